"""The interface through which a model of another library becomes a teacher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mmengine.model import ImgDataPreprocessor
from torch import Tensor, nn

KNOWN = dict(
    gives=('pixels', 'masks', 'boxes', 'features'),
    activation=('softmax', 'sigmoid', 'identity'),
)


class ForeignTeacher(nn.Module, ABC):
    """A model of any library as a teacher.

    A subclass builds the model, loads its weights, and runs it in :meth:`forward`.
    Register it with ``mmdist.MODELS`` and name it in ``teacher.config``.

    Args:
        class_names: Class names, in the order of the score columns. A name that repeats
            gets the column's number appended: COCO's unused ids are all 'N/A'.
        mean: Mean of each input channel, in units of 0 to 255.
        std: Standard deviation of each channel, in the same units; 255 for a model
            that takes values from 0 to 1.
        rgb: Whether the model takes RGB; False for BGR.

    Attributes:
        gives: What :meth:`forward` returns. ``'pixels'``: class logits,
            (N, classes, h, w), at any size. ``'masks'``: logits of K masks,
            (N, K, h, w), and the class probabilities of each without "no object",
            (N, K, classes). ``'boxes'``: for each image all boxes before NMS, (M, 4) as
            x1 y1 x2 y2 in pixels of the batch, and their scores, (M, classes).
            ``'features'``: anything; only ``mmdist.Features`` can use it.
        activation: How box scores become probabilities: ``'sigmoid'``; ``'softmax'``,
            with the background as an extra last column; or ``'identity'`` if they
            already are probabilities, without background.

    Raises:
        ValueError: ``gives`` or ``activation`` is not one of these.

    Example:
        A torchvision segmentor::

            @MODELS.register_module()
            class LRASPP(ForeignTeacher):
                gives = 'pixels'

                def __init__(self, checkpoint, class_names):
                    super().__init__(
                        class_names,
                        mean=[123.675, 116.28, 103.53],
                        std=[58.395, 57.12, 57.375])
                    self.model = lraspp_mobilenet_v3_large(
                        weights_backbone=None, num_classes=len(class_names))
                    self.model.load_state_dict(torch.load(checkpoint))

                def forward(self, images, sizes):
                    return self.model(images)['out']
    """

    gives = 'pixels'
    activation = 'sigmoid'

    def __init__(
        self,
        class_names: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
        rgb: bool = True,
    ) -> None:
        super().__init__()
        for name, known in KNOWN.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(
                    f'{type(self).__name__}.{name} must be one of {known}, got '
                    f'{value!r}.'
                )
        count = Counter(class_names)
        self.class_names = tuple(
            x if count[x] == 1 else f'{x} {i}' for i, x in enumerate(class_names)
        )
        self.data_preprocessor = ImgDataPreprocessor(mean, std, bgr_to_rgb=rgb)

    def answer(self, step: Any) -> Any:
        """Run :meth:`forward` on the batch of a ``Step``."""
        return self(step.teacher_inputs, step.valid_sizes)

    @abstractmethod
    def forward(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> Any:
        """Run the model.

        Args:
            images: The batch in the teacher's own normalisation, (N, 3, H, W).
            sizes: Height and width of each image in pixels, without the padding at its
                bottom and right.

        Returns:
            The output that :attr:`gives` describes.
        """
