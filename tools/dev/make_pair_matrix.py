"""Write the matrix in docs/detectors.md: the default comparison of each pair.

Run it after you change which comparison is chosen: python -m tools.dev.make_pair_matrix
"""

from __future__ import annotations

import warnings
from pathlib import Path

from torch import nn

from mmdist.comparisons.default import default_for_pair
from mmdist.teachers import Teacher
from tools.dev.runs import replace_between

PAGE = Path(__file__).resolve().parents[2] / 'docs' / 'detectors.md'
BEGIN = '<!-- Made by tools/dev/make_pair_matrix.py; do not edit. -->\n'
END = '<!-- End of what is made. -->\n'
FAMILIES = {
    'RetinaNet': 'retinanet/retinanet_r50_fpn_1x_coco.py',
    'FCOS': 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    'ATSS': 'atss/atss_r50_fpn_1x_coco.py',
    'TOOD': 'tood/tood_r50_fpn_1x_coco.py',
    'RTMDet': 'rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
    'YOLOX': 'yolox/yolox_tiny_8xb8-300e_coco.py',
    'SSD': 'ssd/ssd300_coco.py',
    'Faster R-CNN': 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'Cascade R-CNN': 'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',
    'DINO': 'dino/dino-4scale_r50_8xb2-12e_coco.py',
    'Deformable DETR': 'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
    'Sparse R-CNN': 'sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py',
}


def chosen(student: nn.Module, teacher: Teacher) -> str:
    """Name of the comparison of a pair; '-' if there is none."""
    try:
        with warnings.catch_warnings(action='ignore'):  # about shifted anchors
            found = default_for_pair(student, teacher)
    except ValueError:
        return '-'
    name = type(found['dist'].comparison).__name__.removesuffix('Logits')
    return f'{name}, Boxes' if 'box' in found else name


def matrix() -> str:
    """A row per student, a column per teacher."""
    teachers = {name: Teacher(f'mmdet::{path}') for name, path in FAMILIES.items()}
    for teacher in teachers.values():
        teacher.model = teacher.build()  # only the architecture counts
    text = f'\n| student \\ teacher | {" | ".join(FAMILIES)} |\n'
    text += '|---' * (len(FAMILIES) + 1) + '|\n'
    for name, student in teachers.items():
        cells = [chosen(student.model, teacher) for teacher in teachers.values()]
        text += f'| {name} | {" | ".join(cells)} |\n'
    return text + '\n'


def page(text: str) -> str:
    """The page with a new matrix."""
    return replace_between(text, BEGIN, END, matrix())


if __name__ == '__main__':
    PAGE.write_text(page(PAGE.read_text()))
