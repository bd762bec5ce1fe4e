"""How a run ends early: in words, with what is left of it."""

import contextlib
import errno
from collections.abc import Iterator

from dspy_lora.errors import DspyLoraError, TrainingError
from dspy_lora.training.checkpoints import Checkpoints
from dspy_lora.training.run import Run

# How safetensors and torch, which raise no OSError, word a disk that takes no more.
_FULL = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing", "file write failed")


@contextlib.contextmanager
def explained(name: str, run: Run, checkpoints: Checkpoints) -> Iterator[None]:
    """Says what stopped the run inside, and how to go on.

    Raises:
        KeyboardInterrupt: Ctrl-C, after a console line.
        TrainingError: Out of memory, or the disk is full. Other errors pass as they are.
    """
    import torch
    from safetensors import SafetensorError

    try:
        yield
    except DspyLoraError:
        raise
    except KeyboardInterrupt:
        run.say(f"interrupted. {checkpoints.advice()}")
        raise
    except (torch.OutOfMemoryError, MemoryError) as exc:
        advice = f"Use a smaller micro_batch_size or max_length, or --qlora. {checkpoints.advice()}"
        raise TrainingError(f"{name}: out of memory. {advice} ({exc})") from exc
    except (OSError, RuntimeError, SafetensorError) as exc:
        if not _disk_is_full(exc):
            raise
        raise TrainingError(
            f"{name}: no space is left on the disk of {run.folder}. Make room. {checkpoints.advice()} ({exc})"
        ) from exc


def _disk_is_full(exc: BaseException) -> bool:
    if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(words in str(exc) for words in _FULL)
