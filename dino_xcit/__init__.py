"""Pretrain XCiT image encoders without labels: DINO, multi-crop, k-NN and linear evaluation."""

__version__ = "0.1.0"
