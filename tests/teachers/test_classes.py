"""Classes are matched by name, or it stops with both lists."""

from __future__ import annotations

import pytest
import torch

from mmdist.teachers.classes import match_classes


def test_equal_classes_need_no_mapping():
    match = match_classes(('a', 'b'), ['a', 'b'])
    logits = torch.rand(2, 2)
    assert all(x is logits for x in match.select(logits, logits))


@pytest.mark.parametrize(
    ('student', 'teacher', 'columns_s', 'columns_t'),
    [
        ('abc', 'cab', [0, 1, 2], [1, 2, 0]),
        ('ca', 'abcd', [0, 1], [2, 0]),
        ('abcd', 'db', [1, 3], [1, 0]),
    ],
)
def test_another_order_or_a_subset_is_mapped_by_name(
    student, teacher, columns_s, columns_t
):
    match = match_classes(list(student), list(teacher))
    # a column holds the number of its class; the last one is the background
    logits_s = torch.tensor([[*map(ord, student), 0]])
    logits_t = torch.tensor([[*map(ord, teacher), 0]])
    selected_s, selected_t = match.select(logits_s, logits_t)
    assert selected_s.tolist() == [[*(ord(student[i]) for i in columns_s), 0]]
    assert torch.equal(selected_s, selected_t)
    assert selected_t.tolist() == [[*(ord(teacher[i]) for i in columns_t), 0]]


def test_other_names_are_mapped_by_class_map():
    match = match_classes(
        ['person', 'car'], ['auto', 'human'], {'person': 'human', 'car': 'auto'}
    )
    assert match.teacher == [1, 0]


def test_classes_that_cannot_be_matched_print_both_lists():
    with pytest.raises(ValueError) as error:
        match_classes(['cat', 'dog'], ['dog', 'cow'])
    for part in ("['cat', 'dog']", "['dog', 'cow']", "['cat']", "['cow']", 'class_map'):
        assert part in str(error.value)
    with pytest.raises(ValueError, match='cannot be matched'):
        match_classes(['cat'], ['dog'])


def test_a_class_map_with_unknown_names_is_an_error():
    with pytest.raises(ValueError, match=r"neither has \['bird'\]"):
        match_classes(['cat'], ['dog'], {'cat': 'bird'})


def test_unknown_names_pass():
    assert match_classes(None, ['a']).teacher is None
