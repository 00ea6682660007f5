"""The stages of tools/gpu_check.py, which runs each part of one in its own process."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.cuda.is_available()
DEVICE = 'cuda' if CUDA else 'cpu'
if not CUDA:
    os.environ['TRITON_INTERPRET'] = '1'  # read when Triton is imported
NO_GPU = 'torch finds no CUDA device'


class Skip(Exception):
    """A part does not run here; the message says why."""


class Run(argparse.Namespace):
    """What a part is given, and where it reports to."""

    small: bool
    seconds: float
    work: Path
    out: Path
    results: int

    def row(self, table: str, name: str, **cells) -> None:
        """Report a row of a table; one of the same name is replaced."""
        # a column may be any text
        cells = {key.replace('_', ' ').strip(): value for key, value in cells.items()}
        self.write(dict(table=table, name=name, cells=cells))

    def write(self, what: dict) -> None:
        os.write(self.results, (json.dumps(what) + '\n').encode())


def right(ok: bool, value: object = '') -> dict:
    """What is right or wrong."""
    return dict(value=value, met=bool(ok))


def at_most(value: float, goal: float) -> dict:
    return dict(value=value, goal=f'at most {goal:g}', met=bool(value <= goal))


def at_least(value: float, goal: float) -> dict:
    return dict(value=value, goal=f'at least {goal:g}', met=bool(value >= goal))


def need_gpu(run: Run, small_will_do: bool = True) -> None:
    """Skip what measures a GPU, unless it is only tried."""
    if CUDA or (run.small and small_will_do):
        return
    raise Skip(NO_GPU + ('; --small tries it on the CPU' if small_will_do else ''))


def need_ops() -> None:
    """Skip what needs models where their libraries are not installed.

    Raises:
        Exception: They are there, and do not work.
    """
    from check_env import RUN_OPS

    for name in ('mmcv', 'mmcv.ops', 'mmdet', 'mmseg', 'scipy', 'pycocotools'):
        try:
            __import__(name)
        except ModuleNotFoundError as error:
            raise Skip(f'needs mmcv with its ops, mmdet and mmseg: {error}') from None
    exec(RUN_OPS, {})


# --- 1


def machine(run: Run) -> None:
    from benchmarks import measure

    versions = {}
    for name in ('torch', 'triton', 'numpy', 'mmengine', 'mmcv', 'mmdet', 'mmseg'):
        for prefix in ('', 'onedl-'):
            whole = dict(mmdet='mmdetection', mmseg='mmsegmentation').get(name, name)
            for known in {name, whole} if not prefix else {whole}:
                try:
                    versions[name] = prefix + metadata.version(prefix + known)
                except metadata.PackageNotFoundError:
                    continue
    said = dict(
        python=platform.python_version(),
        **{name: versions.get(name, 'missing') for name in ('torch', 'triton')},
        CUDA_of_torch=torch.version.cuda or 'none',
        cuDNN=torch.backends.cudnn.version() or 'none',
        driver=output('nvidia-smi', '--query-gpu=driver_version', '--format=csv'),
        nvcc=output('nvcc', '--version'),
        others=', '.join(f'{k} {v}' for k, v in versions.items()),
        machine=measure.machine(),
    )
    for name, value in said.items():
        run.row('software', name.replace('_', ' '), is_=value)
    if not CUDA:
        run.row('cards', 'none', why=NO_GPU)
        return
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        run.row(
            'cards',
            f'{i}: {card.name}',
            architecture=f'{card.major}.{card.minor}',
            memory_GiB=card.total_memory / 2**30,
            multiprocessors=card.multi_processor_count,
            L2_MiB=getattr(card, 'L2_cache_size', 0) / 2**20,
            bf16='yes' if torch.cuda.is_bf16_supported() else 'no',
        )
    out, source = torch.empty(2, 2**28, dtype=torch.uint8, device='cuda')
    times = []
    for _ in range(10):
        begin, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        out.copy_(source)
        done.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(done))
    speed = 2 * source.nbytes / (1e-3 * min(times)) / 1e9
    run.row('memory', 'a copy of 256 MiB', read_and_written_GB_per_s=speed)


def output(*command: str) -> str:
    """The last line that a command prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 'not found'
    return (done.stdout.strip().splitlines() or ['nothing'])[-1]


# --- 2

# more rows than a tile has, and more classes than a block
TINY = [(2, 19, 3, 6), (40, 35)]
# all sizes of tiles, images apart and together, many and few classes
SIZES = [
    (8, 19, 128, 256),
    (2, 720, 100, 136),
    (1024, 81),
    (1, 1203, 40, 50),
    (3, 2, 65, 63),
]
HALF = (torch.float16, torch.bfloat16)
# student's type, teacher's type, and how many sizes: the kernels of each are compiled
TYPES = [
    (torch.float32, torch.float32, 5),
    (torch.bfloat16, torch.bfloat16, 3),
    (torch.float16, torch.float16, 1),
    (torch.float64, torch.float64, 1),
    (torch.float32, torch.bfloat16, 1),
    (torch.float16, torch.float32, 1),
]


def predictions() -> object:
    """Hard logits; they are those of the tests."""
    sys.path.append(str(ROOT / 'tests' / 'losses'))
    import predictions

    return predictions


def compare(
    run: Run,
    table: str,
    name: str,
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None = None,
    **options,
) -> None:
    """Report how far the kernels are from the formula in float64."""
    from benchmarks import textbook
    from mmdist.losses import DISTLoss

    rows, given = [], (student, teacher)
    for x in given:
        x = x.detach().double().movedim(1, -1)
        rows.append(x.flatten(0, -2) if mask is None else x[mask])
    rows[0].requires_grad_()
    expected = textbook.dist_loss(*rows, **options)
    expected_grad = torch.autograd.grad(expected, rows[0])[0]

    loss = DISTLoss(eps=1e-8, **options)
    loss.path = 'gpu'
    student = student.detach().requires_grad_()  # keeps the layout
    value = loss(student, teacher, mask)
    grad = torch.autograd.grad(value, student)[0].movedim(1, -1)
    outside = 0.0
    if mask is not None:
        outside = grad[~mask].double().norm().item()
        grad = grad[mask]
    grad = grad.reshape(expected_grad.shape).double()
    value_error = abs(value.item() / expected.item() - 1)
    value_limit = 1e-9 if torch.float64 in (student.dtype, teacher.dtype) else 1e-5
    grad_error = (grad - expected_grad).norm() / expected_grad.norm().clamp(min=1e-5)
    # the gradient is rounded to the type of the logits
    limit = 1e-2 if student.dtype in HALF else 10 * value_limit
    run.row(
        table,
        name,
        value=right(value_error < value_limit, value_error),
        gradient=right(grad_error < limit, grad_error.item()),
        gradient_outside_the_mask=right(outside == 0, outside),
    )


def hard_scores(run: Run) -> None:
    hard = predictions()
    table = 'hard scores: relative errors'
    names, shapes = hard.NAMES, TINY
    if not CUDA:  # interpreted, which takes long
        names, shapes = names[:3], shapes[1:]
    for name, shape, activation in itertools.product(
        names, shapes, ('softmax', 'sigmoid')
    ):
        logits = (x.to(DEVICE) for x in hard.prediction(name, shape))
        title = f'{name}, {shape}, {activation}'
        compare(run, table, title, *logits, activation=activation)


def types_and_sizes(run: Run) -> None:
    from mmdist.losses import correlations

    hard = predictions()
    for (*kind, number), activation in itertools.product(TYPES, ('softmax', 'sigmoid')):
        words = ', '.join(str(x).removeprefix('torch.') for x in kind)
        if CUDA:  # otherwise training would take the slower path, and warn
            works = correlations.kernels_work(torch.device('cuda:0'), *kind, activation)
            run.row('kernels taken', f'{words}, {activation}', is_so=right(works))
        for shape in SIZES[:number] if CUDA else TINY[:1]:
            logits = (
                x.to(DEVICE, dtype)
                for x, dtype in zip(
                    hard.prediction('ordinary', shape), kind, strict=True
                )
            )
            title = f'{words}, {shape}, {activation}'
            table = 'types of student and teacher: relative errors'
            compare(run, table, title, *logits, activation=activation)
    logits = [x.to(DEVICE) for x in hard.prediction('ordinary', TINY[0])]
    table = 'options: relative errors'
    compare(run, table, 'identity', *logits, activation='identity')
    compare(run, table, 'tau 4', *logits, tau=4.0)
    compare(run, table, 'inter alone', *logits, gamma=0.0)
    compare(run, table, 'intra alone', *logits, beta=0.0)


def layouts_and_masks(run: Run) -> None:
    shape = (2, 19, 61, 67) if CUDA else (2, 19, 6, 8)
    student, teacher = (x.to(DEVICE) for x in predictions().prediction('', shape))
    places = (shape[0], *shape[2:])
    some = torch.rand(places, generator=torch.Generator().manual_seed(0)) < 0.5
    some[0, : shape[2] // 2] = False  # whole tiles without a row
    two = torch.zeros(places, dtype=torch.bool)
    two[0, 0, 0] = two[1, 2, 3] = True
    masks = {'half': some, 'no mask': None, 'two rows': two}
    padded = torch.nn.functional.pad(student, (1, 2, 1, 1, 1, 0))
    layouts = {
        'contiguous': student,
        'channels last': student.contiguous(memory_format=torch.channels_last),
        'a part of a larger one': padded[:, 1:, 1:-1, 1:-2],
        'expanded': student[:1].expand(shape),
        'transposed': student.transpose(2, 3).contiguous().transpose(2, 3),
    }
    table = 'layouts of the student: relative errors'
    activations = ('softmax', 'sigmoid')
    if not CUDA:
        masks, activations = {'half': some}, activations[:1]
    for (layout, logits), (name, mask), activation in itertools.product(
        layouts.items(), masks.items(), activations
    ):
        mask = None if mask is None else mask.to(DEVICE)
        title = f'{layout}, {name}, {activation}'
        compare(run, table, title, logits, teacher, mask, activation=activation)
    from mmdist.losses import DISTLoss

    loss = DISTLoss()
    loss.path = 'gpu'
    student = student.clone().requires_grad_()
    value = loss(student, teacher, torch.zeros(places, dtype=torch.bool).to(DEVICE))
    value.backward()
    nothing = value.item() == 0 and not student.grad.any()
    run.row(table, 'no row counts: all is 0', value=right(nothing, value.item()))


def bad_teacher(run: Run) -> None:
    from mmdist.losses import DISTLoss

    loss = DISTLoss()
    loss.path = 'gpu'
    student, teacher = torch.randn(2, 2, 19, 8, 8, device=DEVICE).unbind()
    teacher[0, 3, 2, 1] = math.nan
    mask = torch.ones(2, 8, 8, dtype=torch.bool, device=DEVICE)
    mask[0, 2, 1] = False
    value = loss(student, teacher, mask).item()
    table = 'a teacher that gives NaN'
    run.row(table, 'outside the mask', is_=right(math.isfinite(value), value))
    try:
        loss(student, teacher)
        if CUDA:
            torch.cuda.synchronize()
    except (ValueError, RuntimeError) as error:
        said = f'{type(error).__name__}: {str(error).splitlines()[0]}'
        expected = 'assert' in said if CUDA else 'The teacher gave' in said
        run.row(table, 'inside it', is_=right(expected, said))
    else:
        run.row(table, 'inside it', is_=right(False, 'no error'))
    # On a GPU the process cannot use it any more: nothing may come after this.


# --- 3


def loss_table(run: Run) -> None:
    from benchmarks import loss

    need_gpu(run)
    shapes = loss.SHAPES
    if run.small:
        shapes = [((2, 72, 10, 14), 'sigmoid'), ((64, 81), 'softmax')]
    seconds = 0.1 if run.small else 2.0
    goals, found = loss.GOALS[DEVICE], []
    for one in loss.measured(seconds, DEVICE, shapes):
        found.append(one)
        time, peak = one.time, one.peak
        run.row(
            'logits',
            one.name,
            **{
                'textbook, ms': 1e3 * time['textbook'],
                'plain path, ms': 1e3 * time['plain'],
                'fast path, ms': 1e3 * time['fast'],
                'copy of as many bytes, ms': 1e3 * one.floor,
                'textbook / fast': one.faster,
                'fast / copy': at_most(one.to_floor, goals.floor),
                'peak, fast / textbook': at_most(peak['fast'] / peak['textbook'], 0.25),
                'peak, fast / gradient': at_most(peak['fast'] / one.size, 1.25),
            },
        )
        faster = loss.geometric_mean([x.faster for x in found])
        copies = loss.geometric_mean([x.to_floor for x in found])
        run.row(
            'geometric means of the above',
            'fast path',
            textbook=at_least(faster, goals.faster),
            copy=at_most(copies, goals.floor),
        )


# --- 4


def waits(run: Run) -> None:
    from mmdist.losses import DISTLoss

    need_gpu(run, small_will_do=False)
    shape = (2, 19, 64, 64)
    for dtype, activation, masked in itertools.product(
        (torch.float32, torch.bfloat16), ('softmax', 'sigmoid'), (False, True)
    ):
        student, teacher = torch.randn(2, *shape, device='cuda').to(dtype).unbind()
        student.requires_grad_()
        mask = torch.rand(2, 64, 64, device='cuda') < 0.5 if masked else None
        loss = DISTLoss(activation=activation)
        said = ''
        loss(student, teacher, mask).backward()  # compiles, and tries the kernels
        torch.cuda.set_sync_debug_mode('error')
        try:
            loss(student, teacher, mask).backward()
        except RuntimeError as error:
            said = str(error).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode('default')
        words = f'{dtype}, {activation}'.removeprefix('torch.')
        words += ', masked' if masked else ''
        run.row(
            'forward and backward of DISTLoss', words, waits=right(not said, said or 0)
        )


# --- 5


def step(run: Run, part: str) -> None:
    need_gpu(run)
    need_ops()
    from benchmarks import step

    wanted, compiled = part.removesuffix(', compiled'), part.endswith(', compiled')
    (name,) = (x for x in step.PAIRS if x.startswith(wanted))
    pair = step.PAIRS[name]
    size, seconds = pair.full_size, 2.0
    settings = step.SETTINGS[3:] if compiled else step.SETTINGS[:3]
    if run.small:
        # DINO looks for its 900 queries in the image
        size, seconds = ((256, 256) if 'DINO' in name else (64, 64)), 0.0
        settings = step.SETTINGS[3:4] if compiled else step.SETTINGS[:1]
    table = f'{name}, {size[0]}x{size[1]}, batch of 2'
    for one in step.measured(name, seconds, DEVICE, size, settings):
        if one.error:
            run.row(table, one.setting, does_not_run=one.error)
            continue
        cells = {f'{k}, ms': 1e3 * v for k, v in one.time.items()}
        cells['distilled / both'] = at_most(one.overhead, pair.goals[0])
        if one.peak:
            for k, v in one.peak.items():
                cells[f'peak of {k}, MiB'] = v / 2**20
            cells['peak / what student and teacher need'] = at_most(one.memory, 1.05)
            extra = one.waits['distilled'] - one.waits['both']
            # queries are matched on the CPU
            cells['waits more than both'] = (
                extra if 'DINO' in name else at_most(extra, 0)
            )
        run.row(table, one.setting, **cells)


# --- 6

# A teacher with random weights will do: it is about how training runs.
TRAINING = """
_base_ = 'mmdist::{task}/quickstart/{name}.py'
model = dict(teacher=dict(checkpoint=None, allow_random=True))
{more}
"""


def train(run: Run, config: Path, folder: Path, *options: str, launcher=()) -> list:
    """Train; returns what was logged."""
    from tools import runs

    command = [sys.executable, *launcher, str(ROOT / 'tools' / 'train.py'), str(config)]
    command += ['--work-dir', str(folder), *options]
    subprocess.run(command, cwd=run.work, check=True, env=training_environment())
    return [x for x in runs.read_log(folder) if 'loss' in x]


def training_environment() -> dict[str, str]:
    environment = dict(os.environ)
    if not CUDA:
        environment.pop('TRITON_INTERPRET')
        environment['OMP_NUM_THREADS'] = '1'
    return environment


def make_digits(run: Run) -> None:
    few = ['--train', '32', '--train-few', '32', '--val', '8'] if run.small else []
    command = [sys.executable, str(ROOT / 'tools' / 'make_digits.py'), *few]
    subprocess.run(command, cwd=run.work, check=True)


def is_finite(entries: list[dict]) -> bool:
    values = [v for x in entries for k, v in x.items() if 'loss' in k or 'dist_' in k]
    return bool(values) and all(map(math.isfinite, values))


def amp_ema_resume(run: Run) -> None:
    need_gpu(run)
    need_ops()
    from mmdist.checkpoint import load_checkpoint

    make_digits(run)
    epochs = 1 if run.small else 2
    more = (
        "custom_hooks = [dict(type='EMAHook', momentum=0.01)]\n"
        f'max_epochs = {epochs}\n'
        'train_cfg = dict(max_epochs=max_epochs, val_interval=100)\n'
        "default_hooks = dict(logger=dict(interval=1), checkpoint=dict(type='"
        "CheckpointHook', interval=1, filename_tmpl='epoch_{}.pth'))\n"
    )
    config = run.work / 'det.py'
    config.write_text(
        TRAINING.format(task='det', name='dist_retinanet_w32-w16_digits', more=more)
    )
    amp = ['--amp'] * CUDA  # on a CPU, mmengine has none of fp16
    folder = run.work / 'det'
    table = 'RetinaNet on the digits' + (', AMP fp16' if CUDA else '')
    logged = train(run, config, folder, *amp)
    first, last = logged[0], logged[-1]
    run.row(
        table,
        f'{last["step"]} steps',
        losses_finite=right(is_finite(logged)),
        loss=f'{first["loss"]:.3g} to {last["loss"]:.3g}',
        inter=last['dist_inter'],
        s_per_step=last['time'],
        peak_MiB=last.get('memory', ''),
    )
    longer = [f'train_cfg.max_epochs={epochs + 1}']
    again = train(run, config, folder, *amp, '--resume', '--cfg-options', *longer)
    more_steps = [x['step'] for x in again[len(logged) :]]
    follows = more_steps and more_steps[0] == last['step'] + 1
    run.row(
        table,
        'resumed',
        losses_finite=right(is_finite(again)),
        goes_on=right(follows, f'at step {more_steps[0] if more_steps else None}'),
        loss=f'{again[-1]["loss"]:.3g}',
    )
    checkpoint = load_checkpoint(str(folder / f'epoch_{epochs + 1}.pth'))
    ema = checkpoint.get('ema_state_dict', {})
    state = checkpoint['state_dict']
    finite = [x.isfinite().all().item() for x in (*state.values(), *ema.values())]
    run.row(
        table,
        'its checkpoint',
        finite=right(all(finite), len(finite)),
        teacher_in_it=right(not any('teacher' in key for key in state)),
        mean_of_weights=right(len(ema) >= len(state), len(ema)),
    )


def nccl_syncbn(run: Run) -> None:
    need_gpu(run)
    need_ops()
    make_digits(run)
    steps = 3 if run.small else 30
    more = (
        f'train_cfg = dict(max_iters={steps}, val_interval=1000)\n'
        'default_hooks = dict(logger=dict(interval=1))\n'
        'custom_hooks = []\n'
        'model["distill"] = dict(dist=dict(loss=dict(sync=True)))\n'
        # it needs a GPU
        + ("sync_bn = 'torch'\n" if CUDA else '')
    )
    config = run.work / 'seg.py'
    config.write_text(
        TRAINING.format(task='seg', name='dist_deeplabv3_w32-w8_digits', more=more)
    )
    table = 'DeepLabV3 on the digits' + (', SyncBN, NCCL' if CUDA else ', gloo')
    cards = torch.cuda.device_count() if CUDA else 1
    for processes in (1, 2):
        name = f'{processes} process' + ('es' if processes > 1 else '')
        if processes > cards:
            run.row(table, name, losses_finite=f'not run: {cards} card')
            continue
        launcher = ['-m', 'torch.distributed.run', '--standalone']
        launcher += [f'--nproc_per_node={processes}']
        folder = run.work / f'seg_{processes}'
        logged = train(run, config, folder, '--launcher', 'pytorch', launcher=launcher)
        run.row(
            table,
            name,
            losses_finite=right(len(logged) == steps and is_finite(logged)),
            loss=f'{logged[0]["loss"]:.3g} to {logged[-1]["loss"]:.3g}',
            s_per_step=logged[-1]['time'],
        )


def quickstart(run: Run) -> None:
    need_gpu(run)
    need_ops()
    command = [sys.executable, str(ROOT / 'tools' / 'quickstart.py')]
    command += ['--smoke'] * run.small
    subprocess.run(command, cwd=run.work, check=True, env=training_environment())
    report = (run.work / 'work_dirs' / 'quickstart' / 'report.md').read_text()
    head, _, *rows = [x for x in report.splitlines() if x.startswith('|')]
    titles, *cells = [
        [x.strip() for x in li.strip('|').split('|')] for li in (head, *rows)
    ]
    for line in cells:
        named = dict(zip(titles, line, strict=True))
        run.row('quickstart', ', '.join(line[:2]), **dict([*named.items()][2:]))


# --- 7


def study(run: Run) -> None:
    need_gpu(run, small_will_do=False)
    need_ops()
    if run.data_root is None:
        raise Skip('needs its images, --data-root; see `python -m study --help`')
    minutes = (run.seconds - 30) / 60
    command = [sys.executable, '-m', 'study', '--scale', 'full']
    command += ['--methods', 'alone', 'kl-t1', 'dist', '--budget', f'{minutes:.2f}']
    command += ['--data-root', str(run.data_root), '--work-dir', str(run.work)]
    command += ['--out', str(run.out / 'study')]
    command += ['--weights', str(run.weights)] if run.weights else []
    subprocess.run(command, cwd=ROOT, check=True)
    lines = run.out / 'study' / 'results.jsonl'
    for line in lines.read_text().splitlines() if lines.exists() else ():
        cell = json.loads(line)
        run.row(
            'study',
            f'{cell["task"]}, {cell["method"]}, seed {cell["seed"]}',
            score=cell['score'],
        )


PARTS: dict[str, Callable[[Run], None]] = {
    'machine': machine,
    'hard scores': hard_scores,
    'types and sizes': types_and_sizes,
    'layouts and masks': layouts_and_masks,
    'bad teacher': bad_teacher,
    'loss': loss_table,
    'waits': waits,
    'AMP, EMA, resume': amp_ema_resume,
    'NCCL, SyncBN': nccl_syncbn,
    'quickstart': quickstart,
    'study': study,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('stage', type=int)
    parser.add_argument('part')
    parser.add_argument('--results', type=int, required=True, help='a file descriptor')
    parser.add_argument('--seconds', type=float, required=True)
    parser.add_argument('--work', type=Path, required=True)
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--small', action='store_true')
    parser.add_argument('--data-root', type=Path)
    parser.add_argument('--weights', type=Path)
    run = parser.parse_args(namespace=Run())
    try:
        if run.stage == 5:
            step(run, run.part)
        else:
            PARTS[run.part](run)
    except Skip as skip:
        print(skip, flush=True)
        run.write(dict(skipped=str(skip)))


if __name__ == '__main__':
    main()
