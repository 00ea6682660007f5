"""The options of `teacher`, one at a time: a bare forward of a batch of two without
gradient, with random weights. *Weights* is the memory of the teacher's parameters and
buffers. The logits are compared with those of the teacher as it is; their largest
difference is in standard deviations of the logits. *Same class* is the share of pixels
where both predict the same class, a low estimate: random weights leave the classes
close to each other. `dtype='fp16'` is left out: it is for GPUs. On a CPU without fp16
arithmetic, one forward had not finished after a minute.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from mmengine.hub import get_config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor

from benchmarks.measure import interleaved, table
from benchmarks.step import batch
from mmdist.teachers.teacher import Teacher, without_pretrained

TEACHERS = {
    'DeepLabV3 R50': (
        'mmseg::deeplabv3/deeplabv3_r50-d8_4xb2-80k_cityscapes-512x1024.py',
        (128, 256),
    )
}
OPTIONS = {
    'as it is': {},
    "dtype='bf16'": dict(dtype='bf16'),
    'channels_last=True': dict(channels_last=True),
    'compile=True': dict(compile=True),
}


def forward_of(teacher: Teacher, inputs: Tensor) -> Callable[[], Tensor]:
    """The forward of the teacher in a segmentation step."""

    def forward() -> Tensor:
        with teacher.running():
            model = teacher.model
            return model.decode_head(model.extract_feat(inputs)).float()

    return forward


def steps(seconds: float) -> str:
    """The table of the options."""
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    MMLogger.get_current_instance().setLevel('ERROR')
    rows = []
    for name, (path, size) in TEACHERS.items():
        DefaultScope.get_instance(f'teacher {name}', scope_name='mmseg')
        cfg = without_pretrained(get_config(path).model)
        cfg.data_preprocessor.size = size
        torch.manual_seed(0)
        model = revert_sync_batchnorm(MODELS.build(cfg))
        inputs = batch('mmseg', size, model)['inputs']
        rows += rows_of(name, cfg, model, inputs, seconds)
        print('\n'.join(' | '.join(row) for row in rows), flush=True)
    head = ['teacher', 'option', 'time', 'weights', 'logits differ by', 'same class']
    return table(head, rows) + '\n'


def rows_of(
    name: str, cfg: dict, student: torch.nn.Module, inputs: Tensor, seconds: float
) -> list[list[str]]:
    """A row per option of one teacher."""
    forwards, logits, weights, refused = {}, {}, {}, {}
    state = None
    for option, arguments in OPTIONS.items():
        teacher = Teacher(cfg, allow_random=True, **arguments)
        torch.manual_seed(0)
        teacher.load(student)
        state = state or teacher.model.state_dict()  # all have the same weights
        teacher.model.load_state_dict(state)
        forward = forward_of(teacher, inputs)
        try:
            logits[option] = forward()
        except Exception as error:  # a backend without this type, or no compiler
            refused[option] = f'{type(error).__name__}: {str(error).splitlines()[0]}'
            continue
        forwards[option] = forward
        tensors = [*teacher.model.parameters(), *teacher.model.buffers()]
        weights[option] = sum(x.nbytes for x in tensors)
    time = interleaved(forwards, seconds)
    plain = logits['as it is']
    rows = []
    for option in OPTIONS:
        if option in refused:
            rows.append([name, option, f'does not run here: {refused[option]}'])
            rows[-1] += [''] * 3
            continue
        difference = (logits[option] - plain).abs().max() / plain.std()
        same = (logits[option].argmax(1) == plain.argmax(1)).float().mean()
        rows.append(
            [
                name,
                option,
                f'{time[option] / time["as it is"]:.2f}',
                f'{weights[option] / weights["as it is"]:.2f}',
                f'{difference:.1e}',
                f'{100 * same:.1f}%',
            ]
        )
    return rows
