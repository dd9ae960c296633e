"""Collections of vectors: written, added to, opened and searched."""

from eval.collection.store import Collection, open_collection

__all__ = ["Collection", "open_collection"]
