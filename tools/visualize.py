"""Show what a teacher teaches, and where its student disagrees.

    python tools/visualize.py CONFIG CHECKPOINT [IMAGES ...] --out DIR

CONFIG is a distillation config; CHECKPOINT is its student, distilled or plain. Without
IMAGES, the first samples of `val_dataloader` are shown. For a stored teacher they are
those of `train_dataloader`, augmented, with its answers moved as the images are. DIR
gets a picture of each, and index.html.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from functools import partial
from html import escape
from pathlib import Path

import mmcv
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from mmengine.config import DictAction
from mmengine.dataset import Compose, pseudo_collate
from mmengine.device import get_device
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import set_random_seed
from mmengine.structures import BaseDataElement, InstanceData
from pair_report import describe_comparison, parts, quiet, tell_as_hooks
from scipy.optimize import linear_sum_assignment
from stored_score import in_its_pixels, labels_of
from teacher_score import cannot_score, predictor
from torch import Tensor, nn
from torch.utils.data import Dataset
from train import load_distilling

from mmdist import MODELS, Comparison, Pair, comparisons
from mmdist.checkpoint import load_checkpoint, load_strictly
from mmdist.data.answers import check_images, join
from mmdist.data.labels import inner_datasets
from mmdist.losses import as_rows
from mmdist.losses.correlations.common import Settings, is_constant
from mmdist.losses.correlations.plain import ACTIVATIONS, pearson
from mmdist.record import Recorder
from mmdist.teachers import StoredTeacher, Teacher

NO_CLASSES = comparisons.Features, comparisons.Boxes, comparisons.BoxDistributions
MIN_IOU = 0.5  # of boxes that agree
MOST_CLASSES = 40  # in a legend
COLOURS = {'both': 'lime', 'only teacher': 'blue', 'only student': 'red'}
read = partial(mmcv.imread, channel_order='rgb')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('config', help='path of a config that distils')
    add('checkpoint', help="path or URL of the student's checkpoint")
    add('images', nargs='*', help='image files, shown without labels')
    add('--num', type=int, default=8, help='number of validation samples (default: 8)')
    add('--out', type=Path, required=True, help='the folder of the page')
    text = 'lowest score of a box (default: 0.3)'
    add('--score-thr', type=float, default=0.3, help=text)
    add('--entry', help='entry of `distill` to show: <name>, or <name>_<teacher>')
    add('--cfg-options', nargs='+', action=DictAction, help='key=value of the config')
    parser.set_defaults(launcher='none', work_dir=None)
    args = parser.parse_args()
    if args.num < 1:
        parser.error(f'--num must be at least 1, got {args.num}.')
    for path in args.images:
        if not Path(path).is_file() or mmcv.imread(path) is None:
            parser.error(f'{path} does not exist or is not an image.')
    args.cfg = load_distilling(args, parser)
    return args


def prepare(args: argparse.Namespace) -> tuple[nn.Module, Teacher, Dataset]:
    """Build the distilled model with one comparison, its teacher, and the data set."""
    cfg = args.cfg
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    set_random_seed(cfg.get('randomness', {}).get('seed'))
    if cfg.get('data_preprocessor') is not None:  # as the Runner does
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    model = MODELS.build(cfg.model).to(get_device())
    weights = load_checkpoint(args.checkpoint)
    advice = 'Check that the student was trained with this config.'
    load_strictly(model, weights, args.checkpoint, args.config, advice)
    stored = [t for t in model.teachers.values() if isinstance(t, StoredTeacher)]
    if stored and args.images:
        raise ValueError('A stored teacher knows only training images: omit IMAGES.')
    name = 'train_dataloader' if stored else 'val_dataloader'
    if not (loader := cfg.get(name)):
        raise ValueError(f'{args.config} has no `{name}`.')
    lazy = dict(lazy_init=True) if args.images else {}  # without annotations
    dataset = DATASETS.build({**loader.dataset, **lazy})
    for teacher in stored:
        join(dataset, teacher.store.kind)
        check_images(dataset, teacher.store)
    if not dataset.metainfo.get('classes'):
        raise ValueError('The data set has no class names.')
    tell_as_hooks(dataset.metainfo)
    model._load_teachers()
    model._match_classes()
    found = {
        key: comparison
        for key, comparison in model.distill.items()
        if not isinstance(comparison, NO_CLASSES)
        # an RPN does not know the classes
        and getattr(comparison, 'student_path', '') != 'rpn_head'
    }
    key = args.entry or next(iter(found), None)
    if key not in found:
        raise ValueError(f'Only {[*found]} of `distill` compare classes, not {key!r}.')
    model.distill = nn.ModuleDict({key: found[key]})
    model.distill_terms = {key: model.distill_terms[key]}
    teacher = model.teachers[model.distill_terms[key].teacher]
    if reason := cannot_score(teacher):
        raise ValueError(f"The teacher's predictions cannot be shown: {reason}.")
    return model.eval(), teacher, dataset


def images_of(
    args: argparse.Namespace, dataset: Dataset, is_stored: bool
) -> Iterator[tuple[str, np.ndarray, dict, BaseDataElement | None]]:
    """The images of the page: files, or validation or training samples.

    Yields:
        The path, the RGB pixels (height, width, 3), a batch of this image, and its
        labels in these pixels, if any.
    """
    if args.images:
        cfg = next(inner_datasets(args.cfg.val_dataloader.dataset))
        steps = [s for s in cfg['pipeline'] if 'Annotations' not in str(s['type'])]
        for i, path in enumerate(args.images):
            data = Compose(steps)(dict(img_path=path, img_id=i))
            yield path, read(path), pseudo_collate([data]), None
        return
    for i in range(min(args.num, len(dataset))):
        data = dataset[i]
        sample = data['data_samples']
        labels = sample.clone() if 'gt_sem_seg' in sample else None
        if is_stored:  # all that follows is in pixels of the augmented image
            in_its_pixels(sample)
            pixels = data['inputs'].flip(0).permute(1, 2, 0).byte().numpy()
            if 'gt_instances' in sample:
                labels = sample.clone()
                labels.gt_instances.bboxes = labels.gt_instances.bboxes.tensor
        else:
            pixels, info = read(sample.img_path), dataset.get_data_info(i)
            if 'instances' in info:  # in pixels of the file; the sample's may not be
                labels = type(sample)(gt_instances=labels_of(info))
        yield sample.img_path, pixels, pseudo_collate([data]), labels


@torch.no_grad()
def pairs_of(model: nn.Module, batch: dict) -> tuple[list[Pair], np.ndarray]:
    """The pairs compared in an image, and the unpadded shares of height and width."""
    (comparison,) = model.distill.values()
    data = model.data_preprocessor(copy.deepcopy(batch), training=False)
    (sample,) = data['data_samples']
    # a test pipeline does not scale boxes with the image
    sample.set_metainfo(dict(unlabelled='gt_sem_seg' not in sample))
    # Heads return what a loss needs only in train mode; dropout and batch norm, their
    # submodules, stay in eval mode.
    for part in (model, *parts(model)):
        part.training = True
    with Recorder([comparison]) as recorder:
        model.loss(**data)
    model.eval()
    shares = np.divide(sample.img_shape[:2], data['inputs'].shape[-2:])
    return list(recorder.calls(comparison)[0].args[1]), shares


def probabilities(
    comparison: Comparison, student: nn.Module, pair: Pair
) -> tuple[Tensor, str]:
    """The values that are correlated in a pair, and the activation they come from.

    Returns:
        Scores of student and teacher, (2, rows, columns) in float64, on the CPU.
    """
    loss = comparison.loss
    activation = comparison._loss_cfg.get('activation') or pair.activation
    activation = activation or getattr(loss, 'activation', None)
    activation = activation or comparison.activation(student)
    tau = getattr(loss, 'tau', 1.0)
    both = [as_rows(x).double().cpu() / tau for x in (pair.student, pair.teacher)]
    return torch.stack([ACTIVATIONS[activation](x) for x in both]), activation


def inter_class(scores: Tensor, activation: str, pair: Pair) -> Tensor:
    """Correlation of each pixel, (height, width); NaN for pixels that do not count."""
    values = pearson(*scores, 1, None, Settings(activation))
    if pair.mask is not None:
        values[~pair.mask.flatten().cpu()] = torch.nan
    return values.view(pair.student.shape[-2:])


def gram(scores: Tensor, classes: int, activation: str, mask: Tensor | None) -> Tensor:
    """Count, sums and products over the rows that count, (3, 3, classes)."""
    columns = scores.shape[2]
    # a row has several anchors, with background for softmax; or one class of two
    widths = [classes, classes + 1, 1]
    if activation == 'softmax' and columns != classes:
        widths = widths[1::-1]
    width = next(width for width in widths if columns % width == 0)
    if mask is not None:
        scores = scores[:, mask.flatten().cpu()]
    rows = scores.reshape(2, -1, width)[..., :classes]
    rows = torch.cat([torch.ones_like(rows[:1]), rows])
    return torch.einsum('arc,brc->abc', rows, rows)


def intra_class(gram: Tensor, activation: str) -> Tensor:
    """Correlation of each class, (classes,); NaN where a side is constant."""
    count, sums = gram[0, 0], gram[0, 1:]
    cov = gram[1:, 1:] - sums[:, None] * sums / count
    variances = torch.stack([cov[0, 0], cov[1, 1]])
    constant = is_constant(variances, sums / count, count, activation).any(0)
    return (cov[0, 1] / variances.prod(0).sqrt()).masked_fill(constant, torch.nan)


def agreement(student: InstanceData, teacher: InstanceData) -> dict[str, InstanceData]:
    """Boxes that both have, as the student has them, and those that only one has."""
    from mmdet.structures.bbox import bbox_overlaps

    iou = bbox_overlaps(student.bboxes, teacher.bboxes).nan_to_num()
    iou = iou * (student.labels[:, None] == teacher.labels) * (iou >= MIN_IOU)
    ours, theirs = map(torch.from_numpy, linear_sum_assignment(iou, maximize=True))
    matched = iou[ours, theirs] > 0
    both = [torch.zeros(len(x.labels), dtype=torch.bool) for x in (student, teacher)]
    both[0][ours[matched]] = both[1][theirs[matched]] = True
    groups = student[both[0]], teacher[~both[1]], student[~both[0]]
    return dict(zip(COLOURS, groups, strict=True))


def palette_of(meta: dict) -> list:
    """A colour for each class, RGB from 0 to 255."""
    from mmdet.visualization import get_palette

    return meta.get('palette') or get_palette('random', len(meta['classes']))


def tinted(image: np.ndarray, labels: np.ndarray, palette: list) -> np.ndarray:
    """Tint an image in the colours of its labels, (height, width, 3); void is dark."""
    table = np.zeros((256, 3))
    table[: len(palette)] = palette
    height, width = image.shape[:2]
    labels = mmcv.imresize(labels.astype(np.uint8), (width, height), False, 'nearest')
    return (0.4 * image + 0.6 * table[labels]).astype(np.uint8)


def save(file: Path, panels: dict[str, tuple], legend: dict[str, tuple]) -> None:
    """Write the picture of an image.

    ``panels`` has, by title, an RGB image or correlations, and boxes with their
    colours; ``legend`` the colours of the classes.
    """
    height, width = next(iter(panels.values()))[0].shape[:2]
    figure = Figure((11, 11 * height / width + 1.5), layout='compressed')
    axes = figure.subplots(2, 2).flatten()
    options = dict(cmap='RdBu', vmin=-1, vmax=1, extent=(0, width, height, 0))
    for axis, (title, (values, boxes)) in zip(axes, panels.items(), strict=True):
        shown = axis.imshow(values, **options)  # RGB is shown as it is
        axis.set(title=title, xticks=[], yticks=[], facecolor='grey')
        for (x1, y1, x2, y2), colour in boxes:
            box = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colour, lw=0.8)
            axis.add_patch(box)
    if values.ndim == 2:
        figure.colorbar(shown, ax=axes, location='bottom', shrink=0.5, aspect=40)
    handles = [Patch(color=colour, label=name) for name, colour in legend.items()]
    if handles:
        figure.legend(handles=handles, loc='outside lower center', ncols=8)
    figure.savefig(file, dpi=100, bbox_inches='tight', pil_kwargs=dict(quality=90))


PAGE = """<!DOCTYPE html><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.5 sans-serif; max-width: 1120px; margin: 2em auto }}
td, th {{ padding: 0 1em; text-align: right }} img {{ width: 100% }}
td:first-child, th:first-child {{ text-align: left }} i {{ padding: 0 .5em }}</style>
<h1>{title}</h1><p>The <b>correlation</b> of a class is between its scores by student
and teacher, over {rows} of all images: 1 where the student follows, 0 where it does
not, nan where a side is constant. {how}</p><table>{table}</table>{images}"""
MAP = """<b>Inter-class correlation</b>: 1 (blue) where the student orders the classes
as the teacher does, -1 (red) where it is the opposite. Grey pixels do not count."""
BOXES = f"""<b>Both</b>: boxes of the same class with an IoU of at least {MIN_IOU}; the
student's is drawn. Boxes have a score of at least {{}}."""
STORED = """ The images are augmented training images; the teacher's answers are stored,
and moved like the images."""


def table(
    names: Sequence[str], palette: list, index: list[int], columns: dict[str, Tensor]
) -> Iterator[str]:
    """The rows of the compared classes in HTML, the smallest correlation first."""
    yield ''.join(f'<th>{name}</th>' for name in ('class', *columns))
    for i in columns['correlation'].argsort().tolist():  # NaN comes last
        style = f'background: rgb{tuple(map(int, palette[index[i]]))}'
        cells = [f'<i style="{style}"></i>&ensp;{escape(names[index[i]])}']
        cells += [f'{column[i].item():.4g}' for column in columns.values()]
        yield '<tr>' + ''.join(f'<td>{cell}</td>' for cell in cells)


def main() -> None:
    args = parse_args()
    quiet()
    try:
        model, teacher, dataset = prepare(args)
    except (ValueError, RuntimeError, OSError) as error:
        raise SystemExit(str(error)) from None
    (comparison,) = model.distill.values()
    ask = predictor(model, teacher)
    is_seg = isinstance(comparison, comparisons.SegLogits)
    is_stored = isinstance(teacher, StoredTeacher)
    names, palette = dataset.metainfo['classes'], palette_of(dataset.metainfo)
    classes = len(names)
    colours = {i: tuple(x / 255 for x in palette[i]) for i in range(classes)}
    index = [i for (i,) in teacher.classes.student or zip(range(classes), strict=True)]
    args.out.mkdir(parents=True, exist_ok=True)
    sums, images, counts = 0, [], {name: torch.zeros(classes) for name in COLOURS}
    for n, (path, pixels, batch, labels) in enumerate(
        images_of(args, dataset, is_stored)
    ):
        torch.manual_seed(n)  # proposals may be sampled
        pairs, shares = pairs_of(model, batch)
        for pair in pairs[:1] if is_seg else pairs:  # auxiliary heads follow
            scores, activation = probabilities(comparison, model, pair)
            sums = sums + gram(scores, len(index), activation, pair.mask)
        with torch.no_grad():
            found = model.val_step(copy.deepcopy(batch)) + ask(batch)
        samples = dict(labels=labels, student=found[0], teacher=found[1])
        panels: dict[str, tuple] = {}
        seen: set[int] = set()
        for name, sample in samples.items():
            kind = 'gt' if name == 'labels' else 'pred'
            if sample is None:
                panels['image'] = pixels, ()
            elif is_seg:
                label_map = sample.get(f'{kind}_sem_seg').data[0].cpu().numpy()
                panels[name] = tinted(pixels, label_map, palette), ()
                seen.update(np.unique(label_map).tolist())
            else:
                boxes = sample.get(f'{kind}_instances').cpu()
                if kind == 'pred':
                    boxes.pop('masks', None)
                    boxes = boxes[boxes.scores >= args.score_thr]
                    sample.pred_instances = boxes
                each = list(zip(boxes.bboxes, boxes.labels.tolist(), strict=True))
                panels[name] = pixels, [(x, colours[i]) for x, i in each]
                seen.update(i for _, i in each)
        if is_seg:
            values = inter_class(scores, activation, pair)
            height, width = map(round, np.multiply(values.shape, shares).tolist())
            panels['inter-class correlation'] = values[:height, :width], ()
            text = f'mean inter-class correlation {values.nanmean():.3f}'
        else:
            groups = agreement(*(sample.pred_instances for sample in found))
            for name, boxes in groups.items():
                counts[name] += boxes.labels.bincount(minlength=classes)
            text = ', '.join(f'{name} {len(boxes)}' for name, boxes in groups.items())
            boxes = [(x, COLOURS[name]) for name in groups for x in groups[name].bboxes]
            panels[', '.join(map(': '.join, COLOURS.items()))] = pixels, boxes
        seen = sorted(seen & colours.keys())[:MOST_CLASSES]
        save(args.out / f'{n:03}.jpg', panels, {names[i]: colours[i] for i in seen})
        text = escape(f'{Path(path).name}. {text}')
        images.append(f'<h3>{text}</h3><img src="{n:03}.jpg" alt="{text}">')
    index = index[-sums.shape[2] :]  # one channel scores the second class of two
    means = sums[0, 1:] / sums[0, 0]
    columns = {'correlation': intra_class(sums, activation)}
    columns |= {"student's mean": means[0], "teacher's mean": means[1]}
    columns |= {} if is_seg else {name: x[index] for name, x in counts.items()}
    title = f'{Path(args.config).name}: {describe_comparison(comparison, pairs)}'
    page = PAGE.format(
        title=escape(title),
        rows=f'{sums[0, 0].max():.0f} {"pixels" if is_seg else "anchors or boxes"}',
        how=(MAP if is_seg else BOXES.format(args.score_thr)) + STORED * is_stored,
        table='\n'.join(table(names, palette, index, columns)),
        images='\n'.join(images),
    )
    (args.out / 'index.html').write_text(page)
    print(args.out / 'index.html')


if __name__ == '__main__':
    main()
