"""Results of two or more runs held side by side: python -m eval.compare a.json b.json."""
