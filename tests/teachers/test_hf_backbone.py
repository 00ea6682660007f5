"""Image encoders from transformers give the library's own feature maps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from foreign_pairs import PSPNET, check_gradient, distil
from hf_models import MEAN, STD, VIT, save_model, transformers
from torch import nn

from mmdist.registry import MODELS
from mmdist.teachers import ClassMatch, teacher

TEXT = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    vocab_size=64, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
PROMPTS = dict(
    mask_decoder_config=dict(hidden_size=16, num_attention_heads=2, mlp_dim=16,
        iou_head_hidden_dim=16),
    prompt_encoder_config=dict(hidden_size=16, image_size=64, patch_size=8,
        image_embedding_size=8),
)  # fmt: skip


def of(name: str, *backbone: dict, **options) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        options.update(*backbone)
        config = getattr(transformers, f'{name}Config')(**options)
        return getattr(transformers, f'{name}Model')(config)

    return make


MODELS_OF = {
    'dinov2': of('Dinov2', VIT),
    'dinov2_with_registers': of('Dinov2WithRegisters', VIT, num_register_tokens=3),
    'dinov3_vit': of('DINOv3ViT', VIT, num_register_tokens=2),
    'dinov3_convnext': of(
        'DINOv3ConvNext', hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1]
    ),
    'siglip': of('Siglip', vision_config=VIT, text_config=TEXT),
    'clip': of('CLIP', vision_config=VIT, text_config=TEXT),
    'vit': of('ViT', VIT),
    'sam': of(
        'Sam',
        vision_config=dict(
            **VIT, output_channels=16, global_attn_indexes=[1], window_size=2
        ),
        **PROMPTS,
    ),
}
# Number of tokens before the patches: class token and registers.
PREFIX = dict(
    dinov2=1, dinov2_with_registers=4, dinov3_vit=3, dinov3_convnext=1, siglip=0,
    clip=1, vit=1,
)  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    return lambda kind: save_model(MODELS_OF[kind], 'ViTImageProcessor', tmp_path)


def by_hand(kind: str, folder: str, images: torch.Tensor) -> torch.Tensor:
    """The map from transformers alone, for images of whole patches."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    stride = 32 if kind == 'dinov3_convnext' else 8
    n, h, w = len(images), images.size(2) // stride, images.size(3) // stride
    if kind == 'sam':
        padded = F.pad(images, (0, 64 - 8 * w, 0, 64 - 8 * h))
        return model.get_image_embeddings(padded)[:, :, :h, :w]
    more = {}
    if kind in ('siglip', 'clip', 'vit'):
        more = dict(interpolate_pos_encoding=True)
    tokens = getattr(model, 'vision_model', model)(images, **more).last_hidden_state
    return tokens[:, PREFIX[kind] :].reshape(n, h, w, -1).permute(0, 3, 1, 2)


@pytest.mark.parametrize('kind', MODELS_OF)
def test_the_map_is_that_of_transformers(kind, saved):
    folder = saved(kind)
    encoder = MODELS.build(dict(type='mmdist.HFBackbone', name=folder)).eval()
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 64)
    with torch.no_grad():
        ours, theirs = encoder(images, [(32, 64)] * 2), by_hand(kind, folder, images)
        uneven = encoder(torch.randn(1, 3, 37, 60), [(37, 60)])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    stride = 32 if kind == 'dinov3_convnext' else 8
    factor = 64 / 60 if kind == 'sam' else 1
    expected = [max(1, round(x * factor / stride)) for x in (37, 60)]
    assert list(uneven.shape[-2:]) == expected


def test_it_sees_its_own_normalisation(saved):
    encoder = MODELS.build(dict(type='mmdist.HFBackbone', name=saved('dinov2')))
    raw = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    seen = encoder.data_preprocessor(dict(inputs=[raw]))['inputs'][0]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    torch.testing.assert_close(seen, (raw.flip(0) / 255 - mean) / std)


@pytest.mark.parametrize('loss', [dict(), dict(gamma=0.0)])
def test_a_segmentor_learns_from_its_features(loss, saved, monkeypatch):
    entry = dict(
        type='mmdist.Features', student='backbone', levels=[-1], teacher='maps',
        teacher_levels=[0], loss=dict(type='mmdist.DISTLoss', **loss),
    )  # fmt: skip
    config = dict(type='mmdist.HFBackbone', name=saved('dinov2_with_registers'))
    model = distil(PSPNET, config, dict(dist=entry))
    check_gradient(model, least=0.0)
    said = []
    monkeypatch.setattr(
        teacher, 'print_log', lambda text, *args, **kw: said.append(text)
    )
    assert model.teacher.match_classes(['road', 'sky']) == ClassMatch()
    assert not said  # it knows no classes, which is fine


def test_others_are_refused(saved, tmp_path):
    config = transformers.Swin2SRConfig()
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a 'swin2sr', but mmdist supports only clip"):
        MODELS.build(dict(type='mmdist.HFBackbone', name=str(tmp_path)))
    logits = dict(dist=dict(type='mmdist.SegLogits'))
    with pytest.raises(ValueError, match='it gives features'):
        distil(PSPNET, dict(type='mmdist.HFBackbone', name=saved('vit')), logits)
