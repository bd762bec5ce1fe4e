"""What a run shows and measures while the trainer works.

Imported only where a trainer is made, since its class needs transformers at import.
"""

import math
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dspy_lora.training.run import Run
from dspy_lora.training.scoring import Questions, exact_match

# The metric that the trainer chooses its best checkpoint by: the greater, the better.
CHOICE = "eval_choice"

# Weight of the loss among equal exact matches: below one answer in any number of rows that fits in memory.
_TIE_BREAK = 1e-9

_LOGGED = ("loss", "grad_norm", "learning_rate", "mean_token_accuracy")


class Watch(TrainerCallback):
    """Writes ``metrics.jsonl`` and console lines, and adds the exact match to each validation.

    The trainer chooses its best checkpoint by the metrics this adds to: they are handed over as the very dict that the
    trainer reads afterwards.

    Args:
        run: The run's book.
        questions: Validation rows to answer at each validation.
        batch_size: Prompts answered in one batch.
        select_by: ``"exact_match"`` (among equals, the lower loss) or ``"loss"``.
        patience: Validations without a lower validation loss after which training stops; None never stops it.
    """

    def __init__(
        self, run: Run, questions: Questions, batch_size: int, select_by: str, patience: int | None = None
    ) -> None:
        self._run = run
        self._questions = questions
        self._select_by = select_by
        self._batch_size = batch_size
        self._patience = patience
        self._start = 0.0
        self._first = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock that steps per second are counted by."""
        self._start, self._first = time.monotonic(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Records a training step's loss; a validation's log comes without one and is recorded in ``on_evaluate``."""
        if not logs or "loss" not in logs:
            return
        values = {name: float(logs[name]) for name in _LOGGED if name in logs}
        self._run.log(state.global_step, max_steps=state.max_steps, **values)
        speed = (state.global_step - self._first) / (time.monotonic() - self._start)
        width = len(str(state.max_steps))
        self._run.say(
            f"step {state.global_step:>{width}}/{state.max_steps}  loss {values['loss']:.4f}  "
            f"lr {values['learning_rate']:.2e}  {speed:.1f} steps/s"
        )
        if not math.isfinite(values["loss"]):
            control.should_training_stop = True

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Answers the validation rows and records the validation."""
        loss = metrics["eval_loss"]
        share = exact_match(model, processing_class, self._questions, self._batch_size)
        metrics["eval_exact_match"] = share
        metrics[CHOICE] = -loss if self._select_by == "loss" else share - _TIE_BREAK * loss
        self._run.log(state.global_step, eval_loss=loss, eval_exact_match=share)
        self._run.say(f"step {state.global_step}: validation loss {loss:.4f}, exact match {share:.3f}")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ends the run when patience has run out: after the checkpoint that belongs to each validation."""
        if out_of_patience(state, self._patience):
            self._run.say(f"step {state.global_step}: {self._patience} validations without a lower loss, stopping")
            control.should_training_stop = True


def out_of_patience(state: TrainerState, patience: int | None) -> bool:
    """Whether the last ``patience`` validations brought no lower loss than those before them."""
    losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    if patience is None or len(losses) <= patience:
        return False
    return min(losses[-patience:]) >= min(losses[:-patience])
