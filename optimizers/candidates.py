"""What is searched: for every predictor an adapter and an instruction, one text for both.

GEPA's candidate is a dictionary of texts, one a predictor. The text begins with a line that names the adapter by its
content-hashed revision, so GEPA's Pareto front, evaluation cache and merge hold, and merge, which takes whole texts,
never parts an instruction from the adapter it was written for. ``auto``, the classifier's choice for every call, is one
more adapter.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

import dspy

from dspy_lora.errors import ConfigError, near
from dspy_lora.lm import LoRALM

Candidate: TypeAlias = dict[str, str]
Adapters: TypeAlias = Literal["all"] | Sequence[str] | Callable[[str, dspy.Predict], Sequence[str]]

BASE = "none"  # the base model alone
KEPT = "as set"  # a predictor with an LM of its own that takes no adapters
_TEXT = re.compile(r"adapter: (?P<arm>none|as set|[a-z0-9_-]+@[0-9a-f]{12})\n\n(?P<instruction>.*)", re.DOTALL)


def encode(arm: str, instruction: str) -> str:
    """A predictor's text."""
    return f"adapter: {arm}\n\n{instruction}"


def decode(text: str) -> tuple[str, str]:
    """The adapter and the instruction of a predictor's text.

    Raises:
        ConfigError: The text does not begin with an adapter's line.
    """
    if (match := _TEXT.fullmatch(text)) is None:
        raise ConfigError(f"{text[:80]!r} is no predictor's text: it must begin with 'adapter: NAME@REVISION'")
    return match["arm"], match["instruction"]


def arm_of(text: str) -> str:
    """The adapter of a predictor's text."""
    return decode(text)[0]


def with_arms(candidate: Candidate, arms: Mapping[str, str]) -> Candidate:
    """The candidate with other adapters for some predictors."""
    return candidate | {name: encode(arm, decode(candidate[name])[1]) for name, arm in arms.items()}


def assignment(candidate: Candidate) -> tuple[str, ...]:
    """The adapters of all predictors."""
    return tuple(arm_of(text) for text in candidate.values())


class Space:
    """A program and the adapters its predictors may have.

    Args:
        student: The program; it is not changed.
        lm: Lends its registry and its base.
        adapters: Which adapters may be chosen; None leaves every predictor what it has.
        default: Answers where a predictor has no LM of its own; None takes ``lm``.

    Attributes:
        arms: The choices of each predictor, the base model first; one choice where nothing is chosen or the LM takes no
            adapters.
        start: The program as it is.

    Raises:
        ConfigError: No predictor, no adapter that is left to choose from, or one that is unknown.
    """

    def __init__(
        self, student: dspy.Module, lm: LoRALM, adapters: Adapters | None, default: dspy.BaseLM | None = None
    ) -> None:
        self.student, self.lm = student, lm
        self._lms: dict[tuple[int, str], LoRALM] = {}
        self._own = {name: predictor.lm or default or lm for name, predictor in student.named_predictors()}
        if not self._own:
            raise ConfigError(f"{student!r} has no predictor to optimize; those of compiled parts are frozen")
        if isinstance(adapters, str) and adapters != "all":
            raise ConfigError(f"adapters={adapters!r}: give 'all', or names in a list: [{adapters!r}]")
        self.arms = {name: self._arms(name, predictor, adapters) for name, predictor in student.named_predictors()}
        self.start = {
            name: encode(self._now(name), predictor.signature.instructions)
            for name, predictor in student.named_predictors()
        }

    def _arms(self, name: str, predictor: dspy.Predict, adapters: Adapters | None) -> list[str]:
        lm = self._own[name]
        if adapters is None or not isinstance(lm, LoRALM):
            return [self._now(name)]
        known = {revision.adapter: revision.ref for revision in lm.registry.list() if revision.is_for(lm.base)}
        known["auto"] = str(lm.copy(domain="auto").ref)
        wanted = known if adapters == "all" else adapters(name, predictor) if callable(adapters) else adapters
        chosen = [BASE]
        for word in wanted:
            ref = word if word in known.values() else known.get(word)
            if ref is None:
                raise ConfigError(f"adapters={word!r}: {lm.base.name!r} has no such adapter. {near(word, known)}")
            chosen.append(ref)
        if (now := self._now(name)) not in chosen:
            chosen.append(now)
        return list(dict.fromkeys(chosen))

    def _now(self, name: str) -> str:
        lm = self._own[name]
        if not isinstance(lm, LoRALM):
            return KEPT
        return lm.ref or BASE

    def _lm_for(self, name: str, arm: str) -> LoRALM:
        """One LM for all predictors that had the same: modules such as ``dspy.BestOfN`` ask for a single one."""
        lm = self._own[name]
        if (key := (id(lm), arm)) not in self._lms:
            self._lms[key] = lm.copy(domain=None if arm == BASE else arm)
        return self._lms[key]

    def build(self, candidate: Candidate) -> dspy.Module:
        """The program that a candidate means; each predictor knows its component's name."""
        program = self.student.deepcopy()
        for name, predictor in program.named_predictors():
            arm, instruction = decode(candidate[name])
            predictor.signature = predictor.signature.with_instructions(instruction)
            if arm != KEPT:
                predictor.lm = self._lm_for(name, arm)
        return program

    def changes(self, candidate: Candidate) -> int:
        """How far a candidate is from the program as it is: adapters and instructions that differ."""
        return sum(
            (new != old)
            for name in self.start
            for new, old in zip(decode(candidate[name]), decode(self.start[name]), strict=True)
        )
