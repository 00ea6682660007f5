"""A data set of the images in a folder, without labels."""

from __future__ import annotations

import logging
import os
import os.path as osp
from collections.abc import Iterator

from mmengine.dataset import BaseDataset
from mmengine.logging import print_log
from PIL import Image

from mmdist.lookup import in_words
from mmdist.registry import DATASETS
from mmdist.teachers.class_map import first_few

ORIENTATION = 274  # EXIF tag; values above 4 swap width and height
MAX_ASPECT = 100
ENDS = dict(JPEG=b'\xff\xd9', PNG=b'IEND\xaeB`\x82')


@DATASETS.register_module()
@in_words
class ImageFolder(BaseDataset):
    """All images of a folder and its subfolders, for mmdet's and mmseg's pipelines.

    Its pipeline loads no annotations and ends with :class:`MarkUnlabelled`. Damaged
    files, and images with an aspect ratio above 100, are left out with a warning.

    Args:
        data_root: The folder.
        suffixes: File suffixes of images.
        kwargs: Arguments of mmengine's ``BaseDataset``: ``pipeline``, ``metainfo``, ...

    Raises:
        FileNotFoundError: The folder contains no usable image.
        ValueError: The pipeline loads label maps.
    """

    def __init__(
        self,
        data_root: str,
        suffixes: tuple[str, ...] = ('.jpg', '.jpeg', '.png', '.bmp', '.webp'),
        **kwargs,
    ) -> None:
        self.suffixes = tuple(suffixes)
        super().__init__(ann_file='', data_root=data_root, **kwargs)
        # mmdet's LoadAnnotations loads what is there, which is nothing
        steps = {type(step) for step in self.pipeline.transforms}
        if any(x.__name__ == 'LoadAnnotations' and 'mmseg' in str(x) for x in steps):
            raise ValueError(
                'The images of mmdist.ImageFolder have no labels: remove '
                'LoadAnnotations from its `pipeline`, and end it with '
                "dict(type='mmdist.MarkUnlabelled')."
            )

    def load_data_list(self) -> list[dict]:
        """Find the path and the size in pixels of each image, sorted by path."""
        data, left_out = [], []
        for path in sorted(self._paths()):
            try:
                width, height = self._size(path)
            except Exception as error:  # PIL raises any kind
                left_out.append(f'{path} ({error})')
                continue
            info = dict(img_path=path, img_id=len(data), width=width, height=height)
            # mmseg's transforms expect these two
            data.append(dict(info, seg_fields=[], reduce_zero_label=False))
        names = first_few(left_out, 5)
        if not data:
            raise FileNotFoundError(
                f'There is no image ({", ".join(self.suffixes)}) in {self.data_root}'
                + (f' that can be used: {names}.' if left_out else '.')
            )
        if left_out:
            print_log(
                f'mmdist: {len(left_out)} images in {self.data_root} cannot be used '
                f'and are skipped; delete them, or save them again: {names}.',
                'current',
                logging.WARNING,
            )
        return data

    def _size(self, path: str) -> tuple[int, int]:
        """Return width and height of an image as loaded; raise if it cannot be used.

        Only the header is read, unless a JPEG or PNG file lacks its end marker.
        """
        with Image.open(path) as image:
            width, height = image.size
            # PNG's own `getexif` decodes the image
            exif = Image.Image.getexif(image) if self._loads_upright() else {}
            if not _ends_well(path, image.format):
                image.load()
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise ValueError(f'{width} x {height} pixels: too narrow to be resized')
        return (height, width) if exif.get(ORIENTATION, 1) > 4 else (width, height)

    def _paths(self) -> Iterator[str]:
        seen = set()  # a link can lead back to a parent folder
        for folder, subfolders, names in os.walk(self.data_root, followlinks=True):
            if osp.realpath(folder) in seen:
                subfolders.clear()
                continue
            seen.add(osp.realpath(folder))
            for name in names:
                path = osp.join(folder, name)
                is_image = name.lower().endswith(self.suffixes)
                if is_image and not name.startswith('.') and osp.isfile(path):
                    yield path

    def _loads_upright(self) -> bool:
        """Whether the pipeline rotates images by their EXIF data, mmcv's default."""
        flags = [getattr(t, 'color_type', None) for t in self.pipeline.transforms]
        flag = next(filter(None, flags), 'color')
        return flag != 'unchanged' and not flag.endswith('ignore_orientation')


def _ends_well(path: str, image_format: str) -> bool:
    end = ENDS.get(image_format, b'')
    with open(path, 'rb') as file:
        file.seek(-len(end), os.SEEK_END)
        return file.read() == end or not end
