"""k-NN classification of frozen features: :func:`knn_predict` and what is told about it."""

from eval.knn.classify import Predictions, knn_predict

__all__ = ["Predictions", "knn_predict"]
