"""LoRAGEPA: chooses an adapter for each predictor and evolves its instruction with GEPA, together."""

import inspect
import logging
from collections.abc import Callable
from importlib.util import find_spec
from random import Random
from typing import Any, Literal, get_args

import dspy
from dspy.teleprompt import Teleprompter
from dspy_lora.optimizers.asking import IRTEvaluationPolicy
from dspy_lora.optimizers.candidates import Adapters, Space
from dspy_lora.optimizers.proposers import RuleProposer
from dspy_lora.optimizers.run import Run
from gepa import optimize
from gepa.core.state import FrontierType

from dspy_lora.errors import ConfigError, MissingDependencyError, near
from dspy_lora.lm import LoRALM

logger = logging.getLogger(__name__)

_HELD_OUT = 0.4  # share of the training rows that validates where no valset is given
_STRATEGIES = ("pareto", "current_best", "epsilon_greedy", "top_k_pareto")
_OURS = frozenset(  # arguments of ``gepa.optimize`` that LoRAGEPA gives or stands in for
    "seed_candidate trainset valset adapter task_lm evaluator reflection_lm reflection_lm_kwargs "
    "candidate_selection_strategy skip_perfect_score reflection_minibatch_size perfect_score "
    "reflection_prompt_template custom_candidate_proposer module_selector use_merge max_merge_invocations "
    "max_metric_calls max_reflection_cost logger run_dir use_wandb wandb_api_key wandb_init_kwargs use_mlflow "
    "track_best_outputs display_progress_bar seed raise_on_exception reflection_strategy".split()
)


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
        self.offline = reflection_lm is None and instruction_proposer is None
        kwargs = {"add_format_failure_as_feedback": True} | kwargs
        super().__init__(
            metric,
            reflection_lm=reflection_lm,
            instruction_proposer=instruction_proposer or (RuleProposer() if self.offline else None),
            gepa_kwargs=_with_policy(gepa_kwargs or {}),
            **kwargs,
        )
        self.most_wrong = self.offline and "component_selector" not in kwargs
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
        run = Run(self, Space(student, self._lm(student), adapters, self.lm or dspy.settings.lm), train, val)
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


def _with_policy(gepa_kwargs: dict[str, Any]) -> dict[str, Any]:
    """GEPA's arguments, with the policy that ``"irt"`` names."""
    if gepa_kwargs.get("val_evaluation_policy") != "irt":
        return gepa_kwargs
    return gepa_kwargs | {"val_evaluation_policy": IRTEvaluationPolicy()}
