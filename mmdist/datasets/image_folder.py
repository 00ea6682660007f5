"""Images of a folder, without labels."""

from __future__ import annotations

import os.path as osp

from mmengine.dataset import BaseDataset
from mmengine.fileio import list_dir_or_file
from PIL import Image

from mmdist.registry import DATASETS


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
        names = list_dir_or_file(
            self.data_root, list_dir=False, recursive=True, suffix=None
        )
        data = []
        for name in sorted(names):
            if not name.lower().endswith(self.suffixes):
                continue
            path = osp.join(self.data_root, name)
            with Image.open(path) as image:  # reads its header alone
                width, height = image.size
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
