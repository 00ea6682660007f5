"""Teachers' answers for an image at test time: boxes or a map of probabilities."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope
from mmengine.structures import BaseDataElement
from torch import Tensor

from mmdist.comparisons import Detections, SegLogits
from mmdist.comparisons.detections import detected
from mmdist.families import SEG, family_of, seg
from mmdist.step import Step
from mmdist.teachers import ClassMatch, ForeignTeacher, Teacher
from mmdist.teachers.classes import check_number, inner_datasets
from mmdist.teachers.teacher import load_config

LABELS = ('LoadAnnotations', 'LoadPanopticAnnotations', 'LoadProposals')


def test_pipeline(cfg: Config) -> list[dict]:
    """A config's test pipeline, or else its validation pipeline, without labels."""
    found = cfg.get('test_pipeline') or []
    for loader in ('val_dataloader', 'test_dataloader'):
        for dataset in inner_datasets((cfg.get(loader) or {}).get('dataset')):
            found = dataset.get('pipeline') or found
    return [step for step in found if not str(step['type']).endswith(LABELS)]


class Asked:
    """A loaded teacher of a distillation config, asked about views of an image.

    ``classes`` are those of the config's data set, if known; ``views`` are pairs of a
    scale of the teacher's own image size and whether the image is mirrored.
    """

    def __init__(
        self, teacher: Teacher, cfg: Config, classes: Sequence[str], views: list[tuple]
    ) -> None:
        self.teacher, self.model, self.views = teacher, teacher.model, views
        own = load_config(teacher.config, f'{teacher.name}.config')
        self.scope = own.get('default_scope') or cfg.get('default_scope')
        self.steps = test_pipeline(own) or test_pipeline(cfg)
        self.names = list(teacher.class_names or classes)
        if not self.steps or not self.names:
            what = 'class names' if self.steps else 'a test pipeline'
            raise SystemExit(
                f'Neither the config of `{teacher.name}` nor that of the student has '
                f'{what}: add a `test_dataloader` with its data set to one of them.'
            )
        check_number(self.names, self.model)
        with DefaultScope.overwrite_default_scope(self.scope):
            self.pipeline = Compose(self.steps)
        gives = getattr(self.model, 'gives', '')
        is_map = gives in ('pixels', 'masks') or family_of(self.model) == SEG
        self.kind = 'maps' if is_map else 'boxes'
        (SegLogits if is_map else Detections)().check_pair(None, self.model)
        test_cfg = getattr(self.model, 'test_cfg', None) or {}
        self.test_cfg = test_cfg.get('rcnn') or test_cfg

    def describe(self) -> dict:
        """Everything that its answers depend on."""
        digest = hashlib.sha256()
        for name, value in self.model.state_dict().items():
            digest.update(name.encode() + value.cpu().numpy().tobytes())
        config = self.teacher.config
        return dict(
            config=config if isinstance(config, str) else None,
            checkpoint=self.teacher.origin,
            weights_sha256=digest.hexdigest(),
            test_cfg=self.test_cfg,
            pipeline=self.steps,
            views=self.views,
        )

    def answers(self, packed: Mapping, grid: Sequence[int] | None) -> list[Tensor]:
        """Its answer for each view of an image that :attr:`pipeline` packed.

        Boxes, (M, 6), x1 y1 x2 y2 score label, in pixels of the file; or probabilities,
        (classes, *grid). If ``grid`` is None, it is that of the first view's logits.
        """
        found, whole = [], packed['inputs'].float()
        for scale, flip in self.views:
            inputs, sample = whole, packed['data_samples'].clone()
            if scale != 1:
                size = [max(round(side * scale), 1) for side in whole.shape[-2:]]
                options = dict(mode='bilinear', antialias=True)
                inputs = F.interpolate(inputs[None], size, **options)[0]
            height, width = size = tuple(inputs.shape[-2:])
            sample.set_metainfo(dict(img_shape=size))
            inputs = inputs.flip(-1) if flip else inputs
            data = dict(inputs=[inputs], data_samples=[sample])
            step = self._step(**self.model.data_preprocessor(data, False))
            if self.kind == 'maps':
                answer = self._map(step, grid)
                grid = answer.shape[-2:]
                found.append(answer.flip(-1) if flip else answer)
                continue
            (boxes,) = detected(step)
            columns = boxes.bboxes, boxes.scores[:, None], boxes.labels[:, None]
            rows = torch.cat(columns, 1).float()
            if flip:
                rows[:, [0, 2]] = width - rows[:, [2, 0]]
            own = rows.new_tensor(sample.get('scale_factor', (1.0, 1.0)))
            factors = [width / whole.shape[-1], height / whole.shape[-2]]
            rows[:, :4] /= (own * rows.new_tensor(factors)).repeat(2)
            found.append(rows)
        return found

    def _step(self, inputs: Tensor, data_samples: Sequence[BaseDataElement]) -> Step:
        step = Step(self.model, self.teacher, ClassMatch(), inputs, data_samples)
        step.shared('teacher_inputs', lambda: inputs)  # already normalised
        return step

    def _map(self, step: Step, grid: Sequence[int] | None) -> Tensor:
        """Class probabilities of the image without its padding, (classes, *grid)."""
        image, valid = tuple(step.inputs.shape[-2:]), step.valid_sizes[0]
        if self.test_cfg.get('mode') == 'slide':
            # the model stitches windows together
            height, width = self.test_cfg['crop_size']
            window = step.inputs[..., :height, :width]
            cells, seen = _read(self._step(window, [])).shape[-2:], window.shape[-2:]
            metas = [dict(step.data_samples[0].metainfo)]
            found = self.model.slide_inference(step.inputs, metas)
            if seg.activation_of(self.model) != 'identity':
                found = seg.SegMap(found, as_scores=True).read(found.shape[-2:])
        else:
            found, seen = _read(step), image
            cells = found.shape[-2:]
        if found.shape[1] == 1 and len(self.names) == 2:
            found = torch.cat([1 - found, found], 1)
        found = found / found.sum(1, keepdim=True).clamp(min=1)  # scores of masks
        sizes = zip(cells, valid, seen, strict=True)
        own = [max(round(c * v / s), 1) for c, v, s in sizes]
        return resampled(found, grid or own, valid, image)


def _read(step: Step) -> Tensor:
    """Class probabilities as the head computes them, (1, classes, h, w)."""
    if isinstance(step.teacher_model, ForeignTeacher):
        found = seg.ask_foreign(step, as_scores=True)
    else:
        found = seg.ask(step, seg.head_of(step.teacher_model), as_scores=True)
    return found.read(found.size)


def resampled(
    maps: Tensor, grid: Sequence[int], valid: Sequence[int], image: Sequence[int]
) -> Tensor:
    """Crop maps (1, C, h, w) of an image to its top left part, resampled to (C, *grid).

    ``valid`` and ``image`` are height and width of the part and the image in pixels.
    """
    if (*maps.shape[-2:], *valid) == (*grid, *image):
        return maps[0]
    y, x = (part / whole for part, whole in zip(valid, image, strict=True))
    theta = maps.new_tensor([[[x, 0, x - 1], [0, y, y - 1]]])
    places = F.affine_grid(theta, [1, maps.shape[1], *grid], align_corners=False)
    options = dict(padding_mode='border', align_corners=False)
    return F.grid_sample(maps, places, **options)[0]


def fused(answers: Sequence[Tensor]) -> Tensor:
    """Fuse the boxes of several teachers or views to (K, 6), the highest score first.

    This is weighted boxes fusion (Solovyev et al., arXiv 1910.13302). Each answer has
    boxes (M, 6), x1 y1 x2 y2 score label.
    """
    from mmdet.models.utils import weighted_boxes_fusion

    # mmdet warns about each box without area, and divides by the sum of the scores
    good = [x[(x[:, 2:4] > x[:, :2]).all(1) & (x[:, 4] > 0)] for x in answers]
    columns = ([x[:, part].tolist() for x in good] for part in (slice(4), 4, 5))
    boxes, scores, labels = weighted_boxes_fusion(*columns)
    return torch.cat([boxes.view(-1, 4), scores[:, None], labels[:, None]], 1)


class Answers:
    """Combine all teachers and views into one answer for an image.

    A single teacher keeps its own classes; several use the student's.
    """

    def __init__(
        self, asked: Sequence[Asked], classes: Sequence[str], min_score: float
    ) -> None:
        self.asked, self.min_score, self.kind = asked, min_score, asked[0].kind
        self.class_names, self.matches = asked[0].names, [ClassMatch()]
        if len(asked) > 1:
            self.class_names = list(classes or asked[0].names)
            self.matches = [x.teacher.match_classes(self.class_names) for x in asked]
        for one, match in zip(asked, self.matches, strict=True):
            if one.kind != self.kind or match.student is not None:
                raise SystemExit(
                    f'The answers of `{one.teacher.name}` and the other teachers '
                    "cannot be combined: each must know all of the student's classes, "
                    'and all must detect boxes or all must segment. Store each in its '
                    'own folder, and list them in `teachers`.'
                )

    def __call__(self, packed: Sequence[Mapping]) -> Tensor:
        """The answer to store for an image that each teacher's pipeline packed."""
        answers, grid = [], None
        for one, match, image in zip(self.asked, self.matches, packed, strict=True):
            with DefaultScope.overwrite_default_scope(one.scope), one.teacher.running():
                views = one.answers(image, grid)
            for found in views:
                if self.kind == 'maps':
                    found = match.select_teacher(found, 0, 'identity')
                    grid = found.shape[-2:]
                else:
                    found[:, 5] = match.common_labels(found[:, 5].long())
                    found = found[(found[:, 5] >= 0) & (found[:, 4] >= self.min_score)]
                answers.append(found)
        if self.kind == 'maps':
            return sum(answers) / len(answers)
        if len(answers) > 1:
            most = max(one.test_cfg.get('max_per_img', 100) for one in self.asked)
            rows = fused(answers)[:most]
            answers = [rows[rows[:, 4] >= self.min_score]]
        return answers[0]
