"""Instruction-following tasks without end. The prompt alone decides every answer.

What varies is everything a reader should not rely on: field names, wording, order, types, label sets. One word in ten
and one wording in five are held out from training, as far as ``words.py`` and ``phrases.py`` say.
"""

from collections.abc import Callable
from random import Random

from dspy_lora.seedling import rules, skills
from dspy_lora.seedling.sentences import Texts
from dspy_lora.seedling.task import Task, pick
from dspy_lora.seedling.words import Split

Maker = Callable[[Random, Split, Texts], Task]

# Share of each sort of task.
KINDS: dict[Maker, float] = {
    rules.rules_task: 0.40,
    rules.described_task: 0.03,
    rules.field_rules_task: 0.03,
    rules.unless_task: 0.04,
    rules.both_task: 0.03,
    rules.demos_task: 0.06,
    rules.number_task: 0.03,
    skills.extract_task: 0.12,
    skills.contains_task: 0.05,
    skills.list_task: 0.06,
    skills.lookup_task: 0.05,
    skills.option_task: 0.03,
    skills.compare_task: 0.02,
    skills.topic_task: 0.03,
    skills.several_task: 0.08,
}

_DESCRIPTIONS = ("the {f}", "The {f} to look at.", "{f}", "what is given as {f}", "a {f}", "the {f} of this case")


def make_task(rng: Random, split: Split, texts: Texts, maker: Maker | None = None) -> Task:
    """A task of any sort, or of the given one; now and then with a field's description."""
    [chosen] = [maker] if maker else rng.choices(list(KINDS), list(KINDS.values()))
    task = chosen(rng, split, texts)
    if rng.random() < 0.25:
        described = rng.choice([*task.inputs, *task.outputs])
        text = pick(rng, _DESCRIPTIONS, split).format(f=described.replace("_", " "))
        task.descriptions.setdefault(described, text)
    return task
