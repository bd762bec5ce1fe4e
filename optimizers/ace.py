"""ACE: learns a playbook from what a program did, offline over epochs or online while it serves.

Zhang et al. 2025, "Agentic Context Engineering", arXiv 2510.04618. The playbook's bullets stand at the end of every
predictor's instruction between two marker lines, so the compiled program needs nothing of this package to run.
"""

import inspect
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, cast

import dspy
import pydantic
from dspy.teleprompt.teleprompt import Teleprompter
from dspy.utils.exceptions import AdapterParseError
from dspy_lora.optimizers.ace_roles import Curator, Record, Reflector, RuleCurator, RuleReflector
from dspy_lora.optimizers.rollouts import Rollout, Rollouts, scored, shown_value
from dspy_lora.optimizers.run_log import RunLog, digest

from dspy_lora.context.deltas import Delta, Update
from dspy_lora.context.playbook import Embed, Playbook, with_playbook, without_playbook
from dspy_lora.context.tokens import CountTokens, count_tokens_of, estimate_tokens
from dspy_lora.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_DELTAS = pydantic.TypeAdapter(list[Delta])
_REMEMBERED = 1_024  # answers that feedback may still come for


class ACE(Teleprompter):
    """A teleprompter that tells a program what earlier attempts have taught.

    The program answers training rows in batches (Generator). After each batch the Reflector says what to learn and
    which bullets helped or misled, the Curator turns that into operations on the playbook, and the playbook is refined
    (bullets that say the same are merged) and trimmed to the token budget: the bullets of the least helpful minus
    harmful go first (``Playbook.trim``).

    Args:
        metric: ``(gold, pred, trace)`` or ``dspy.GEPA``'s ``(gold, pred, trace, pred_name, pred_trace)``, to a number,
            a bool or a ``dspy.Prediction`` with ``score`` and ``feedback``. Where it raises, the example failed. None
            only for online use with ``feedback``.
        reflection_lm: Reflects and curates. None counts instead: label rules from recorded feedback.
        epochs: How often all rows are gone through.
        batch_size: Rows that are answered with the same playbook.
        rounds: Rounds of the Reflector on each batch.
        token_budget: Most tokens of the playbook in the prompt.
        count_tokens: Counts them; None takes the tokenizer of the program's LM where that is a LoRALM, else a token for
            every 3 bytes (``count_tokens_of``).
        embedder: Takes texts to vectors (``dspy.Embedder``), for bullets that say the same in other words.
        similarity: Least cosine of such bullets.
        ground_truth: Whether the Reflector is told a row's right answer where the row holds the predictor's output
            field. Else it has the metric's feedback alone.
        playbook: To begin with; None takes the program's own, if it has one.
        reflector: Instead of ``Reflector`` or ``RuleReflector``.
        curator: Instead of ``Curator`` or ``RuleCurator``.
        num_threads: Rows answered at once.
        failure_score: Of a row on which the program or the metric raised.
        seed: Of the order of rows.
        log_dir: Keeps every answer there, and ``playbook.md``; a run that was killed goes on when it is compiled again.
        track_stats: Whether the program gets ``detailed_results``, an ``ACEResult``.

    Raises:
        ConfigError: A number that is not positive.
        TypeError: A metric that takes neither three nor five arguments.

    Example:
        >>> program = ACE(metric).compile(program, trainset=train, valset=val)
        >>> program.playbook.save("playbook.md")
        >>> program.save("program.json")
    """

    def __init__(
        self,
        metric: Callable[..., Any] | None,
        *,
        reflection_lm: dspy.LM | None = None,
        epochs: int = 2,
        batch_size: int = 8,
        rounds: int = 3,
        token_budget: int = 2_000,
        count_tokens: CountTokens | None = None,
        embedder: Embed | None = None,
        similarity: float = 0.9,
        ground_truth: bool = True,
        playbook: Playbook | None = None,
        reflector: dspy.Module | None = None,
        curator: dspy.Module | None = None,
        num_threads: int | None = None,
        failure_score: float = 0.0,
        seed: int = 0,
        log_dir: str | Path | None = None,
        track_stats: bool = False,
    ) -> None:
        super().__init__()
        numbers = {"epochs": epochs, "batch_size": batch_size, "rounds": rounds, "token_budget": token_budget}
        for name, value in numbers.items():
            if value < 1:
                raise ConfigError(f"{name}={value!r} must be 1 or more")
        self.metric = None if metric is None else _of_five(metric)
        self.metric_name = getattr(metric, "__qualname__", repr(metric))
        self.reflection_lm, self.rounds, self.reflector, self.curator = reflection_lm, rounds, reflector, curator
        self.epochs, self.batch_size, self.seed = epochs, batch_size, seed
        self.token_budget, self.count_tokens = token_budget, count_tokens
        self.embedder, self.similarity = embedder, similarity
        self.ground_truth, self.playbook = ground_truth, playbook
        self.num_threads, self.failure_score = num_threads, failure_score
        self.log_dir = None if log_dir is None else Path(log_dir)
        self.track_stats = track_stats

    def compile(
        self,
        student: dspy.Module,
        *,
        trainset: list[dspy.Example],
        teacher: dspy.Module | None = None,
        valset: list[dspy.Example] | None = None,
    ) -> dspy.Module:
        """Learns a playbook offline.

        Args:
            student: The program; it is not changed.
            trainset: Rows to learn from.
            teacher: Not taken.
            valset: Rows that choose among the playbooks of all epochs, the one at the beginning included; without them
                the last one is kept.

        Returns:
            A copy that is told the playbook and holds it as ``playbook``, ``_compiled``.

        Raises:
            ConfigError: No metric, no rows, no predictor, a teacher, or a ``log_dir`` of another run.
            DataError: ``log_dir/playbook.md`` was edited meanwhile; nothing of it or of the run is lost.
        """
        if teacher is not None:
            raise ConfigError("ACE takes no teacher")
        if self.metric is None or not trainset:
            raise ConfigError("ACE.compile needs a metric and training rows; without them there is ACE.online")
        learner = Learner(self, student)
        result = _Offline(self, learner, trainset, valset or []).run()
        if self.log_dir is not None:
            result.playbook.save(self.log_dir / "playbook.md")
        program = learner.told(result.playbook)
        program.playbook, program._compiled = result.playbook, True
        if self.track_stats:
            program.detailed_results = result
        return program

    def online(self, program: dspy.Module, path: str | Path | None = None) -> "Online":
        """A program that learns while it serves.

        Args:
            program: Compiled or not; it is not changed.
            path: A Markdown file of the playbook, read if it is there and written after every change.

        Raises:
            DataError: The file cannot be read as a playbook; it is left as it is.
        """
        return Online(self, program, None if path is None else Path(path))


@dataclass
class ACEResult:
    """What a run found.

    Attributes:
        playbooks: The playbook at the beginning and after every epoch.
        val_scores: Mean score of each on the validation rows; empty without these.
        best_idx: Which one the program got.
        train_scores: Mean score on the training rows in every epoch, each row answered before it was learned from.
        metric_calls: In all; a row that meets the same playbook again is not asked again.
        usage: ``calls`` of LMs by the program, ``prompt_tokens``, ``completion_tokens``.
        failures: What the program, the metric or a role raised, and operations that were refused.
    """

    playbooks: list[Playbook] = field(default_factory=list)
    val_scores: list[float] = field(default_factory=list)
    best_idx: int = 0
    train_scores: list[float] = field(default_factory=list)
    metric_calls: int = 0
    usage: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def playbook(self) -> Playbook:
        """The one that the program got."""
        return self.playbooks[self.best_idx]


class Learner:
    """Folds what a program did into a playbook. It belongs to one program, whose predictors it knows by name.

    Args:
        ace: The settings.
        program: A copy of it is told playbooks.

    Raises:
        ConfigError: It has no predictor.
    """

    def __init__(self, ace: ACE, program: dspy.Module) -> None:
        self.ace = ace
        own = vars(program).get("playbook")
        self.start = ace.playbook or (own if isinstance(own, Playbook) else Playbook())
        self.program = program.deepcopy()
        vars(self.program).pop("playbook", None)
        self.program._compiled = False  # DSPy shows and saves no predictor of a compiled part
        if not self.program.predictors():
            raise ConfigError(f"{program!r} has no predictor to tell a playbook; those of compiled parts are frozen")
        lm = self.program.predictors()[0].lm or dspy.settings.lm
        self.count = ace.count_tokens or (count_tokens_of(lm) if lm else estimate_tokens)
        self.tasks = {
            name: without_playbook(predictor.signature.instructions)
            for name, predictor in self.program.named_predictors()
        }
        with_lm = ace.reflection_lm is not None
        self.reflector = ace.reflector or (Reflector(ace.rounds) if with_lm else RuleReflector())
        self.curator = ace.curator or (Curator() if with_lm else RuleCurator())

    def instructions(self, playbook: Playbook) -> dict[str, str]:
        """Each predictor's instruction with the bullets that are for it."""
        return {name: with_playbook(task, self._share(playbook, name).prompt()) for name, task in self.tasks.items()}

    def build(self, instructions: Mapping[str, str]) -> dspy.Module:
        """A copy of the program with other instructions."""
        program = self.program.deepcopy()
        for name, predictor in program.named_predictors():
            predictor.signature = predictor.signature.with_instructions(instructions[name])
        return program

    def told(self, playbook: Playbook) -> dspy.Module:
        """A copy of the program that is told a playbook."""
        return self.build(self.instructions(playbook))

    def deltas(self, playbook: Playbook, records: Mapping[str, Sequence[Record]], failures: list[str]) -> list[Delta]:
        """What attempts teach, as operations that the playbook will take.

        Args:
            playbook: What the program was told; it is not changed.
            records: Attempts of each predictor.
            failures: Takes what went wrong.
        """
        found: list[Delta] = []
        for name, attempts in records.items():
            try:
                found += self._reflect(playbook, name, attempts) if attempts else []
            except AdapterParseError as exc:
                failures.append(f"{name}: a reflection could not be parsed and is left out: {exc}"[:500])
        refusals = playbook.refusals(found)
        failures += [reason for reason in refusals if reason]
        return [delta for delta, reason in zip(found, refusals, strict=True) if reason is None]

    def _reflect(self, playbook: Playbook, name: str, attempts: Sequence[Record]) -> list[Delta]:
        own = self._share(playbook, name)
        section = f"{name} / " if len(self.tasks) > 1 else ""
        left = self.ace.token_budget - self.count(playbook.prompt())
        with dspy.context(lm=self.ace.reflection_lm or dspy.settings.lm, trace=[]):
            seen = self.reflector(task=self.tasks[name], playbook=own, section=section, records=attempts)
            found = self.curator(playbook=own, section=section, insights=seen.insights, tokens_left=left)
        return [*seen.counts, *found.operations]

    def fold(self, playbook: Playbook, deltas: Sequence[Delta]) -> None:
        """Carries operations out, merges what says the same, keeps to the budget."""
        playbook.apply(deltas)
        if any(not isinstance(delta, Update) or delta.text for delta in deltas):
            playbook.refine(self.ace.embedder, self.ace.similarity)
        playbook.trim(self.ace.token_budget, self.count)

    def records(self, example: dspy.Example, rollout: Rollout) -> dict[str, list[Record]]:
        """The attempts of one row, with its score and, where it is known and wanted, the right answer."""
        told = self._right_answers(example) if rollout.records else {}
        return {
            name: [
                {**each, "Score": rollout.score, "Feedback": _joined(each["Feedback"], told.get(name))}
                for each in attempts
            ]
            for name, attempts in rollout.records.items()
        }

    def _right_answers(self, example: dspy.Example) -> dict[str, str]:
        if not self.ace.ground_truth:
            return {}
        known, found = dict(example.labels()), {}
        for name, predictor in self.program.named_predictors():
            right = {key: known[key] for key in predictor.signature.output_fields if key in known}
            if len(right) == 1:
                found[name] = f"The right answer is {next(iter(right.values()))}."
            elif right:
                found[name] = f"It should have been {', '.join(f'{key}={value!r}' for key, value in right.items())}."
        return found

    def _share(self, playbook: Playbook, name: str) -> Playbook:
        """The bullets for a predictor: a section ``"summarize / Length"`` is for ``summarize`` alone."""
        others = {f"{other} /" for other in self.tasks if other != name}
        return Playbook(bullet for bullet in playbook.bullets if not bullet.section.startswith(tuple(others)))


class _Offline:
    """One ``compile``."""

    def __init__(self, ace: ACE, learner: Learner, train: Sequence[dspy.Example], val: Sequence[dspy.Example]) -> None:
        self.ace, self.learner, self.train, self.val = ace, learner, list(train), list(val)
        self.playbook = learner.start.copy()
        self.log = RunLog(ace.log_dir, self._settings())
        self.rollouts = Rollouts(
            learner, cast(Callable[..., Any], ace.metric), self.log, ace.num_threads, ace.failure_score
        )
        self.result = ACEResult()

    def _settings(self) -> dict[str, Any]:
        ace, lms = self.ace, [predictor.lm or dspy.settings.lm for predictor in self.learner.program.predictors()]
        return {
            "train": digest(*(row.toDict() for row in self.train)),
            "val": digest(*(row.toDict() for row in self.val)),
            "program": self.learner.tasks,
            "lms": [lm and lm.model for lm in lms],
            "reflection_lm": ace.reflection_lm and ace.reflection_lm.model,
            "metric": ace.metric_name,
            "playbook": digest(self.playbook.render()),
            "ground_truth": ace.ground_truth,
            "token_budget": ace.token_budget,
            "epochs": ace.epochs,
            "batch_size": ace.batch_size,
            "rounds": ace.rounds,
            "seed": ace.seed,
        }

    def run(self) -> ACEResult:
        """All epochs, and the choice among their playbooks."""
        self._keep()
        for epoch in range(self.ace.epochs):
            rows = Random(f"{self.ace.seed} {epoch}").sample(self.train, len(self.train))
            size = self.ace.batch_size
            scores = [score for at in range(0, len(rows), size) for score in self._step(rows[at : at + size])]
            self.result.train_scores.append(sum(scores) / len(scores))
            self._keep()
            logger.info("ACE epoch %d: %.3f, %r", epoch + 1, self.result.train_scores[-1], self.playbook)
        scores = self.result.val_scores
        self.result.best_idx = scores.index(max(scores)) if scores else len(self.result.playbooks) - 1
        self.result.metric_calls, self.result.usage = self.rollouts.calls, self.rollouts.usage
        return self.result

    def _keep(self) -> None:
        self.result.playbooks.append(self.playbook.copy())
        if self.val:
            scores = [rollout.score for rollout in self._answer(self.val, traced=False)]
            self.result.val_scores.append(sum(scores) / len(scores))

    def _answer(self, rows: Sequence[dspy.Example], traced: bool) -> list[Rollout]:
        instructions = self.learner.instructions(self.playbook)
        rollouts = self.rollouts.run([(instructions, row) for row in rows], traced)
        errors = [rollout.error for rollout in rollouts if rollout.error]
        if errors:
            logger.warning("%d of %d rows failed; the first: %s", len(errors), len(rows), errors[0])
        self.result.failures += errors
        return rollouts

    def _step(self, rows: Sequence[dspy.Example]) -> list[float]:
        """Answers a batch and learns from it; returns its scores."""
        rollouts = self._answer(rows, traced=True)
        records: dict[str, list[Record]] = {name: [] for name in self.learner.tasks}
        for row, rollout in zip(rows, rollouts, strict=True):
            for name, attempts in self.learner.records(row, rollout).items():
                records[name] += attempts
        self.learner.fold(self.playbook, self._deltas(records))
        if self.ace.log_dir is not None:
            self.playbook.save(self.ace.log_dir / "playbook.md")
        return [rollout.score for rollout in rollouts]

    def _deltas(self, records: Mapping[str, Sequence[Record]]) -> list[Delta]:
        """From the log where an LM has reflected on the same before; counting is done again, to remember the rows."""
        if self.ace.reflection_lm is None:
            return self.learner.deltas(self.playbook, records, self.result.failures)
        key = digest("deltas", self.playbook.render(), records)
        if (known := self.log.get(key)) is None:
            failures: list[str] = []
            found = self.learner.deltas(self.playbook, records, failures)
            known = {"deltas": _DELTAS.dump_python(found, mode="json"), "failures": failures}
            self.log.put(key, known)
        self.result.failures += known["failures"]
        return _DELTAS.validate_python(known["deltas"])


class Online(dspy.Module):
    """A program that answers with its current playbook and learns from feedback. Any thread may call it.

    An answer under way keeps the playbook that it began with. ``save`` and ``load`` hold program and playbook.

    Args:
        ace: The settings.
        program: The program; it is not changed.
        path: The playbook's file.

    Attributes:
        playbook: What it has learned.
        failures: What went wrong while it learned.
    """

    def __init__(self, ace: ACE, program: dspy.Module, path: Path | None = None) -> None:
        super().__init__()
        self.learner, self.path = Learner(ace, program), path
        self.playbook = Playbook.load(path) if path is not None and path.exists() else self.learner.start.copy()
        self.program = self.learner.told(self.playbook)
        self.failures: list[str] = []
        self._answers: deque[tuple[dspy.Prediction, Rollout]] = deque(maxlen=_REMEMBERED)
        self._lock = threading.Lock()

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
        names = {id(predictor): name for name, predictor in program.named_predictors()}
        records: dict[str, list[dict[str, Any]]] = {}
        for predictor, inputs, outputs in trace:
            if (name := names.get(id(predictor))) is not None:
                shown = [{key: shown_value(value) for key, value in part.items()} for part in (inputs, outputs)]
                records.setdefault(name, []).append({"Inputs": shown[0], "Generated Outputs": shown[1]})
        self._answers.append((prediction, Rollout(0.0, records=records)))

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
        answers = [rollout for known, rollout in list(self._answers) if known is prediction]
        if not answers:
            raise DataError(f"{str(prediction)[:80]!r} is none of the last {_REMEMBERED} answers of this program.")
        text = feedback or f"This answer got a score of {score}."
        judged = {
            name: [{**each, "Feedback": text} for each in attempts] for name, attempts in answers[-1].records.items()
        }
        rollout = Rollout(float(score), records=judged)
        self._learn(self.learner.records(example or dspy.Example().with_inputs(), rollout))

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
        except Exception as exc:  # noqa: BLE001 - one example's metric may fail
            score, feedback = ace.failure_score, None
            self.failures.append(f"the metric raised {type(exc).__name__}: {exc}")
            logger.warning("%s", self.failures[-1])
        self.feedback(prediction, score, feedback or "", example)
        return prediction

    def _learn(self, records: Mapping[str, Sequence[Record]]) -> None:
        with self._lock:
            self.learner.fold(self.playbook, self.learner.deltas(self.playbook, records, self.failures))
            self.program = self.learner.told(self.playbook)
            if self.path is not None:
                self.playbook.save(self.path)


def _of_five(metric: Callable[..., Any]) -> Callable[..., Any]:
    """A metric that takes GEPA's five arguments; one of three gets no trace, which would mean "strict" to it."""
    for count in (5, 3):
        try:
            inspect.signature(metric).bind(*[None] * count)
        except TypeError:
            continue
        return metric if count == 5 else lambda gold, pred, trace, pred_name, pred_trace: metric(gold, pred, None)
    raise TypeError(
        f"metric {metric!r} must take (gold, pred, trace) or (gold, pred, trace, pred_name, pred_trace), not "
        f"{inspect.signature(metric)}"
    )


def _joined(feedback: str, right: str | None) -> str:
    """Feedback that begins with the right answer, where it is known and not said anyway."""
    return feedback if right is None or right in feedback else f"{right} {feedback}"
