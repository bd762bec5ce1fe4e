"""The loss curve of a run."""

import json
from pathlib import Path

from dspy_lora.errors import MissingDependencyError

PICTURE_FILE = "loss.png"


def draw_losses(run_folder: Path) -> Path:
    """Draws training loss, validation loss and exact match of ``metrics.jsonl`` over the steps.

    Args:
        run_folder: The run's folder; the picture lands there.

    Returns:
        The picture's path.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise MissingDependencyError("a loss curve needs matplotlib. Run: pip install matplotlib") from exc
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(7, 4), layout="constrained")
    losses = figure.add_subplot(xlabel="step", ylabel="loss (nats a token of the answer)")
    matches = losses.twinx()
    matches.set(ylabel="exact match", ylim=(0, 1))
    curves = [
        (losses, "loss", "training loss", "-", "C0"),
        (losses, "eval_loss", "validation loss", "o-", "C1"),
        (matches, "eval_exact_match", "exact match", "s--", "C2"),
    ]
    for axes, key, label, style, color in curves:
        points = [(line["step"], line[key]) for line in lines if key in line]
        axes.plot([step for step, _ in points], [value for _, value in points], style, color=color, label=label)
    figure.legend(loc="outside upper center", ncols=len(curves), frameon=False)
    figure.savefig(run_folder / PICTURE_FILE, dpi=120)
    return run_folder / PICTURE_FILE
