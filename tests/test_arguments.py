"""Arguments of the Distiller in a config: accepted, or refused with a clear error.

`reliability/test_mistakes.py` has the most common mistakes.
"""

from __future__ import annotations

import copy

import pytest
from builders import distilled_config
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmseg.models import build_segmentor

from mmdist.hooks import DistillScheduleHook

SEG = dict(type='mmdist.SegLogits')


@pytest.fixture(scope='module')
def pair(seg_config, tmp_path_factory) -> Config:
    return distilled_config(tmp_path_factory.mktemp('pair'), seg_config)


@pytest.fixture
def config(pair) -> Config:
    init_default_scope('mmseg')
    return copy.deepcopy(pair)


def loss(**options) -> dict:
    return dict(distill=dict(d=dict(**SEG, loss=options)))


def entry(**arguments) -> dict:
    return dict(distill=dict(d=arguments))


def several(*names, **entries) -> dict:
    teachers = {name: dict(config='x.py') for name in names}
    return dict(teacher=None, teachers=teachers, distill=entries)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(decode_heat={}), r"'decode_heat'\. Did you mean 'decode_head'\?"),
        (dict(distill={}), '`distill` must be a dict of name -> config'),
        (dict(distill=dict(pop=SEG)), "entry name 'pop'.* not a method of a dict"),
        (dict(distill={'loss': SEG}), "`distill` .* entry name 'loss'"),
        (dict(distill={'my_loss': SEG}), "`distill` .* entry name 'my_loss'"),
        (dict(distill={'a.b': SEG}), r"`distill` .* entry name 'a\.b'"),
        (dict(distill={'': SEG}), "`distill` .* entry name ''"),
        (dict(student=None), 'such as `student=_base_.model`'),
        (dict(student=dict(num=1)), 'such as `student=_base_.model`'),
        (loss(beta=1), r'`distill\.d\.loss` has the unknown loss type None'),
        (entry(**SEG, loss='mmdist.DISTLoss'), r'`distill\.d\.loss` must be a dict w'),
        (entry(**SEG, aux_weight='1'), "'aux_weight' must be a number, got '1'"),
        (
            several('b_c', 'c', a=SEG, a_b=SEG),
            "'a_b_c' is ambiguous: entry 'a' with teacher 'b_c', or entry 'a_b' with",
        ),
        *(
            (several('a', 'b', d=dict(**SEG, from_teacher=weights)), 'weights .* must')
            for weights in (dict(a=0, b=0), dict(a='1'), dict(a=float('inf')))
        ),
        (
            several('a', 'b', d=dict(**SEG, from_teacher=['a'])),
            r"the name of a teacher or a dict of name -> weight, got \['a'\]",
        ),
        (several(d=SEG), '`teachers` must be a dict of name'),
        (entry(type='DenseLogits'), r"'DenseLogits'\. .*mean 'mmdist\.DenseLogits'\?"),
        (entry(type='mmdist.Attention'), r"type 'mmdist\.Attention'\..* mmdist has "),
        (entry(type='mmdist.DISTLoss'), r"comparison type 'mmdist\.DISTLoss'"),
        (entry(loss=dict(type='mmdist.DISTLoss')), r'`distill\.d` .* type None'),
        (
            dict(distill=dict(d='mmdist.SegLogits')),
            r"`distill\.d` must be a dict with a `type`, got 'mmdist\.SegLogits'",
        ),
        (
            entry(**SEG, resizes='label'),
            r"'resizes'\. Did you mean 'resize'\? It takes",
        ),
    ],
)
def test_a_mistake_ends_in_a_sentence(config, changes, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build({**config.model, **changes})


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(points=5), 'increasing times'),
        (dict(points=[(5, 1.0), (2, 0.0)]), 'increasing times'),
        (dict(points=[(0, -1.0)]), 'increasing times'),
    ],
)
def test_a_mistake_in_the_schedule_ends_in_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        DistillScheduleHook(**options)


def test_students_that_are_taken(config):
    """A config's path, and a config that distils already, whose student is taken."""
    plain = MODELS.build(config.model.student)
    for student in (config.model.teacher.config, config.filename, config.model):
        model = MODELS.build({**config.model, 'student': student})
        assert list(model.state_dict()) == list(plain.state_dict())
        assert model.student_class is type(plain)
    with pytest.raises(FileNotFoundError, match=r"^`student` is 'none\.py', but there"):
        MODELS.build({**config.model, 'student': 'none.py'})


def test_arguments_of_none_that_the_apis_set_leave_the_students(config):
    """mmseg's builder passes None for both by default."""
    for key in ('train_cfg', 'test_cfg'):
        assert config.model.student[key] is not None
    model = build_segmentor(config.model)
    assert model.test_cfg == config.model.student.test_cfg
    assert model.train_cfg == config.model.student.train_cfg
