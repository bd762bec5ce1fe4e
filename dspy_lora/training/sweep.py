"""One setting, several values: ``--sweep learning_rate=1e-4,3e-4``."""

from collections.abc import Sequence
from dataclasses import dataclass

from dspy_lora.errors import ConfigError, near
from dspy_lora.training.settings import TrainConfig

_NUMBERS = (int, float, int | None, float | None)


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
        numeric = [name for name, field in TrainConfig.model_fields.items() if field.annotation in _NUMBERS]
        return cls.of(text, numeric, "numeric setting", "learning_rate=1e-4,3e-4")

    @classmethod
    def of(cls, text: str, keys: Sequence[str], what: str, example: str) -> "Sweep":
        """Reads ``KEY=VALUE,VALUE,...`` for any keys.

        Args:
            text: What was asked for.
            keys: Those that are allowed.
            what: They are, for a message.
            example: For a message.

        Raises:
            ConfigError: Not of that form, a value twice, or another key.
        """
        key, _, listed = text.partition("=")
        values = tuple(value.strip() for value in listed.split(","))
        if not all(values) or len(set(values)) < len(values):
            raise ConfigError(f"--sweep {text!r}: give different values, as in --sweep {example}.")
        if key not in keys:
            raise ConfigError(f"--sweep {text!r}: {key!r} is no {what}. {near(key, keys)}")
        return cls(key, values)
