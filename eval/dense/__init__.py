"""Evaluation of frozen patch features without training: k-NN segmentation and label propagation in videos."""
