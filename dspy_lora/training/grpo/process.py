"""The process that trains an adapter with GRPO.

    python -m dspy_lora.training.grpo.process

reads one JSON object a line from its standard input and answers each with one on its standard output; what libraries
print goes to standard error. It holds base, adapter and optimizer from one step to the next (loading takes seconds) and
ends with its parent, in the middle of a step too.
"""

import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from dspy_lora.adapters.base import Base
from dspy_lora.errors import DspyLoraError, TrainingError
from dspy_lora.training.failures import is_out_of_memory
from dspy_lora.training.grpo.settings import GRPOSettings
from dspy_lora.training.grpo.trainer import Group, GroupTrainer
from dspy_lora.training.run import Run

_PARENT_POLL_S = 2.0


class _Server:
    """Answers the lines of the parent."""

    def __init__(self) -> None:
        self.trainer: GroupTrainer | None = None
        self.run: Run | None = None
        self.steps = 0
        self.turns = False

    def load(
        self, settings: dict[str, Any], base: dict[str, Any], parent: str | None, folder: str, turns: bool, **rest: Any
    ) -> dict[str, Any]:
        """Loads the base and the adapter; ``turns`` leaves the GPU between steps."""
        chosen, place = GRPOSettings.model_validate(settings), Path(folder)
        self.run = Run(place, "grpo", quiet=True)
        self.turns = turns
        self.card = {"base": base, "parent": parent, "config": settings, "sampling": rest}
        self.trainer = GroupTrainer(chosen, Base(**base), Path(parent) if parent else None, folder=place, **rest)
        self._leave()
        return {"device": self.trainer.device.type, "parameters": sum(w.numel() for w in self.trainer.weights)}

    def step(self, groups: list[Group]) -> dict[str, Any]:
        """One step; its figures go to ``metrics.jsonl`` too."""
        if self.trainer is None or self.run is None:
            raise TrainingError("a step was asked for before the model was loaded.")
        if self.turns:
            self.trainer.move(self.trainer.device)
        try:
            figures = self.trainer.step(groups)
        finally:
            self._leave()
        self.steps += 1
        self.run.log(self.steps, **figures)
        return figures

    def end(self) -> dict[str, Any]:
        """Writes the run's card."""
        if self.run is not None:
            self.run.close(name="grpo", steps=self.steps, **self.card)
        return {}

    def _leave(self) -> None:
        if self.turns and self.trainer is not None:
            self.trainer.move("cpu")


def _answer(work: Callable[..., dict[str, Any]], arguments: dict[str, Any]) -> dict[str, Any]:
    """Does one piece of work; what it raises becomes an answer too, the traceback goes to the log."""
    try:
        return {"value": work(**arguments)}
    except DspyLoraError as exc:
        return {"error": type(exc).__name__, "message": str(exc)}
    except Exception as exc:  # noqa: BLE001 - the parent raises it
        traceback.print_exc()
        if is_out_of_memory(exc):
            advice = "Use a smaller micro_batch_size or max_length, qlora, or share_gpu."
            return {"error": TrainingError.__name__, "message": f"out of memory: {_first_line(exc)} {advice}"}
        return {"error": TrainingError.__name__, "message": f"{type(exc).__name__}: {exc}"}


def _first_line(exc: Exception) -> str:
    return str(exc).split("\n", 1)[0]


def _requests() -> "queue.SimpleQueue[dict[str, Any]]":
    """The parent's lines, read beside the work: their end, or another parent, ends this process at once."""
    found: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    parent = os.getppid()

    def read() -> None:
        for line in sys.stdin:
            found.put(json.loads(line))
        os._exit(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_S)
        os._exit(1)

    for target in (read, watch):
        threading.Thread(target=target, daemon=True).start()
    return found


def _replies() -> TextIO:
    """The pipe to the parent, taken away from whoever prints."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return pipe


def main() -> None:
    """Serves until the parent asks for the end."""
    replies, requests, server = _replies(), _requests(), _Server()
    import torch

    def send(reply: dict[str, Any]) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    send({"value": {"cuda": torch.cuda.is_available()}})
    work: dict[str, Callable[..., dict[str, Any]]] = {"load": server.load, "step": server.step, "end": server.end}
    while True:
        request = requests.get()
        name = request.pop("do")
        send(_answer(work[name], request))
        if name == "end":
            break
    os._exit(0)  # the reader waits for a line that will not come


if __name__ == "__main__":
    main()
