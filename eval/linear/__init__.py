"""Linear classifiers on frozen features: trained by SGD on views (heads), on kept epochs (cached), or by L-BFGS."""
