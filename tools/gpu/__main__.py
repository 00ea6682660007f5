"""`python -m tools.gpu STAGE PART`: one part, as `tools/gpu_check.py` runs it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from . import loss, models
from .report import Run, Skip

PARTS: dict[str, Callable[[Run], None]] = {
    'machine': loss.machine,
    'hard scores': loss.hard_scores,
    'types and sizes': loss.types_and_sizes,
    'layouts and masks': loss.layouts_and_masks,
    'bad teacher': loss.bad_teacher,
    'loss': loss.loss_table,
    'waits': loss.waits,
    'AMP, EMA, resume': models.amp_ema_resume,
    'NCCL, SyncBN': models.nccl_syncbn,
    'quickstart': models.quickstart,
    'study': models.study,
}


def main() -> None:
    """Run one part of a stage."""
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
            models.step(run, run.part)
        else:
            PARTS[run.part](run)
    except Skip as skip:
        print(skip, flush=True)
        run.write(dict(skipped=str(skip)))


if __name__ == '__main__':
    main()
