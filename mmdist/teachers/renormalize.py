"""Map images from the student's normalisation to the teacher's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Renormalize:
    """Maps a batch from the student's normalisation to the teacher's.

    Both are affine per channel, so the map is one affine step, after swapping the
    channels if one is RGB and the other BGR. The padding is refilled with the teacher's
    value. Takes the data_preprocessor of each.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        mean_s, std_s = _mean_std(student)
        mean_t, std_t = _mean_std(teacher)
        self.flip = swaps_channels(student) != swaps_channels(teacher)
        if self.flip:
            mean_s, std_s = mean_s.flip(0), std_s.flip(0)
        self.scale = (std_s / std_t).float()
        self.shift = ((mean_s - mean_t) / std_t).float()
        self.fill = _pad_value(teacher)
        self.refill = self.fill != _pad_value(student)
        self.rescale = bool((self.scale != 1).any() or (self.shift != 0).any())

    def __call__(
        self, inputs: Tensor, valid_sizes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Map a batch, (N, C, H, W), normalised and padded for the student.

        ``valid_sizes`` are height and width of each image without padding. Returns what
        the teacher's data_preprocessor would; ``inputs`` itself if the two agree.
        """
        outputs = inputs.flip(1) if self.flip else inputs
        if self.rescale:
            self.scale = self.scale.to(inputs.device)
            self.shift = self.shift.to(inputs.device)
            outputs = outputs * self.scale + self.shift
        if self.rescale or self.refill:
            if outputs is inputs:
                outputs = inputs.clone()
            for image, (height, width) in zip(outputs, valid_sizes, strict=True):
                image[:, height:].fill_(self.fill)
                image[:, :, width:].fill_(self.fill)
        return outputs


def _mean_std(preprocessor: nn.Module) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation, each (C, 1, 1), in float64 on the CPU."""
    if getattr(preprocessor, 'mean', None) is None:
        return torch.zeros(1, 1, 1).double(), torch.ones(1, 1, 1).double()
    return preprocessor.mean.double().cpu(), preprocessor.std.double().cpu()


def swaps_channels(preprocessor: nn.Module) -> bool:
    """Whether a preprocessor swaps BGR and RGB; libraries name this differently."""
    names = '_channel_conversion', 'channel_conversion'
    return any(getattr(preprocessor, name, False) for name in names)


def _pad_value(preprocessor: nn.Module) -> float:
    """The value of padded pixels; mmdet and mmseg name it differently."""
    return getattr(preprocessor, 'pad_value', getattr(preprocessor, 'pad_val', 0))
