"""The ratios of a sweep as lines over the swept value."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dspy_lora.bench.figure import Figure
from dspy_lora.errors import MissingDependencyError


def lines(points: Sequence[Sequence[Figure]]) -> dict[str, list[Figure]]:
    """The ratios of each point, by name. Points have the same measurements, whose names may hold the swept number."""
    columns = zip(*([figure for figure in point if figure.unit == "x"] for point in points), strict=True)
    found: dict[str, list[Figure]] = {}
    for column in columns:
        name = column[0].name
        if any(figure.name != name for figure in column):
            name = re.sub(r"\d+", "N", name)
        while name in found:  # the same measurement twice, as for two lengths of answers
            name += "'"
        found[name] = list(column)
    return found


def draw(key: str, values: Sequence[Any], points: Sequence[Sequence[Figure]], path: Path) -> None:
    """Writes the picture: medians as lines, least to most as bands.

    Args:
        key: What was swept.
        values: Of the points.
        points: The figures of each value.
        path: Where to; its ending says the format.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib import figure as drawing

    picture = drawing.Figure(figsize=(8, 5), layout="constrained")
    axes = picture.add_subplot(xlabel=key, ylabel="ratio (x)")
    places = range(len(values))  # evenly: values mostly double, and shapes are no numbers
    for name, figures in lines(points).items():
        (line,) = axes.plot(places, [each.median for each in figures], "o-", label=name)
        least, most = [min(each.values) for each in figures], [max(each.values) for each in figures]
        axes.fill_between(places, least, most, alpha=0.15, color=line.get_color(), linewidth=0)
    axes.set_xticks(places, [str(value) for value in values])
    axes.axhline(1.0, color="grey", linewidth=0.8)
    picture.legend(loc="outside lower center", fontsize=8, frameon=False)
    picture.savefig(path, dpi=120)


def require_matplotlib() -> None:
    """Raises a MissingDependencyError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as exc:
        raise MissingDependencyError(
            "--picture needs 'matplotlib', which is not installed. Run: pip install matplotlib"
        ) from exc
