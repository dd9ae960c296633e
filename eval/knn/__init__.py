"""k-NN classification of frozen features: :func:`knn_predict` and its reports."""

from eval.knn.classify import Predictions, knn_predict

__all__ = ["Predictions", "knn_predict"]
