"""How a run ends early: in words, with what is left of it."""

import contextlib
import errno
from collections.abc import Iterator

from dspy_lora.errors import DspyLoraError, TrainingError
from dspy_lora.training.checkpoints import Checkpoints
from dspy_lora.training.run import Run

# How safetensors and torch, which raise no OSError, word a disk that takes no more.
_FULL = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing", "file write failed")

# How torch words it on a CPU, where it raises a plain RuntimeError.
_NO_MEMORY = "can't allocate memory"


@contextlib.contextmanager
def explained(name: str, run: Run, checkpoints: Checkpoints) -> Iterator[None]:
    """Says what stopped the run inside, and how to go on.

    Raises:
        KeyboardInterrupt: Ctrl-C, after a console line.
        TrainingError: Out of memory, or the disk is full. Other errors pass as they are.
    """
    from safetensors import SafetensorError

    try:
        yield
    except DspyLoraError:
        raise
    except KeyboardInterrupt:
        run.say(f"interrupted. {checkpoints.advice()}")
        raise
    except (OSError, RuntimeError, MemoryError, SafetensorError) as exc:
        if is_out_of_memory(exc):
            advice = f"Use a smaller micro_batch_size or max_length, or --qlora. {checkpoints.advice()}"
            raise TrainingError(f"{name}: out of memory. {advice} ({exc})") from exc
        if not _disk_is_full(exc):
            raise
        raise TrainingError(
            f"{name}: no space is left on the disk of {run.folder}. Make room. {checkpoints.advice()} ({exc})"
        ) from exc


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether the GPU or the machine had no memory left."""
    import torch

    return isinstance(exc, torch.OutOfMemoryError | MemoryError) or _NO_MEMORY in str(exc)


def _disk_is_full(exc: BaseException) -> bool:
    if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(words in str(exc) for words in _FULL)
