"""Stages 1 to 4: the card, and the loss. They need torch, Triton and mmengine alone."""

from __future__ import annotations

import itertools
import math
import os
import platform
import subprocess
import sys
from importlib import metadata

import torch

from .report import CUDA, DEVICE, NO_GPU, ROOT, Run, at_least, at_most, need_gpu, right

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
    if CUDA:  # the process cannot use the GPU any more, not even to clean up
        sys.stdout.flush()
        os._exit(0)


# --- 3


def loss_table(run: Run) -> None:
    from benchmarks import loss

    need_gpu(run)
    shapes = loss.SHAPES
    if run.small:
        shapes = [((2, 72, 50, 68), 'sigmoid'), ((4, 19, 64, 64), 'softmax')]
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
