import pytest
import torch
from torch import nn

from mmdist.record import Recorder


def test_direct_calls_of_forward_are_recorded_and_the_instance_is_left_as_it_was():
    linear, other = nn.Linear(2, 3), nn.Linear(2, 3)
    x = torch.ones(1, 2)
    with Recorder([linear, linear]) as recorder:  # watched twice is recorded once
        called = linear(x)
        direct = linear.forward(input=x)
    assert [call.output for call in recorder.calls(linear)] == [called, direct]
    assert recorder.calls(linear)[0].args == (x,)
    assert recorder.calls(linear)[1].kwargs == {'input': x}
    assert recorder.calls(other) == []
    assert 'forward' not in vars(linear)
    linear(x)
    assert len(recorder.calls(linear)) == 2


def test_a_forward_of_the_instances_own_is_kept():
    linear = nn.Linear(2, 3)

    def doubled(x):
        return 2 * nn.Linear.forward(linear, x)

    linear.forward = doubled
    with Recorder([linear]) as recorder:
        output = linear(torch.ones(1, 2))
    assert recorder.calls(linear)[0].output is output
    assert linear.forward is doubled


def test_an_error_inside_leaves_the_instance_as_it_was():
    linear = nn.Linear(2, 3)
    with pytest.raises(RuntimeError), Recorder([linear]):
        linear(torch.ones(1, 5))
    assert 'forward' not in vars(linear)
