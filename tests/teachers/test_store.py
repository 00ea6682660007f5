"""Stored answers are exact, checked strictly, and survive crashes and full disks."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import in_process, start

from mmdist.teachers.store import Store, StoreWriter

CLASSES = ('cat', 'dog', 'cow')
MANIFEST = dict(kind='boxes', class_names=CLASSES, teachers=[dict(checkpoint='a.pth')])
NAN = float('nan')


def some_boxes(seed: int, number: int = 5) -> torch.Tensor:
    """Rows of x1 y1 x2 y2 score label."""
    rows = torch.rand(number, 6, generator=torch.Generator().manual_seed(seed))
    rows[:, 2:4] += rows[:, :2]
    rows[:, 5] = (rows[:, 5] * 3).floor()
    return rows


def some_map(seed: int) -> torch.Tensor:
    """Probabilities times 255."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, 4, 6), generator=generator, dtype=torch.uint8)


def image(i: int, **more) -> dict:
    return dict(img_path=f'/data/train/{i}.jpg', **more)


def images(number: int) -> list[dict]:
    return [image(i, height=480, width=640 + i) for i in range(number)]


def add(writer: StoreWriter, i: int, kind: str = 'boxes') -> None:
    # storing rounds the values
    scores = (some_map(i) - 0.4).clamp(min=0) / 255
    answer = some_boxes(i) if kind == 'boxes' else scores
    writer.add(image(i)['img_path'], (480, 640 + i), answer)


def write(folder: Path, number: int = 4, kind: str = 'boxes') -> Path:
    """Write a store of ``number`` images."""
    writer = StoreWriter(folder, dict(MANIFEST, kind=kind))
    for i in range(number):
        add(writer, i, kind)
    return folder


def assert_holds(store: Store, images: Iterable[int], kind: str = 'boxes') -> None:
    """Check the answers that :func:`add` gave for these images, to the bit."""
    expected = dict(boxes=some_boxes, maps=some_map)[kind]
    for i in images:
        assert torch.equal(store.answer(image(i)), expected(i))


@pytest.mark.parametrize('kind', ['boxes', 'maps'])
def test_answers_are_stored_to_the_bit(tmp_path, kind):
    store = Store(write(tmp_path, kind=kind))
    assert (store.kind, store.class_names, store.is_by_id) == (kind, CLASSES, False)
    assert 'a.pth' in store.origin
    store.check(images(4))
    assert_holds(store, range(4), kind)
    assert store.key(image(5)) is None


def test_images_without_boxes_have_an_answer(tmp_path):
    writer = StoreWriter(tmp_path, MANIFEST)
    writer.add('/a/1.jpg', (4, 6), torch.zeros(0, 6))
    for number in (0, 5):
        store = Store(tmp_path)
        assert store.answer(dict(img_path='/a/1.jpg')).shape == (0, 6)
        writer.add('/a/2.jpg', (4, 6), some_boxes(0, number))
    assert len(Store(tmp_path).answer(dict(img_path='/a/2.jpg'))) == 5


def test_images_are_found_where_the_data_were_moved(tmp_path, monkeypatch):
    names = ('train/a/1.jpg', 'train/b/1.jpg', 'extra/1.jpg')
    writer = StoreWriter(tmp_path / 'a', MANIFEST)
    for i, name in enumerate(names):
        writer.add(f'/data/coco/{name}', (4, 6), some_boxes(i))
    store = Store(tmp_path / 'a')
    monkeypatch.chdir(tmp_path)  # relative paths start here
    for root in ('/data/coco', '/ssd/coco', 'coco'):
        for i, name in enumerate(names):
            found = store.answer(dict(img_path=f'{root}/{name}'))
            assert torch.equal(found, some_boxes(i))
    # another image can have the same name
    for other in ('val/1.jpg', 'train/c/1.jpg', 'b/1.jpg', '1.jpg'):
        assert store.key(dict(img_path=f'/ssd/coco/{other}')) is None
    assert store.key({}) is None


# ---- damage --------------------------------------------------------------------------


def damage(part: str, change):
    """A function that changes a file of a store."""

    def harm(folder: Path) -> None:
        (folder / part).write_bytes(change((folder / part).read_bytes()))

    return harm


def answer(*row: float):
    """A function that replaces the first box of the second image."""
    row = np.array(row, '<f4').tobytes()
    return damage('part-0-0.bin', lambda x: x[:120] + row + x[144:])


LINES = 'part-0-0.jsonl'


@pytest.mark.parametrize(
    ('harm', 'words'),
    {
        'no manifest': (lambda x: (x / 'manifest.json').unlink(), 'has no manifest'),
        'version': (
            damage('manifest.json', lambda x: x.replace(b'version 2', b'version 9')),
            "damaged or not a .*version 2': store it again",
        ),
        'garbage': (damage('manifest.json', lambda x: x[:-9]), 'damaged'),
        'other classes': (
            damage('manifest.json', lambda x: x.replace(b'"cow"', b'"cow", "bee"')),
            'is damaged',
        ),
        'no JSON': (damage(LINES, lambda x: x[5:]), '0.jsonl is damaged'),
        'no answer': (damage(LINES, lambda x: b'{}\n' + x), "damaged: b'{}'... is not"),
        'shape': (damage(LINES, lambda x: x.replace(b'6]', b'5]')), 'jsonl is damaged'),
        'start': (damage(LINES, lambda x: x.replace(b': 0}', b': -9}')), 'is damaged'),
        'place': (damage(LINES, lambda x: x.replace(b': 0}', b': 0.5}')), 'is damaged'),
        'NaN': (answer(0, NAN, 1, 1, 0.5, 0), 'NaN or infinite.*in .*train/1.jpg.$'),
        'negative': (answer(5, 0, 1, 1, 0.5, 0), 'negative size, in .*train/1.jpg.$'),
        'score': (answer(0, 0, 1, 1, 1.5, 0), 'not between 0 and 1, in .*/1.jpg.$'),
        'NaN score': (answer(0, 0, 1, 1, NAN, 0), 'not between 0 and 1, in .*/1.jpg.$'),
        'label': (answer(0, 0, 1, 1, 0.5, 3), 'belong to no class, in .*/1.jpg.$'),
        'no index': (answer(0, 0, 1, 1, 0.5, 0.5), 'that belong to no class, in '),
    }.values(),
)  # fmt: skip
def test_what_is_damaged_is_refused_in_words(tmp_path, harm, words):
    harm(write(tmp_path, kind='maps' if words == 'is damaged' else 'boxes'))
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        Store(tmp_path)


@pytest.mark.parametrize('kind', ['boxes', 'maps'])
@pytest.mark.parametrize(
    ('harm', 'lost'),
    [
        (damage(LINES, lambda x: x[:-3]), [3]),
        (damage(LINES, lambda x: x[: -len(x) // 2]), [2, 3]),
        (damage('part-0-0.bin', lambda x: x[:-1]), [3]),
        (damage('part-0-0.bin', lambda x: x[: len(x) // 3]), [1, 2, 3]),
        (lambda x: (x / 'part-0-0.bin').unlink(), [0, 1, 2, 3]),
        (lambda x: (x / LINES).unlink(), [0, 1, 2, 3]),
    ],
)
def test_what_is_cut_off_is_named_and_asked_again(tmp_path, kind, harm, lost):
    harm(write(tmp_path, kind=kind))
    names = ', '.join(f'/data/train/{i}.jpg' for i in lost)
    words = f'{len(lost)} of 4 training images have no answer: {names}.*again'
    with pytest.raises(ValueError, match=words):
        Store(tmp_path).check(images(4))
    writer = StoreWriter(tmp_path, dict(MANIFEST, kind=kind))
    left = [i for i in range(4) if image(i)['img_path'] not in writer.done]
    assert left == lost
    for i in left:
        add(writer, i, kind)
    assert_holds(Store(tmp_path), range(4), kind)


def test_another_size_is_named(tmp_path):
    store = Store(write(tmp_path))
    other = [image(0, height=640, width=480), *images(4)[1:]]
    words = r'height x width .*/train/0.jpg \(640 x 480, was 480 x 640\)\. Store'
    with pytest.raises(ValueError, match=words):
        store.check(other)
    with pytest.raises(ValueError, match=words):
        store.answer(other[0])
    store.check([image(0), image(1, height=None, width=None)])  # unknown size
    with pytest.raises(ValueError, match=r'/8\.jpg, .*/12\.jpg and 2 more\. Ask'):
        store.check(images(15)[8:])


# ---- writers -------------------------------------------------------------------------


def test_another_command_is_refused(tmp_path):
    def manifest(path, **options):
        teacher = dict(checkpoint=path, weights_sha256='1f', views=[[1.0, False]])
        return dict(MANIFEST, teachers=[{**teacher, **options}])

    StoreWriter(tmp_path, manifest('a.pth'))._lock.close()
    StoreWriter(tmp_path, manifest('b.pth'))._lock.close()  # the file was moved
    for options, where in (
        (dict(weights_sha256='2e'), r"\[0\]\['weights_sha256'\] is '1f', .* '2e'"),
        (dict(views=[[1.0, True]]), r"\[0\]\['views'\]\[0\]\[1\] is False, .* True"),
        (dict(views=[]), r"\[0\]\['views'\]\[0\]\[0\] is 1.0, .* None"),
    ):
        for process in (0, 1):
            with pytest.raises(ValueError, match=r"manifest\['teachers'\]" + where):
                StoreWriter(tmp_path, manifest('b.pth', **options), process)


def test_a_second_writer_is_refused(tmp_path):
    first = StoreWriter(tmp_path, MANIFEST)
    with pytest.raises(ValueError, match='Another command is writing'):
        StoreWriter(tmp_path, MANIFEST)
    StoreWriter(tmp_path, MANIFEST, process=1)  # of the same command
    first._lock.close()
    StoreWriter(tmp_path, MANIFEST)


def test_several_processes_write_one_store(tmp_path):
    writers = [StoreWriter(tmp_path, MANIFEST, i) for i in range(2)]
    for i in range(4):
        add(writers[i % 2], i)
    assert_holds(Store(tmp_path), range(4))


def write_for_ever(folder: Path) -> None:
    writer = StoreWriter(folder, MANIFEST)
    for i in range(10**9):
        add(writer, i)


def test_a_killed_writer_loses_nothing_and_blocks_nobody(tmp_path):
    process, part = start(write_for_ever, tmp_path), tmp_path / LINES
    while not (part.exists() and part.read_bytes().count(b'\n') > 20):
        assert process.is_alive()
        time.sleep(0.05)
    with pytest.raises(ValueError, match='Another command is writing'):
        StoreWriter(tmp_path, MANIFEST)
    process.kill()
    process.join()
    with part.open('ab') as file:  # as if it had been killed within a line
        file.write(b'{"file": "/data/')
    writer = StoreWriter(tmp_path, MANIFEST)
    number = len(writer.done)
    assert number > 20
    assert writer.done == {image(i)['img_path'] for i in range(number)}
    add(writer, number)
    assert_holds(Store(tmp_path), range(number + 1))


def write_until_it_is_full(folder: Path, kind: str) -> tuple[int, str]:
    writer = StoreWriter(folder, dict(MANIFEST, kind=kind))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    for i in range(100):
        try:
            add(writer, i, kind)
        except OSError as error:
            return i, str(error)
    return 100, 'no error'


@pytest.mark.parametrize('kind', ['boxes', 'maps'])
def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path, kind):
    number, said = in_process(write_until_it_is_full, tmp_path, kind)
    assert 3 < number < 100
    assert 'File too large. The answers so far are kept. Free some space. Run' in said
    writer = StoreWriter(tmp_path, dict(MANIFEST, kind=kind))
    assert writer.done == {image(i)['img_path'] for i in range(number)}
    Store(tmp_path).check(images(number))


def test_a_writer_may_go_on_after_a_failure(tmp_path, monkeypatch):
    writer = StoreWriter(tmp_path, MANIFEST)
    add(writer, 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', lambda file: os.write(-1, b''))
        with pytest.raises(OSError, match='cannot be written: Bad file descriptor'):
            add(writer, 1)
    add(writer, 2)
    store = Store(tmp_path)
    assert_holds(store, (0, 2))
    assert store.key(image(1)) is None


def test_nan_is_not_stored(tmp_path):
    for kind, size in dict(boxes=(1, 6), maps=(3, 2, 2)).items():
        writer = StoreWriter(tmp_path / kind, dict(MANIFEST, kind=kind))
        with pytest.raises(ValueError, match=r'/a/1\.jpg contains NaN'):
            writer.add('/a/1.jpg', (4, 6), torch.full(size, NAN))
        assert not (tmp_path / kind / LINES).read_bytes()


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
    store.name_classes({1: 'cat', 2: 'dog', 3: 'cow'})  # twice is fine
    assert store.class_names == CLASSES
    found = store.answer(dict(img_id=7, img_path='x.jpg', height=4, width=6))
    assert found.tolist() == [[1, 2, 4, 6, 0.25, 2], [1, 2, 4, 6, 0.5, 0]]
    assert store.answer(dict(img_id=5)).tolist() == [[0, 0, 2.5, 2, 0.5, 0]]
    assert store.key(dict(img_id=6)) is None
    assert store.answer(dict(img_id=6)).shape == (0, 6)


def test_where_nothing_was_found_there_is_no_entry(tmp_path):
    store = Store(results(tmp_path, [entry(i, 1) for i in range(2)]))
    store.check(dict(img_id=i) for i in range(4))
    with pytest.raises(ValueError, match=r'answer: 2, 3, 4\. Ask .* of them\.$'):
        store.check(dict(img_id=i) for i in range(5))


def test_an_empty_results_file(tmp_path):
    store = Store(results(tmp_path, []))
    store.name_classes({1: 'cat'})
    assert (store.class_names, store.key(dict(img_id=1))) == (('cat',), None)


def test_unknown_category_ids_are_named(tmp_path):
    store = Store(results(tmp_path, [entry(1, i) for i in range(90)]))
    words = 'category ids 3, 4, 5, 6, 7 and 82 more.*annotation file has 0, 1, 2'
    with pytest.raises(ValueError, match=words):
        store.name_classes({0: 'a', 1: 'b', 2: 'c'})


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        ('', 'is cut off or not a COCO results file .*: Expecting value'),
        (json.dumps([entry(1, 1)] * 3)[:-20], 'is cut off or .*: Expecting'),
        (dict(images=[dict(id=3)]), 'not a COCO results file .*contains images'),
        ('5', 'not a COCO results file of boxes'),
        ([entry(1, 1), 5], 'not a COCO results file of boxes.*contains 5'),
        ([entry(1, 1), dict(entry(1, 2), bbox=[1, 2, 3])], r'contains .*\[1, 2, 3\]'),
        ([dict(image_id=1, category_id=1, score=1, segmentation='a')], "contains.*'a'"),
        ([entry(1, 'cat')], "contains .*'cat'"),
        ([entry([1], 1)], r"contains .*'image_id': \[1\]"),
        ([entry(1, 1, (1, 2, NAN, 1)), entry(8, 1)], 'NaN or infinite numbers, in 1'),
        ([entry(i, 1, (1, 2, -1, 1)) for i in range(9)], 'in 0, 1, 2, 3, 4 and 4 more'),
        ([entry(3, 1, score=7)], 'scores that are not between 0 and 1, in 3'),
    ],
)  # fmt: skip
def test_no_results_of_boxes_are_refused_in_words(tmp_path, content, words):
    with pytest.raises(ValueError, match=words):
        Store(results(tmp_path, content))


def test_many_boxes_are_read_in_seconds(tmp_path):
    """20,000 images with 50 boxes each; COCO has 118,000 images."""
    writer = StoreWriter(tmp_path, MANIFEST)
    writer.add('/data/train/0.jpg', (4, 6), some_boxes(0, 50))
    line, rows = ((tmp_path / f'part-0-0.{x}').read_bytes() for x in ('jsonl', 'bin'))
    lines = [
        line.replace(b'train/0', b'train/%d' % i).replace(
            b': 0}', b': %d}' % (i * 1200)
        )
        for i in range(20_000)
    ]
    (tmp_path / LINES).write_bytes(b''.join(lines))
    (tmp_path / 'part-0-0.bin').write_bytes(rows * 20_000)
    before = time.process_time()
    store = Store(tmp_path)
    assert time.process_time() - before < 2
    assert store._rows.shape == (1_000_000, 6)
