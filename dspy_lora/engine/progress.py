"""One line on standard error while an engine starts."""

import contextlib
import sys
import time
from typing import Any


class Progress:
    """Shows that something happens: a moving second count on a terminal, two plain lines elsewhere.

    Args:
        name: The base model.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._began = time.monotonic()
        self._shown = -1
        self._terminal = _is_terminal()
        self._open = True
        if not self._terminal:
            self._write(f"dspy-lora: starting vLLM for {name!r} (some 20 s on a CPU, a minute or two on a GPU)\n")

    def tick(self) -> None:
        """Called often while the engine starts."""
        seconds = int(time.monotonic() - self._began)
        if self._terminal and seconds != self._shown:
            self._shown = seconds
            self._write(f"\rdspy-lora: starting vLLM for {self._name!r} ... {seconds} s")

    def done(self, info: dict[str, Any]) -> None:
        """The engine serves."""
        seconds = time.monotonic() - self._began
        start = "\r" if self._terminal else ""
        slots = f"{info['max_loras']} adapter slots, rank up to {info['max_lora_rank']}"
        room = f"{slots if info['max_loras'] else 'no LoRA'}, context {info['max_model_len']}"
        where = f"vLLM {info['vllm']} serves {self._name!r} on {info['device']}"
        self._write(f"{start}dspy-lora: {where} after {seconds:.0f} s ({room})\n")
        self._open = False

    def stop(self) -> None:
        """Ends the line if the engine never came up."""
        if self._open and self._terminal:
            self._write("\n")
        self._open = False

    def _write(self, text: str) -> None:
        if sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):  # closed, or a pipe nobody reads: no reason to stop
                sys.stderr.write(text)
                sys.stderr.flush()


def _is_terminal() -> bool:
    with contextlib.suppress(ValueError):  # closed
        return sys.stderr is not None and sys.stderr.isatty()
    return False
