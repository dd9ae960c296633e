"""Measuring frozen backbones: features, k-NN, linear probe, retrieval. Knows nothing of training."""
