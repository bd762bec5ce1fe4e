"""The errors dspy-lora raises, as one tree.

    DspyLoraError
    ├── ConfigError (ValueError)               lora_config.yaml, an environment variable or an argument
    │   └── UnknownDomainError (LookupError)   a domain nobody configured or published
    ├── AdapterError (ValueError)              an adapter folder that cannot be served
    │   ├── UnknownAdapterError (LookupError)  a name or revision the registry does not hold
    │   └── ChangedAdapterError                a saved program names a revision that is gone or changed
    ├── PublishError (OSError)                 the disk refused: nothing was published
    ├── DataError (ValueError)                 rows that cannot be trained or evaluated on
    ├── TrainingError (RuntimeError)           a training run that ended early
    │   └── DivergedError                      its loss is no longer a number
    ├── MissingDependencyError (ImportError)   a package of an extra is not installed
    ├── TuningError (RuntimeError)             this machine cannot time LoRA's kernels
    │   └── CrashError                         a setting broke the CUDA context
    └── EngineError (RuntimeError)             the engine process
        ├── EngineStartError                   it did not come up
        └── EngineDiedError                    it died and could not be brought back

Each error is also the standard type a caller would expect, so ``except LookupError`` works without importing this
module. Errors of a single LM call cross into DSPy as ``dspy.lm15`` errors instead (see engine/translate.py).
"""

import difflib
from collections.abc import Iterable


class DspyLoraError(Exception):
    """Base of every error of this package."""


class ConfigError(DspyLoraError, ValueError):
    """A setting is unknown or has a value that is not allowed."""


class UnknownDomainError(ConfigError, LookupError):
    """The domain is neither configured nor published."""


class AdapterError(DspyLoraError, ValueError):
    """The adapter cannot be served; the message says what to do about it."""


class UnknownAdapterError(AdapterError, LookupError):
    """The registry holds no adapter or revision of that name."""


class ChangedAdapterError(AdapterError):
    """A saved program asks for an adapter revision that is missing or differs."""


class PublishError(DspyLoraError, OSError):
    """Writing to the registry failed; the registry is as it was before."""


class DataError(DspyLoraError, ValueError):
    """Rows are malformed, empty or do not fit the task."""


class TrainingError(DspyLoraError, RuntimeError):
    """A training run could not be finished."""


class DivergedError(TrainingError):
    """The loss is no longer a number: the same settings would end the same way again."""


class MissingDependencyError(DspyLoraError, ImportError):
    """A package that an extra brings is not installed; the message names the command."""


class TuningError(DspyLoraError, RuntimeError):
    """This machine cannot time LoRA's kernels, or their usual settings fail on it."""


class CrashError(TuningError):
    """A setting broke the CUDA context: it is noted as refused, and a new process can go on."""


class EngineError(DspyLoraError, RuntimeError):
    """The engine process cannot do what was asked."""


class EngineStartError(EngineError):
    """The engine process did not come up; the message ends with its last log lines."""


class EngineDiedError(EngineError):
    """The engine process died and a restart did not help."""


def near(name: str, allowed: Iterable[str]) -> str:
    """Words the allowed names for an error message, nearest first.

    Args:
        name: What was asked for.
        allowed: What exists.

    Returns:
        ``"Did you mean 'legal'? Known: financial, legal."``, without the question where nothing is near.
    """
    known = sorted(allowed)
    matches = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    question = f"Did you mean {' or '.join(repr(match) for match in matches)}? " if matches else ""
    return f"{question}Known: {', '.join(known) if known else 'none'}."
