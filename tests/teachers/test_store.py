"""The stored answers of a teacher: exact, strict, and whole whatever happens."""

from __future__ import annotations

import base64
import json
import re
import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import in_process, start

from mmdist.teachers.store import Store
from mmdist.teachers.store_writer import StoreWriter

CLASSES = ('cat', 'dog', 'cow')
MANIFEST = dict(kind='boxes', class_names=CLASSES, teachers=[dict(checkpoint='a.pth')])
ROOT = '/data/coco'


def some_boxes(seed: int, number: int = 5) -> torch.Tensor:
    """Rows of x1 y1 x2 y2 score label."""
    rows = torch.rand(number, 6, generator=torch.Generator().manual_seed(seed))
    rows[:, 2:4] += rows[:, :2]
    rows[:, 5] = (rows[:, 5] * 3).floor()
    return rows


def some_map(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, 4, 6), generator=generator, dtype=torch.uint8)


def write(folder: Path, number: int = 4, kind: str = 'boxes') -> Path:
    """A store of so many images."""
    answer = some_boxes if kind == 'boxes' else some_map
    writer = StoreWriter(folder, dict(MANIFEST, kind=kind, images=number))
    for i in range(number):
        writer.add(f'{ROOT}/train/{i}.jpg', (480, 640 + i), answer(i))
    assert writer.complete() == number
    return folder


def key_of(store: Store, path: str) -> str | None:
    return store.key(dict(img_path=path))


def test_boxes_are_stored_to_the_bit(tmp_path):
    store = Store(write(tmp_path / 'a'))
    assert (store.kind, store.class_names, store.is_by_id) == ('boxes', CLASSES, False)
    assert 'a.pth' in store.origin
    for i in range(4):
        key = key_of(store, f'{ROOT}/train/{i}.jpg')
        boxes, scores, labels = store.boxes(key)
        rows = some_boxes(i)
        assert torch.equal(boxes, rows[:, :4])
        assert torch.equal(scores, rows[:, 4])
        assert torch.equal(labels, rows[:, 5].long())
        assert store.size(key) == (480, 640 + i)
    assert key_of(store, f'{ROOT}/train/5.jpg') is None


def test_images_without_boxes_have_an_answer(tmp_path):
    writer = StoreWriter(tmp_path, dict(MANIFEST, images=2))
    writer.add('/a/1.jpg', (4, 6), torch.zeros(0, 6))
    writer.add('/a/2.jpg', (4, 6), some_boxes(0))
    writer.complete()
    store = Store(tmp_path)
    boxes, scores, labels = store.boxes(key_of(store, '/a/1.jpg'))
    assert (boxes.shape, scores.shape, labels.shape) == ((0, 4), (0,), (0,))
    assert len(store.boxes(key_of(store, '/a/2.jpg'))[0]) == 5


def test_maps_are_stored_to_the_bit(tmp_path):
    store = Store(write(tmp_path, kind='maps'))
    assert store.kind == 'maps'
    for i in range(4):
        assert torch.equal(
            store.map(key_of(store, f'{ROOT}/train/{i}.jpg')), some_map(i)
        )


def test_images_are_found_where_the_data_were_moved(tmp_path, monkeypatch):
    writer = StoreWriter(tmp_path / 'a', dict(MANIFEST, images=3))
    for name in ('train/a/1.jpg', 'train/b/1.jpg', 'extra/1.jpg'):
        writer.add(f'{ROOT}/{name}', (4, 6), some_boxes(0))
    writer.complete()
    store = Store(tmp_path / 'a')
    assert key_of(store, '/ssd/coco/train/b/1.jpg') == f'{ROOT}/train/b/1.jpg'
    assert key_of(store, '/ssd/coco/extra/1.jpg') == f'{ROOT}/extra/1.jpg'
    # another image may have the same name
    for other in ('val/1.jpg', 'train/c/1.jpg', 'b/1.jpg', '1.jpg'):
        assert key_of(store, f'/ssd/coco/{other}') is None
    monkeypatch.chdir(tmp_path)  # a relative path counts from here
    assert key_of(store, 'coco/train/a/1.jpg') == f'{ROOT}/train/a/1.jpg'
    assert store.key({}) is None


def rewrite(file: Path, change) -> None:
    file.write_bytes(change(file.read_bytes()))


def damage(part: str, change):
    """Change a file of a store."""
    return lambda folder: rewrite(next(folder.glob(part)), change)


def answer(row: list[float]):
    """Another box in the second image."""
    boxes = base64.b64encode(np.array([row], '<f4').tobytes())

    def change(part: bytes) -> bytes:
        first, second, *rest = part.splitlines(keepends=True)
        second = re.sub(rb'"boxes": ".*"', b'"boxes": "%s"' % boxes, second)
        return b''.join([first, second, *rest])

    return damage('part-0.jsonl', change)


NAN = float('nan')


@pytest.mark.parametrize(
    ('harm', 'words'),
    {
        'no manifest': (lambda x: (x / 'manifest.json').unlink(), 'has no manifest'),
        'version': (
            damage('manifest.json', lambda x: x.replace(b'n": 1', b'n": 9')),
            "'version': 9.*store the teacher again",
        ),
        'garbage': (damage('manifest.json', lambda x: x[:-9]), 'damaged'),
        'incomplete': (
            damage('manifest.json', lambda x: x.replace(b'true', b'false')),
            'answers for 4 of 4 images: it is being written, was interrupted',
        ),
        'lost line': (
            damage('part-0.jsonl', lambda x: x[x.index(b'\n') + 1 :]),
            'answers for 3 of 4 images.*store_teacher.py again',
        ),
        'torn line': (damage('part-0.jsonl', lambda x: x[:-3]), 'ends within a line'),
        'no JSON': (damage('part-0.jsonl', lambda x: x[5:]), 'part-0.jsonl is damaged'),
        'cut boxes': (
            damage('part-0.jsonl', lambda x: x.replace(b'"boxes": "', b'"boxes": "AA')),
            'part-0.jsonl is damaged',
        ),
        'NaN': (answer([0, NAN, 1, 1, 0.5, 0]), 'NaN or infinite.*/train/1.jpg'),
        'negative': (answer([5, 0, 1, 1, 0.5, 0]), 'negative size, in .*/train/1.jpg'),
        'score': (answer([0, 0, 1, 1, 1.5, 0]), 'not between 0 and 1, in .*/1.jpg'),
        'NaN score': (answer([0, 0, 1, 1, NAN, 0]), 'not between 0 and 1, in .*/1.jpg'),
        'label': (answer([0, 0, 1, 1, 0.5, 3]), 'labels that are no class, in .*1.jpg'),
    }.values(),
)  # fmt: skip
def test_what_is_damaged_is_refused_in_words(tmp_path, harm, words):
    harm(write(tmp_path))
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        Store(tmp_path)


def test_a_map_is_never_read_from_outside(tmp_path):
    part = write(tmp_path / 'store', kind='maps') / 'part-0.jsonl'
    entries = [json.loads(line) for line in part.read_text().splitlines()]
    inside = tmp_path / 'store/maps' / entries[0]['map']
    inside.rename(tmp_path / 'store' / inside.name)
    entries[0]['map'] = f'../{inside.name}'
    part.write_text(''.join(f'{json.dumps(x)}\n' for x in entries))
    with pytest.raises(ValueError, match='1 of 4 files are missing'):
        Store(tmp_path / 'store')


@pytest.mark.parametrize('harm', [Path.unlink, lambda x: rewrite(x, lambda y: y[:-1])])
def test_maps_that_are_cut_off_are_named(tmp_path, harm):
    files = sorted((write(tmp_path, kind='maps') / 'maps').iterdir())
    for file in files[:2]:
        harm(file)
    with pytest.raises(
        ValueError, match='2 of 4 files are missing or cut off'
    ) as raised:
        Store(tmp_path)
    assert all(
        (file.name in str(raised.value)) == (file in files[:2]) for file in files
    )


@pytest.mark.parametrize(
    ('other', 'words'),
    [
        (np.zeros((2, 6, 6), np.uint8), '3 classes that was stored: it has 2 classes'),
        (np.zeros((3, 4, 6), np.int8), 'its type int8'),
        (np.zeros((12, 6), np.uint8), r'its shape is \(12, 6\)'),
        (np.array([1, 'a'], object), 'was stored: .*Python objects'),
    ],
)
def test_a_map_that_is_another_one_is_refused(tmp_path, other, words):
    write(tmp_path, 1, kind='maps')
    store = Store(tmp_path)
    (file,) = (tmp_path / 'maps').iterdir()
    np.save(file, other, allow_pickle=True)
    with pytest.raises(ValueError, match=words):
        store.map(f'{ROOT}/train/0.jpg')


def test_another_command_is_refused(tmp_path):
    write(tmp_path)
    other = dict(MANIFEST, images=4, teachers=[dict(checkpoint='b.pth')])
    with pytest.raises(
        ValueError, match=r'begun by another .*`teachers`.*a.pth.*b.pth'
    ):
        StoreWriter(tmp_path, other)
    # more images are the same command
    assert len(StoreWriter(tmp_path, dict(MANIFEST, images=9)).done) == 4


def test_a_second_writer_is_refused(tmp_path):
    first = StoreWriter(tmp_path, dict(MANIFEST, images=4))
    with pytest.raises(ValueError, match='Another command is writing'):
        StoreWriter(tmp_path, dict(MANIFEST, images=4))
    StoreWriter(tmp_path, dict(MANIFEST, images=4), process=1)  # of the same command
    first._lock.close()
    StoreWriter(tmp_path, dict(MANIFEST, images=4))


def test_several_processes_write_one_store(tmp_path):
    writers = [StoreWriter(tmp_path, dict(MANIFEST, images=4), i) for i in range(2)]
    for i in range(4):
        writers[i % 2].add(f'/a/{i}.jpg', (4, 6), some_boxes(i))
    assert writers[0].complete() == 4
    store = Store(tmp_path)
    for i in range(4):
        assert torch.equal(store.boxes(f'/a/{i}.jpg')[0], some_boxes(i)[:, :4])


def write_for_ever(folder: Path) -> None:
    writer = StoreWriter(folder, dict(MANIFEST, images=10**9))
    for i in range(10**9):
        writer.add(f'/a/{i}.jpg', (4, 6), some_boxes(i))


def test_a_killed_writer_loses_nothing_and_blocks_nobody(tmp_path):
    process, part = start(write_for_ever, tmp_path), tmp_path / 'part-0.jsonl'
    while not (part.exists() and part.read_bytes().count(b'\n') > 20):
        assert process.is_alive()
        time.sleep(0.05)
    with pytest.raises(ValueError, match='Another command is writing'):
        StoreWriter(tmp_path, dict(MANIFEST, images=1))
    process.kill()
    process.join()
    with part.open('ab') as file:  # as if it had been killed within a line
        file.write(b'{"file": "/a/')
    with pytest.raises(ValueError, match='ends within a line'):
        Store(tmp_path)
    writer = StoreWriter(tmp_path, dict(MANIFEST, images=1))
    number = len(writer.done)
    assert number > 20
    assert writer.done == {f'/a/{i}.jpg' for i in range(number)}
    with pytest.raises(ValueError, match=f'answers for {number} of 1 images'):
        Store(tmp_path)
    writer.add(f'/a/{number}.jpg', (4, 6), some_boxes(number))
    writer.complete()
    store = Store(tmp_path)
    for i in range(number + 1):
        assert torch.equal(store.boxes(f'/a/{i}.jpg')[0], some_boxes(i)[:, :4])


def write_until_it_is_full(folder: Path, kind: str) -> tuple[int, str]:
    writer = StoreWriter(folder, dict(MANIFEST, kind=kind, images=1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    for i in range(100):
        large = torch.zeros(3, 30, 30 if i > 5 else 2, dtype=torch.uint8)
        try:
            writer.add(
                f'/a/{i}.jpg', (4, 6), some_boxes(i) if kind == 'boxes' else large
            )
        except OSError as error:
            return i, str(error)
    return 100, 'no error'


@pytest.mark.parametrize('kind', ['boxes', 'maps'])
def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path, kind):
    number, said = in_process(write_until_it_is_full, tmp_path, kind)
    assert 3 < number < 100
    assert 'File too large. What is stored is kept. Make room. Run' in said
    writer = StoreWriter(tmp_path, dict(MANIFEST, kind=kind, images=1))
    assert writer.done == {f'/a/{i}.jpg' for i in range(number)}
    assert writer.complete() == number
    assert set(Store(tmp_path)._of) == writer.done


def test_nan_is_not_stored(tmp_path):
    writer = StoreWriter(tmp_path, dict(MANIFEST, images=1))
    with pytest.raises(ValueError, match=r'/a/1\.jpg with NaN'):
        writer.add('/a/1.jpg', (4, 6), torch.full((1, 6), NAN))
    assert not (tmp_path / 'part-0.jsonl').read_bytes()


# ---- COCO results files --------------------------------------------------------------


def entry(image: int, category: int, box=(1, 2, 3, 4), score=0.5, **more) -> dict:
    return dict(
        image_id=image, bbox=list(box), score=score, category_id=category, **more
    )


def results(folder: Path, content) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / 'results.bbox.json').write_text(text)
    return folder / 'results.bbox.json'


def test_a_coco_results_file(tmp_path):
    mask = dict(size=[4, 6], counts='a}b')  # detectron2 writes both in one entry
    found = [
        entry(7, 3, score=0.25),
        entry(5, 1, (0, 0, 2.5, 2), segmentation=mask),
        entry(7, 1),
    ]
    store = Store(results(tmp_path, found))
    assert (store.kind, store.is_by_id, store.class_names) == ('boxes', True, None)
    store.name_classes({1: 'cat', 2: 'dog', 3: 'cow'})
    store.name_classes({1: 'cat', 2: 'dog', 3: 'cow'})  # it may be told twice
    assert store.class_names == CLASSES
    boxes, scores, labels = store.boxes(store.key(dict(img_id=7, img_path='x.jpg')))
    assert boxes.tolist() == [[1, 2, 4, 6], [1, 2, 4, 6]]
    assert (scores.tolist(), labels.tolist()) == ([0.25, 0.5], [2, 0])
    assert store.boxes(5)[0].tolist() == [[0, 0, 2.5, 2]]
    assert store.size(7) is None
    assert store.key(dict(img_id=6)) is None


def test_an_empty_results_file(tmp_path):
    store = Store(results(tmp_path, []))
    store.name_classes({1: 'cat'})
    assert (store.class_names, store.key(dict(img_id=1))) == (('cat',), None)


def test_unknown_category_ids_are_named(tmp_path):
    store = Store(results(tmp_path, [entry(1, i) for i in range(90)]))
    words = 'category ids 3, 4, 5, 6, 7 and 82 more.*annotation file knows 0, 1, 2'
    with pytest.raises(ValueError, match=words):
        store.name_classes({0: 'a', 1: 'b', 2: 'c'})


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        ('', 'is no COCO results file, or is cut off'),
        (json.dumps([entry(1, 1)] * 3)[:-20], 'is no COCO results file, or is cut off'),
        (dict(images=[dict(id=3)]), "no COCO results file of boxes.*it has {'id': 3}"),
        ([entry(1, 1), 5], 'is no COCO results file of boxes'),
        ([entry(1, 1), dict(entry(1, 2), bbox=[1, 2, 3])], r'it has .*\[1, 2, 3\]'),
        ([dict(image_id=1, category_id=1, score=1, segmentation='a')], "it has .*'a'"),
        ([entry(1, 'cat')], "it has .*'cat'"),
        ([entry(1, 1, (1, 2, NAN, 1)), entry(8, 1)], 'NaN or infinite numbers, in 1'),
        ([entry(i, 1, (1, 2, -1, 1)) for i in range(9)], 'in 0, 1, 2, 3, 4 and 4 more'),
        ([entry(3, 1, score=7)], 'scores that are not between 0 and 1, in 3'),
    ],
)  # fmt: skip
def test_no_results_of_boxes_are_refused_in_words(tmp_path, content, words):
    with pytest.raises(ValueError, match=words):
        Store(results(tmp_path, content))


def test_a_path_that_is_not_there():
    with pytest.raises(FileNotFoundError, match='nowhere is not there'):
        Store('nowhere')


def test_many_boxes_are_read_in_seconds(tmp_path):
    """20,000 images with 50 boxes; COCO has 118,000."""
    folder = write(tmp_path, 1)
    line = (folder / 'part-0.jsonl').read_text()
    boxes = re.search('"boxes": "(.*)"', line)[1]
    lines = [
        line.replace('train/0', f'train/{i}').replace(boxes, boxes[:160] * 10)
        for i in range(20_000)
    ]
    (folder / 'part-0.jsonl').write_text(''.join(lines))
    rewrite(
        folder / 'manifest.json',
        lambda x: x.replace(b'"images": 1', b'"images": 20000'),
    )
    before = time.process_time()
    store = Store(folder)
    assert time.process_time() - before < 2
    assert store._boxes.shape == (1_000_000, 4)
