"""Random, small models of Hugging Face transformers, saved to a folder."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

transformers = pytest.importorskip('transformers')

SIZE = 64
NAMES = {0: 'road', 1: 'sky', 2: 'car'}
LABELS = dict(id2label=NAMES, label2id={v: k for k, v in NAMES.items()})
RESNET = dict(
    embedding_size=8,
    hidden_sizes=[8, 16, 16, 16],
    depths=[1, 1, 1, 1],
    layer_type='basic',
    out_features=['stage1', 'stage2', 'stage3', 'stage4'],
)
SWIN = dict(
    image_size=SIZE,
    embed_dim=8,
    depths=[1, 1, 1, 1],
    num_heads=[1, 1, 2, 2],
    window_size=4,
    out_features=['stage1', 'stage2', 'stage3', 'stage4'],
)
DETR = dict(
    use_timm_backbone=False,
    backbone=None,
    d_model=32,
    encoder_layers=1,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=16,
    decoder_ffn_dim=16,
    num_queries=10,
)
HYBRID = dict(
    d_model=32,
    encoder_hidden_dim=32,
    encoder_in_channels=[16, 16, 16],
    feat_strides=[8, 16, 32],
    encoder_ffn_dim=16,
    encoder_attention_heads=2,
    decoder_in_channels=[32, 32, 32],
    decoder_ffn_dim=16,
    decoder_layers=2,
    decoder_attention_heads=2,
    num_queries=10,
    num_denoising=0,
    eval_size=None,
)


def resnet(**more) -> transformers.PreTrainedConfig:
    return transformers.ResNetConfig(**RESNET, **more)


def vit(**more) -> dict:
    return dict(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=SIZE,
        patch_size=8,
        **more,
    )


def mask_classifier(name: str) -> transformers.PreTrainedModel:
    swin = transformers.SwinConfig(**SWIN)
    if name == 'maskformer':
        detr = transformers.DetrConfig(**DETR, backbone_config=resnet())
        config = transformers.MaskFormerConfig(
            backbone_config=swin,
            decoder_config=detr,
            fpn_feature_size=32,
            mask_feature_size=32,
            **LABELS,
        )
        return transformers.MaskFormerForInstanceSegmentation(config)
    options = dict(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=10,
        **LABELS,
    )
    return transformers.Mask2FormerForUniversalSegmentation(
        transformers.Mask2FormerConfig(**options)
    )


def amplified(model: nn.Module) -> nn.Module:
    """Keeps what random weights see of an image from fading layer by layer."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(0.001)
    return model


SEGMENTORS = {
    'segformer': lambda: transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(
            depths=[1] * 4,
            hidden_sizes=[8, 16, 24, 32],
            num_attention_heads=[1, 1, 2, 2],
            decoder_hidden_size=16,
            **LABELS,
        )
    ),
    'upernet': lambda: transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(
            backbone_config=resnet(),
            hidden_size=16,
            use_auxiliary_head=False,
            **LABELS,
        )
    ),
    'beit': lambda: transformers.BeitForSemanticSegmentation(
        transformers.BeitConfig(
            **vit(), out_indices=[1, 2, 3, 4], use_auxiliary_head=False, **LABELS
        )
    ),
    'data2vec-vision': lambda: transformers.Data2VecVisionForSemanticSegmentation(
        transformers.Data2VecVisionConfig(
            **vit(), out_indices=[1, 2, 3, 4], use_auxiliary_head=False, **LABELS
        )
    ),
    'mobilenet_v2': lambda: transformers.MobileNetV2ForSemanticSegmentation(
        transformers.MobileNetV2Config(depth_multiplier=0.25, **LABELS)
    ),
    'mobilevit': lambda: amplified(
        transformers.MobileViTForSemanticSegmentation(
            transformers.MobileViTConfig(
                image_size=SIZE,
                hidden_sizes=[16, 24, 32],
                neck_hidden_sizes=[8, 8, 8, 16, 16, 16, 32],
                num_attention_heads=2,
                aspp_out_channels=16,
                **LABELS,
            )
        )
    ),
    'mobilevitv2': lambda: amplified(
        transformers.MobileViTV2ForSemanticSegmentation(
            transformers.MobileViTV2Config(
                image_size=SIZE,
                width_multiplier=0.25,
                base_attn_unit_dims=[32, 48, 64],
                aspp_out_channels=16,
                **LABELS,
            )
        )
    ),
    'dpt': lambda: transformers.DPTForSemanticSegmentation(
        transformers.DPTConfig(
            **vit(),
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 16, 16],
            fusion_hidden_size=8,
            use_auxiliary_head=False,
            **LABELS,
        )
    ),
    'maskformer': lambda: mask_classifier('maskformer'),
    'mask2former': lambda: mask_classifier('mask2former'),
    'eomt': lambda: transformers.EomtForUniversalSegmentation(
        transformers.EomtConfig(
            **{k: v for k, v in vit().items() if k != 'intermediate_size'},
            mlp_ratio=2,
            num_blocks=2,
            num_queries=10,
            num_upscale_blocks=1,
            **LABELS,
        )
    ),
}
DETECTORS = {
    'detr': lambda: transformers.DetrForObjectDetection(
        transformers.DetrConfig(**DETR, backbone_config=resnet(), **LABELS)
    ),
    'table-transformer': lambda: transformers.TableTransformerForObjectDetection(
        transformers.TableTransformerConfig(**DETR, backbone_config=resnet(), **LABELS)
    ),
    'dab-detr': lambda: transformers.DabDetrForObjectDetection(
        transformers.DabDetrConfig(
            **{k: v for k, v in DETR.items() if k != 'd_model'},
            hidden_size=32,
            backbone_config=resnet(),
            **LABELS,
        )
    ),
    'conditional_detr': lambda: transformers.ConditionalDetrForObjectDetection(
        transformers.ConditionalDetrConfig(**DETR, backbone_config=resnet(), **LABELS)
    ),
    'deformable_detr': lambda: transformers.DeformableDetrForObjectDetection(
        transformers.DeformableDetrConfig(
            **DETR,
            backbone_config=transformers.ResNetConfig(
                **{**RESNET, 'out_features': ['stage2', 'stage3', 'stage4']}
            ),
            num_feature_levels=4,
            **LABELS,
        )
    ),
    'rt_detr': lambda: transformers.RTDetrForObjectDetection(
        transformers.RTDetrConfig(
            **HYBRID,
            backbone_config=transformers.RTDetrResNetConfig(
                **{**RESNET, 'out_features': ['stage2', 'stage3', 'stage4']}
            ),
            **LABELS,
        )
    ),
    'rt_detr_v2': lambda: transformers.RTDetrV2ForObjectDetection(
        transformers.RTDetrV2Config(
            **HYBRID,
            backbone_config=transformers.RTDetrResNetConfig(
                **{**RESNET, 'out_features': ['stage2', 'stage3', 'stage4']}
            ),
            **LABELS,
        )
    ),
    'd_fine': lambda: transformers.DFineForObjectDetection(
        transformers.DFineConfig(
            **HYBRID,
            backbone_config=transformers.HGNetV2Config(
                hidden_sizes=[16, 16, 16, 16],
                stem_channels=[3, 8, 8],
                stage_in_channels=[8, 16, 16, 16],
                stage_mid_channels=[8, 8, 8, 8],
                stage_out_channels=[16, 16, 16, 16],
                stage_num_blocks=[1, 1, 1, 1],
                stage_numb_of_layers=[1, 1, 1, 1],
                out_features=['stage2', 'stage3', 'stage4'],
            ),
            **LABELS,
        )
    ),
    'yolos': lambda: transformers.YolosForObjectDetection(
        transformers.YolosConfig(
            **{**vit(), 'image_size': [SIZE, SIZE]}, num_detection_tokens=10, **LABELS
        )
    ),
}
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]


def save_model(make, processor: str, folder, labels: dict | None = None) -> str:
    """Save a random model and its image processor to a folder.

    Args:
        make: Makes the model.
        processor: Name of the image processor's class.
        folder: Where.
        labels: The names of its classes, if they are not :data:`NAMES`.
    """
    torch.manual_seed(0)
    if labels:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(LABELS, 'id2label', labels)
            patch.setitem(LABELS, 'label2id', {v: k for k, v in labels.items()})
            model = make()
    else:
        model = make()
    for name, parameter in model.named_parameters():
        # boxes would be those of the queries, as their last layer starts at zero
        if parameter.ndim > 1 and ('embed' not in name or 'bbox_embed' in name):
            # of any width and depth, so that its output depends on the image
            nn.init.kaiming_normal_(parameter.flatten(1))
    model.save_pretrained(folder)
    getattr(transformers, processor)(
        image_mean=MEAN, image_std=STD, size=dict(height=SIZE, width=SIZE)
    ).save_pretrained(folder)
    return str(folder)


def tokenizer(folder: str, words: list[str]) -> None:
    """A tokenizer of BERT with a vocabulary of a few words."""
    path = os.path.join(folder, 'vocab.txt')
    with open(path, 'w') as file:
        file.write('\n'.join(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '.', *words]))
    transformers.BertTokenizer(path).save_pretrained(folder)


def grounding_dino(
    config: type = transformers.GroundingDinoConfig,
    model: type = transformers.GroundingDinoForObjectDetection,
) -> transformers.PreTrainedModel:
    made = config(
        backbone_config=transformers.SwinConfig(
            **{**SWIN, 'out_features': ['stage2', 'stage3', 'stage4']}
        ),
        text_config=transformers.BertConfig(
            vocab_size=16,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        ),
        d_model=64,
        encoder_layers=1,
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_layers=2,
        decoder_ffn_dim=16,
        decoder_attention_heads=2,
        num_queries=10,
        max_text_len=32,
    )
    return model(made)


def mm_grounding_dino() -> transformers.PreTrainedModel:
    return grounding_dino(
        transformers.MMGroundingDinoConfig,
        transformers.MMGroundingDinoForObjectDetection,
    )


def oneformer() -> transformers.PreTrainedModel:
    config = transformers.OneFormerConfig(
        backbone_config=transformers.SwinConfig(**SWIN),
        text_encoder_width=16,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=64,
        text_encoder_context_length=12,
        text_encoder_proj_layers=1,
        text_encoder_n_ctx=2,
        task_seq_len=12,
        conv_dim=32,
        mask_dim=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        query_dec_layers=1,
        num_queries=10,
        **LABELS,
    )
    return transformers.OneFormerForUniversalSegmentation(config)


# Of the models that docs/teachers.md names, those that stand in for them, and their
# image processors.
STANDS_IN = {
    'nvidia/segformer-b5': (SEGMENTORS['segformer'], 'SegformerImageProcessor'),
    'facebook/mask2former': (SEGMENTORS['mask2former'], 'Mask2FormerImageProcessor'),
    'PekingU/rtdetr': (DETECTORS['rt_detr'], 'RTDetrImageProcessor'),
    'IDEA-Research/grounding-dino': (grounding_dino, 'GroundingDinoImageProcessor'),
}
