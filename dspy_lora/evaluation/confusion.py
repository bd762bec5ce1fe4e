"""Which labels are taken for which: a table of the most frequent ones, and its picture."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dspy_lora.errors import MissingDependencyError

OTHER, NONE = "(other)", "(none)"
MOST_LABELS = 20  # more cannot be read in a picture
_WIDTH = 24  # characters of a label


@dataclass(frozen=True)
class Confusion:
    """Rows of each label by what was answered.

    Attributes:
        labels: References, the most frequent first, then ``(other)`` where labels are left.
        answers: The same labels, then ``(other)`` for any other answer and ``(none)`` for no answer. Both get more
            brackets where a label is called so.
        counts: Rows of the test set, labels x answers.
    """

    labels: tuple[str, ...]
    answers: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, truth: Sequence[str], given: Sequence[str], most: int = MOST_LABELS) -> "Confusion":
        """Counts.

        Args:
            truth: The reference labels.
            given: The answers; "" for none.
            most: Labels with a line of their own.
        """
        support = sorted(Counter(truth).items(), key=lambda pair: (-pair[1], pair[0]))
        shown = [label for label, _ in support[:most]]
        other, none = (_free(name, shown) for name in (OTHER, NONE))
        labels = (*shown, other) if len(support) > len(shown) else tuple(shown)
        answers = (*shown, other, none)

        def cell(label: str) -> str:
            return label if label in shown else other

        pairs = Counter((cell(a), cell(b) if b else none) for a, b in zip(truth, given, strict=True))
        return cls(labels, answers, tuple(tuple(pairs[label, answer] for answer in answers) for label in labels))

    def draw(self, path: Path, title: str) -> None:
        """Writes the picture as PNG: the colour is the share of a label's rows, the number counts them.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        require_matplotlib()
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3 + 0.4 * len(self.answers), 2.5 + 0.4 * len(self.labels)), layout="constrained")
        axes = figure.subplots()
        shares = [[count / max(sum(row), 1) for count in row] for row in self.counts]
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for i, row in enumerate(self.counts):
            for j, count in enumerate(row):
                if count:
                    colour = "white" if shares[i][j] > 0.5 else "black"
                    axes.text(j, i, str(count), ha="center", va="center", color=colour, fontsize=8)
        axes.set_xticks(range(len(self.answers)), map(_short, self.answers), rotation=45, ha="right", fontsize=8)
        axes.set_yticks(range(len(self.labels)), map(_short, self.labels), fontsize=8)
        axes.set_xlabel("answer")
        axes.set_ylabel("label")
        axes.set_title(_literal(title), fontsize=10)
        figure.savefig(path, dpi=120, format="png")


def require_matplotlib() -> None:
    """Raises a MissingDependencyError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as exc:
        raise MissingDependencyError(
            "the picture of the confusion matrix needs 'matplotlib', which is not installed. "
            "Run: pip install matplotlib, or leave the picture out with --no-picture."
        ) from exc


def _short(label: str) -> str:
    return _literal(label if len(label) <= _WIDTH else label[: _WIDTH - 1] + "…")


def _literal(text: str) -> str:
    return text.replace("$", r"\$")  # matplotlib would read mathematics


def _free(name: str, taken: Sequence[str]) -> str:
    return name if name not in taken else _free(f"({name})", taken)
