"""One ``compile`` of LoRAGEPA: the race, GEPA from its winner, the choice."""

import logging
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import fmean
from typing import TYPE_CHECKING, Any

import dspy
from dspy_lora.optimizers.asking import Bank, IRTEvaluationPolicy
from dspy_lora.optimizers.candidates import Candidate, Space, assignment, with_arms
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
from gepa.strategies.proposal_sampling import IndependentSampling
from gepa.utils import FileStopper

from dspy_lora.errors import ConfigError

if TYPE_CHECKING:
    from dspy_lora.optimizers.lora_gepa import LoRAGEPA

logger = logging.getLogger(__name__)

_MOVES = 0.1  # share of the metric calls for adapter moves during GEPA
_PROPOSALS = 4  # evaluated at once in a GEPA step


@dataclass(frozen=True)
class _Shares:
    """Metric calls of a run by what spends them."""

    race: int
    moves: int
    gepa: int


class Run:
    """One ``compile``."""

    def __init__(
        self, owner: "LoRAGEPA", space: Space, train: Sequence[dspy.Example], val: Sequence[dspy.Example]
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
        if owner.offline and owner.optimize_prompts:
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
            "component_selector": MostWrongSelector.__name__ if owner.most_wrong else named(owner.component_selector),
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
        if not self.owner.most_wrong:
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
