"""The checkpoints of a run that is not finished, and whether a run may go on from them."""

import json
import shutil
from pathlib import Path
from typing import Any

from dspy_lora.errors import ConfigError, TrainingError

SETTINGS_FILE = "settings.json"

# What the trainer writes (transformers.Trainer._save_checkpoint), its state last: the weights in one of three files.
_WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")

# Settings that change neither the rows, nor their order, nor the weights (but for rounding).
_FREE = {
    "eval_batch_size", "gradient_checkpointing", "micro_batch_size", "name", "output_dir", "quiet", "registry",
    "report_to", "torch_compile", "train", "dev",
}  # fmt: skip


class Checkpoints:
    """The folder ``checkpoints`` of a run: there from its start until it succeeds.

    Args:
        run_folder: The run's folder.
    """

    def __init__(self, run_folder: Path) -> None:
        self.folder = run_folder / "checkpoints"

    def last(self) -> Path | None:
        """The newest checkpoint that is whole; newer ones, which a killed run began to write, are removed."""
        for folder in sorted(self.folder.glob("checkpoint-*"), key=step_of, reverse=True):
            if _is_whole(folder):
                return folder
            shutil.rmtree(folder, ignore_errors=True)
        return None

    def begin(self, settings: dict[str, Any], resume: bool) -> Path | None:
        """Makes the folder ready.

        Args:
            settings: What the run's weights depend on, as JSON.
            resume: Whether to go on from the last checkpoint, if there is one.

        Returns:
            The checkpoint to go on from; None starts from the beginning.

        Raises:
            ConfigError: The checkpoints were made with other settings.
            TrainingError: There are checkpoints, and the run is not to go on from them.
        """
        last = self.last()
        if last is not None and not resume:
            raise TrainingError(
                f"{self.folder} holds a run that was not finished (up to step {step_of(last)}). Go on with --resume, "
                "or remove that folder to start anew."
            )
        if last is not None:
            self._compare(settings)
            return last
        self.remove()
        self.folder.mkdir(parents=True)
        (self.folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2, default=str), encoding="utf-8")
        return None

    def remove(self) -> None:
        """Removes them all."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def advice(self) -> str:
        """What is left of a run that ended early, and how to go on."""
        last = self.last()
        if last is None:
            return "There is no checkpoint yet: the next run starts from the beginning."
        return f"The last checkpoint is of step {step_of(last)} ({last}): run the same command again with --resume."

    def _compare(self, settings: dict[str, Any]) -> None:
        before = json.loads((self.folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        if changes := differences(before, settings):
            raise ConfigError(
                f"{self.folder} was made with other settings: {'; '.join(changes)}. Set them back to go on with "
                "--resume, or remove that folder to start anew."
            )


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Words each setting that decides over the weights and differs: ``"r was 8 and is 16"``."""
    now = json.loads(json.dumps(now, default=str))
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    return [f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in changed if key not in _FREE]


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _is_whole(folder: Path) -> bool:
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or cut off
        return False
    there = {path.name for path in folder.iterdir()}
    return state["global_step"] == step_of(folder) and there.issuperset(_FILES) and not there.isdisjoint(_WEIGHTS)
