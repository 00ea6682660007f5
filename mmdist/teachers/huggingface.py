"""Segmentors and detectors from Hugging Face transformers as teachers.

transformers is only imported when such a teacher is built: ``pip install mmdist[hf]``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdist.registry import MODELS

from .foreign import ForeignTeacher

# Segmentors by `model_type`: they score pixels, or classify masks.
PER_PIXEL = (
    *('beit', 'data2vec-vision', 'dpt', 'mobilenet_v2', 'mobilevit', 'mobilevitv2'),
    *('segformer', 'upernet'),
)
MASKS = ('eomt', 'mask2former', 'maskformer', 'oneformer')
# Their position embeddings have one fixed size.
FIXED_SIZE = ('beit', 'data2vec-vision', 'dpt', 'eomt')
# Checkpoint keys that no prediction needs: counters of BN, a buffer of Swin that
# transformers computes, and OneFormer's text encoder, which is used only in training.
UNUSED = re.compile(
    r'\.(num_batches_tracked|relative_position_index)$|^model\.text_mapper\.'
)


class Detector(NamedTuple):
    """How to read a detector from transformers."""

    activation: str  # of its class logits
    # If True, it ignores padding, and boxes are relative to the image without padding.
    takes_mask: bool
    is_prompted: bool = False


DETECTORS = {
    'detr': Detector('softmax', True),
    'table-transformer': Detector('softmax', True),
    'yolos': Detector('softmax', False),
    'conditional_detr': Detector('sigmoid', True),
    'dab-detr': Detector('sigmoid', True),
    'deformable_detr': Detector('sigmoid', True),
    'd_fine': Detector('sigmoid', False),
    'rt_detr': Detector('sigmoid', False),
    'rt_detr_v2': Detector('sigmoid', False),
    'grounding-dino': Detector('sigmoid', True, is_prompted=True),
    'mm-grounding-dino': Detector('sigmoid', True, is_prompted=True),
}


class HFTeacher(ForeignTeacher):
    """Common base of teachers from transformers.

    ``auto`` is the transformers class that loads the model; class names that are not
    given are those of its ``config``.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: There is no such model, or the hub cannot be reached.
        RuntimeError: Weights are missing, unexpected or have another shape.
        ValueError: This kind of model is not supported, or has no size to resize to.
    """

    def __init__(
        self,
        name: str,
        auto: str,
        config: Any,
        class_names: Sequence[str] | None = None,
        resize: bool = False,
    ) -> None:
        # else it fetches names for its own post-processing from another repository
        options = {'class_info_file': None} if config.model_type == 'oneformer' else {}
        processor = _load(name, 'AutoImageProcessor', **options)
        scale = processor.rescale_factor if processor.do_rescale else 1.0
        mean, std = [0.0] * 3, [1.0] * 3
        if processor.do_normalize:
            mean, std = processor.image_mean, processor.image_std
        mean, std = ([x / scale for x in values] for values in (mean, std))
        names = [config.id2label[i] for i in range(len(config.id2label))]
        super().__init__(class_names or names, mean, std)
        self.size = _fixed_size(name, config, processor) if resize else None
        self.model = _load_model(name, auto)
        # token ids, (1, tokens), by the argument of the model that takes them
        self.text: dict[str, Tensor] = {}

    def run(self, images: Tensor, **inputs) -> Any:
        """Run the model on a batch that is :meth:`resized`, and on its text."""
        for name, ids in self.text.items():
            inputs[name] = ids.to(images.device).expand(len(images), -1)
        return self.model(pixel_values=images, **inputs)

    def resized(self, images: Tensor) -> Tensor:
        """Resize a batch, (N, 3, H, W), to the size of the model, if it has one."""
        if self.size is None or images.shape[-2:] == self.size:
            return images
        return F.interpolate(images, self.size, mode='bilinear', antialias=True)


@MODELS.register_module()
class HFSegmentor(HFTeacher):
    """A semantic segmentor from transformers.

    SegFormer, DPT, UPerNet, BEiT and others score the classes of each pixel;
    MaskFormer, Mask2Former, OneFormer and EoMT classify masks.

    Args:
        name: Name on the hub, or a folder written by ``save_pretrained``.
        resize: Resize each batch to the fixed size of the image processor. This is
            always done for BEiT, Data2Vec, DPT and EoMT, which take one size only. By
            default, the others see the images as the student does.
    """

    def __init__(self, name: str, resize: bool = False) -> None:
        config = config_of(name, (*PER_PIXEL, *MASKS))
        kind = config.model_type
        self.gives = 'masks' if kind in MASKS else 'pixels'
        auto = f'AutoModelFor{"Universal" if kind in MASKS else "Semantic"}Segmentation'
        super().__init__(name, auto, config, resize=resize or kind in FIXED_SIZE)
        if kind == 'oneformer':  # it takes its task as text
            self.text['task_inputs'] = _load(name, 'AutoTokenizer')(
                'the task is semantic',
                padding='max_length',
                max_length=config.task_seq_len,
                truncation=True,
                return_tensors='pt',
            ).input_ids

    def forward(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> Any:
        """Return class logits, or mask logits and the class probabilities of masks."""
        output = self.run(self.resized(images))
        if self.gives == 'pixels':
            return output.logits
        classes = output.class_queries_logits.softmax(-1)[..., :-1]
        return output.masks_queries_logits, classes


@MODELS.register_module()
class HFDetector(HFTeacher):
    """A detector from transformers: DETRs, YOLOS, or Grounding DINO with prompts.

    Args:
        name: Name on the hub, or a folder written by ``save_pretrained``.
        prompts: For Grounding DINO, the things to detect, which are its class names. A
            class gets the score of its best token.
        resize: Resize each batch to the fixed size of the image processor. By default,
            the teacher sees the images as the student does.

    Raises:
        ValueError: ``prompts`` are missing, not supported, or too long together.
    """

    gives = 'boxes'

    def __init__(
        self,
        name: str,
        prompts: Sequence[str] | None = None,
        resize: bool = False,
    ) -> None:
        config = config_of(name, DETECTORS)
        self.activation, self.takes_mask, is_prompted = DETECTORS[config.model_type]
        if is_prompted != bool(prompts):
            raise ValueError(
                f'{name!r} needs `prompts`, a list of what to detect.'
                if is_prompted
                else f'{name!r} has a fixed list of classes and takes no `prompts`.'
            )
        kind = 'ZeroShotObjectDetection' if is_prompted else 'ObjectDetection'
        super().__init__(name, f'AutoModelFor{kind}', config, prompts, resize)
        self.spans = []
        if prompts:
            ids, self.spans = _as_tokens(_load(name, 'AutoTokenizer'), prompts)
            if ids.size(1) > config.max_text_len:
                raise ValueError(
                    f'The prompts have {ids.size(1)} tokens, but {name!r} takes at '
                    f'most {config.max_text_len}: give fewer or shorter ones.'
                )
            self.text['input_ids'] = ids

    def forward(
        self, images: Tensor, sizes: Sequence[tuple[int, int]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the boxes of all queries and their class logits."""
        full = tuple(images.shape[-2:])
        images = self.resized(images)
        mask = {}
        if self.takes_mask:
            mask['pixel_mask'] = _mask(images, sizes, full)
        output = self.run(images, **mask)
        logits = output.logits
        if self.spans:
            logits = torch.stack(
                [logits[..., start:end].amax(-1) for start, end in self.spans], -1
            )
        x, y, w, h = output.pred_boxes.unbind(-1)
        boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
        if not self.takes_mask:
            sizes = [full] * len(images)
        scales = boxes.new_tensor([(w, h, w, h) for h, w in sizes])
        return list(zip(boxes * scales[:, None], logits, strict=True))


def _mask(
    images: Tensor, sizes: Sequence[tuple[int, int]], full: tuple[int, int]
) -> Tensor:
    """A mask, (N, h, w): 1 on the image, 0 on its padding."""
    mask = torch.zeros_like(images[:, 0], dtype=torch.long)
    height, width = mask.shape[1:]
    for cells, (h, w) in zip(mask, sizes, strict=True):
        cells[: round(h * height / full[0]), : round(w * width / full[1])].fill_(1)
    return mask


def _as_tokens(
    tokenizer: Any, prompts: Sequence[str]
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return the ids of 'a . b .', (1, tokens), and the span of each prompt in it."""
    dot = tokenizer.convert_tokens_to_ids('.')
    ids, spans = [tokenizer.cls_token_id], []
    for prompt in prompts:
        tokens = tokenizer(prompt.lower(), add_special_tokens=False).input_ids
        spans.append((len(ids), len(ids) + len(tokens)))
        ids += [*tokens, dot]
    return torch.tensor([[*ids, tokenizer.sep_token_id]]), spans


def _load(name: str, auto: str, **options) -> Any:
    """Load a config, processor, tokenizer or model by a class of transformers."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            'Teachers from Hugging Face need the package transformers: '
            '`pip install mmdist[hf]`.'
        ) from error
    try:
        return getattr(transformers, auto).from_pretrained(name, **options)
    except OSError as error:
        raise FileNotFoundError(
            f'There is no model {name!r} on this machine, and it could not be fetched '
            'from the hub. `name` must be a model on the hub, or a folder that '
            f'`save_pretrained` wrote, image processor included.\n{error}'
        ) from error


def config_of(name: str, known: Iterable[str]) -> Any:
    """Load a model's config; raise ValueError if its ``model_type`` is not known."""
    config = _load(name, 'AutoConfig')
    if config.model_type not in known:
        raise ValueError(
            f'{name!r} is a {config.model_type!r}, but mmdist supports only '
            f'{", ".join(sorted(known))}. For any other model, write a '
            'mmdist.ForeignTeacher; see docs/teachers.md.'
        )
    return config


def _load_model(name: str, auto: str) -> nn.Module:
    """Load a model in float32; RuntimeError if weights are missing or left over."""
    model, info = _load(
        name,
        auto,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        # not the dtype of the file; `teacher.dtype` selects half precision
        dtype=torch.float32,
    )
    wrong = {what: sorted(map(str, keys)) for what, keys in info.items()}
    wrong['unexpected_keys'] = [
        key for key in wrong['unexpected_keys'] if not UNUSED.search(key)
    ]
    found = [f'{what} {keys}' for what, keys in wrong.items() if keys]
    if found:
        raise RuntimeError(
            f'The weights in {name!r} do not fit a {type(model).__name__}: '
            f'{"; ".join(found)}'
        )
    return model


def _fixed_size(name: str, config: Any, processor: Any) -> tuple[int, int]:
    """Return the height and width that the model was trained at."""
    if config.model_type in FIXED_SIZE and getattr(config, 'image_size', None):
        size = config.image_size
        return (size, size) if isinstance(size, int) else tuple(size)
    size = processor.size
    sides = getattr(size, 'height', None), getattr(size, 'width', None)
    if None in sides:
        raise ValueError(
            f'The image processor of {name!r} has no fixed size, got {size}: omit '
            '`resize`.'
        )
    return sides
