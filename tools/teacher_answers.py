"""What teachers answer to an image in a test: boxes or a map of probabilities."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData
from torch import Tensor

from mmdist.comparisons import Detections, SegLogits
from mmdist.comparisons.detections import after_nms
from mmdist.data.labels import inner_datasets
from mmdist.families import SEG, family_of, seg
from mmdist.step import Step
from mmdist.teachers import ClassMatch, ForeignTeacher, Teacher
from mmdist.teachers.classes import check_number
from mmdist.teachers.teacher import load_config

LABELS = ('LoadAnnotations', 'LoadPanopticAnnotations', 'LoadProposals')


def test_pipeline(cfg: Config) -> list[dict] | None:
    """The pipeline of a config's test, or else of its validation."""
    for loader in ('test_dataloader', 'val_dataloader'):
        for dataset in inner_datasets((cfg.get(loader) or {}).get('dataset')):
            if dataset.get('pipeline'):
                return dataset['pipeline']
    return cfg.get('test_pipeline')


def as_seen(pipeline: Sequence[dict], scale: float, flip: bool) -> list[dict]:
    """A test pipeline without labels, at another size, and mirrored."""
    found, resize = [], dict(type='Resize', scale_factor=scale, keep_ratio=True)
    for transform in deepcopy(list(pipeline)):
        kind = str(transform['type'])
        if kind.endswith(LABELS):
            continue
        if 'Resize' in kind or 'Pad' in kind:
            for key in {'scale', 'scale_factor', 'size', 'max_size'} & {*transform}:
                transform[key] = _times(transform[key], scale)
            resize = None if 'Resize' in kind else resize
        found.append(transform)
    mirror = dict(type='RandomFlip', prob=1.0, direction='horizontal')
    # before the padding, which stays on the right
    kinds = [str(transform['type']) for transform in found]
    place = next(i for i, kind in enumerate(kinds) if 'Pad' in kind or 'Pack' in kind)
    found[place:place] = [resize] * (bool(resize) and scale != 1) + [mirror] * flip
    return found


def _times(size: Any, scale: float) -> Any:
    if isinstance(size, (list, tuple)):
        return tuple(_times(side, scale) for side in size)
    if isinstance(size, float):
        return size * scale
    return round(size * scale) if size else size


class Asked:
    """A teacher, and the views of an image that it is asked about.

    Args:
        teacher: The teacher, loaded.
        cfg: The config that distils.
        classes: The classes of its data set; None if unknown.
        flip: Ask about mirrored images too.
        scales: Sizes of the images beside the teacher's own; the first gives the grid
            of a map.

    Raises:
        ValueError: It cannot be asked.
    """

    def __init__(
        self,
        teacher: Teacher,
        cfg: Config,
        classes: Sequence[str] | None,
        flip: bool,
        scales: Sequence[float],
    ) -> None:
        self.teacher, self.model = teacher, teacher.model
        own = load_config(teacher.config, f'{teacher.name}.config')
        self.scope = own.get('default_scope') or cfg.get('default_scope')
        pipeline = test_pipeline(own) or test_pipeline(cfg)
        names = teacher.class_names or classes
        if not pipeline or not names:
            what = 'class names' if pipeline else 'a pipeline of a test'
            raise ValueError(
                f'Neither the config of `{teacher.name}` nor that of the student has '
                f'{what}: add a `test_dataloader` with its data set to one of them.'
            )
        self.names = list(names)
        check_number(self.names, self.model)
        flips = (False, True) if flip or 'flip' in teacher.views else (False,)
        self.views = [(s, f) for s in scales for f in flips]
        self.pipelines = [as_seen(pipeline, *view) for view in self.views]
        gives = self.model.gives if isinstance(self.model, ForeignTeacher) else ''
        is_map = gives in ('pixels', 'masks') or family_of(self.model) == SEG
        self.kind = 'maps' if is_map else 'boxes'
        (SegLogits if is_map else Detections)().check_pair(None, self.model)
        test_cfg = getattr(self.model, 'test_cfg', None) or {}
        self.test_cfg = test_cfg.get('rcnn') or test_cfg
        self._stride: list[float] | None = None  # of mode='slide', in pixels

    def describe(self) -> dict:
        """What its answers depend on, as JSON."""
        digest = hashlib.sha256()
        for name, value in self.model.state_dict().items():
            digest.update(name.encode() + value.cpu().numpy().tobytes())
        config = self.teacher.config
        return dict(
            config=config if isinstance(config, str) else None,
            checkpoint=self.teacher.origin,
            weights_sha256=digest.hexdigest(),
            test_cfg=json.loads(json.dumps(self.test_cfg, default=str)),
            pipelines=json.loads(json.dumps(self.pipelines, default=str)),
        )

    def answer(self, packed: dict, flip: bool) -> tuple[Tensor, tuple[int, int]]:
        """What it finds in an image that one of :attr:`pipelines` packed.

        Returns:
            Boxes, (M, 6), x1 y1 x2 y2 score label, in pixels of the file; or
            probabilities, (classes, h, w). And height and width of the file.
        """
        samples = [packed['data_samples']]
        data = dict(inputs=[packed['inputs']], data_samples=samples)
        with DefaultScope.overwrite_default_scope(self.scope), self.teacher.running():
            data = self.model.data_preprocessor(data, False)
            step = Step(self.model, self.teacher, ClassMatch(), **data)
            step.shared('teacher_inputs', lambda: data['inputs'])
            size = tuple(step.data_samples[0].ori_shape[:2])
            if self.kind == 'maps':
                maps = self._probabilities(step)
                return (maps.flip(-1) if flip else maps), size
            found = self._detect(step)
        columns = (found.bboxes, found.scores[:, None], found.labels[:, None])
        rows = torch.cat(columns, 1).float()
        if flip:
            rows[:, [0, 2]] = size[1] - rows[:, [2, 0]]
        return rows, size

    def _detect(self, step: Step) -> InstanceData:
        sample = step.data_samples[0]
        if isinstance(self.model, ForeignTeacher):
            found = after_nms(self.model, *step.teacher_features[0])
            scale = found.bboxes.new_tensor(sample.get('scale_factor', (1.0, 1.0)))
            found.bboxes /= scale.repeat(2)
            return found
        modules = getattr(getattr(self.model, 'roi_head', None), '_modules', {})
        with patch.dict(modules, mask_head=None):  # nobody asks for masks
            return self.model.predict(step.inputs, [sample])[0].pred_instances

    def _probabilities(self, step: Step) -> Tensor:
        """Those of the image without its padding, at the stride of the head's logits.

        What is predicted in windows is first put together, as the model does it.
        """
        full, valid = tuple(step.inputs.shape[-2:]), step.valid_sizes[0]
        if self.test_cfg.get('mode') == 'slide':
            height, width = self.test_cfg['crop_size']
            window = step.inputs[..., :height, :width]
            if self._stride is None:
                cells = _read(self._step_of(window)).shape[-2:]
                pixels = window.shape[-2:]
                self._stride = [p / c for p, c in zip(pixels, cells, strict=True)]
            metas = [dict(sample.metainfo) for sample in step.data_samples]
            found = self.model.inference(step.inputs, metas)
            kind = seg.activation_of(self.model)
            if kind != 'identity':
                found = found.sigmoid() if kind == 'sigmoid' else found.softmax(1)
            cells = [v / s for v, s in zip(valid, self._stride, strict=True)]
        else:
            found = _read(step)
            sizes = zip(found.shape[-2:], valid, full, strict=True)
            cells = [c * v / f for c, v, f in sizes]
        if found.shape[1] == 1 and len(self.names) == 2:
            found = torch.cat([1 - found, found], 1)
        found = found / found.sum(1, keepdim=True).clamp(min=1)  # scores of masks
        return resampled(found, [max(round(c), 1) for c in cells], valid, full)

    def _step_of(self, inputs: Tensor) -> Step:
        step = Step(self.model, self.teacher, ClassMatch(), inputs, [])
        step.shared('teacher_inputs', lambda: inputs)
        return step


def _read(step: Step) -> Tensor:
    """Probabilities of the classes, (1, classes, h, w), as the head computes them."""
    if isinstance(step.teacher_model, ForeignTeacher):
        found = seg.ask_foreign(step, as_scores=True)
    else:
        found = seg.ask(step, seg.head_of(step.teacher_model), as_scores=True)
    return found.read(found.size)


def resampled(
    maps: Tensor, size: Sequence[int], valid: Sequence[int], full: Sequence[int]
) -> Tensor:
    """Maps of the top left part of an image, at the centres of other cells.

    Args:
        maps: (1, C, h, w), of the whole image.
        size: Height and width of the result, (C, height, width).
        valid: Height and width of the part.
        full: Height and width of the image.
    """
    if (*maps.shape[-2:], *valid) == (*size, *full):
        return maps[0]
    y, x = (part / whole for part, whole in zip(valid, full, strict=True))
    theta = maps.new_tensor([[[x, 0, x - 1], [0, y, y - 1]]])
    grid = F.affine_grid(theta, [1, maps.shape[1], *size], align_corners=False)
    options = dict(padding_mode='border', align_corners=False)
    return F.grid_sample(maps, grid, **options)[0]


def fused(answers: Sequence[Tensor]) -> Tensor:
    """What several teachers or views detect as one, the highest score first.

    By mmdet's weighted boxes fusion (Solovyev et al., arXiv 1910.13302).

    Args:
        answers: The boxes of each, (M, 6), x1 y1 x2 y2 score label.

    Returns:
        (K, 6).
    """
    from mmdet.models.utils import weighted_boxes_fusion

    # mmdet warns of each box without area, and divides by the sum of the scores
    good = [x[(x[:, 2:4] > x[:, :2]).all(1) & (x[:, 4] > 0)] for x in answers]
    columns = ([x[:, part].tolist() for x in good] for part in (slice(4), 4, 5))
    boxes, scores, labels = weighted_boxes_fusion(*columns)
    return torch.cat([boxes.view(-1, 4), scores[:, None], labels[:, None]], 1)


class Answers:
    """All teachers and views, as one answer for an image.

    The classes of one teacher are its own; of several they are those of the student
    that all of them know.

    Args:
        asked: The teachers.
        classes: The student's classes; None if unknown.
        min_score: The least score of a box.

    Raises:
        ValueError: They have nothing in common.
    """

    def __init__(
        self, asked: Sequence[Asked], classes: Sequence[str] | None, min_score: float
    ) -> None:
        self.asked, self.min_score = asked, min_score
        self.kind = asked[0].kind
        matches, classes = [ClassMatch()], classes or asked[0].names
        if len(asked) == 1:
            classes = asked[0].names
        else:
            matches = [one.teacher.match_classes(classes) for one in asked]
        # the student's class of each column that `select_teacher` gives
        ours = [
            list(range(len(classes)))
            if m.student is None
            else [i for (i,) in m.student]
            for m in matches
        ]
        common = sorted(set.intersection(*map(set, ours)))
        if not common or any(one.kind != self.kind for one in asked):
            raise ValueError(
                'The teachers have no answer in common: they share no class, or some '
                'detect boxes and some segment.'
            )
        self.class_names = [classes[i] for i in common]
        columns = [[c.index(i) for i in common] for c in ours]
        self.parts = list(zip(asked, matches, columns, strict=True))

    def __call__(self, packed: Sequence[dict]) -> tuple[tuple[int, int], Tensor]:
        """Height and width of a file, and what is stored of it.

        Args:
            packed: What the pipelines of all teachers made of it.
        """
        packed, answers = iter(packed), []
        for one, match, columns in self.parts:
            for _, flip in one.views:
                found, size = one.answer(next(packed), flip)
                if self.kind == 'maps':
                    found = match.select_teacher(found, 0, 'identity')[columns]
                    if answers:
                        own, grid = found.shape[-2:], answers[0].shape[-2:]
                        found = resampled(found[None], grid, own, own)
                else:
                    labels = match.common_labels(found[:, 5].long()).tolist()
                    places = [columns.index(i) if i in columns else -1 for i in labels]
                    found[:, 5] = found.new_tensor(places)
                    found = found[(found[:, 5] >= 0) & (found[:, 4] >= self.min_score)]
                answers.append(found)
        if self.kind == 'maps':
            mean = sum(answers) / len(answers)
            # NaN stays what the writer refuses
            return size, mean if mean.isnan().any() else (mean * 255).round().byte()
        if len(answers) > 1:
            most = max(one.test_cfg.get('max_per_img', 100) for one in self.asked)
            rows = fused(answers)[:most]
            answers = [rows[rows[:, 4] >= self.min_score]]
        return size, answers[0]
