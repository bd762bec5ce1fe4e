"""LoRAGEPA: chooses an adapter for each predictor and evolves its instruction with GEPA, together."""

import inspect
import logging
import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, Literal, get_args

import dspy
from dspy.teleprompt import Teleprompter
from dspy_lora.optimizers.asking import Bank, IRTEvaluationPolicy
from dspy_lora.optimizers.candidates import Adapters, Candidate, Space, assignment, with_arms
from dspy_lora.optimizers.choosing import choose
from dspy_lora.optimizers.component_selector import MostWrongSelector
from dspy_lora.optimizers.outages import Passing
from dspy_lora.optimizers.proposers import RuleProposer
from dspy_lora.optimizers.racing import Assignment, Race, Racer
from dspy_lora.optimizers.reflection import Reflection, alternatives, objectives
from dspy_lora.optimizers.results import Found, LoRAGEPAResult
from dspy_lora.optimizers.rollouts import Rollouts
from dspy_lora.optimizers.run_log import RunLog, digest
from dspy_lora.optimizers.run_settings import configured_settings, lm_settings, named, program_settings, written
from gepa import optimize
from gepa.core.state import FrontierType
from gepa.strategies.proposal_sampling import IndependentSampling
from gepa.utils import FileStopper

from dspy_lora.errors import ConfigError, MissingDependencyError, near
from dspy_lora.lm import LoRALM

logger = logging.getLogger(__name__)

_MOVES = 0.1  # share of the metric calls for adapter moves during GEPA
_HELD_OUT = 0.4  # share of the training rows that validates where no valset is given
_STRATEGIES = ("pareto", "current_best", "epsilon_greedy", "top_k_pareto")
_OURS = frozenset(  # arguments of ``gepa.optimize`` that LoRAGEPA gives or stands in for
    "seed_candidate trainset valset adapter task_lm evaluator reflection_lm reflection_lm_kwargs "
    "candidate_selection_strategy skip_perfect_score reflection_minibatch_size perfect_score "
    "reflection_prompt_template custom_candidate_proposer module_selector use_merge max_merge_invocations "
    "max_metric_calls max_reflection_cost logger run_dir use_wandb wandb_api_key wandb_init_kwargs use_mlflow "
    "track_best_outputs display_progress_bar seed raise_on_exception reflection_strategy".split()
)
_PROPOSALS = 4  # evaluated at once in a GEPA step


class LoRAGEPA(dspy.GEPA, Teleprompter):  # Teleprompter again: MLflow's autolog looks at its direct subclasses alone
    """A teleprompter that gives every predictor the adapter and the instruction that together score best.

    Three phases share one budget of metric calls. A race on training rows chooses among assignments of adapters, the
    base model always among them (``racing.py``). GEPA evolves the instructions of the winner, with moves to the race's
    other favourites among its mutations. On the validation rows, of which reflection sees nothing, the simplest program
    wins that is not significantly worse than the best (``choosing.py``); that may be the program as it came.

    Args:
        metric: As for ``dspy.GEPA``: ``(gold, pred, trace, pred_name, pred_trace)`` to a float or a ``dspy.Prediction``
            with ``score``, ``feedback`` and perhaps ``objective_scores``.
        lm: Answers where a predictor has no LM of its own, and lends its adapters; None takes ``dspy.settings.lm``.
        adapters: ``"all"`` of the LM's registry and ``"auto"`` (the classifier's choice for every call), some names of
            these, or a function of a predictor's name and the predictor that returns names.
        adapter_budget: Share of the metric calls for the race.
        race_rows: ``"drawn"`` at random, or ``"telling"``: where a race begins with a screening (several predictors),
            the rows come first that told most in it by item response theory. In simulated races
            (``tests/test_racing.py``) it wins as often, 27 against 28 of 30, and where three rows in five are right
            whatever the adapters, 26 against 20.
        select_adapters: Whether adapters are chosen; else every predictor keeps its own, and there is no race.
        optimize_prompts: Whether instructions are evolved.
        prior: Plausibility of an adapter (``"legal@0123456789ab"`` or ``"none"``) for a predictor by name, such as a
            router's similarity; decides between equals in the race.
        alpha: Level of the tests that choose the program.
        reflection_lm: Writes instructions; without it, and without ``instruction_proposer``, ``RuleProposer`` does, and
            more often the predictors that err more (``component_selector.py``), unless ``component_selector`` is
            given.
        gepa_kwargs: As for ``dspy.GEPA``. With ``{"val_evaluation_policy": "irt"}``, or an ``IRTEvaluationPolicy``,
            GEPA asks a new candidate only the validation rows that tell most about it (``asking.py``); the best
            candidates are asked the rest before the choice. With ``{"frontier_type": "objective"}`` (or ``"hybrid"``,
            ``"cartesian"``) its front is over objectives: ``score``, ``adapters`` and ``seconds``, and those of the
            metric; ``detailed_results.front`` has the candidates that are best in some trade of them.
        **kwargs: As for ``dspy.GEPA``: one of ``auto``, ``max_full_evals`` and ``max_metric_calls``;
            ``reflection_minibatch_size``, ``instruction_proposer``, ``component_selector``, ``log_dir`` (a file
            ``gepa.stop`` in it ends GEPA's phase), ``seed``, ``num_threads``, ``track_stats``... Unlike there,
            ``add_format_failure_as_feedback`` is True unless given, ``warn_on_score_mismatch`` has no effect, and
            ``track_best_outputs`` and ``code_proposer`` are not taken.

    Raises:
        ConfigError: Not exactly one budget, a share outside 0 to 1, nothing to optimize, or an argument that GEPA would
            not take.
        MissingDependencyError: ``use_wandb`` or ``use_mlflow`` without the package.
        TypeError: A metric that does not take five arguments.

    Example:
        >>> best = LoRAGEPA(metric=metric, auto="light").compile(program, trainset=train, valset=val)
        >>> best.save("program.json")
    """

    def __init__(
        self,
        metric: Callable[..., Any],
        *,
        lm: LoRALM | None = None,
        adapters: Adapters = "all",
        adapter_budget: float = 0.4,
        race_rows: Literal["drawn", "telling"] = "drawn",
        select_adapters: bool = True,
        optimize_prompts: bool = True,
        prior: Callable[[str, str], float] | None = None,
        alpha: float = 0.05,
        reflection_lm: dspy.LM | None = None,
        instruction_proposer: Any = None,
        gepa_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        budgets = {name: kwargs.get(name) for name in ("auto", "max_full_evals", "max_metric_calls")}
        if sum(value is not None for value in budgets.values()) != 1:
            raise ConfigError(f"give exactly one of auto, max_full_evals and max_metric_calls; given: {budgets}")
        if not 0 < adapter_budget < 1:
            raise ConfigError(f"adapter_budget={adapter_budget!r} is no share between 0 and 1")
        if race_rows not in ("drawn", "telling"):
            raise ConfigError(f"race_rows={race_rows!r}; allowed are 'drawn' and 'telling'.")
        if not (select_adapters or optimize_prompts):
            raise ConfigError("select_adapters and optimize_prompts are both False: there is nothing to optimize")
        self._offline = reflection_lm is None and instruction_proposer is None
        kwargs = {"add_format_failure_as_feedback": True} | kwargs
        super().__init__(
            metric,
            reflection_lm=reflection_lm,
            instruction_proposer=instruction_proposer or (RuleProposer() if self._offline else None),
            gepa_kwargs=_with_policy(gepa_kwargs or {}),
            **kwargs,
        )
        self._most_wrong = self._offline and "component_selector" not in kwargs
        self.lm, self.adapters, self.prior, self.alpha = lm, adapters, prior, alpha
        self.adapter_budget, self.race_rows = adapter_budget, race_rows
        self.select_adapters, self.optimize_prompts = select_adapters, optimize_prompts
        self._check_gepa()

    def _check_gepa(self) -> None:
        """What ``gepa.optimize`` would refuse only after the race has spent its calls."""
        refused = {"track_best_outputs": self.track_best_outputs, "code_proposer": self.custom_code_proposer}
        if given := [name for name, value in refused.items() if value]:
            raise ConfigError(f"LoRAGEPA takes no {given[0]}")
        allowed = sorted(inspect.signature(optimize).parameters.keys() - _OURS)
        if wrong := sorted(self.gepa_kwargs.keys() - set(allowed)):
            raise ConfigError(f"gepa_kwargs={wrong!r}: not taken. {near(wrong[0], allowed)}")
        words = {
            "candidate_selection_strategy": (self.candidate_selection_strategy, _STRATEGIES),
            "component_selector": (self.component_selector, ("round_robin", "all")),
            "val_evaluation_policy": (self.gepa_kwargs.get("val_evaluation_policy"), ("full_eval", "irt")),
            "frontier_type": (self.gepa_kwargs.get("frontier_type"), get_args(FrontierType)),
        }
        for name, (word, known) in words.items():
            if isinstance(word, str) and word not in known:
                raise ConfigError(f"{name}={word!r}; allowed are {', '.join(map(repr, known))}")
        for name, wanted in (("wandb", self.use_wandb), ("mlflow", self.use_mlflow)):
            if wanted and find_spec(name) is None:
                raise MissingDependencyError(f"use_{name}=True needs {name}: pip install {name}")

    def compile(
        self,
        student: dspy.Module,
        *,
        trainset: list[dspy.Example],
        teacher: dspy.Module | None = None,
        valset: list[dspy.Example] | None = None,
    ) -> dspy.Module:
        """Optimizes a program.

        Args:
            student: The program; it is not changed.
            trainset: Rows for the race and for reflection.
            teacher: Not taken.
            valset: Rows that choose the program; without them a part of the training rows is held out.

        Returns:
            A copy with adapters and instructions, ``_compiled``; ``detailed_results`` is a ``LoRAGEPAResult``.

        Raises:
            ConfigError: No training rows, no LoRALM, a teacher, or a ``log_dir`` of another run.
            LMError: An LM is out of reach, or another outage (``outages.py``). With a ``log_dir`` the run goes on from
                there when it is compiled again.
        """
        if teacher is not None:
            raise ConfigError("LoRAGEPA takes no teacher")
        train, val = self._rows(trainset, valset)
        adapters = self.adapters if self.select_adapters else None
        run = _Run(self, Space(student, self._lm(student), adapters, self.lm or dspy.settings.lm), train, val)
        result = run.result()
        program = run.space.build(result.found[result.best_idx].candidate)
        program._compiled = True
        program.detailed_results = result
        if self.log_dir is not None:
            result.write(self.log_dir)
        return program

    def _rows(
        self, trainset: list[dspy.Example], valset: list[dspy.Example] | None
    ) -> tuple[list[dspy.Example], list[dspy.Example]]:
        if not trainset:
            raise ConfigError("trainset is empty: LoRAGEPA needs rows to race adapters on and to reflect on")
        if valset:
            return list(trainset), list(valset)
        rows = Random(self.seed or 0).sample(list(trainset), len(trainset))
        held = max(1, round(_HELD_OUT * len(rows)))
        if held == len(rows):
            raise ConfigError("one training row and no valset: give more rows")
        logger.info("No valset: %d of %d training rows are held out to choose the program.", held, len(rows))
        return rows[held:], rows[:held]

    def _lm(self, student: dspy.Module) -> LoRALM:
        lm = self.lm or dspy.settings.lm
        own = [predictor.lm for predictor in student.predictors() if isinstance(predictor.lm, LoRALM)]
        lm = lm if isinstance(lm, LoRALM) else own[0] if own else lm
        if not isinstance(lm, LoRALM):
            raise ConfigError(f"LoRAGEPA needs a LoRALM, and the configured LM is {lm!r}. Give lm=LoRALM(...).")
        return lm

    def budget(self, predictors: int, train: int, val: int) -> int:
        """The metric calls of a run; the last step of GEPA, which may score several candidates, can go beyond them."""
        if self.auto is not None:
            candidates = {"light": 6, "medium": 12, "heavy": 18}[self.auto]
            raced = self.adapter_budget if self.select_adapters else 0.0
            return int(self.auto_budget(predictors, candidates, val) / (1 - raced))
        if self.max_full_evals is not None:
            return self.max_full_evals * (train + val)
        return int(self.max_metric_calls)


@dataclass(frozen=True)
class _Shares:
    """Metric calls of a run by what spends them."""

    race: int
    moves: int
    gepa: int


class _Run:
    """One ``compile``."""

    def __init__(
        self, owner: LoRAGEPA, space: Space, train: Sequence[dspy.Example], val: Sequence[dspy.Example]
    ) -> None:
        self.owner, self.space, self.train, self.val = owner, space, train, val
        self.seed = owner.seed or 0
        self._val_keys = [digest(row.toDict()) for row in self.val]
        self.total = owner.budget(len(space.start), len(train), len(val))
        self.log = RunLog(None if owner.log_dir is None else Path(owner.log_dir), self._settings())
        self.rollouts = Rollouts(space, owner.metric_fn, self.log, owner.num_threads, owner.failure_score)
        self.shares = self._shares()
        proposer = owner.custom_instruction_proposer
        self.proposer = proposer.fresh() if isinstance(proposer, RuleProposer) else proposer or _built_in()
        if owner._offline and owner.optimize_prompts:
            logger.info("No reflection_lm: instructions are written by RuleProposer, by counting.")

    def _settings(self) -> dict[str, Any]:
        owner = self.owner
        policy = owner.gepa_kwargs.get("val_evaluation_policy")
        return {
            "train": digest(*(row.toDict() for row in self.train)),
            "val": digest(*self._val_keys),
            "program": program_settings(self.space.student),
            "adapters": self.space.arms,
            "base": self.space.lm.base.revision,
            "lm": lm_settings(self.space.lm),
            "reflection_lm": lm_settings(owner.reflection_lm),
            "configured": configured_settings(),
            "metric": written(owner.metric_fn),
            "failure_score": owner.failure_score,
            "perfect_score": owner.perfect_score,
            "metric_calls": self.total,
            "adapter_budget": owner.adapter_budget,
            "race_rows": owner.race_rows,
            "optimize_prompts": owner.optimize_prompts,
            "minibatch": owner.reflection_minibatch_size,
            "component_selector": MostWrongSelector.__name__ if owner._most_wrong else named(owner.component_selector),
            "instruction_proposer": named(owner.custom_instruction_proposer),
            "val_evaluation_policy": repr(policy) if isinstance(policy, IRTEvaluationPolicy) else type(policy).__name__,
            "seed": self.seed,
        }

    def _shares(self) -> _Shares:
        """Both ends of the race are scored on all validation rows whatever happens; the rest is shared out.

        Raises:
            ConfigError: The budget does not hold that.
        """
        left = self.total - 2 * len(self.val)
        if left < 0:
            raise ConfigError(
                f"{self.total} metric calls do not score two programs on {len(self.val)} validation rows. Give at "
                f"least {2 * len(self.val)}, or fewer validation rows."
            )
        choices = math.prod(len(arms) for arms in self.space.arms.values())
        if choices == 1:
            return _Shares(0, 0, left + len(self.val))
        if not self.owner.optimize_prompts:
            return _Shares(left, 0, 0)
        race = min(round(self.total * self.owner.adapter_budget), left)
        moves = round(_MOVES * self.total) if left - race > _MOVES * self.total else 0
        return _Shares(race, moves, left - race - moves)

    # -- phases ----------------------------------------------------------------------------------------------------

    def result(self) -> LoRAGEPAResult:
        """The program as it is, so that what fails on every row is told before calls are spent; race, GEPA, choice."""
        found = [self._found(self.space.start, [])]
        race = self._race()
        winner = with_arms(self.space.start, dict(zip(self.space.start, race.ranking[0], strict=True)))
        if winner != self.space.start:
            found.append(self._found(winner, [0]))
        moves: list[str] = []
        if self.owner.optimize_prompts:
            reflection = self._reflection(race)
            found += self._evolve(winner, reflection, len(found) - 1)
            moves = reflection.moves
        choice = choose(
            [self._by_row(each.val_scores) for each in found],
            [self._complexity(each) for each in found],
            self.owner.alpha,
        )
        return LoRAGEPAResult(
            found=found,
            choice=choice,
            race=race.rounds,
            ranking=race.ranking,
            race_calls=race.calls,
            moves=moves,
            metric_calls=self.rollouts.calls,
            usage=self.rollouts.usage,
            seconds=self.rollouts.seconds,
            seed=self.owner.seed,
            log_dir=self.owner.log_dir,
            candidates=[self.space.build(each.candidate) for each in found] if self.owner.track_stats else [],
        )

    def _race(self) -> Race:
        names = list(self.space.start)
        rows = Random(self.seed).sample(list(self.train), len(self.train))

        def score(pairs: Sequence[tuple[Assignment, dspy.Example]]) -> list[float]:
            asked = [(with_arms(self.space.start, dict(zip(names, arms, strict=True))), row) for arms, row in pairs]
            return [rollout.score for rollout in self.rollouts.run(asked)]

        def prior(arms: Assignment) -> float:
            if self.owner.prior is None:
                return 0.0
            return sum(self.owner.prior(name, arm) for name, arm in zip(names, arms, strict=True))

        start = assignment(self.space.start)
        telling = self.owner.race_rows == "telling"
        return Racer(self.space.arms, start, rows, score, self.shares.race, self.seed, prior, telling).run()

    def _reflection(self, race: Race) -> Reflection:
        owner = self.owner
        return Reflection(
            self.rollouts,
            self.log,
            self.proposer,
            owner.reflection_lm,
            alternatives([*race.ranking, assignment(self.space.start)], list(self.space.start)),
            self.train,
            self.shares.moves,
            owner.perfect_score,
            self.seed,
            owner.add_format_failure_as_feedback,
        )

    def _evolve(self, seed_candidate: Candidate, reflection: Reflection, parent: int) -> list[Found]:
        """GEPA from the race's winner; returns what it found beside that, parents as indices of all that was found."""
        owner = self.owner
        result = _gepa(
            seed_candidate=seed_candidate,
            trainset=list(self.train),
            valset=list(self.val),
            adapter=reflection,
            candidate_selection_strategy=owner.candidate_selection_strategy,
            skip_perfect_score=owner.skip_perfect_score,
            reflection_minibatch_size=owner.reflection_minibatch_size,
            perfect_score=owner.perfect_score,
            module_selector=self._selector(reflection),
            use_merge=owner.use_merge,
            max_merge_invocations=owner.max_merge_invocations,
            max_metric_calls=self.shares.gepa - self._reserve() + len(self.val),
            logger=_Quiet(),
            use_wandb=owner.use_wandb,
            wandb_api_key=owner.wandb_api_key,
            wandb_init_kwargs=owner.wandb_init_kwargs,
            use_mlflow=owner.use_mlflow,
            track_best_outputs=False,
            display_progress_bar=False,
            seed=self.seed,
            raise_on_exception=True,
            **({"sampling_strategy": IndependentSampling(_PROPOSALS)} | owner.gepa_kwargs | self._stoppers()),
        )
        scores = self._completed(result.candidates, result.val_subscores)
        kept = [index for index, each in enumerate(scores) if len(each) == len(self.val)]
        places = {index: parent + place for place, index in enumerate(kept)}
        return [
            Found(
                result.candidates[index],
                [places[each] for each in _nearest(index, result.parents, places)],
                [scores[index][row] for row in range(len(self.val))],
                self.space.changes(result.candidates[index]),
                reflection.found_at[digest(result.candidates[index])],
                result.val_aggregate_subscores[index] if result.val_aggregate_subscores else {},
            )
            for index in kept
            if index
        ]

    def _selector(self, reflection: Reflection) -> Any:
        if not self.owner._most_wrong:
            return self.owner.component_selector
        return MostWrongSelector(reflection.records, self.proposer, self.seed)

    def _stoppers(self) -> dict[str, Any]:
        """GEPA's own way to end a run early: a file ``gepa.stop`` in ``log_dir``."""
        given = self.owner.gepa_kwargs.get("stop_callbacks") or []
        stoppers = list(given) if isinstance(given, Sequence) else [given]
        if self.owner.log_dir is not None:
            stoppers.append(FileStopper(str(Path(self.owner.log_dir) / "gepa.stop")))
        return {"stop_callbacks": stoppers or None}

    def _reserve(self) -> int:
        """Metric calls for the rows that an evaluation policy left out, of the candidates that may win."""
        if self.owner.gepa_kwargs.get("val_evaluation_policy") in (None, "full_eval"):
            return 0
        return min(len(self.val), self.shares.gepa // 4)

    def _completed(
        self, candidates: Sequence[Candidate], known: Sequence[Mapping[int, float]]
    ) -> list[dict[int, float]]:
        """The candidates' scores, with the rows that the best ones were not asked, as long as calls are left."""
        scores = [dict(each) for each in known]
        partial = [index for index, each in enumerate(scores) if len(each) < len(self.val)]
        expected = Bank(known).expected() if partial else []
        ranked = sorted(partial, key=lambda index: (index > 0, -expected[index]))
        for index in ranked:
            missing = [row for row in range(len(self.val)) if row not in scores[index]]
            if self.rollouts.calls + len(missing) > self.total and index != ranked[0]:
                break
            found = self.rollouts.run([(candidates[index], self.val[row]) for row in missing])
            scores[index] |= {row: rollout.score for row, rollout in zip(missing, found, strict=True)}
        return scores

    def _found(self, candidate: Candidate, parents: list[int]) -> Found:
        ran = self.rollouts.run([(candidate, row) for row in self.val])
        scores, judged = [rollout.score for rollout in ran], [objectives(candidate, rollout) for rollout in ran]
        names = dict.fromkeys(name for each in judged for name in each)
        means = {name: fmean(each[name] for each in judged if name in each) for name in names}
        return Found(candidate, parents, scores, self.space.changes(candidate), self.rollouts.calls, means)

    def _by_row(self, scores: Sequence[float]) -> list[float]:
        """Sums over the copies of each row: a row that is there twice is no more evidence for its sign."""
        sums: dict[str, float] = {}
        for row, score in zip(self._val_keys, scores, strict=True):
            sums[row] = sums.get(row, 0.0) + score
        return list(sums.values())

    def _complexity(self, found: Found) -> float:
        """Changes first; of equally many the shorter instructions."""
        return found.changes + sum(map(len, found.instructions.values())) / 1e6


def _with_policy(gepa_kwargs: dict[str, Any]) -> dict[str, Any]:
    """GEPA's arguments, with the policy that ``"irt"`` names."""
    if gepa_kwargs.get("val_evaluation_policy") != "irt":
        return gepa_kwargs
    return gepa_kwargs | {"val_evaluation_policy": IRTEvaluationPolicy()}


def _nearest(index: int, parents: Sequence[Sequence[int | None]], kept: Container[int]) -> list[int]:
    """The nearest ancestors of a candidate that were kept."""
    found: list[int] = []
    for each in parents[index]:
        if each is not None:
            found += [each] if each in kept else _nearest(each, parents, kept)
    return list(dict.fromkeys(found))


def _gepa(**given: Any) -> Any:
    """``gepa.optimize``, which raises an outage that a proposer met."""
    try:
        return optimize(**given)
    except Passing as passing:
        raise passing.error from passing.error.__cause__


class _Quiet:
    """GEPA's log lines at debug level."""

    def log(self, message: str) -> None:
        logger.debug(message)


def _built_in() -> Any:
    """DSPy's own instruction proposer."""
    from dspy.teleprompt.gepa.instruction_proposal import InstructionProposer

    return InstructionProposer()
