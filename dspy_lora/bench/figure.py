"""A measured figure: its values, one a repeat, and the bar that it is held against."""

import dataclasses
import statistics
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Figure:
    """A measured figure.

    Attributes:
        name: What it is.
        unit: Of its values; ``"x"`` for ratios.
        values: One a repeat.
        least: It is to be at least this, at the median.
        most: It is to be at most this, at the median.
    """

    name: str
    unit: str
    values: tuple[float, ...]
    least: float | None = None
    most: float | None = None

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    @property
    def holds(self) -> bool | None:
        """Whether the bar holds; None without a bar."""
        if self.least is None and self.most is None:
            return None
        return (self.least is None or self.median >= self.least) and (self.most is None or self.median <= self.most)


def ratios(above: Sequence[float], below: Sequence[float]) -> tuple[float, ...]:
    """Each value over the one of the same repeat."""
    return tuple(over / under for over, under in zip(above, below, strict=True))
