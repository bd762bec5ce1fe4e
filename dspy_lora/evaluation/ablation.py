"""One program with and without its parts, on the same rows."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dspy_lora.evaluation.irt import IRTFit, fit_irt
from dspy_lora.evaluation.report import markdown_table, text_table
from dspy_lora.evaluation.responses import Responses
from dspy_lora.evaluation.scores import Estimate, estimate_mean


@dataclass(frozen=True)
class Spent:
    """Wall time in seconds and tokens of one step of one answer."""

    stage: str
    seconds: float
    tokens: int


@dataclass(frozen=True)
class System:
    """One variant.

    Attributes:
        name: Which parts it has.
        score: Mean of the metric.
        gain: Mean of the row by row difference from the first variant; None for that one.
        ability: In logits, of the item response model; None where there is one variant alone.
        error: Its standard error.
        seconds: Median wall time by stage.
        tokens: Mean tokens by stage.
    """

    name: str
    score: Estimate
    gain: Estimate | None
    ability: float | None
    error: float | None
    seconds: Mapping[str, float]
    tokens: Mapping[str, float]


@dataclass(frozen=True)
class Ablation:
    """The variants, the plainest first.

    Attributes:
        systems: One a variant.
        responses: Score of each variant on each row.
        warnings: What the figures cannot tell.
    """

    systems: tuple[System, ...]
    responses: Responses
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, responses: Responses, spent: Mapping[str, Sequence[Spent]], seed: int = 0) -> "Ablation":
        """Estimates scores, differences from the first variant, and abilities.

        Args:
            responses: Variants x rows; every variant was asked every row.
            spent: What each variant's steps took.
            seed: Of the resamples.
        """
        fit = fit_irt(responses, log=False) if len(responses.systems) > 1 else None  # the warnings are in the tables
        first = responses.scores[0]
        systems = []
        for name, scores in zip(responses.systems, responses.scores, strict=True):
            ability, error = fit.ability(name) if fit else (None, None)
            gain = estimate_mean(scores - first, seed) if name != responses.systems[0] else None
            seconds, tokens = _by_stage(spent.get(name, ()))
            systems.append(System(name, estimate_mean(scores, seed), gain, ability, error, seconds, tokens))
        return cls(tuple(systems), responses, tuple(fit.warnings) if isinstance(fit, IRTFit) else ())

    def system(self, name: str) -> System:
        """The variant of that name.

        Raises:
            DataError: There is none.
        """
        return self.systems[self.responses.system(name)]

    def to_text(self) -> str:
        """For the console."""
        return "\n".join([text_table(*self._table()), *(f"note: {warning}" for warning in self.warnings)])

    def to_markdown(self) -> str:
        """For a reader."""
        return "\n\n".join([markdown_table(*self._table()), *(f"Note: {warning}." for warning in self.warnings)]) + "\n"

    def save(self, path: str | Path) -> None:
        """Writes all figures as JSON."""
        state = {
            "systems": [dataclasses.asdict(system) for system in self.systems],
            "rows": list(self.responses.items),
            "scores": dict(zip(self.responses.systems, self.responses.scores.tolist(), strict=True)),
            "warnings": list(self.warnings),
        }
        Path(path).write_text(json.dumps(state, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _table(self) -> tuple[list[str], list[list[str]]]:
        stages = list(dict.fromkeys(stage for system in self.systems for stage in system.seconds))
        head = ["system", "score [95 %]", "over the first [95 %]", "ability ± s.e."]
        head += [f"{stage}, ms" for stage in stages] + (["tokens a query"] if stages else [])
        return head, [self._row(system, stages) for system in self.systems]

    def _row(self, system: System, stages: Sequence[str]) -> list[str]:
        gain = "" if system.gain is None else system.gain.shown("+")
        ability = "" if system.ability is None else f"{system.ability:+.2f} ± {system.error:.2f}"
        times = [f"{1000 * system.seconds[stage]:.2f}" if stage in system.seconds else "" for stage in stages]
        tokens = [f"{system.tokens.get('answer', 0.0):.0f}"] if stages else []
        return [system.name, system.score.shown(), gain, ability, *times, *tokens]


def _by_stage(spent: Sequence[Spent]) -> tuple[dict[str, float], dict[str, float]]:
    stages = dict.fromkeys(each.stage for each in spent)
    seconds = {stage: float(np.median([each.seconds for each in spent if each.stage == stage])) for stage in stages}
    tokens = {stage: float(np.mean([each.tokens for each in spent if each.stage == stage])) for stage in stages}
    return seconds, tokens
