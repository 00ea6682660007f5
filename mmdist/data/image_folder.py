"""Images of a folder, without labels."""

from __future__ import annotations

import os
import os.path as osp
from collections.abc import Iterator

from mmengine.dataset import BaseDataset
from PIL import Image

from mmdist.registry import DATASETS

ORIENTATION = 274  # in EXIF data; above 4 width and height are exchanged


@DATASETS.register_module()
class ImageFolder(BaseDataset):
    """All images of a folder and its subfolders, for mmdet's and mmseg's pipelines.

    Its pipeline loads no annotations and ends with :class:`MarkUnlabelled`.

    Args:
        data_root: The folder.
        suffixes: Suffixes of the images.
        kwargs: As for mmengine's ``BaseDataset``: ``pipeline``, ``metainfo``, ...

    Raises:
        FileNotFoundError: It holds no image.
    """

    def __init__(
        self,
        data_root: str,
        suffixes: tuple[str, ...] = ('.jpg', '.jpeg', '.png', '.bmp', '.webp'),
        **kwargs,
    ) -> None:
        self.suffixes = tuple(suffixes)
        super().__init__(ann_file='', data_root=data_root, **kwargs)

    def load_data_list(self) -> list[dict]:
        """The path and the size in pixels of each image, sorted by path."""
        data = []
        for path in sorted(self._paths()):
            with Image.open(path) as image:  # reads its header alone
                width, height = image.size
                if self._loads_upright() and image.getexif().get(ORIENTATION, 1) > 4:
                    width, height = height, width
            data.append(
                dict(
                    img_path=path,
                    img_id=len(data),
                    width=width,
                    height=height,
                    seg_fields=[],  # mmseg's transforms look for it
                    reduce_zero_label=False,
                )
            )
        if not data:
            raise FileNotFoundError(
                f'There is no image ({", ".join(self.suffixes)}) in {self.data_root}.'
            )
        return data

    def _paths(self) -> Iterator[str]:
        seen = set()  # a link may lead back to a folder around it
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
        """Whether the pipeline turns images as their EXIF data says; mmcv's default."""
        flags = [getattr(t, 'color_type', None) for t in self.pipeline.transforms]
        flag = next(filter(None, flags), 'color')
        return flag != 'unchanged' and not flag.endswith('ignore_orientation')
