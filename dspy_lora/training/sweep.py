"""One setting, several values: ``--sweep learning_rate=1e-4,3e-4``."""

from dataclasses import dataclass

from dspy_lora.errors import ConfigError, near
from dspy_lora.training.settings import TrainConfig

_NUMBERS = (int, float, int | None)


@dataclass(frozen=True)
class Sweep:
    """A setting of TrainConfig and the values to try, as they were written."""

    key: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Sweep":
        """Reads ``KEY=VALUE,VALUE,...``.

        Raises:
            ConfigError: Not of that form, a value twice, or no numeric setting. The values are checked by TrainConfig.
        """
        key, _, listed = text.partition("=")
        values = tuple(value.strip() for value in listed.split(","))
        if not all(values) or len(set(values)) < len(values):
            raise ConfigError(f"--sweep {text!r}: give different values, as in --sweep learning_rate=1e-4,3e-4.")
        numeric = [name for name, field in TrainConfig.model_fields.items() if field.annotation in _NUMBERS]
        if key not in numeric:
            raise ConfigError(f"--sweep {text!r}: {key!r} is no numeric setting. {near(key, numeric)}")
        return cls(key, values)
