"""tools/visualize.py: the page of real pairs, its numbers, and its errors."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pairs
import pytest
import torch
from mmengine.structures import InstanceData
from pairs import SLOW
from scipy.stats import pearsonr

from mmdist import MODELS, Pair
from mmdist.teachers.teacher import build_model, load_config

NO_VALIDATION = [f'val_{name}=None' for name in ('dataloader', 'cfg', 'evaluator')]


class Result(NamedTuple):
    text: str  # its error and what it printed to stderr
    page: str
    correlations: dict[str, float]  # by class, in the page's order


@pytest.fixture
def visualize(run_tool, tmp_path):
    def run(*args: str, status: int = 0) -> Result:
        ran = run_tool('visualize', *args, '--out', 'page', status=status)
        file = tmp_path / 'page' / 'index.html'
        page = unescape(file.read_text()) if file.exists() else ''
        rows = re.findall(r'</i>\s*(\w+)</td><td>([-.\dna]+)</td>', page)
        found = {name: float(value) for name, value in rows}
        return Result(ran.said, page, found)

    return run


@pytest.fixture
def tool(tools):
    """The tool as a module."""
    import visualize

    return visualize


def write_pair(folder: Path, student: str, same: bool = False, distill: str = ''):
    """Like :func:`pairs.write_pair`, with `teacher.pth` and `student.pth`."""
    pairs.write_pair(folder, student, distill=distill)
    # the large std makes scores vary
    pairs.write_weights(folder, 'teacher', seed=1, std=0.1)
    pairs.write_weights(folder, 'student', seed=1 if same else 2, std=0.1)


def check_pictures(folder: Path, number: int) -> None:
    files = sorted(folder.glob('*.jpg'))
    assert [file.name for file in files] == [f'{i:03}.jpg' for i in range(number)]
    for file in files:
        image = cv2.imread(str(file))
        assert image.shape[1] > 900 and image.std() > 20
        assert file.stat().st_size < 1_000_000  # noise


@pytest.mark.slow
def test_segmentors(visualize, tmp_path, seg_config):
    write_pair(tmp_path, seg_config)
    found = visualize('pair.py', 'student.pth', '--num', '2')
    check_pictures(tmp_path / 'page', 2)
    assert 'SegLogits with DISTLoss, softmax' in found.page
    assert '320 pixels' in found.page  # of 2 x 12x16, without void labels
    assert sorted(found.correlations) == ['road', 'sky', 'tree']
    values = list(found.correlations.values())
    assert values == sorted(values) and values[0] < 0.999
    assert found.page.count('<img src="00') == 2
    assert '<script' not in found.page
    assert str(tmp_path) not in found.page


def test_images_of_segmentors_against_numpy(visualize, tmp_path, seg_config, seg_root):
    write_pair(tmp_path, seg_config)
    files = [str(seg_root / 'images' / f'{i}.png') for i in range(2)]
    found = visualize('pair.py', 'student.pth', *files)
    check_pictures(tmp_path / 'page', 2)
    assert '384 pixels' in found.page  # all: there are no labels
    outputs = [
        probabilities_of(tmp_path, name, files) for name in ('student', 'teacher')
    ]
    for i, name in enumerate(('sky', 'road', 'tree')):
        student, teacher = (x[:, i].flatten() for x in outputs)
        assert found.correlations[name] == pytest.approx(
            np.corrcoef(student, teacher)[0, 1], abs=2e-4
        )
    for n in range(2):
        student, teacher = (x[n].reshape(3, -1).T for x in outputs)
        mean = np.mean(
            [pearsonr(*row)[0] for row in zip(student, teacher, strict=True)]
        )
        text = re.search(
            rf'{n}\.png\. mean inter-class correlation ([-.\d]+)', found.page
        )
        assert float(text[1]) == pytest.approx(mean, abs=1e-3)


def probabilities_of(folder: Path, name: str, files: list[str]) -> np.ndarray:
    """A plain model's class probabilities, (images, classes, height, width)."""
    model = build_model(load_config(folder / 'student.py')).eval()
    model.load_state_dict(torch.load(folder / f'{name}.pth')['state_dict'])
    outputs = []
    for file in files:
        image = torch.from_numpy(cv2.imread(file)).permute(2, 0, 1)
        inputs = model.data_preprocessor(dict(inputs=[image]))['inputs']
        with torch.no_grad():
            logits = model.decode_head.forward(model.extract_feat(inputs))
        outputs.append(logits.double().softmax(1).numpy())
    return np.concatenate(outputs)


def test_detectors(visualize, tmp_path, det_config):
    write_pair(tmp_path, det_config)
    found = visualize('pair.py', 'student.pth', '--num', '2')
    check_pictures(tmp_path / 'page', 2)
    assert 'DenseLogits with DISTLoss, sigmoid' in found.page
    # 9 anchors at each location of five levels of 128x96
    locations = sum(h * w for h, w in ((12, 16), (6, 8), (3, 4), (2, 2), (1, 1)))
    assert f'{2 * 9 * locations} anchors' in found.page
    assert sorted(found.correlations) == ['car', 'dog', 'person']
    assert re.search(
        r'1\.png\. both \d+, only teacher \d+, only student \d+', found.page
    )


def test_a_copy_of_the_student_agrees_everywhere(visualize, tmp_path, det_config):
    write_pair(tmp_path, det_config, same=True)
    found = visualize('pair.py', 'student.pth', '--num', '1')
    assert set(found.correlations.values()) == {1.0}
    assert re.search('both [1-9].*, only teacher 0, only student 0<', found.page)


def test_map_against_scipy(tool):
    torch.manual_seed(0)
    comparison = MODELS.build(dict(type='mmdist.SegLogits'))
    mask = torch.ones(1, 5, 6, dtype=torch.bool)
    mask[0, 1, 2] = False
    pair = Pair(torch.randn(1, 4, 5, 6), torch.randn(1, 4, 5, 6), mask)
    scores, activation = tool.probabilities(comparison, None, pair)
    values = tool.inter_class(scores, activation, pair)
    assert values.shape == (5, 6)
    student, teacher = pair.student.softmax(1)[0], pair.teacher.softmax(1)[0]
    for y, x in ((0, 0), (2, 5), (4, 3)):
        expected = pearsonr(student[:, y, x].numpy(), teacher[:, y, x].numpy())[0]
        assert values[y, x].item() == pytest.approx(expected, abs=1e-5)
    assert values[1, 2].isnan() and values.isnan().sum() == 1


@pytest.mark.parametrize(
    ('columns', 'activation', 'width'),
    [
        (3, 'softmax', 3),  # pixels
        (4, 'softmax', 4),  # proposals, with the background
        (27, 'sigmoid', 3),  # nine anchors in a row
        (8, 'softmax', 4),  # two anchors in a row, with the background
    ],
)
def test_classes_against_numpy(tool, columns, activation, width):
    rng = np.random.default_rng(0)
    parts = [torch.from_numpy(rng.random((2, 50, columns))) for _ in range(3)]
    mask = torch.from_numpy(rng.random(50) < 0.7)
    grams = [tool.gram(scores, 3, activation, mask) for scores in parts]
    found = tool.intra_class(sum(grams), activation)
    rows = torch.cat([x[:, mask].reshape(2, -1, width) for x in parts], 1).numpy()
    assert sum(grams)[0, 0, 0] == rows.shape[1]
    expected = [np.corrcoef(rows[0, :, i], rows[1, :, i])[0, 1] for i in range(3)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_a_constant_class(tool):
    scores = torch.rand(2, 40, 3, dtype=torch.float64)
    scores[1, :, 2] = 0.3
    found = tool.intra_class(tool.gram(scores, 3, 'sigmoid', None), 'sigmoid')
    assert found.isnan().tolist() == [False, False, True]


def test_a_picture_has_a_legend_and_thin_boxes(tool, monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(
        tool.Figure, 'savefig', lambda self, *args, **options: figures.append(self)
    )
    image, colours = np.zeros((96, 128, 3), np.uint8), dict(car='red', dog='lime')
    boxes = [(torch.tensor([8.0, 8, 40, 60]), 'red')] * 300
    panels = {name: (image, boxes) for name in ('image', 'student', 'teacher', 'both')}
    tool.save(tmp_path / '0.jpg', panels, colours)
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ['car', 'dog']
    widths = {box.get_linewidth() for axis in figures[0].axes for box in axis.patches}
    assert max(widths) < 1  # point, of a picture 11 inches wide


def test_classes_in_colour(tool):
    image = np.full((4, 4, 3), 100, np.uint8)
    labels = np.array([[0, 1], [1, 255]])  # at half the size
    found = tool.tinted(image, labels, [(200, 0, 0), (0, 200, 0)])
    assert found[0, 0].tolist() == [160, 40, 40]
    assert found[0, 3].tolist() == found[3, 0].tolist() == [40, 160, 40]
    assert found[3, 3].tolist() == [40, 40, 40]  # void


def boxes(*rows: tuple) -> InstanceData:
    """Boxes 10 wide and high at (x, label)."""
    bboxes = torch.tensor([[x, 0, x + 10, 10] for x, _ in rows]).view(-1, 4).float()
    labels = torch.tensor([label for _, label in rows], dtype=torch.long)
    return InstanceData(bboxes=bboxes, labels=labels)


def test_agreement_of_boxes(tool):
    student = boxes((0, 0), (100, 0), (200, 1), (2, 0))
    teacher = boxes((1, 0), (100, 2), (300, 1))
    found = tool.agreement(student, teacher)
    assert found['both'].bboxes[:, 0].tolist() in ([0], [2])  # one, not both
    assert found['only teacher'].bboxes[:, 0].tolist() == [100, 300]
    assert len(found['only student']) == 3
    for one, other in ((student, boxes()), (boxes(), teacher), (boxes(), boxes())):
        found = tool.agreement(one, other)
        assert list(map(len, found.values())) == [0, len(other), len(one)]


@pytest.mark.parametrize(
    ('args', 'status', 'says'),
    [
        SLOW(['pair.py', 'hello.pth'], 1, "The checkpoint 'hello.pth' cannot be read"),
        (['pair.py', 'student.pth', 'nowhere.png'], 2, 'nowhere.png does not exist'),
        (['pair.py', 'student.pth', 'pair.py'], 2, 'is not an image'),
        (['pair.py', 'student.pth', '--num', '0'], 2, '--num must be at least 1'),
        SLOW(['pair.py', 'nowhere.pth'], 1, "checkpoint 'nowhere.pth' does not exist"),
        (['pair.py', 'other.pth'], 1, "'other.pth' do not fit pair.py. 1 missing in"),
        SLOW(
            ['pair.py', 'student.pth', '--cfg-options', *NO_VALIDATION],
            1,
            'pair.py has no `val_dataloader`',
        ),
        SLOW(
            ['pair.py', 'student.pth', '--entry', 'a'],
            1,
            "Only ['dist'] of `distill` compare classes",
        ),
    ],
)
def test_errors(visualize, tmp_path, seg_config, args, status, says):
    write_pair(tmp_path, seg_config)
    weights = torch.load(tmp_path / 'student.pth')['state_dict']
    weights.pop('decode_head.conv_seg.bias')
    torch.save(weights, tmp_path / 'other.pth')
    (tmp_path / 'hello.pth').write_text('hello')
    found = visualize(*args, status=status)
    assert says in found.text
    assert not found.page


@pytest.mark.slow
def test_an_entry_of_several_teachers(visualize, tmp_path, seg_config):
    write_pair(tmp_path, seg_config)
    pair = (tmp_path / 'pair.py').read_text()
    one, two = (
        f"dict(config='student.py', checkpoint='{name}.pth')"
        for name in ('student', 'teacher')
    )
    pair = re.sub('teacher={.*}', f'teachers=dict(a={one}, b={two})', pair)
    (tmp_path / 'pair.py').write_text(pair)
    for entry, is_same in (('dist_a', True), ('dist_b', False)):
        found = visualize('pair.py', 'student.pth', '--num', '1', '--entry', entry)
        assert (set(found.correlations.values()) == {1.0}) == is_same
        assert ('mean inter-class correlation 1.000' in found.page) == is_same


@pytest.mark.slow
def test_features_alone_have_no_classes(visualize, tmp_path, det_config):
    entry = "dict(mimic=dict(type='mmdist.Features', student='neck'))"
    write_pair(tmp_path, det_config, distill=entry)
    found = visualize('pair.py', 'student.pth', status=1)
    assert 'Only [] of `distill` compare classes' in found.text
