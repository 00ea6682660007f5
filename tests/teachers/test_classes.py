"""Classes are matched by name; if that fails, the error prints both lists."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmseg.datasets import ADE20KDataset, CityscapesDataset
from scipy.special import expit, logit, softmax

from mmdist.teachers import Teacher
from mmdist.teachers.classes import ClassMatch, match_classes

FEW = ('person', 'car')
MANY = ('person', 'bicycle', 'car')
TWO, PETS = ['cat', 'train'], ['car', 'cat', 'dog']


@pytest.mark.parametrize(
    ('student', 'teacher', 'columns_s', 'columns_t'),
    [
        ('ab', 'ab', [0, 1], [0, 1]),
        ('abc', 'cab', [0, 1, 2], [1, 2, 0]),
        ('ca', 'abcd', [0, 1], [2, 0]),
        ('abcd', 'db', [1, 3], [1, 0]),
    ],
)
def test_another_order_or_a_subset_is_mapped_by_name(
    student, teacher, columns_s, columns_t
):
    match = match_classes(list(student), list(teacher))
    # each column holds its class's letter as a number
    logits_s = torch.tensor([[*map(ord, student)]])
    logits_t = torch.tensor([[*map(ord, teacher)]])
    selected_s, selected_t = match.select(logits_s, logits_t)
    assert selected_s.tolist() == [[ord(student[i]) for i in columns_s]]
    assert torch.equal(selected_s, selected_t)
    assert selected_t.tolist() == [[ord(teacher[i]) for i in columns_t]]
    assert (selected_t is logits_t) == (student == teacher)  # nothing is copied


# ---- classes that only one side knows --------------------------------------------


@pytest.mark.parametrize('offset', [0.0, 300.0, -300.0])
@pytest.mark.parametrize('dim', [1, 2])
def test_probabilities_of_a_softmax_are_added(dim, offset):
    logits = 5 * torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(0))
    match = match_classes(['d', 'a'], list('abcde'))
    _, selected = match.select(logits.narrow(dim, 0, 3), logits + offset, dim)
    p = softmax(np.moveaxis(logits.double().numpy(), dim, -1), -1)
    expected = np.stack(
        [p[..., 3], p[..., 0], p[..., 1] + p[..., 2] + p[..., 4] + p[..., 5]], -1
    )
    actual = softmax(np.moveaxis(selected.double().numpy(), dim, -1), -1)
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_half_precision_does_not_round_the_background():
    logits = torch.full((1, 1001), 4.0, dtype=torch.bfloat16)
    classes = [str(i) for i in range(1000)]
    _, selected = match_classes(classes[:1], classes).select(logits[:, :2], logits)
    np.testing.assert_allclose(
        softmax(selected.double().numpy(), 1), [[1 / 1001, 1000 / 1001]], rtol=1e-5
    )


def test_probabilities_as_such_are_added():
    teacher = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    match = match_classes(FEW, MANY)
    _, selected = match.select(teacher[:, :3], teacher, activation='identity')
    np.testing.assert_allclose(selected, [[0.1, 0.3, 0.6]], rtol=1e-6)


def test_independent_scores_stay_as_they_are():
    """Sigmoid scores, and scores without a background column."""
    teacher = torch.tensor(logit([[0.1, 0.9, 0.3]]))
    match = match_classes(FEW, MANY)
    for activation in ('sigmoid', 'softmax', 'identity'):
        _, selected = match.select(teacher[:, :2], teacher, activation=activation)
        np.testing.assert_allclose(expit(selected.numpy()), [[0.1, 0.3]])


def test_where_a_teacher_mostly_sees_what_the_student_does_not_know():
    """There, a softmax over the shared classes would compare two tiny probabilities."""
    probabilities = torch.tensor(
        [[0.3, 0.4, 0.3], [0.3, 0.6, 0.1], [0.0, 0.98, 0.02], [0.02, 0.0, 0.98]]
    )
    mostly_known = [True, False, False, True]
    match = match_classes(FEW, MANY)
    assert match.mostly_known(probabilities.log()).tolist() == mostly_known
    assert (
        match.mostly_known(7 * probabilities, activation='identity').tolist()
        == mostly_known
    )
    maps = probabilities.T.reshape(1, 3, 2, 2).log()
    assert match.mostly_known(maps).tolist() == [[[True, False], [False, True]]]


@pytest.mark.parametrize('student', [MANY, MANY[::-1], (*MANY, 'dog')])
def test_a_teacher_whose_classes_are_all_known_counts_everywhere(student):
    teacher = torch.rand(2, 3)
    assert match_classes(student, MANY).mostly_known(teacher) is None
    assert ClassMatch().mostly_known(teacher) is None
    assert match_classes(FEW, MANY).mostly_known(teacher, activation='sigmoid') is None


# ---- class_map -------------------------------------------------------------------


@pytest.mark.parametrize(
    ('student', 'teacher', 'class_map', 'message'),
    [
        # the message prints both lists
        (
            *(['cat', 'dog'], ['dog', 'cow'], None),
            r'(?s)cannot be matched.*\(2\): cat, dog\n.*\(2\): dog, cow\n'
            r'.*the student \(1\): cat\n.*the teacher \(1\): cow\n',
        ),
        (['cat'], ['dog'], None, 'cannot be matched'),
        # unknown names; the student has a 'train', which does not help
        (TWO, ['dog'], {'cat': 'bird'}, r"the teacher has no class \['bird'\]\."),
        (TWO, ['dog'], {'cat': 'train'}, r"the teacher has no class \['train'\]\."),
        (TWO, ['dog'], {'dog': 'dog'}, r"the student has no class \['dog'\]\."),
        (
            *(TWO, ['dog'], {'cow': 'bee', 'ant': 'dog'}),
            r"\['ant', 'cow'\] and the teacher has no class \['",
        ),
        # a column that is used twice would distort every softmax over its row
        (
            *(PETS, ['car', 'animal'], {'cat': 'animal', 'dog': 'animal'}),
            r"student's \['cat', 'dog'\] .* 'animal'",
        ),
        (PETS, ['car', 'animal'], {'cat': 'car'}, r"'s \['car', 'cat'\] .* 'car'"),
        (
            *(PETS, ['car', 'animal'], {'cat': ['car', 'animal']}),
            r"student's \['car', 'cat'\] .* 'car'",
        ),
        (['car', 'dog', 'dog'], FEW, None, r"of the same name: \['dog'\]"),
        (FEW, ['car', 'person', 'car'], None, r"of the same name: \['car'\]"),
        (['car', None], FEW, None, r'of the student must be strings, got \['),
    ],
)
def test_what_cannot_be_matched_is_refused(student, teacher, class_map, message):
    with pytest.raises(ValueError, match=message):
        match_classes(student, teacher, class_map)


@pytest.mark.parametrize(
    ('student', 'teacher', 'whose'),
    [(None, 'd', 'the student'), ('c', None, 'the teacher'), (None, None, 'both')],
)
def test_a_class_map_needs_the_names_of_both_sides(student, teacher, whose):
    with pytest.raises(ValueError, match=f'class names of {whose} are unknown'):
        match_classes(student, teacher, {'c': 'd'})
    with pytest.raises(ValueError, match='`class_match` match classes by name'):
        match_classes(student, teacher, {}, 'shared')
    assert match_classes(student, teacher, {}) == ClassMatch()


def test_the_name_of_a_single_class_may_be_a_string():
    """A data set with `classes='tree'` stores a string in its metainfo."""
    assert match_classes(None, ['a']).teacher is None  # unknown names pass
    assert match_classes(['a', 'a'], ['a', 'a']) == ClassMatch()
    assert match_classes('tree', ('tree',)) == ClassMatch()
    assert match_classes(['tree'], ['car', 'tree']).teacher == [(1,)]
    assert match_classes('tree', ['car', 'tree']).teacher == [(1,)]


# ---- several names for one class, and shared classes -------------------------------

VEHICLES = ['person', 'car', 'truck', 'bus', 'dog']
MAP = {'vehicle': ['car', 'truck', 'bus']}


@pytest.mark.parametrize('background', [False, True])
@pytest.mark.parametrize('order', [['person', 'vehicle'], ['vehicle', 'person']])
def test_several_classes_of_the_teacher_are_one_of_the_students(background, order):
    """Their probabilities are added; unknown classes count as background."""
    logits = 4 * torch.randn(6, 5 + background, dtype=torch.float64)
    _, selected = match_classes(order, VEHICLES, MAP).select(logits[:, :3], logits)
    p = softmax(logits.numpy(), 1)
    columns = {'person': p[:, 0], 'vehicle': p[:, 1:4].sum(1)}
    expected = [columns[name] for name in order]
    if background:
        expected.append(p[:, 4:].sum(1))
    expected = np.stack(expected, 1)
    np.testing.assert_allclose(
        softmax(selected.numpy(), 1), expected / expected.sum(1, keepdims=True)
    )


def test_of_independent_scores_the_largest_counts():
    logits = torch.randn(6, 5, dtype=torch.float64)
    match = match_classes(['person', 'vehicle'], VEHICLES, MAP)
    _, selected = match.select(logits[:, :2], logits, activation='sigmoid')
    expected = np.stack([logits[:, 0], logits[:, 1:4].numpy().max(1)], 1)
    np.testing.assert_array_equal(selected, expected)


def test_what_both_know_is_compared_if_asked_for():
    student, teacher = ['person', 'car', 'drone'], ['car', 'cat', 'person']
    match = match_classes(student, teacher, class_match='shared')
    a, b = match.select(torch.tensor([[0, 1, 2]]), torch.tensor([[1, 9, 0]]))
    assert a.tolist() == b.tolist() == [[0, 1]]
    text = match.describe(student, teacher)
    assert text == (
        'Classes that are compared (2): person, car. '
        'Only the student knows (1): drone. Only the teacher knows (1): cat.'
    )

    # with a background, a class that only one side knows is background to the other
    p = softmax(np.arange(4.0)[None], 1)
    a, b = match.select(torch.arange(4.0)[None], torch.arange(4.0)[None])
    np.testing.assert_allclose(
        softmax(a.numpy(), 1), [[p[0, 0], p[0, 1], p[0, 2] + p[0, 3]]], rtol=1e-6
    )
    np.testing.assert_allclose(
        softmax(b.numpy(), 1), [[p[0, 2], p[0, 0], p[0, 1] + p[0, 3]]], rtol=1e-6
    )
    with pytest.raises(ValueError, match='cannot be matched') as error:
        match_classes(['a'], ['b'], class_match='shared')
    assert 'shared' not in str(error.value)


def test_the_error_offers_shared_classes_and_close_names():
    with pytest.raises(ValueError) as error:
        match_classes(['person', 'Motor_bike', 'drone'], ['person', 'motorbike', 'cat'])
    assert "similar names: {'Motor_bike': 'motorbike'}" in str(error.value)
    assert "`teacher.class_match='shared'`" in str(error.value)


def test_ade20k_teaches_cityscapes():
    config = Config.fromstring(
        "_base_ = 'mmdist::_base_/class_maps/cityscapes_from_ade20k.py'", '.py'
    )
    cityscapes, ade20k = (
        dataset.METAINFO['classes'] for dataset in (CityscapesDataset, ADE20KDataset)
    )
    match = match_classes(cityscapes, ade20k, config.class_map, 'shared')
    left_out = {'traffic sign', 'rider', 'train', 'wall'}
    compared = [cityscapes[i] for (i,) in match.student]
    assert compared == [name for name in cityscapes if name not in left_out]
    car = match.teacher[compared.index('car')]
    assert [ade20k[i] for i in car] == ['car', 'van']
    text = match.describe(cityscapes, ade20k, most=3)
    assert 'other names (5): building <- building + house + skyscraper, ' in text
    assert text.endswith('teacher knows (126): wall, floor, ceiling and 123 more.')

    with pytest.raises(ValueError, match='cannot be matched') as error:
        match_classes(cityscapes, ade20k)
    assert "'mmdist::_base_/class_maps/cityscapes_from_ade20k.py'" in str(error.value)
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize(
    'class_map',
    [
        *([('car', 'auto')], 'car', {'car': 3}, {'car': None}, {1: 'auto'}),
        *({'car': {'auto', 'van'}}, {'car': ['auto', 'auto']}, {'car': [['auto']]}),
    ],
)
def test_a_class_map_of_another_form_is_refused(class_map):
    """A name listed twice would count twice."""
    with pytest.raises(ValueError, match=r'`teacher.class_map` must be a dict .*, got'):
        Teacher({}, class_map=class_map)


# ---- a loaded teacher --------------------------------------------------------------


def test_names_of_a_teacher_that_is_loaded(det_config, tmp_path, monkeypatch):
    """One per class of its head; a column without a name would count as background."""
    (tmp_path / 'config.py').write_text(det_config)
    teacher = Teacher(str(tmp_path / 'config.py'), str(tmp_path / 'a.pth'))
    model = teacher.build()
    for names, right in (('ab', False), ('abcd', False), ('abc', True)):
        meta = dict(dataset_meta=dict(CLASSES=list(names)))
        torch.save(dict(state_dict=model.state_dict(), meta=meta), teacher.checkpoint)
        message = f'{len(names)} class names .* but its head has 3 classes'
        with nullcontext() if right else pytest.raises(ValueError, match=message):
            teacher.load(model)

    logged = []
    monkeypatch.setattr(
        'mmdist.teachers.teacher.print_log', lambda text, *_, **__: logged.append(text)
    )
    teacher.match_classes(list('abc'))
    assert not logged
    teacher.match_classes(list('ba'))
    assert logged == [
        'mmdist: `teacher`. Classes that are compared (2): b, a. Only the teacher '
        'knows (1): c.'
    ]


def test_an_empty_list_leaves_a_class_out():
    match = match_classes(['wall', 'car'], ['car', 'wall'], {'wall': []}, 'shared')
    assert (match.student, match.teacher) == ([(1,)], [(0,)])
