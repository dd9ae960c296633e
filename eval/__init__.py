"""Evaluation of frozen backbones: features, k-NN, linear probe, retrieval. Independent of training."""
