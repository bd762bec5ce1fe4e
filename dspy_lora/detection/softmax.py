"""Softmax regression over sparse rows, in NumPy: how the domain classifier is trained and calibrated."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

_BATCH = 32  # a small batch touches few columns, so its dense block stays in the processor's cache
_EPOCHS = 3
_LEAST_STEPS = 300  # few rows are gone through more often
_RATE = 0.3
_BIAS_RATE = 0.03  # a bias is fed by every row, a column by few


class Row(NamedTuple):
    """A sparse vector: ``values[i]`` at ``columns[i]``, each column at most once."""

    columns: Ints
    values: Floats


class Model(NamedTuple):
    """``weights`` (columns, classes) and ``bias`` (classes)."""

    weights: Floats
    bias: Floats

    def logits(self, row: Row) -> Floats:
        """One number a class."""
        found: Floats = row.values @ self.weights[row.columns] + self.bias
        return found


def softmax(logits: Floats) -> Floats:
    """Probabilities along the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares: Floats = powers / powers.sum(axis=-1, keepdims=True)
    return shares


def fit(rows: Sequence[Row], labels: Ints, columns: int, classes: int, seed: int) -> Model:
    """Trains with AdaGrad (Duchi et al. 2011), the classes balanced by the root of their sizes.

    Args:
        rows: The training rows.
        labels: The class of each, below ``classes``.
        columns: Number of columns.
        classes: Number of classes.
        seed: Decides the order of the rows.
    """
    model = Model(np.zeros((columns, classes), np.float32), np.zeros(classes, np.float32))
    return _train(model, None, rows, labels, seed)


def fit_one_more(model: Model, rows: Sequence[Row], labels: Ints, seed: int) -> Model:
    """Adds a class, the last of ``labels``, and leaves the weights of the others as they are."""
    old = np.stack([model.logits(row) for row in rows])
    columns = len(model.weights)
    new = _train(Model(np.zeros((columns, 1), np.float32), np.zeros(1, np.float32)), old, rows, labels, seed)
    return Model(np.hstack([model.weights, new.weights]), np.concatenate([model.bias, new.bias]))


def _train(model: Model, fixed: Floats | None, rows: Sequence[Row], labels: Ints, seed: int) -> Model:
    """Changes ``model`` in place; ``fixed`` (rows, classes) are the logits of classes before it that stay."""
    share = np.sqrt(1 / np.bincount(labels)[labels])
    weight: Floats = (share / share.mean()).astype(np.float32)
    # One step size a column: with one a weight, the faint slopes of many wrong classes would step as far as the right.
    squares = Model(np.full((len(model.weights), 1), 1e-8, np.float32), np.full(1, 1e-8, np.float32))
    random = np.random.default_rng(seed)
    epochs = max(_EPOCHS, -(-_LEAST_STEPS * _BATCH // max(len(rows), _BATCH)))
    for _ in range(epochs):
        order = random.permutation(len(rows))
        for start in range(0, len(rows), _BATCH):
            batch = order[start : start + _BATCH]
            before = None if fixed is None else fixed[batch]
            _step(model, squares, [rows[i] for i in batch], labels[batch], weight[batch], before)
    return model


def _step(model: Model, squares: Model, rows: list[Row], labels: Ints, share: Floats, fixed: Floats | None) -> None:
    """One AdaGrad step on the columns that a batch touches."""
    used, block = _dense(rows)
    logits = block @ model.weights[used] + model.bias
    if fixed is not None:
        logits = np.hstack([fixed, logits])
    wrong = softmax(logits)
    wrong[np.arange(len(rows)), labels] -= 1
    wrong = wrong[:, -len(model.bias) :] * share[:, None] / np.float32(len(rows))
    slope = block.T @ wrong
    squares.weights[used] += (slope**2).sum(axis=1, keepdims=True)
    model.weights[used] -= _RATE * slope / np.sqrt(squares.weights[used])
    bias_slope = wrong.sum(0)
    squares.bias[:] += (bias_slope**2).sum()
    model.bias[:] -= _BIAS_RATE * bias_slope / np.sqrt(squares.bias)


def _dense(rows: list[Row]) -> tuple[Ints, Floats]:
    """The columns that occur in some rows, and the rows over those columns alone."""
    used, place = np.unique(np.concatenate([row.columns for row in rows]), return_inverse=True)
    block = np.zeros((len(rows), len(used)), np.float32)
    block[np.repeat(np.arange(len(rows)), [len(row.columns) for row in rows]), place] = np.concatenate(
        [row.values for row in rows]
    )
    return used, block


def temperature(logits: Floats, labels: Ints) -> float:
    """The divisor of the logits under which held-out rows are likeliest (Guo et al. 2017).

    A row counts a little as each other class too, less with more rows (as in Platt 1999): rows that are all right would
    else make every answer certain.

    Args:
        logits: (rows, classes) of rows that were not trained on.
        labels: The class of each.

    Returns:
        The best of 161 values between 0.05 and 20, evenly spaced in the logarithm.
    """
    tried = np.geomspace(0.05, 20, 161)
    aside = 1 / (len(labels) + 2)

    def loss(degree: float) -> float:
        logs = np.log(softmax(logits / np.float32(degree)) + 1e-12)
        return -float(((1 - aside) * logs[np.arange(len(labels)), labels] + aside * logs.mean(axis=1)).mean())

    return float(min(tried, key=loss))


def calibration_error(probabilities: Floats, right: NDArray[np.bool_], bins: int = 15) -> float:
    """Expected calibration error: how far confidence and accuracy lie apart, over equally wide bins of confidence.

    Args:
        probabilities: (rows) of the class that was chosen.
        right: (rows) whether it was right.
        bins: Number of bins; 15 as in Guo et al. (2017).
    """
    place = np.minimum((probabilities * bins).astype(int), bins - 1)
    gaps = [abs(probabilities[place == each].sum() - right[place == each].sum()) for each in range(bins)]
    return float(sum(gaps) / len(right))
