"""Random logits on all paths, against the published formula in float64."""

from __future__ import annotations

import numpy as np
import published
import torch
from predictions import LAYOUTS, run

CASES = {'plain': 500, 'cpu': 700, 'cpu in many tiles': 500, 'gpu': 24}
# what each dtype rounds away, relative to the gradient's norm
ROUNDING = {
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
    torch.float32: 2e-4,
    torch.float64: 1e-4,
}
VALUE = {torch.float64: 1e-6}


def random_case(rng: np.random.Generator) -> dict:
    classes = int(rng.choice([1, 2, 3, 4, 5, 6, 19, 80]))
    shape = [
        (int(rng.integers(1, 60)), classes),
        (int(rng.integers(1, 4)), classes, *rng.integers(1, 6, 2).tolist()),
        (2, classes, int(rng.integers(1, 20))),
    ][rng.integers(3)]
    # from nearly uniform scores to fully saturated rows
    scale = np.exp(rng.uniform(np.log(1e-2), np.log(18)))
    offset = rng.choice([0.0, -4.6, 8.0])
    agreement = rng.uniform(-1, 1.5)
    noise, teacher = rng.normal(size=(2, *shape)) * scale
    student = agreement * teacher + noise + offset
    dtype = list(ROUNDING)[rng.integers(4)]
    student, teacher = (
        LAYOUTS[str(rng.choice(list(LAYOUTS)))](torch.tensor(x).to(dtype))
        for x in (student, teacher + offset)
    )
    mask = None
    if rng.random() < 0.5:
        mask = torch.tensor(rng.random((shape[0], *shape[2:])) < rng.uniform(0.1, 1))
        mask.view(-1)[rng.integers(mask.numel())] = True
    return dict(
        student=student,
        teacher=teacher,
        mask=mask,
        settings=dict(
            activation=str(rng.choice(['softmax', 'sigmoid', 'identity'])),
            tau=float(np.exp(rng.uniform(np.log(0.5), np.log(20)))),
            eps=float(rng.choice([0.0, 1e-8])),
        ),
    )


def needs_float64(student, teacher, mask, settings) -> bool:
    """Whether fp32 rounds away what centring leaves of the scores."""
    keep = slice(None) if mask is None else mask.numpy().reshape(-1)
    activation, tau = settings['activation'], settings['tau']
    for x in (student, teacher):
        x = published.scores(x.detach().double().numpy(), activation, tau)[keep]
        for rows in (x, x.T):
            with np.errstate(divide='ignore', invalid='ignore'):
                inverse = np.nan_to_num(rows.mean(1) / rows.std(1), posinf=np.inf)
            if np.abs(inverse).max() > 100:
                return True
    return False


def test_random_logits(path, make_loss):
    rng = np.random.default_rng(0)
    compared = 0
    for number in range(CASES[path]):
        case = random_case(rng)
        student, teacher, mask, settings = case.values()
        dtype = student.dtype
        if path == 'plain' and dtype != torch.float64 and needs_float64(**case):
            continue  # it is all fp32
        compared += 1
        value, grad = run(make_loss(**settings), student, teacher, mask)
        oracle, gradient, size = published.value_and_gradient(
            *(x.detach().double().numpy() for x in (student, teacher)),
            mask=None if mask is None else mask.numpy(),
            **settings,
        )
        what = f'case {number}: {tuple(student.shape)}, {dtype}, {settings}'
        error = abs(value.item() - oracle) / settings['tau'] ** 2
        assert error < VALUE.get(dtype, 2e-5), what
        # a gradient below the smallest number of its dtype is 0
        nothing = torch.finfo(dtype).smallest_normal * gradient.size**0.5
        error = np.linalg.norm(grad.double().numpy() - gradient)
        bound = ROUNDING[dtype] * np.linalg.norm(gradient) + 1e-5 * size + nothing
        assert error < bound, f'{what}: {error:.1e} >= {bound:.1e}'
    assert compared > CASES[path] / 3
