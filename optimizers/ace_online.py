"""A program that learns its playbook while it serves."""

import logging
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dspy
from dspy_lora.optimizers.ace_learner import Learner
from dspy_lora.optimizers.ace_roles import Record
from dspy_lora.optimizers.outages import is_outage
from dspy_lora.optimizers.rollouts import Records, scored
from dspy_lora.optimizers.traces import by_predictor, shown

from dspy_lora.context.playbook import Playbook
from dspy_lora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from dspy_lora.optimizers.ace import ACE

logger = logging.getLogger(__name__)

_REMEMBERED = 1_024  # answers that feedback may still come for


class Online(dspy.Module):
    """A program that answers with its current playbook and learns from feedback. Any thread may call it.

    ``program`` and its predictors stay the same objects, for those who listen to them or trace them; what was learned
    changes their instructions. A predictor reads its own once a call, so it is told the old playbook or the new one.
    ``save`` and ``load`` hold program and playbook.

    Args:
        ace: The settings.
        program: The program; it is not changed.
        path: The playbook's file. Several workers may learn into one: see ``Playbook.save``.

    Attributes:
        program: A copy of the program, which is told the playbook.
        playbook: What it has learned.
        failures: What went wrong while it learned.
    """

    def __init__(self, ace: "ACE", program: dspy.Module, path: Path | None = None) -> None:
        super().__init__()
        self.learner, self.path = Learner(ace, program), path
        self.playbook = self._beginning()
        self.program = self.learner.told(self.playbook)
        self.failures: list[str] = []
        self._answers: deque[tuple[dspy.Prediction, Records]] = deque(maxlen=_REMEMBERED)
        self._lock = threading.Lock()

    def _beginning(self) -> Playbook:
        if self.path is not None and self.path.exists():
            return Playbook.load(self.path)
        playbook = self.learner.start()
        if self.path is not None:
            playbook.share(self.path)  # another worker may write it first
        return playbook

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {key: value for key, value in state.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.Lock()

    def load_state(self, state: dict[str, Any], **kwargs: Any) -> None:
        """As DSPy's; what it learns from now on goes on from there."""
        super().load_state(state, **kwargs)
        self.learner = Learner(self.learner.ace, self.program)

    def forward(self, **inputs: Any) -> Any:
        """Answers with the current playbook."""
        program, trace = self.program, list[Any]()
        with dspy.context(trace=trace):
            prediction = program(**inputs)
        self._remember(program, prediction, trace)
        return prediction

    async def aforward(self, **inputs: Any) -> Any:
        """Answers with the current playbook."""
        program, trace = self.program, list[Any]()
        with dspy.context(trace=trace):
            prediction = await program.acall(**inputs)
        self._remember(program, prediction, trace)
        return prediction

    def _remember(self, program: dspy.Module, prediction: Any, trace: list[Any]) -> None:
        """Keeps what feedback needs, and hands the trace on to whoever traces this call."""
        if dspy.settings.trace is not None:
            dspy.settings.trace.extend(trace)
        records = {
            name: [{"Inputs": shown(inputs), "Generated Outputs": shown(outputs)} for _, inputs, outputs in calls]
            for name, calls in by_predictor(program, trace).items()
        }
        self._answers.append((prediction, records))

    def feedback(
        self, prediction: dspy.Prediction, score: float, feedback: str = "", example: dspy.Example | None = None
    ) -> None:
        """Folds in how good an answer was.

        Args:
            prediction: An answer of this program, one of the last 1,024.
            score: Its score; 1 and more means right.
            feedback: What was wrong, or what would have been right.
            example: The row, where its right answer is known by now.

        Raises:
            DataError: Not such an answer, or the playbook's file was edited by hand; what was learned is in
                ``playbook`` then.
        """
        answers = [records for known, records in list(self._answers) if known is prediction]
        if not answers:
            raise DataError(f"{str(prediction)[:80]!r} is none of the last {_REMEMBERED} answers of this program.")
        text = feedback or f"This answer got a score of {score}."
        judged = {name: [{**each, "Feedback": text} for each in attempts] for name, attempts in answers[-1].items()}
        self._learn(self.learner.records(example or dspy.Example().with_inputs(), float(score), judged))

    def learn(self, example: dspy.Example) -> Any:
        """Answers a row whose right answer is known, scores it with ACE's metric and folds that in.

        Returns:
            The answer.

        Raises:
            ConfigError: ACE has no metric.
        """
        ace = self.learner.ace
        if ace.metric is None:
            raise ConfigError("this ACE has no metric: give one, or score answers yourself with `feedback`")
        prediction = self(**example.inputs())
        try:
            score, _, feedback = scored(ace.metric(example, prediction, None, None, None))
        except Exception as exc:
            if is_outage(exc):  # of an LM that judges
                raise
            score, feedback = ace.failure_score, None
            self.failures.append(f"the metric raised {type(exc).__name__}: {exc}")
            logger.warning("%s", self.failures[-1])
        self.feedback(prediction, score, feedback or "", example)
        return prediction

    def _learn(self, records: Mapping[str, Sequence[Record]]) -> None:
        with self._lock:
            self.learner.fold(self.playbook, self.learner.deltas(self.playbook, records, self.failures))
            try:
                self._save()
            finally:
                self.learner.tell(self.program, self.playbook)

    def _save(self) -> None:
        """Writes the file; where that brought in what others have learned, the whole is tidied up and written again."""
        while self.path is not None and self.playbook.save(self.path):
            self.learner.tidy(self.playbook)
