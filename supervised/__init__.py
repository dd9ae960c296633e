"""Supervised training and evaluation on top of a pretrained backbone: classification, detection, segmentation."""
