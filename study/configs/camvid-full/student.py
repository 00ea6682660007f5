_base_ = '../../../configs/seg/camvid/pspnet_r18-d8_1xb8-20k_camvid-360x480.py'
