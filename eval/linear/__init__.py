"""Linear classifiers on frozen features: SGD on augmented images, and L-BFGS logistic regression."""
