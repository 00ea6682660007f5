"""Errors about misspelt names suggest the right one."""

import pytest

from mmdist.lookup import check_arguments, did_you_mean, in_words


def teacher(config, checkpoint=None, *, views=()):
    pass


def loss(weight: float = 1.0, least: 'int | None' = 3, kind: str = ''):
    pass


def open_ended(config, *args, **kwargs):
    pass


@pytest.mark.parametrize(
    ('word', 'known', 'said'),
    [
        ('chekpoint', ['config', 'checkpoint'], " Did you mean 'checkpoint'?"),
        ('DISTLoss', ['mmdist.DISTLoss'], " Did you mean 'mmdist.DISTLoss'?"),
        ('mmdist.seglogit', ['mmdist.SegLogits'], " Did you mean 'mmdist.SegLogits'?"),
        ('zebra', ['config', 'checkpoint'], ''),
        (None, ['config'], ''),
    ],
)
def test_did_you_mean_names_the_nearest(word, known, said):
    assert did_you_mean(word, known) == said


@pytest.mark.parametrize(
    ('function', 'cfg', 'said'),
    [
        (
            teacher,
            dict(config='a', chekpoint='b'),
            "unknown argument 'chekpoint'. Did you mean 'checkpoint'? It takes "
            'config, checkpoint, views.',
        ),
        (
            teacher,
            dict(checkpoint='b'),
            "the argument 'config' is missing. It takes config, checkpoint, views.",
        ),
        (lambda: None, dict(a=1), "unknown argument 'a'. It takes no arguments."),
        (loss, dict(weight='1'), "'weight' must be a number, got '1'."),
        (loss, dict(weight=None), "'weight' must be a number, got None."),
        (loss, dict(least=[1]), "'least' must be a number, got [1]."),
    ],
)
def test_check_arguments_says_what_is_wrong(function, cfg, said):
    with pytest.raises(ValueError) as error:
        check_arguments('teacher', function, cfg)
    assert str(error.value) == f'`teacher`: {said}'


def test_check_arguments_passes_what_can_be_called():
    check_arguments(
        'teacher', teacher, dict(type='Teacher', config='a', views=['flip'])
    )
    check_arguments('teacher', open_ended, dict(config='a', anything=1))
    check_arguments('teacher', teacher, dict(checkpoint='b'), given=['config'])
    check_arguments('teacher', loss, dict(weight=2, least=None, kind='a'))


def test_a_class_without_arguments_says_so():
    class Hook:
        pass

    with pytest.raises(ValueError, match=r'`Hook`: unknown .*takes no arguments'):
        in_words(Hook)(seed=1)
