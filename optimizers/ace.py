"""ACE: learns a playbook from what a program did, offline over epochs or online while it serves.

Zhang et al. 2025, "Agentic Context Engineering", arXiv 2510.04618. The playbook's bullets stand at the end of every
predictor's instruction between two marker lines, so the compiled program needs nothing of this package to run.
"""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, cast

import dspy
import pydantic
from dspy.teleprompt.teleprompt import Teleprompter
from dspy_lora.optimizers.ace_learner import Learner
from dspy_lora.optimizers.ace_online import Online
from dspy_lora.optimizers.ace_roles import Record, RuleReflector
from dspy_lora.optimizers.rollouts import Pair, Rollout, Rollouts
from dspy_lora.optimizers.run_log import RunLog, digest
from dspy_lora.optimizers.run_settings import configured_settings, lm_settings, program_settings, written

from dspy_lora.context.bullets import Embed
from dspy_lora.context.deltas import Delta
from dspy_lora.context.playbook import Playbook
from dspy_lora.context.taught import attach
from dspy_lora.context.tokens import CountTokens
from dspy_lora.errors import ConfigError

logger = logging.getLogger(__name__)

_DELTAS = pydantic.TypeAdapter(list[Delta])


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
        playbook: To begin with; None takes the program's own, else the bullets that its instructions tell.
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
        self.metric_name = None if metric is None else written(metric)
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
            LMError: An LM is out of reach, or another outage (``outages.py``). With a ``log_dir`` the run goes on from
                there when it is compiled again.
            DataError: ``log_dir/playbook.md`` was edited meanwhile; nothing of it or of the run is lost. Or the program
                has no playbook object, and the one in its instructions cannot be read.
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
        attach(program, result.playbook)
        program._compiled = True
        if self.track_stats:
            program.detailed_results = result
        return program

    def online(self, program: dspy.Module, path: str | Path | None = None) -> Online:
        """A program that learns while it serves.

        Args:
            program: Compiled or not; it is not changed.
            path: A Markdown file of the playbook, read if it is there and written after every change. Several workers
                may share it: each brings in what the others have learned when it writes.

        Raises:
            DataError: The file cannot be read as a playbook; it is left as it is. Or there is none, and the one in the
                program's instructions cannot be read.
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


class _Offline:
    """One ``compile``."""

    def __init__(self, ace: ACE, learner: Learner, train: Sequence[dspy.Example], val: Sequence[dspy.Example]) -> None:
        self.ace, self.learner, self.train, self.val = ace, learner, list(train), list(val)
        self.playbook = learner.start()
        self.log = RunLog(ace.log_dir, self._settings())
        self.rollouts = Rollouts(
            learner, cast(Callable[..., Any], ace.metric), self.log, ace.num_threads, ace.failure_score
        )
        self.result = ACEResult()

    def _settings(self) -> dict[str, Any]:
        ace = self.ace
        return {
            "train": digest(*(row.toDict() for row in self.train)),
            "val": digest(*(row.toDict() for row in self.val)),
            "program": program_settings(self.learner.program),
            "reflection_lm": lm_settings(ace.reflection_lm),
            "configured": configured_settings(),
            "metric": ace.metric_name,
            "playbook": digest(self.playbook.render()),
            "reflector": program_settings(self.learner.reflector),
            "curator": program_settings(self.learner.curator),
            "embedder": ace.embedder and repr(ace.similarity),
            "failure_score": ace.failure_score,
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
            scores = [rollout.score for rollout in self._answer(self.val)[1]]
            self.result.val_scores.append(sum(scores) / len(scores))

    def _answer(self, rows: Sequence[dspy.Example]) -> tuple[list[Pair], list[Rollout]]:
        instructions = self.learner.instructions(self.playbook)
        pairs = [(instructions, row) for row in rows]
        rollouts = self.rollouts.run(pairs)
        self.result.failures += [rollout.error for rollout in rollouts if rollout.error]
        return pairs, rollouts

    def _step(self, rows: Sequence[dspy.Example]) -> list[float]:
        """Answers a batch and learns from it; returns its scores."""
        pairs, rollouts = self._answer(rows)
        found = self.rollouts.records(pairs, list(self.learner.tasks))
        records: dict[str, list[Record]] = {name: [] for name in self.learner.tasks}
        for row, rollout, seen in zip(rows, rollouts, found, strict=True):
            for name, attempts in self.learner.records(row, rollout.score, seen).items():
                records[name] += attempts
        self.learner.fold(self.playbook, self._deltas(records))
        if self.ace.log_dir is not None:
            self.playbook.save(self.ace.log_dir / "playbook.md")
        return [rollout.score for rollout in rollouts]

    def _deltas(self, records: Mapping[str, Sequence[Record]]) -> list[Delta]:
        """From the log where an LM has reflected on the same before; counting is done again, to remember the rows."""
        if isinstance(self.learner.reflector, RuleReflector):
            return self.learner.deltas(self.playbook, records, self.result.failures)
        key = digest("deltas", self.playbook.render(), records)
        if (known := self.log.get(key)) is None:
            failures: list[str] = []
            found = self.learner.deltas(self.playbook, records, failures)
            known = {"deltas": _DELTAS.dump_python(found, mode="json"), "failures": failures}
            self.log.put(key, known)
        self.result.failures += known["failures"]
        return _DELTAS.validate_python(known["deltas"])


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
