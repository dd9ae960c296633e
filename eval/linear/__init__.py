"""Linear classifiers on frozen features: by SGD on views or kept epochs (sgd, heads), or by L-BFGS (logistic)."""
