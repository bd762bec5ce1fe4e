"""What the base model can do, on instructions, words and rules that its training never saw.

    python -m dspy_lora.seedling.bars [--count 400] [--seed 0] [--split train] [--model FOLDER]

Every question goes through LoRALM and DSPy's own adapter, greedily. An answer has the right structure where the adapter
parses every output field out of it with its type. It is right where, beside that, every field (``reasoning`` aside)
equals the expected value.

A kind may have a single held-out wording, as most but the rules have: its count says how the model takes that sentence.
``--split train`` asks with the training's words and wordings instead.
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from random import Random
from typing import Any

import dspy
from dspy.utils.exceptions import AdapterParseError, ContextWindowExceededError

from dspy_lora.seedling.chats import signature
from dspy_lora.seedling.rules import rules_task
from dspy_lora.seedling.sentences import Texts
from dspy_lora.seedling.tasks import Maker, make_task
from dspy_lora.seedling.words import Split

ADAPTERS: dict[str, dspy.Adapter] = {
    "ChatAdapter": dspy.ChatAdapter(use_json_adapter_fallback=False),
    "JSONAdapter": dspy.JSONAdapter(),
}


@dataclass(frozen=True)
class Question:
    """One held-out call.

    Attributes:
        kind: The sort of task.
        labels: Number of labels where rules decide, else 0.
        signature: The task, with a ``reasoning`` field in one of five.
        demos: Few-shot examples.
        row: Values of all fields.
    """

    kind: str
    labels: int
    signature: type[dspy.Signature]
    demos: list[dict[str, Any]]
    row: dict[str, Any]

    @property
    def inputs(self) -> dict[str, Any]:
        """The input fields' values."""
        return {name: self.row[name] for name in self.signature.input_fields}

    def outcome(self, outputs: dict[str, Any] | None) -> "Outcome":
        """Scores the parsed output fields; None where they could not be parsed."""
        wanted = [name for name in self.signature.output_fields if name != "reasoning"]
        right = outputs is not None and all(outputs.get(name) == self.row[name] for name in wanted)
        return Outcome(self, outputs is not None, right)


@dataclass(frozen=True)
class Outcome:
    """How one question was answered."""

    question: Question
    structure: bool
    right: bool


def questions(seed: int | str, count: int, maker: Maker | None = None, split: Split = "heldout") -> list[Question]:
    """Questions of all sorts in their shares, or of one.

    Args:
        seed: Decides which. A text draws others than any number does; of a number the sign does not count.
        count: How many; each is of a task of its own.
        maker: The sort of task, such as ``rules_task``; None takes all.
        split: Whose words and wordings: held-out ones, or those of the training.
    """
    rng, texts, found = Random(seed), Texts(), list[Question]()
    while len(found) < count:
        task = make_task(rng, split, texts, maker)
        reasoning = not task.needs_demos and rng.random() < 0.2
        shown = len(task.rows) - 1 if task.needs_demos else rng.choice((0, 0, 0, 1, 3))
        *demos, row = task.rows[: shown + 1]
        found.append(Question(task.kind, task.labels, signature(task, reasoning=reasoning), demos, row))
    return found


def ask(lm: dspy.LM, adapter: dspy.Adapter, asked: Sequence[Question], threads: int = 64) -> list[Outcome]:
    """Asks every question, side by side. One whose prompt exceeds the context has no answer."""

    def one(question: Question) -> Outcome:
        predict = dspy.Predict(question.signature)
        predict.demos = [dspy.Example(demo) for demo in question.demos]
        with dspy.context(lm=lm, adapter=adapter):
            try:
                return question.outcome(dict(predict(**question.inputs)))
            except (AdapterParseError, ContextWindowExceededError):
                return question.outcome(None)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, asked))


def share(outcomes: Sequence[Outcome], what: str) -> float:
    """Share of outcomes whose ``structure`` or ``right`` is true."""
    return sum(getattr(outcome, what) for outcome in outcomes) / max(1, len(outcomes))


def report(name: str, everything: Sequence[Outcome], rules: Sequence[Outcome]) -> str:
    """The figures of one DSPy adapter as text."""
    every = [*everything, *rules]
    structure = f"right structure {share(every, 'structure'):.1%} of {len(every)} calls"
    rights = f"right {share(everything, 'right'):.1%} of {len(everything)} of all sorts"
    return "\n".join(
        (
            f"{name}: {structure}, rules followed {share(rules, 'right'):.1%} of {len(rules)}, {rights}",
            "  rules by labels: " + _counts([(f"{outcome.question.labels:2d}", outcome) for outcome in rules]),
            "  right by kind: " + _counts([(outcome.question.kind, outcome) for outcome in everything]),
        )
    )


def _counts(named: Sequence[tuple[str, Outcome]]) -> str:
    """``copy 3/22, ...``: how many are right of those with each name."""
    groups: dict[str, list[bool]] = {}
    for name, outcome in named:
        groups.setdefault(name, []).append(outcome.right)
    return ", ".join(f"{name.strip()} {sum(rights)}/{len(rights)}" for name, rights in sorted(groups.items()))


def main() -> None:
    """Asks the seedling and prints the figures."""
    from dspy_lora.lm import LoRALM

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=400, help="questions of all sorts, and as many on rules")
    parser.add_argument("--seed", type=int, default=0, help="the questions on rules take the next one")
    parser.add_argument("--split", choices=("heldout", "train"), default="heldout", help="whose words and wordings")
    parser.add_argument("--model", default="seedling", help="the seedling, or a folder with another one")
    args = parser.parse_args()
    lm = LoRALM(args.model, max_tokens=300, cache=False)
    for name, adapter in ADAPTERS.items():
        everything = ask(lm, adapter, questions(args.seed, args.count, split=args.split))
        rules = ask(lm, adapter, questions(args.seed + 1, args.count, rules_task, args.split))
        print(report(name, everything, rules), flush=True)


if __name__ == "__main__":
    main()
