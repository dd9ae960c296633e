"""Write dino_xcit/data/fashion_mnist_sample.npz from the full Fashion-MNIST (sample:fashion-mnist-full).

The first 1,200 training and the first 300 test images of each class, in the order of the full set.

    python tools/make_sample.py
"""

from __future__ import annotations

import numpy as np

from dino_xcit.data.sample import EMBEDDED, open_sample

COUNTS = {"train": 1200, "val": 300}


def main() -> None:
    """Write the file and print what it holds."""
    arrays: dict[str, np.ndarray] = {}
    for part, count in COUNTS.items():
        full = open_sample("fashion-mnist-full", part)
        assert full.labels is not None
        chosen = np.sort(np.concatenate([np.flatnonzero(full.labels == label)[:count] for label in range(10)]))
        arrays[f"{part}_images"] = full.images[chosen]
        arrays[f"{part}_labels"] = full.labels[chosen].astype(np.uint8)
    np.savez_compressed(EMBEDDED, **arrays)  # type: ignore[arg-type]
    print({name: array.shape for name, array in arrays.items()}, f"{EMBEDDED.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
