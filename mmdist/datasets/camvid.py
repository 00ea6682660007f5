"""CamVid, road scenes seen from a car."""

from __future__ import annotations

from mmseg.datasets import BaseSegDataset

from mmdist.registry import DATASETS


@DATASETS.register_module()
class CamVidDataset(BaseSegDataset):
    """CamVid with the 11 classes that are commonly evaluated.

    Source: Brostow et al., "Semantic object classes in video", Pattern Recognition
    Letters 2009; the classes and the 367 / 101 / 233 images are those of SegNet
    (Badrinarayanan et al., TPAMI 2017). ``img_dir/<split>/*.jpg`` are the images and
    ``ann_dir/<split>/*.png`` hold ids 0 to 10, and 255 for void.

    Args:
        img_suffix: Suffix of the images.
        seg_map_suffix: Suffix of the label maps.
        kwargs: As for mmseg's ``BaseSegDataset``.
    """

    METAINFO = dict(
        classes=(
            'Sky', 'Building', 'Pole', 'Road', 'Pavement', 'Tree', 'SignSymbol',
            'Fence', 'Car', 'Pedestrian', 'Bicyclist',
        ),
        palette=[
            [128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128],
            [60, 40, 222], [128, 128, 0], [192, 128, 128], [64, 64, 128], [64, 0, 128],
            [64, 64, 0], [0, 128, 192],
        ],
    )  # fmt: skip

    def __init__(
        self, img_suffix: str = '.jpg', seg_map_suffix: str = '.png', **kwargs
    ) -> None:
        super().__init__(img_suffix=img_suffix, seg_map_suffix=seg_map_suffix, **kwargs)
