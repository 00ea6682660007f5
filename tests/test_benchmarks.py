from __future__ import annotations

import pytest

from benchmarks import __main__ as main
from benchmarks import loss, measure


@pytest.mark.parametrize('activation', ['softmax', 'sigmoid'])
def test_contestants_are_the_same_function(activation):
    loss.check_same(activation)


@pytest.mark.slow
def test_memory_of_the_fast_path():
    shape = (4, 19, 128, 256)
    size = 4 * 4 * 19 * 128 * 256
    fast = loss.peak_of('fast', shape, 'softmax')
    assert size < fast < 1.6 * size
    assert fast < 0.3 * loss.peak_of('textbook', shape, 'softmax')


def test_contestants_take_turns():
    order = []
    times = measure.interleaved({k: lambda k=k: order.append(k) for k in 'ab'}, 0, 5)
    assert set(times) == {'a', 'b'} and order[:2] == ['a', 'b']
    assert all(sorted(order[i : i + 2]) == ['a', 'b'] for i in range(2, 12, 2))


def test_parts_of_the_page_can_be_measured_alone(tmp_path, monkeypatch):
    monkeypatch.setattr('torch.set_num_threads', lambda number: None)
    page = tmp_path / 'benchmarks.md'
    monkeypatch.setattr(
        main.loss, 'speed', lambda seconds, device='cpu': f'SPEED {device}'
    )
    monkeypatch.setattr(main.loss, 'growth', lambda seconds, plot: 'GROWTH')
    for part, number in (
        ('loss', 1),
        ('growth', 2),
        ('loss', 2),
        ('gpu', 3),
        ('loss', 3),
    ):
        monkeypatch.setattr('sys.argv', ['benchmarks', part, '--output', str(page)])
        main.main()
        text = page.read_text()
        assert text.count('Machine: ') == number
        assert ('Not measured' in text) == (number < 3)
    assert text.count('SPEED cpu') == text.count('SPEED cuda') == 1
    assert text.count('GROWTH') == 1
    assert text.count('## On a GPU') == 1
