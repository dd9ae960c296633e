"""Collections of vectors, search among them, and benchmarks of what they find."""

from eval.retrieval.collection import Collection, open_collection

__all__ = ["Collection", "open_collection"]
