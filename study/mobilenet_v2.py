"""MobileNetV2 with torchvision's ImageNet weights, whole or only its first stages.

Configs import it by ``custom_imports = dict(imports=['study.mobilenet_v2'])``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mmseg.models.backbones import MobileNetV2 as MMSegMobileNetV2
from torch import Tensor

from mmdist.checkpoint import load_checkpoint, load_strictly
from mmdist.registry import MODELS


@MODELS.register_module()
class MobileNetV2(MMSegMobileNetV2):
    """mmseg's MobileNetV2, cut off after a stage, for mmseg and mmdet.

    The first stages alone are a small backbone that starts from ImageNet weights; a
    narrow MobileNetV2 has none. Four of the seven stages have 0.24 of its 1.8 million
    parameters. With ``init_cfg=dict(type='Pretrained', checkpoint=...)`` torchvision's
    file (``mobilenet_v2-b0353104.pth``) is loaded strictly.

    Args:
        num_stages: Number of stages to keep, of seven.
        out_indices: Stages whose maps are returned, from 0; the last one if omitted.
        kwargs: As for mmseg's ``MobileNetV2``.

    Raises:
        ValueError: ``num_stages`` or ``out_indices`` name stages that do not exist.
    """

    def __init__(
        self, num_stages: int = 7, out_indices: Sequence[int] | None = None, **kwargs
    ) -> None:
        if not 1 <= num_stages <= 7:
            raise ValueError(f'MobileNetV2 has 1 to 7 stages, got {num_stages=}.')
        out_indices = (num_stages - 1,) if out_indices is None else out_indices
        if max(out_indices) >= num_stages:
            raise ValueError(
                f'`out_indices` of MobileNetV2 are {tuple(out_indices)}, but with '
                f'{num_stages=} the last stage is {num_stages - 1}.'
            )
        super().__init__(out_indices=out_indices, **kwargs)
        for name in self.layers[num_stages:]:
            delattr(self, name)
        self.layers = self.layers[:num_stages]

    def init_weights(self) -> None:
        """Load torchvision's weights if ``init_cfg`` is a pretrained file."""
        cfg = self.init_cfg
        if not (isinstance(cfg, Mapping) and cfg['type'] == 'Pretrained'):
            super().init_weights()
            return
        path = cfg['checkpoint']
        state = rename_torchvision_keys(load_checkpoint(path))
        ours = ('conv1', *self.layers)
        state = {k: v for k, v in state.items() if k.split('.')[0] in ours}
        load_strictly(
            self,
            state,
            path,
            'MobileNetV2',
            "Give torchvision's mobilenet_v2-b0353104.pth, and `widen_factor=1.0`.",
        )
        self._is_init = True  # as mmengine marks an initialised module

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps of the stages ``out_indices``, (N, C, h, w), always in a tuple."""
        maps = super().forward(x)
        return (maps,) if isinstance(maps, Tensor) else maps


def rename_torchvision_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of torchvision's ``mobilenet_v2`` as mmseg names them.

    Args:
        state_dict: Keys ``features.<block>...`` and ``classifier...``. The classifier
            and the last 1x1 convolution, ``features.18``, have no counterpart and are
            omitted.

    Raises:
        ValueError: A key is not one of torchvision's ``mobilenet_v2``.
    """
    stage_of_block = [
        (stage, i)
        for stage, (_, _, num_blocks) in enumerate(MMSegMobileNetV2.arch_settings, 1)
        for i in range(num_blocks)
    ]
    renamed = {}
    for key, value in state_dict.items():
        if key.startswith(('features.18.', 'classifier.')):
            continue
        if match := re.fullmatch(r'features\.0\.([01])\.(\w+)', key):
            part, name = match.groups()
            prefix = 'conv1'
        elif match := re.fullmatch(
            r'features\.(\d+)\.conv\.(\d)\.(?:([01])\.)?(\w+)', key
        ):
            block, layer, part, name = match.groups()
            stage, i = stage_of_block[int(block) - 1]
            if part is None:
                # torchvision has the last convolution and its BN side by side, after
                # two ConvBNs, or one in the first stage, which does not expand
                last = 1 if stage == 1 else 2
                part, layer = int(layer) - last, last
            prefix = f'layer{stage}.{i}.conv.{layer}'
        else:
            raise ValueError(
                f"The weights hold {key!r}, and torchvision's mobilenet_v2 has no such "
                'key. Give the file mobilenet_v2-b0353104.pth.'
            )
        renamed[f'{prefix}.{("conv", "bn")[int(part)]}.{name}'] = value
    return renamed
