"""Mark an image as unlabelled."""

from __future__ import annotations

from mmengine.structures import PixelData
from torch import full

from mmdist.data.unlabelled import no_instances
from mmdist.lookup import in_words, is_a
from mmdist.registry import TRANSFORMS


@TRANSFORMS.register_module()
@in_words
class MarkUnlabelled:
    """Set ``metainfo['unlabelled']``: the image is distilled, its labels are ignored.

    Put it last, after ``PackDetInputs`` or ``PackSegInputs``. Labels that the sample
    already has are dropped.

    Args:
        with_mask: Whether the labelled images of the batch have instance masks.

    Raises:
        ValueError: The sample is not packed yet.
    """

    def __init__(self, with_mask: bool = False) -> None:
        self.with_mask = with_mask

    def __call__(self, results: dict) -> dict:
        """Mark the data sample of a packed result."""
        sample = results.get('data_samples')
        if sample is None:
            raise ValueError(
                '`mmdist.MarkUnlabelled` marks a packed sample: put it last in the '
                'pipeline, after `PackDetInputs` or `PackSegInputs`.'
            )
        sample.set_metainfo(dict(unlabelled=True))
        size = tuple(results['inputs'].shape[-2:])
        if is_a(sample, 'DetDataSample'):
            sample.gt_instances = no_instances(size, masks=self.with_mask)
            sample.ignored_instances = no_instances(size, masks=self.with_mask)
        else:
            sample.gt_sem_seg = PixelData(data=full((1, *size), 255))
        return results
