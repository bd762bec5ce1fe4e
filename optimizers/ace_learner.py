"""How ACE folds what a program did into a playbook, offline and online alike."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import dspy
from dspy_lora.optimizers.ace_roles import Curator, Record, Reflector, RuleCurator, RuleReflector
from dspy_lora.optimizers.outages import is_answer, is_too_long
from dspy_lora.optimizers.proposers import RIGHT_ANSWER
from dspy_lora.optimizers.rollouts import Records
from dspy_lora.optimizers.traces import shown_value

from dspy_lora.context.deltas import Add, Delta, Update
from dspy_lora.context.playbook import Playbook
from dspy_lora.context.taught import own_playbook, told_bullets, with_playbook, without_playbook
from dspy_lora.context.tokens import count_tokens_of, estimate_tokens
from dspy_lora.errors import ConfigError

if TYPE_CHECKING:
    from dspy_lora.optimizers.ace import ACE

logger = logging.getLogger(__name__)


class Learner:
    """Folds what a program did into a playbook. It belongs to one program, whose predictors it knows by name.

    Args:
        ace: The settings.
        program: A copy of it is told playbooks.

    Raises:
        ConfigError: It has no predictor.
    """

    def __init__(self, ace: "ACE", program: dspy.Module) -> None:
        self.ace = ace
        self._given = ace.playbook or own_playbook(program)
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

    def start(self) -> Playbook:
        """The playbook to begin with: ACE's, the program's, or the one that its instructions tell.

        Instructions hold no ids and no counters. An id is made again from section and text, counters begin at 0.

        Raises:
            DataError: There is no playbook but in an instruction, and that one cannot be read.
        """
        if self._given is not None:
            return self._given.copy()
        playbook = Playbook()
        playbook.apply(
            Add(section=self._section(name) + heading, text=text)
            for name, predictor in self.program.named_predictors()
            for heading, text in told_bullets(predictor.signature.instructions)
        )
        if len(playbook):
            logger.warning(
                "the program has no playbook object: %d bullets are read from its instructions, and their counters "
                "begin at 0; dspy_lora.load(program, path) brings a saved playbook whole",
                len(playbook),
            )
        return playbook

    def instructions(self, playbook: Playbook) -> dict[str, str]:
        """Each predictor's instruction with the bullets that are for it."""
        return {name: with_playbook(task, self._share(playbook, name).prompt()) for name, task in self.tasks.items()}

    def build(self, instructions: Mapping[str, str]) -> dspy.Module:
        """A copy of the program with other instructions."""
        program = self.program.deepcopy()
        _instruct(program, instructions)
        return program

    def told(self, playbook: Playbook) -> dspy.Module:
        """A copy of the program that is told a playbook."""
        return self.build(self.instructions(playbook))

    def tell(self, program: dspy.Module, playbook: Playbook) -> None:
        """Tells a playbook to a program that ``told`` made; its predictors stay the same objects."""
        _instruct(program, self.instructions(playbook))

    def deltas(self, playbook: Playbook, records: Mapping[str, Sequence[Record]], failures: list[str]) -> list[Delta]:
        """What attempts teach, as operations that the playbook will take.

        Args:
            playbook: What the program was told; it is not changed.
            records: Attempts of each predictor.
            failures: Takes what went wrong.

        Raises:
            LMError: An LM is out of reach, or another outage. What is only too long for it is halved, down to one
                attempt or insight, and left out if that is too long too.
        """
        found: list[Delta] = []
        for name, attempts in records.items():
            found += self._reflect(playbook, name, attempts, failures) if attempts else []
        refusals = playbook.refusals(found)
        failures += [reason for reason in refusals if reason]
        return [delta for delta, reason in zip(found, refusals, strict=True) if reason is None]

    def _reflect(self, playbook: Playbook, name: str, attempts: Sequence[Record], failures: list[str]) -> list[Delta]:
        own = self._share(playbook, name)
        section = self._section(name)

        def failed(exc: Exception) -> None:
            what = "was too long" if is_too_long(exc) else "could not be parsed"
            failures.append(f"{name}: a reflection {what} and is left out: {exc}"[:500])

        def reflect(part: Sequence[Record]) -> dspy.Prediction:
            return self.reflector(task=self.tasks[name], playbook=own, section=section, records=part)

        def curate(part: Sequence[str]) -> dspy.Prediction:
            return self.curator(playbook=own, section=section, insights=part, tokens_left=left)

        left = self.ace.token_budget - self.count(playbook.prompt())
        with dspy.context(lm=self.ace.reflection_lm or dspy.settings.lm, trace=[]):
            seen = _in_parts(reflect, attempts, failed)
            found = _in_parts(curate, [text for each in seen for text in each.insights], failed) if seen else []
        return [*(delta for each in seen for delta in each.counts), *(d for each in found for d in each.operations)]

    def fold(self, playbook: Playbook, deltas: Sequence[Delta]) -> None:
        """Carries operations out and tidies up."""
        playbook.apply(deltas)
        if any(not isinstance(delta, Update) or delta.text for delta in deltas):
            self.tidy(playbook)
        else:  # counts alone make no two bullets alike
            playbook.trim(self.ace.token_budget, self.count)

    def tidy(self, playbook: Playbook) -> None:
        """Merges what says the same, keeps to the budget."""
        playbook.refine(self.ace.embedder, self.ace.similarity)
        playbook.trim(self.ace.token_budget, self.count)

    def records(self, example: dspy.Example, score: float, seen: Records) -> dict[str, list[Record]]:
        """The attempts of one row, with its score and, where it is known and wanted, the right answer."""
        right = self._right_answers(example) if seen else {}
        return {
            name: [{**each, "Score": score} | _told(each["Feedback"], right.get(name, {})) for each in attempts]
            for name, attempts in seen.items()
        }

    def _right_answers(self, example: dspy.Example) -> dict[str, dict[str, Any]]:
        """For each predictor the output fields that the row holds."""
        known = dict(example.labels()) if self.ace.ground_truth else {}
        return {
            name: {key: known[key] for key in predictor.signature.output_fields if key in known}
            for name, predictor in self.program.named_predictors()
        }

    def _section(self, name: str) -> str:
        """What the sections of a predictor alone begin with."""
        return f"{name} / " if len(self.tasks) > 1 else ""

    def _share(self, playbook: Playbook, name: str) -> Playbook:
        """The bullets for a predictor: a section ``"summarize / Length"`` is for ``summarize`` alone."""
        others = {f"{other} /" for other in self.tasks if other != name}
        return Playbook(bullet for bullet in playbook.bullets if not bullet.section.startswith(tuple(others)))


def _instruct(program: dspy.Module, instructions: Mapping[str, str]) -> None:
    """Gives each predictor its instruction in one step, so that a call reads the old one or the new one."""
    for name, predictor in program.named_predictors():
        predictor.signature = predictor.signature.with_instructions(instructions[name])


def _in_parts(
    ask: Callable[[Sequence[Any]], dspy.Prediction], items: Sequence[Any], failed: Callable[[Exception], None]
) -> list[dspy.Prediction]:
    """What a role says of items: of all at once or, where its prompt is too long, of each half, down to one item.

    Args:
        ask: Asks the role.
        items: What it is asked about.
        failed: Takes what it raised where nothing shorter is left to ask, or its answer was of no use.
    """
    try:
        return [ask(items)]
    except Exception as exc:
        if not is_answer(exc):
            raise
        if len(items) < 2 or not is_too_long(exc):
            failed(exc)
            return []
    middle = len(items) // 2  # outside the handler: what a half raises was not caused by the length of the whole
    return [part for half in (items[:middle], items[middle:]) for part in _in_parts(ask, half, failed)]


def _told(feedback: str, right: Mapping[str, Any]) -> dict[str, str]:
    """Feedback that begins with the right answer, where it is known and not said anyway; a single one also by itself.

    By itself it is for those that count: a sentence does not show where an answer ends that has periods.
    """
    if not right:
        return {"Feedback": feedback}
    if len(right) > 1:
        sentence = f"It should have been {', '.join(f'{key}={value!r}' for key, value in right.items())}."
        return {"Feedback": _joined(feedback, sentence)}
    (answer,) = map(shown_value, right.values())
    return {"Feedback": _joined(feedback, f"The right answer is {answer}."), RIGHT_ANSWER: answer}


def _joined(feedback: str, sentence: str) -> str:
    return feedback if sentence in feedback else f"{sentence} {feedback}"
