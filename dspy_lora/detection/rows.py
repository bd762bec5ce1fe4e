"""Texts as rows of numbers: hashed n-grams, the rare ones heavier, or an embedder's vectors; each of length 1."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspy_lora.detection.ngrams import ngrams
from dspy_lora.detection.softmax import Floats, Ints, Row
from dspy_lora.errors import DataError


def rows_of(texts: Sequence[str], bits: int, scale: Floats, embedder: Any) -> list[Row]:
    """One row a text: of ``2**bits`` columns, or of the embedder's where ``bits`` is 0.

    Raises:
        DataError: The embedder gave no vector a text.
    """
    if bits:
        return [scaled(ngrams(text, bits), scale) for text in texts]
    vectors = np.asarray(embedder(list(texts)), np.float32)
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise DataError(f"the embedder gave an array of shape {vectors.shape} for {len(texts)} texts.")
    return [dense_row(vector) for vector in vectors]


def scaled(columns: Ints, scale: Floats) -> Row:
    """A row of length 1 in which a rare n-gram weighs more."""
    values = scale[columns]
    return Row(columns, values / max(float(np.sqrt(values @ values)), 1e-9))


def dense_row(vector: Floats) -> Row:
    """A row of length 1 in the direction of a vector."""
    return Row(np.arange(len(vector)), vector / max(float(np.linalg.norm(vector)), 1e-9))


def rarity(found: list[Ints], width: int) -> Floats:
    """Inverse document frequency, log((1 + texts) / (1 + texts with it)), a column."""
    counts = np.bincount(np.concatenate(found), minlength=width)
    return np.log((1 + len(found)) / (1 + counts)).astype(np.float16).astype(np.float32)  # as it is saved


def where(rows: Sequence[Row], chosen: NDArray[np.bool_]) -> list[Row]:
    """The rows at which ``chosen`` is true."""
    return [rows[i] for i in np.flatnonzero(chosen)]
