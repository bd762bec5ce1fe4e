"""What a classifier keeps of its training, for domains that come later."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspy_lora.detection.rows import dense_row, scaled
from dspy_lora.detection.softmax import Floats, Ints, Row

_ROWS = 6000  # over all domains
_MOST = 60  # of one domain
_FEWEST = 4


@dataclasses.dataclass(frozen=True)
class Memory:
    """Some rows of every class, from which a later domain learns what it is not.

    Attributes:
        rows: The rows, as trained on, class after class.
        labels: Their classes.
        held: Which of them were held out when their class was trained; they stand first in it.
    """

    rows: list[Row]
    labels: Ints
    held: NDArray[np.bool_]

    def arrays(self, bits: int) -> dict[str, NDArray[Any]]:
        """As arrays: of n-grams the columns alone (the rest follows), of vectors the values."""
        kept: dict[str, NDArray[Any]] = {"labels": self.labels.astype(np.int32), "held": self.held}
        if bits:
            joined = np.concatenate([row.columns for row in self.rows])
            lengths = np.array([len(row.columns) for row in self.rows], np.int32)
            return kept | {"lengths": lengths, "columns": joined.astype(np.uint16 if bits <= 16 else np.uint32)}
        return kept | {"vectors": np.stack([row.values for row in self.rows]).astype(np.float16)}

    def kept_out(self) -> NDArray[np.bool_]:
        """Every other held-out row of each class, which no later class is trained on either.

        A row keeps its place in its class as classes are added, so it is always one of these or never.
        """
        place = np.arange(len(self.labels)) - np.searchsorted(self.labels, self.labels)
        return self.held & (place % 2 == 0)

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]], bits: int, scale: Floats) -> "Memory":
        """Reads ``arrays``."""
        if bits:
            ends = np.cumsum(arrays["lengths"])[:-1]
            rows = [scaled(part, scale) for part in np.split(arrays["columns"].astype(np.int64), ends)]
        else:
            rows = [dense_row(vector) for vector in arrays["vectors"].astype(np.float32)]
        return cls(rows, arrays["labels"].astype(np.int64), arrays["held"])


def remember(rows: list[Row], labels: Ints, held: NDArray[np.bool_], classes: int) -> Memory:
    """Keeps some rows of each class, held-out ones first."""
    most = max(_FEWEST, min(_MOST, _ROWS // classes))
    order = np.argsort(~held, kind="stable")
    by_class = [order[labels[order] == label][:most] for label in range(classes)]
    kept = np.concatenate(by_class)
    return Memory([rows[i] for i in kept], labels[kept], held[kept])
