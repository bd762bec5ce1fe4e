"""Rows held out of training, and what they decide: the temperature, the margin, a scarce domain's bias."""

import dataclasses
import logging

import numpy as np
from numpy.typing import NDArray

from dspy_lora.detection.record import UNCALIBRATED_MARGIN, Record
from dspy_lora.detection.softmax import Ints, Model, Row, softmax, temperature

logger = logging.getLogger(__name__)

FEWEST_TO_HOLD_OUT = 10  # texts; of fewer all are trained on
_HELD_OUT = 0.1
_MOST_HELD_OUT = 300
_GIVEN_UP = 0.005  # share of the right answers on held-out rows that the margin may cost
_MOST_MARGIN = 0.5  # a text that is three times as likely of one domain as of the next is always sent there
_TAKEN = 0.01  # share of the other domains' rows that a domain added with few texts may take


def held_out(labels: Ints, seed: int) -> NDArray[np.bool_]:
    """A tenth of each class that has rows enough."""
    random = np.random.default_rng(seed)
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        if len(places) >= FEWEST_TO_HOLD_OUT:
            count = min(_MOST_HELD_OUT, max(1, round(len(places) * _HELD_OUT)))
            held[random.choice(places, count, replace=False)] = True
    return held


def calibrated(record: Record, model: Model, rows: list[Row], labels: Ints) -> Record:
    """Sets temperature and margin by rows that were not trained on, where there are any."""
    inside = labels < len(record.domains)
    if not inside.any():
        logger.warning("no domain has %d texts to hold some out: probabilities are not calibrated", FEWEST_TO_HOLD_OUT)
        return record
    logits = np.stack([model.logits(row) for row in rows])
    degree = temperature(logits, labels)
    shares = softmax(logits / np.float32(degree))
    top = np.sort(shares, axis=1)
    right = inside & (shares.argmax(1) == labels)
    margins = (top[:, -1] - top[:, -2])[right]
    margin = min(_MOST_MARGIN, float(np.quantile(margins, _GIVEN_UP))) if len(margins) else UNCALIBRATED_MARGIN
    return dataclasses.replace(record, temperature=degree, margin=round(margin, 4), calibrated=True)


def make_eager(model: Model, place: int, others: list[Row]) -> None:
    """Raises the bias of a class until it takes a hundredth of rows that are not its own, and were not trained on."""
    if len(others) < 1 / _TAKEN:
        return  # of so few rows one is more than may be taken
    logits = np.stack([model.logits(row) for row in others])
    lead = np.delete(logits, place, axis=1).max(axis=1) - logits[:, place]
    model.bias[place] += max(0.0, float(np.quantile(lead, _TAKEN)))
