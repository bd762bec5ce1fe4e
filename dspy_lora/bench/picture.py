"""The ratios of a sweep as lines over the swept value."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dspy_lora.bench.figure import Figure
from dspy_lora.errors import ConfigError, MissingDependencyError


def lines(points: Sequence[Sequence[Figure]]) -> dict[str, dict[int, Figure]]:
    """The ratios by name, each with the place of its point: not all points have every one."""
    found: dict[str, dict[int, Figure]] = {}
    for place, point in enumerate(points):
        for figure in point:
            if figure.unit == "x":
                found.setdefault(figure.name, {})[place] = figure
    return found


def draw(key: str, values: Sequence[Any], points: Sequence[Sequence[Figure]], path: Path) -> None:
    """Writes the picture: medians as lines, least to most as bands.

    Args:
        key: What was swept.
        values: Of the points.
        points: The figures of each value.
        path: Where to; its ending says the format.
    """
    from matplotlib import figure as drawing

    picture = drawing.Figure(figsize=(8, 5), layout="constrained")
    axes = picture.add_subplot(xlabel=key, ylabel="ratio (x)")
    for name, line in lines(points).items():
        places, figures = list(line), line.values()
        (drawn,) = axes.plot(places, [each.median for each in figures], "o-", label=name)
        least, most = [min(each.values) for each in figures], [max(each.values) for each in figures]
        axes.fill_between(places, least, most, alpha=0.15, color=drawn.get_color(), linewidth=0)
    axes.set_xticks(range(len(values)), [str(value) for value in values])  # evenly: they double, or are no numbers
    axes.axhline(1.0, color="grey", linewidth=0.8)
    picture.legend(loc="outside lower center", fontsize=8, frameon=False)
    picture.savefig(path, dpi=120)


def check(path: Path) -> None:
    """Refuses what cannot be drawn.

    Raises:
        ConfigError: matplotlib does not write such files.
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as exc:
        raise MissingDependencyError(
            "--picture needs 'matplotlib', which is not installed. Run: pip install matplotlib"
        ) from exc
    endings = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in endings:
        raise ConfigError(f"--picture {path}: matplotlib writes {', '.join(endings)}. Give the name such an ending.")
