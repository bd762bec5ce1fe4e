"""dspy.BootstrapFinetune for programs whose predictors get adapters of their own, and for models that fail at times."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import dspy
from dspy.teleprompt.bootstrap_trace import FailedPrediction
from dspy_lora.optimizers.outages import is_outage

logger = logging.getLogger(__name__)


class BootstrapFinetune(dspy.BootstrapFinetune):
    """DSPy's optimizer of the same name, with five differences in what it trains on (read at DSPy 3.4.1).

    - ``multitask=False`` gives each predictor the calls that it made itself. DSPy goes by the place of a call among
      the program's calls: predictors that are called in another order than they were defined in get each other's data,
      and of a predictor that is called twice one call is lost.
    - An example whose answer cannot be parsed, in full or in part, is left out. DSPy scores it -1, which counts as
      true, and fails with an AttributeError or a TypeError.
    - An example on which the program raises is left out too, with a line in the log. In DSPy it ends the run. Errors
      of the LM itself (no engine, no server) still do.
    - Where there is a metric, an example counts if it scores above 0. DSPy takes every score but 0.
    - An example on which the metric raises, with a line in the log, or returns None scores 0. In DSPy it ends the run.

    Arguments are those of ``dspy.BootstrapFinetune``.
    """

    metric: Callable[..., Any] | None

    def compile(
        self,
        student: dspy.Module,
        trainset: list[dspy.Example],
        teacher: dspy.Module | list[dspy.Module] | None = None,
    ) -> dspy.Module:
        """Trains the student's LMs on what the teachers, or the student itself, answered well.

        Args:
            student: The program, with an LM on every predictor; its predictors get the new LMs.
            trainset: Examples to collect answers on.
            teacher: One or several programs of the student's structure; None, alone or among them, is the student.

        Returns:
            The student.

        Raises:
            RuntimeError: A training job failed; its error is the cause.
            DspyLoraError: As ``LoRAProvider.finetune``: no example was left, a setting is not allowed...
        """
        programs = [each or student for each in (teacher if isinstance(teacher, list) else [teacher])]
        self._places = {id(one): place for each in programs for place, one in enumerate(each.predictors())}
        metric = self.metric
        with contextlib.ExitStack() as stack:
            for program in {id(each): each for each in programs}.values():
                stack.enter_context(_forgiving(program))
            stack.callback(setattr, self, "metric", metric)
            self.metric = metric and _judged(metric)
            return super().compile(student, trainset, teacher)

    def _prepare_finetune_data(
        self, trace_data: list[dict[str, Any]], lm: dspy.LM, pred_ind: int | None = None
    ) -> tuple[list[dict[str, Any]], Any]:
        answered = [item for item in trace_data if not isinstance(item["prediction"], FailedPrediction)]
        good = [item for item in answered if not self.metric or float(item["score"]) > 0]
        logger.info("%d examples, %d answered, %d to train on", len(trace_data), len(answered), len(good))
        if pred_ind is not None:
            good = [item | {"trace": self._calls(item["trace"], pred_ind)} for item in good]
        return super()._prepare_finetune_data(good, lm)

    def _calls(self, trace: list[Any], place: int) -> list[Any]:
        """The calls of one predictor."""
        return [call for call in trace if self._places.get(id(call[0])) == place]


def _judged(metric: Callable[..., Any]) -> Callable[..., Any]:
    """The metric, with a score of 0 where it raises or returns None."""

    def judge(example: dspy.Example, prediction: Any, trace: Any = None) -> Any:
        try:
            score = metric(example, prediction, trace)
        except Exception as exc:
            if is_outage(exc):
                raise
            logger.warning("an example scores 0: the metric raised %s: %s", type(exc).__name__, str(exc).strip()[:200])
            return 0
        return 0 if score is None else score

    return judge


@contextlib.contextmanager
def _forgiving(program: dspy.Module) -> Iterator[None]:
    """Within it, a program that raises returns a ``FailedPrediction``."""
    forward = object.__getattribute__(program, "forward")  # Module warns where it is looked up as usual
    own = program.__dict__.get("forward")

    def attempt(*args: Any, **inputs: Any) -> Any:
        try:
            return forward(*args, **inputs)
        except Exception as exc:
            if is_outage(exc):
                raise
            logger.warning("an example is left out: %s: %s", type(exc).__name__, str(exc).strip()[:200])
            return FailedPrediction(f"{type(exc).__name__}: {exc}")

    program.forward = attempt
    try:
        yield
    finally:
        if own is None:
            del program.forward
        else:
            program.forward = own
