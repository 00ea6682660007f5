"""Loading and mixing images without labels; the configs of docs/unlabelled.md run."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from builders import distilled_config, slow
from docs_blocks import code
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.dataset import BaseDataset, ConcatDataset
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.runner.loops import _InfiniteDataloaderIterator
from mmseg.structures import SegDataSample
from PIL import Image
from torch.utils.data import DataLoader

from mmdist.data import ImageFolder, MarkUnlabelled, MixedSampler

BLOCKS = dict(zip(('seg', 'det'), code('docs/unlabelled.md'), strict=True))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five images in a folder and its subfolders, and a file that is not an image."""
    rng = np.random.default_rng(0)
    for name in ('a/0.png', 'a/1.jpg', 'b/2.png', 'b/3.JPG', '4.png'):
        path = tmp_path / 'images' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = rng.integers(0, 256, (96, 128, 3), dtype=np.uint8)
        path.write_bytes(cv2.imencode(path.suffix, image)[1].tobytes())
    (tmp_path / 'images/readme.txt').write_text('')
    return tmp_path / 'images'


def test_all_images_of_a_folder_are_found(folder, tmp_path):
    data = ImageFolder(str(folder), pipeline=[])
    names = [Path(data.get_data_info(i)['img_path']).name for i in range(len(data))]
    assert names == ['4.png', '0.png', '1.jpg', '2.png', '3.JPG']
    info = data.get_data_info(0)
    assert (info['height'], info['width']) == (96, 128)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='There is no image'):
        ImageFolder(str(tmp_path / 'empty'), pipeline=[])


@pytest.mark.parametrize('color_type', ['color', 'color_ignore_orientation'])
def test_the_size_is_that_of_the_image_as_it_is_loaded(tmp_path, color_type):
    """EXIF data say whether the camera was rotated."""
    exif = Image.Exif()
    exif[274] = 6
    Image.new('RGB', (40, 30)).save(tmp_path / 'a.jpg', exif=exif)
    load = dict(type='LoadImageFromFile', color_type=color_type)
    with DefaultScope.overwrite_default_scope('mmdet'):
        data = ImageFolder(str(tmp_path), pipeline=[load])
    info = data.get_data_info(0)
    assert (info['height'], info['width']) == data[0]['img'].shape[:2]


def test_an_image_that_cannot_be_used_is_left_out_by_name(folder, tmp_path, caplog):
    """At once, not during training, where the error would name no file."""
    odd = tmp_path / 'odd'
    odd.mkdir()
    (odd / 'text.jpg').write_text('not an image')
    for name in ('a/0.png', 'a/1.jpg'):
        whole = (folder / name).read_bytes()
        (odd / f'cut{name[3:]}').write_bytes(whole[: len(whole) // 2])
    Image.new('RGB', (3000, 1)).save(odd / 'thin.png')
    Image.new('L', (20_000, 10_000)).save(odd / 'huge.png')
    names = {path.name for path in odd.iterdir()}
    with pytest.raises(FileNotFoundError) as error:
        ImageFolder(str(odd), pipeline=[])
    assert all(name in str(error.value) for name in names)
    junk = (folder / 'a/1.jpg').read_bytes() + b'what a camera adds'
    (odd / 'junk.jpg').write_bytes(junk)
    MMLogger.get_current_instance().addHandler(caplog.handler)
    data = ImageFolder(str(odd), pipeline=[])
    MMLogger.get_current_instance().removeHandler(caplog.handler)
    assert Path(data.get_data_info(0)['img_path']).name == 'junk.jpg' and len(data) == 1
    text = caplog.text.partition('5 images in')[2]
    assert all(name in text for name in names)


def test_a_mistake_ends_in_a_sentence(folder):
    with pytest.raises(ValueError, match=r"`ImageFolder`: .* 'data_root' is missing"):
        ImageFolder(root=str(folder))
    with (
        DefaultScope.overwrite_default_scope('mmseg'),
        pytest.raises(ValueError, match=r'no labels: remove .*mmdist\.MarkUnlabelled'),
    ):
        ImageFolder(str(folder), pipeline=[dict(type='LoadAnnotations')])


def test_a_loop_of_links_is_read_once(folder):
    (folder / 'a' / 'loop').symlink_to(folder)
    (folder / 'b' / '.hidden.png').write_bytes((folder / '4.png').read_bytes())
    assert len(ImageFolder(str(folder), pipeline=[])) == 5


def test_a_sample_is_marked_and_loses_its_labels():
    inputs = torch.zeros(3, 6, 8)
    for sample in (DetDataSample(), SegDataSample()):
        results = MarkUnlabelled()(dict(inputs=inputs, data_samples=sample))
        assert results['data_samples'].metainfo['unlabelled'] is True
    assert (sample.gt_sem_seg.data == 255).all()
    with pytest.raises(ValueError, match='after `PackDetInputs`'):
        MarkUnlabelled()(dict(img=inputs))


class Numbers(BaseDataset):
    """A data set without files."""

    def __init__(self, size: int) -> None:
        self.size = size
        super().__init__(serialize_data=False)

    def load_data_list(self) -> list[dict]:
        return [dict(number=i) for i in range(self.size)]


def batches(sizes, per_batch, epoch, rank=0, world_size=1, seed=0) -> list[list[int]]:
    sampler = MixedSampler(
        ConcatDataset([Numbers(size) for size in sizes]), per_batch, seed
    )
    sampler.rank, sampler.world_size = rank, world_size
    sampler.batches = -(-sizes[0] // (per_batch[0] * world_size))
    sampler.set_epoch(epoch)
    indices = list(sampler)
    assert len(indices) == len(sampler)
    number = sum(per_batch)
    return [indices[i : i + number] for i in range(0, len(indices), number)]


def test_every_batch_has_its_share_of_each_data_set():
    seen = [b for epoch in range(5) for b in batches((6, 10), (2, 1), epoch)]
    assert len(seen) == 15
    for batch in seen:
        assert sum(i < 6 for i in batch) == 2 and len(batch) == 3
    counts = Counter(i for batch in seen for i in batch)
    # the first is shown once per epoch, the second continues where it stopped
    assert all(counts[i] == 5 for i in range(6))
    assert sorted(counts[i] for i in range(6, 16)) == [1] * 5 + [2] * 5
    first, second = (batches((6, 10), (2, 1), epoch) for epoch in (0, 1))
    assert first != second and first == batches((6, 10), (2, 1), 0)


def test_processes_share_an_epoch():
    ranks = [batches((12, 9), (2, 1), 0, rank, 2) for rank in range(2)]
    assert [len(r) for r in ranks] == [3, 3]
    indices = [i for rank in ranks for batch in rank for i in batch]
    assert sorted(i for i in indices if i < 12) == list(range(12))
    others = [i for i in indices if i >= 12]
    assert len(others) == len(set(others)) == 6


def test_training_by_iterations_goes_on_where_it_was():
    """mmengine restarts and skips what was trained, also beyond the end of an epoch."""

    def indices(skip: int) -> list[list[int]]:
        data = ConcatDataset([Numbers(6), Numbers(10)])
        sampler = MixedSampler(data, (2, 1), seed=0)
        loader = DataLoader(data, batch_size=3, sampler=sampler, collate_fn=list)
        batches = _InfiniteDataloaderIterator(loader)
        return [
            [item['number'] + 6 * (place == 2) for place, item in enumerate(batch)]
            for _, batch in zip(range(8), batches, strict=False)
        ][skip:]

    every = indices(0)
    assert indices(4) == every[4:]
    assert sorted(i for batch in every[:3] for i in batch[:2]) == list(range(6))
    assert sorted(i for batch in every[3:6] for i in batch[:2]) == list(range(6))
    assert len({batch[2] for batch in every}) == 8  # across epochs, none twice


def test_wrong_numbers_are_an_error():
    for numbers in ([1], [0, 1], [1, -1]):
        with pytest.raises(ValueError, match=r'; got sizes \[2, 2\] and'):
            MixedSampler(ConcatDataset([Numbers(2), Numbers(2)]), numbers)
    with pytest.raises(ValueError, match='non-empty data sets'):
        MixedSampler(ConcatDataset([Numbers(2), Numbers(0)]), [1, 1])
    for numbers in ([1, 1], []):
        with pytest.raises(ValueError, match='ConcatDataset'):
            MixedSampler(Numbers(2), numbers)


@pytest.mark.parametrize('family', ['seg', *slow(['det'])])
def test_the_page_trains(family, request, folder, tmp_path):
    """Its config on a tiny student and data, by iterations (seg) or epochs (det)."""
    distilled_config(tmp_path, request.getfixturevalue(f'{family}_config'))
    block = re.sub(r"_base_ = '.*'", "_base_ = './distilled.py'", BLOCKS[family])
    block = re.sub(r'scale=\(\d+, \d+\)', 'scale=(128, 96)', block)
    block = block.replace('_base_.crop_size', '(96, 128)')
    block = block.replace('data/unlabelled', str(folder))
    (tmp_path / 'config.py').write_text(block)
    config = Config.fromfile(tmp_path / 'config.py')
    config.work_dir = str(tmp_path / 'work')
    config.train_dataloader.num_workers = 0
    config.train_cfg.val_interval = 100
    config.train_cfg.update(
        dict(max_iters=3) if family == 'seg' else dict(max_epochs=2)
    )
    runner = Runner.from_cfg(config)
    marks, losses = [], []
    step = runner.model.loss

    def keep(inputs, samples, **kwargs):
        marks.append([bool(s.metainfo.get('unlabelled')) for s in samples])
        losses.append(step(inputs, samples, **kwargs))
        return losses[-1]

    runner.model.loss = keep
    runner.train()
    assert len(marks) >= 2 and all(m == [False, False, True, True] for m in marks)
    assert all(found['loss_dist'].item() > 0 for found in losses)
