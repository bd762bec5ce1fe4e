"""What an adapter takes: parameters that were trained, and what the training cost."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspy_lora.adapters.base import Base, weights_files
from dspy_lora.adapters.checks import WEIGHTS_FILE
from dspy_lora.adapters.weights import read_header
from dspy_lora.errors import AdapterError, ConfigError

_PACKED = ("U8", "I8", "I32")


@dataclass(frozen=True)
class Parameters:
    """How much was trained.

    Attributes:
        trained: Values in the adapter's weights.
        base: Values in the base's weights; None where they are not on this disk or are stored packed (quantised).
    """

    trained: int
    base: int | None

    @property
    def share(self) -> float | None:
        """Trained values among all, 0 to 1."""
        return None if self.base is None else self.trained / (self.trained + self.base)

    @classmethod
    def of(cls, adapter: Path, base: Base) -> "Parameters":
        """Counts them from the files' headers.

        Raises:
            AdapterError: The adapter's weights cannot be read.
            ConfigError: The base's cannot.
        """
        try:
            trained = sum(tensor.parameters for tensor in read_header(adapter / WEIGHTS_FILE).values())
        except (OSError, ValueError) as exc:
            raise AdapterError(f"{adapter / WEIGHTS_FILE} cannot be read: {exc}. Copy the adapter again.") from exc
        return cls(trained, None if base.folder is None else _base_parameters(base.folder))


def _base_parameters(folder: Path) -> int | None:
    files = weights_files(folder)
    try:
        tensors = [tensor for file in files for tensor in read_header(file).values()]
    except (OSError, ValueError) as exc:
        raise ConfigError(f"base model {folder} cannot be read: {exc}. Copy or download it again.") from exc
    if any(tensor.dtype in _PACKED for tensor in tensors):
        return None
    return sum(tensor.parameters for tensor in tensors)


@dataclass(frozen=True)
class TrainingCost:
    """What the training run cost.

    Attributes:
        gpu_hours: Of the run.
        rate: Dollars a GPU-hour, as the user gave it.
    """

    gpu_hours: float
    rate: float

    @property
    def dollars(self) -> float:
        """GPU-hours times the rate."""
        return self.gpu_hours * self.rate

    @classmethod
    def of(cls, card: Mapping[str, Any], rate: float) -> "TrainingCost":
        """Takes the GPU-hours of a run card (``run.json``, or the metadata of a published adapter).

        A card without ``gpu_hours`` has its wall time on one GPU, where it names a GPU.

        Raises:
            ConfigError: The rate is negative, or the card says nothing of a GPU.
        """
        if not 0 <= rate < float("inf"):
            raise ConfigError(f"--rate {rate!r}: give dollars a GPU-hour, 0 or more.")
        if (hours := card.get("gpu_hours")) is None:
            on_gpu = (card.get("hardware") or {}).get("gpu")
            hours = card["wall_seconds"] / 3600 if on_gpu and "wall_seconds" in card else None
        if not hours:  # a run on the CPU has 0
            raise ConfigError(
                f"--rate {rate:g}: nothing says how many GPU-hours the training took. Give --run RUN_FOLDER of a run "
                "on a GPU, or leave --rate out."
            )
        return cls(float(hours), rate)
