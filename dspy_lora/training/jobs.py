"""A training job as DSPy holds it: a future over a child process, with a state to ask for and a way to stop it."""

import contextlib
import fcntl
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from pathlib import Path
from typing import Any

from dspy.clients.provider import TrainingJob
from dspy.clients.utils_finetune import TrainingStatus

from dspy_lora.child import child_environment
from dspy_lora.engine.failures import ending, last_lines
from dspy_lora.errors import TrainingError
from dspy_lora.training.chats import ChatConfig
from dspy_lora.training.run import CARD_FILE, METRICS_FILE

SETTINGS_FILE = "job.json"
LOG_FILE = "train.log"
LOCK_FILE = ".lock"  # held while a run goes on; the system frees it when a process dies
ADAPTER_FOLDER = "adapter"

_POLL_S = 0.2
_device = threading.Lock()  # jobs that are started at once share it, so they train one after another


class LoRATrainingJob(TrainingJob):
    """One training run in a process of its own.

    ``result()`` waits for the LM that is bound to the new adapter, or, as everywhere in DSPy, returns the exception
    that ended the run; of a cancelled job it raises ``concurrent.futures.CancelledError``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._config: ChatConfig | None = None

    @property
    def folder(self) -> Path | None:
        """The run's folder, with ``train.log``, ``metrics.jsonl`` and ``run.json``; None until its turn has come."""
        return self._config.output_dir if self._config else None

    def status(self) -> dict[str, Any]:
        """Where the job stands.

        Returns:
            ``status`` (a ``TrainingStatus``: pending, running, succeeded, failed or cancelled) and, once its turn has
            come, ``folder``, ``max_steps`` (of a job given ``epochs`` once it has logged a step, None before) and the
            newest figures: ``step``, ``seconds``, ``loss``, ``eval_loss``,
            ``eval_exact_match``.
        """
        report: dict[str, Any] = {"status": self._stage()}
        if self._config is not None:
            report |= {"folder": str(self._config.output_dir), "max_steps": self._config.max_steps}
            report |= _figures(self._config.output_dir / METRICS_FILE)
        return report

    def _stage(self) -> TrainingStatus:
        if self.cancelled():
            return TrainingStatus.cancelled
        if self.done():
            return TrainingStatus.failed if isinstance(self.result(), Exception) else TrainingStatus.succeeded
        return TrainingStatus.running if self._process is not None else TrainingStatus.pending

    def cancel(self) -> bool:
        """Stops the run. Its last checkpoint stays: the same job, started again, goes on from there.

        Returns:
            Whether it is cancelled; False where it was done already.
        """
        with self._lock:
            cancelled = Future.cancel(self)
            if cancelled and self._process is not None:
                self._process.terminate()
        return cancelled

    def set_result(self, result: Any) -> None:
        """Keeps what the job came to; a cancelled job keeps nothing."""
        with contextlib.suppress(InvalidStateError):
            super().set_result(result)

    def train(self, config: ChatConfig, make_room: Callable[[], None]) -> Path:
        """Trains in a child process when the device is free, and waits for it; a finished run is left as it is.

        Args:
            config: The run; its rows are in a file, and its folder is its own.
            make_room: Called before the process starts.

        Returns:
            The run's folder, with the adapter.

        Raises:
            TrainingError: The run failed or was cancelled.
        """
        with self._turn(config):
            self._config = config
            if (config.output_dir / CARD_FILE).is_file() and (config.output_dir / ADAPTER_FOLDER).is_dir():
                return config.output_dir
            make_room()
            log = config.output_dir / LOG_FILE
            with self._child(config) as process, log.open("w", encoding="utf-8") as written:
                assert process.stdout is not None
                for line in process.stdout:
                    written.write(line)
                    written.flush()
                    if not config.quiet and line.startswith(f"[{config.name}]"):
                        _show(line)
            if self.cancelled():
                raise TrainingError(f"{config.name}: the training was cancelled. Start it again to go on.")
            if process.returncode:
                text = log.read_text(encoding="utf-8")
                raise TrainingError(
                    f"{config.name}: the training process {ending(process.returncode)}. Its log, {log}, ends:\n"
                    f"{last_lines(text)}"
                )
        return config.output_dir

    @contextlib.contextmanager
    def _turn(self, config: ChatConfig) -> Iterator[None]:
        """Waits until no other job of this process trains and no equal one of another, or this one is cancelled."""

        def wait(acquire: Callable[[], bool]) -> None:
            while not acquire():
                if self.cancelled():
                    raise TrainingError(f"{config.name}: the training was cancelled before it began.")

        def folder_is_free() -> bool:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            time.sleep(_POLL_S)
            return False

        wait(lambda: _device.acquire(timeout=_POLL_S))
        try:
            with (config.output_dir / LOCK_FILE).open("w") as file:
                wait(folder_is_free)
                yield
        finally:
            _device.release()

    @contextlib.contextmanager
    def _child(self, config: ChatConfig) -> "Iterator[subprocess.Popen[str]]":
        """The training process. It ends with this one, and Ctrl-C reaches both."""
        settings = config.output_dir / SETTINGS_FILE
        settings.write_text(config.to_json(), encoding="utf-8")
        with self._lock:
            if self.cancelled():
                raise TrainingError(f"{config.name}: the training was cancelled before it began.")
            self._process = process = subprocess.Popen(
                [sys.executable, "-P", "-m", "dspy_lora.training.chats", str(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                env=child_environment(),
            )
        with process:
            try:
                yield process
            except BaseException:
                process.terminate()
                raise


def _figures(metrics: Path) -> dict[str, Any]:
    """The newest value of every figure that a run has written down."""
    figures: dict[str, Any] = {}
    if metrics.is_file():
        for line in metrics.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the last line may be half written
                figures |= json.loads(line)
    return figures


def _show(line: str) -> None:
    """Shows a line of progress on standard error."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):  # closed, or a pipe nobody reads: no reason to stop
            sys.stderr.write(line)
            sys.stderr.flush()
