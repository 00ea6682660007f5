"""Foundation models from Hugging Face transformers as teachers of feature maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mmdist.registry import MODELS

from .huggingface import HFTeacher, config_of

# Supported values of `model_type`. Those in INTERPOLATED interpolate their position
# embeddings only on request.
INTERPOLATED = ('clip', 'siglip', 'vit')
BACKBONES = (
    *INTERPOLATED,
    *('dinov2', 'dinov2_with_registers', 'dinov3_convnext', 'dinov3_vit', 'sam'),
)


@MODELS.register_module()
class HFBackbone(HFTeacher):
    """An image encoder from transformers, for ``mmdist.Features`` only.

    DINOv2 (with or without registers), DINOv3 (ViT, ConvNeXt), SigLIP, CLIP, ViT and
    SAM. The module ``maps`` returns the last hidden state as one feature map, without
    class token and registers. docs/teachers.md has a config.

    Args:
        name: Name on the hub, or a folder written by ``save_pretrained``.

    Raises:
        ValueError: This kind of model is not supported.
    """

    gives = 'features'

    def __init__(self, name: str) -> None:
        config = config_of(name, BACKBONES)
        kind = config.model_type
        super().__init__(name, 'AutoModel', config)
        self.class_names = ()
        for tower in ('vision_model', 'vision_encoder'):  # drop text and prompts
            self.model = getattr(self.model, tower, self.model)
        config = getattr(config, 'vision_config', config)
        self.stride = getattr(config, 'patch_size', 32)  # 32 for a ConvNeXt
        # SAM takes one size: the long side is resized to it, the short side padded
        self.side = config.image_size if kind == 'sam' else None
        self.options = {}
        if kind in INTERPOLATED:
            self.options['interpolate_pos_encoding'] = True
        self.maps = TokensToMaps()

    def forward(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """The map of a batch, (N, C, h, w); h, w are its size / ``stride``, rounded."""
        full = images.shape[-2:]
        factor = self.side / max(full) if self.side else 1.0
        h, w = (max(1, round(x * factor / self.stride)) for x in full)
        size = (h * self.stride, w * self.stride)
        if full != size:
            images = F.interpolate(images, size, mode='bilinear', antialias=True)
        if self.side:
            images = F.pad(images, (0, self.side - size[1], 0, self.side - size[0]))
        hidden = self.model(pixel_values=images, **self.options).last_hidden_state
        return self.maps(hidden, h, w)


class TokensToMaps(nn.Module):
    """Turn the last hidden state into a map; a module gives its output a path."""

    def forward(self, hidden: Tensor, h: int, w: int) -> Tensor:
        """Turn (N, tokens, C), or (N, C, H, W) with the map top left, into a map."""
        if hidden.ndim == 4:
            return hidden[..., :h, :w]
        patches = hidden[:, hidden.size(1) - h * w :]  # class token and registers first
        return patches.transpose(1, 2).unflatten(2, (h, w))
