# For an ADE20K teacher of a Cityscapes student:
#
#     _base_ = [..., 'mmdist::_base_/class_maps/cityscapes_from_ade20k.py']
#     teacher=dict(..., class_map=_base_.class_map, class_match='shared')
#
# Only classes with the same meaning in both. ADE20K has no rider, train or traffic sign
# (a signboard is mostly an advertisement), and its wall is mostly a room's.
class_map = dict(
    building=['building', 'house', 'skyscraper'],
    vegetation=['tree', 'plant', 'palm'],
    terrain=['grass', 'earth', 'field', 'land', 'sand'],
    car=['car', 'van'],
    motorcycle='minibike',
    wall=[],  # not compared
)
