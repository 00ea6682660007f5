"""Small random models of Hugging Face transformers, saved to a folder."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import nn

transformers = pytest.importorskip('transformers')
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZE = 64
NAMES = {0: 'road', 1: 'sky', 2: 'car'}
LABELS = dict(id2label=NAMES, label2id={v: k for k, v in NAMES.items()})
RESNET = dict(
    embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1],
    layer_type='basic', out_features=['stage1', 'stage2', 'stage3', 'stage4'],
)  # fmt: skip
SWIN = dict(
    image_size=SIZE, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2],
    window_size=4, out_features=['stage1', 'stage2', 'stage3', 'stage4'],
)  # fmt: skip
DETR = dict(
    use_timm_backbone=False, backbone=None, d_model=32, encoder_layers=1,
    decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=10,
)  # fmt: skip
HYBRID = dict(
    d_model=32, encoder_hidden_dim=32, encoder_in_channels=[16, 16, 16],
    feat_strides=[8, 16, 32], encoder_ffn_dim=16, encoder_attention_heads=2,
    decoder_in_channels=[32, 32, 32], decoder_ffn_dim=16, decoder_layers=2,
    decoder_attention_heads=2, num_queries=10, num_denoising=0, eval_size=None,
)  # fmt: skip


SEMANTIC, OBJECTS = 'SemanticSegmentation', 'ObjectDetection'
UNIVERSAL = 'UniversalSegmentation'
VIT = dict(
    hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16,
    image_size=SIZE, patch_size=8,
)  # fmt: skip
THREE_STAGES = dict(out_features=['stage2', 'stage3', 'stage4'])
MASKS = dict(
    hidden_dim=32, encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2,
    num_attention_heads=2, dim_feedforward=16, num_queries=10,
)  # fmt: skip


def config(name: str, *options: dict, **more) -> transformers.PreTrainedConfig:
    """A config; later options override earlier ones."""
    options = {k: v for group in (*options, more) for k, v in group.items()}
    return getattr(transformers, f'{name}Config')(**options)


def model(name: str, task: str, *options: dict, **more) -> transformers.PreTrainedModel:
    # the classes of a prompted model are its prompts
    labels = {} if 'Grounding' in name else LABELS
    made = config(name, labels, *options, **more)
    return getattr(transformers, f'{name}For{task}')(made)


def of(name: str, task: str, *options: dict, **more) -> Callable:
    """Returns a function that makes a model; it calls options that are functions."""

    def make() -> transformers.PreTrainedModel:
        called = {k: v() if callable(v) else v for k, v in more.items()}
        return model(name, task, *options, **called)

    return make


def amplified(make: Callable) -> Callable:
    """Keep an image's signal from fading layer by layer in a random model."""

    def amplify() -> nn.Module:
        made = make()
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.fill_(0.001)
        return made

    return amplify


def resnet(*options: dict) -> transformers.PreTrainedConfig:
    return config('ResNet', RESNET, *options)


def swin(*options: dict) -> transformers.PreTrainedConfig:
    return config('Swin', SWIN, *options)


def rt_resnet() -> transformers.PreTrainedConfig:
    return config('RTDetrResNet', RESNET, THREE_STAGES)


SEGMENTORS = {
    'segformer': of('Segformer', SEMANTIC, depths=[1] * 4, hidden_sizes=[8, 16, 24, 32],
        num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16),
    'upernet': of('UperNet', SEMANTIC, backbone_config=resnet, hidden_size=16,
        use_auxiliary_head=False),
    **{key: of(name, SEMANTIC, VIT, out_indices=[1, 2, 3, 4], use_auxiliary_head=False)
        for key, name in {'beit': 'Beit', 'data2vec-vision': 'Data2VecVision'}.items()},
    'mobilenet_v2': of('MobileNetV2', SEMANTIC, depth_multiplier=0.25),
    'mobilevit': amplified(of('MobileViT', SEMANTIC, image_size=SIZE, hidden_sizes=[16,
        24, 32], neck_hidden_sizes=[8, 8, 8, 16, 16, 16, 32], num_attention_heads=2,
        aspp_out_channels=16)),
    'mobilevitv2': amplified(of('MobileViTV2', SEMANTIC, image_size=SIZE,
        width_multiplier=0.25, base_attn_unit_dims=[32, 48, 64], aspp_out_channels=16)),
    'dpt': of('DPT', SEMANTIC, VIT, backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=8,
        use_auxiliary_head=False),
    'maskformer': of('MaskFormer', 'InstanceSegmentation', backbone_config=swin,
        decoder_config=lambda: config('Detr', DETR, backbone_config=resnet()),
        fpn_feature_size=32, mask_feature_size=32),
    'mask2former': of('Mask2Former', UNIVERSAL, MASKS, backbone_config=swin,
        feature_size=32, mask_feature_size=32),
    'eomt': of('Eomt', UNIVERSAL, {k: v for k, v in VIT.items() if 'inter' not in k},
        mlp_ratio=2, num_blocks=2, num_queries=10, num_upscale_blocks=1),
}  # fmt: skip
DETECTORS = {
    'detr': of('Detr', OBJECTS, DETR, backbone_config=resnet),
    'table-transformer': of('TableTransformer', OBJECTS, DETR, backbone_config=resnet),
    'dab-detr': of('DabDetr', OBJECTS,
        {k: v for k, v in DETR.items() if k != 'd_model'}, hidden_size=32,
        backbone_config=resnet),
    'conditional_detr': of('ConditionalDetr', OBJECTS, DETR, backbone_config=resnet),
    'deformable_detr': of('DeformableDetr', OBJECTS, DETR, backbone_config=lambda:
        resnet(THREE_STAGES), num_feature_levels=4),
    'rt_detr': of('RTDetr', OBJECTS, HYBRID, backbone_config=rt_resnet),
    'rt_detr_v2': of('RTDetrV2', OBJECTS, HYBRID, backbone_config=rt_resnet),
    'd_fine': of('DFine', OBJECTS, HYBRID, backbone_config=lambda: config('HGNetV2',
        THREE_STAGES, hidden_sizes=[16, 16, 16, 16], stem_channels=[3, 8, 8],
        stage_in_channels=[8, 16, 16, 16], stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[16, 16, 16, 16], stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1])),
    'yolos': of('Yolos', OBJECTS, VIT, image_size=[SIZE, SIZE],
        num_detection_tokens=10),
}  # fmt: skip
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]


def save_model(make, processor: str, folder, labels: dict | None = None) -> str:
    """Save a random model and its image processor to a folder.

    Args:
        make: Makes the model.
        processor: Name of the image processor's class.
        folder: Where to save them.
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
        # `bbox_embed` too: its last layer starts at 0, which keeps the queries' boxes
        if parameter.ndim > 1 and ('embed' not in name or 'bbox_embed' in name):
            # suits any width and depth, so that the output depends on the image
            nn.init.kaiming_normal_(parameter.flatten(1))
    model.save_pretrained(folder)
    getattr(transformers, processor)(
        image_mean=MEAN, image_std=STD, size=dict(height=SIZE, width=SIZE)
    ).save_pretrained(folder)
    return str(folder)


def tokenizer(folder: str, words: list[str]) -> None:
    """Save a BERT tokenizer with a vocabulary of a few words."""
    path = os.path.join(folder, 'vocab.txt')
    with open(path, 'w') as file:
        file.write('\n'.join(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '.', *words]))
    transformers.BertTokenizer(path).save_pretrained(folder)


GROUNDING = dict(
    backbone_config=lambda: swin(THREE_STAGES), text_config=lambda: config('Bert',
    vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=16), d_model=64, encoder_layers=1, encoder_ffn_dim=16,
    encoder_attention_heads=2, decoder_layers=2, decoder_ffn_dim=16,
    decoder_attention_heads=2, num_queries=10, max_text_len=32,
)  # fmt: skip
grounding_dino = of('GroundingDino', OBJECTS, **GROUNDING)
mm_grounding_dino = of('MMGroundingDino', OBJECTS, **GROUNDING)
oneformer = of(
    'OneFormer', UNIVERSAL, MASKS, backbone_config=swin, text_encoder_width=16,
    text_encoder_num_layers=1, text_encoder_vocab_size=64,
    text_encoder_context_length=12, text_encoder_proj_layers=1, text_encoder_n_ctx=2,
    task_seq_len=12, conv_dim=32, mask_dim=32, query_dec_layers=1,
)  # fmt: skip
# Stand-ins for the models that docs/teachers.md names, with their image processors.
STANDS_IN = {
    'nvidia/segformer-b5': (SEGMENTORS['segformer'], 'SegformerImageProcessor'),
    'facebook/mask2former': (SEGMENTORS['mask2former'], 'Mask2FormerImageProcessor'),
    'PekingU/rtdetr': (DETECTORS['rt_detr'], 'RTDetrImageProcessor'),
    'IDEA-Research/grounding-dino': (grounding_dino, 'GroundingDinoImageProcessor'),
    'facebook/dinov2': (lambda: transformers.Dinov2Model(config('Dinov2', VIT)),
        'ViTImageProcessor'),
}  # fmt: skip
