"""Rule-following tasks: the prompt alone decides which label a text gets."""

import re
from collections.abc import Callable
from random import Random
from typing import Any, Literal

from dspy_lora.seedling.compose import insert, text_with
from dspy_lora.seedling.labels import Rule, keyword_sets, label_set, list_style, make_rules, rule_lines, written
from dspy_lora.seedling.phrasing import pick
from dspy_lora.seedling.task import Draw, Field, Task, World
from dspy_lora.seedling.words import field_names


def _count(rng: Random) -> int:
    """Number of labels: 2 to 8, each equally often."""
    return rng.randint(2, 8)


def _described(rng: Random, world: World, i: str, o: str) -> tuple[str, str]:
    """Descriptions of the input and the output field; mostly none."""
    left = pick(rng, "input_desc", world.split, i=i) if rng.random() < 0.2 else ""
    right = pick(rng, "output_desc", world.split, o=o) if rng.random() < 0.2 else ""
    return left, right


def _type(rng: Random, labels: list[str], share: float = 0.3) -> Any:
    """The output's type: str, or a Literal of the labels in any order."""
    return Literal[tuple(rng.sample(labels, len(labels)))] if rng.random() < share else str


def _said(i: str) -> str:
    return i.replace("_", " ") if "_" in i else i


def _reason(rng: Random, world: World, i: str, o: str, hit: str | None, label: str) -> str:
    if hit is None:
        return pick(rng, "reason_default", world.split, i=_said(i), o=_said(o), L=label)
    return pick(rng, "reason_hit", world.split, i=_said(i), o=_said(o), k=hit, L=label)


def _sampler(
    rng_rules: list[Rule], default: str | None, world: World, i: str, o: str
) -> Callable[[Random], Draw]:
    """Draws of a plain keyword task: each rule equally often, the default a little more often than one rule."""
    every = [keyword for rule in rng_rules for keyword in rule.keywords]

    def draw(rng: Random) -> Draw:
        weights = [1.0] * len(rng_rules) + ([1.2] if default is not None else [])
        which = rng.choices(range(len(weights)), weights)[0]
        if which == len(rng_rules):
            text, label, hit = text_with(rng, world, [], every), str(default), None
        else:
            rule = rng_rules[which]
            hit, label = rng.choice(rule.keywords), rule.label
            text = text_with(rng, world, [hit], every)
        return Draw({i: text}, {o: label}, _reason(rng, world, i, o, hit, label))

    return draw


def _frame(rng: Random, world: World, i: str, o: str, labels: list[str], rules: str) -> str:
    """Opening, list of labels, header, rules, closing: some of them left out."""
    opening = pick(rng, "opening", world.split, i=_said(i), o=_said(o))
    named = ""
    if rng.random() < 0.3:
        shown = written(rng.sample(labels, len(labels)), list_style(rng))
        named = pick(rng, "label_list", world.split, o=_said(o), LABELS=shown)
    header = pick(rng, "header", world.split) if rng.random() < 0.3 else ""
    closing = pick(rng, "closing", world.split, o=_said(o)) if rng.random() < 0.2 else ""
    parts = [opening, named, header, rules, closing]
    return ("\n" if "\n" in rules else rng.choice((" ", " ", "\n"))).join(part for part in parts if part)


def keyword(rng: Random, world: World) -> Task:
    """"If it mentions X or Y, answer Z" with 2 to 8 labels, with or without a default."""
    (i,), (o,) = field_names(rng, world.split, 1, 1)
    labels = label_set(rng, world.split, _count(rng))
    has_default = rng.random() < 0.55
    default = labels[-1] if has_default else None
    rules = make_rules(rng, world.split, world.pool, labels[:-1] if has_default else labels)
    text = rule_lines(rng, world.split, rules, default, _said(i), _said(o))
    instructions = _frame(rng, world, i, o, labels, text)
    left, right = _described(rng, world, i, o)
    draw = _sampler(rules, default, world, i, o)
    return Task("keyword", instructions, [Field(i, str, left)], [Field(o, _type(rng, labels), right)], draw, len(labels))


def priority(rng: Random, world: World) -> Task:
    """Texts that match two rules; the instruction says whether the first or the last rule wins."""
    (i,), (o,) = field_names(rng, world.split, 1, 1)
    labels = label_set(rng, world.split, rng.randint(2, 5))
    has_default = len(labels) > 2 and rng.random() < 0.5
    default = labels[-1] if has_default else None
    rules = make_rules(rng, world.split, world.pool, labels[:-1] if has_default else labels)
    first = rng.random() < 0.6
    note = pick(rng, "priority_first" if first else "priority_last", world.split)
    text = rule_lines(rng, world.split, rules, default, _said(i), _said(o), note)
    every = [word for rule in rules for word in rule.keywords]
    single = _sampler(rules, default, world, i, o)

    def draw(inner: Random) -> Draw:
        if len(rules) < 2 or inner.random() < 0.4:
            return single(inner)
        two = sorted(inner.sample(range(len(rules)), 2))
        hits = [inner.choice(rules[number].keywords) for number in two]
        winner = 0 if first else 1
        shown = hits if inner.random() < 0.5 else hits[::-1]
        label = rules[two[winner]].label
        reason = f'Both "{hits[0]}" and "{hits[1]}" appear; the {"first" if first else "last"} rule wins, so it is {label}.'
        return Draw({i: text_with(inner, world, shown, every)}, {o: label}, reason)

    instructions = _frame(rng, world, i, o, labels, text)
    return Task("priority", instructions, [Field(i)], [Field(o, _type(rng, labels))], draw, len(labels))


def negative(rng: Random, world: World) -> Task:
    """One keyword list; one label with it, another without it."""
    (i,), (o,) = field_names(rng, world.split, 1, 1)
    labels = label_set(rng, world.split, 2)
    words = keyword_sets(rng, world.split, world.pool, [rng.randint(1, 3)])[0]
    rule = pick(rng, "negative", world.split, i=_said(i), o=_said(o), K=written(words, list_style(rng)), L=labels[0], N=labels[1])  # fmt: skip

    def draw(inner: Random) -> Draw:
        hit = inner.choice(words) if inner.random() < 0.5 else None
        label = labels[0] if hit else labels[1]
        text = text_with(inner, world, [hit] if hit else [], list(words))
        reason = f'"{hit}" appears, so it is {label}.' if hit else f"It is not there, so it is {label}."
        return Draw({i: text}, {o: label}, reason)

    return Task("negative", rule, [Field(i)], [Field(o, _type(rng, labels))], draw, 2)


def both(rng: Random, world: World) -> Task:
    """Two keywords; the answer depends on whether both, one or none occur."""
    (i,), (o,) = field_names(rng, world.split, 1, 1)
    labels = label_set(rng, world.split, 3)
    (a,), (b,) = keyword_sets(rng, world.split, world.pool, [1, 1])
    rule = pick(rng, "both", world.split, i=_said(i), o=_said(o), A=a, B=b, L=labels[0], M=labels[1], N=labels[2])

    def draw(inner: Random) -> Draw:
        shown = inner.choice(([a, b], [b, a], [a], [b], []))
        label = labels[2 - len(shown)]
        seen = " and ".join(f'"{word}"' for word in shown) if shown else "Neither word"
        reason = f"{seen} {'appear' if len(shown) == 2 else 'appears'}, so it is {label}."
        return Draw({i: text_with(inner, world, shown, [a, b])}, {o: label}, reason)

    return Task("both", rule, [Field(i)], [Field(o, _type(rng, labels))], draw, 3)


def by_field(rng: Random, world: World) -> Task:
    """The rules come in an input field, new ones with each question."""
    (i, r), (o,) = field_names(rng, world.split, 2, 1)
    instructions = pick(rng, "by_field", world.split, i=_said(i), o=_said(o), r=r)
    first = rng.random() < 0.5

    def draw(inner: Random) -> Draw:
        labels = label_set(inner, world.split, inner.randint(2, 5))
        default = labels[-1] if inner.random() < 0.5 else None
        rules = make_rules(inner, world.split, world.pool, labels[:-1] if default is not None else labels)
        made = _sampler(rules, default, world, i, o)(inner)
        shown = {r: rule_lines(inner, world.split, rules, default, _said(i), _said(o))}
        return Draw(shown | made.inputs if first else made.inputs | shown, made.outputs, made.reason)

    fields = [Field(r), Field(i)] if first else [Field(i), Field(r)]
    return Task("by_field", instructions, fields, [Field(o)], draw, 4)


def by_description(rng: Random, world: World) -> Task:
    """The rules stand in the output field's description."""
    task = keyword(rng, world)
    (i,), (o,) = task.inputs, task.outputs
    rules = " ".join(task.instructions.split("\n"))
    instructions = pick(rng, "by_description", world.split, i=_said(i.name), o=_said(o.name))
    return Task("by_description", instructions, [i], [Field(o.name, o.type, rules)], task.draw, task.labels)


def by_demos(rng: Random, world: World) -> Task:
    """Only the examples tell which words go with which label."""
    (i,), (o,) = field_names(rng, world.split, 1, 1)
    labels = label_set(rng, world.split, rng.choice((2, 2, 2, 3, 4)))
    words = keyword_sets(rng, world.split, world.pool, [1] * len(labels))
    rules = [Rule(keywords, label) for keywords, label in zip(words, labels, strict=True)]
    every = [word for rule in rules for word in rule.keywords]

    def one(inner: Random, rule: Rule) -> Draw:
        hit = rule.keywords[0]
        return Draw({i: text_with(inner, world, [hit], every)}, {o: rule.label}, _reason(inner, world, i, o, hit, rule.label))  # fmt: skip

    def show(inner: Random) -> list[Draw]:
        shown = [one(inner, rule) for rule in rules for _ in range(inner.choice((1, 1, 2)))]
        inner.shuffle(shown)
        return shown

    instructions = pick(rng, "by_demos", world.split, i=_said(i), o=_said(o)) if rng.random() < 0.7 else ""
    draw = lambda inner: one(inner, inner.choice(rules))  # noqa: E731
    return Task("by_demos", instructions, [Field(i)], [Field(o, _type(rng, labels, 0.15))], draw, len(labels), len(labels), show)  # fmt: skip


def two_outputs(rng: Random, world: World) -> Task:
    """Two output fields, each with its own rules."""
    (i,), (o, p) = field_names(rng, world.split, 1, 2)
    labels = [label_set(rng, world.split, rng.randint(2, 4)) for _ in range(2)]
    sizes = [1 if rng.random() < 0.6 else 2 for part in labels for _ in part[:-1]]
    words = keyword_sets(rng, world.split, world.pool, sizes)
    cut = len(labels[0]) - 1
    rules = [
        [Rule(k, label) for k, label in zip(chunk, part, strict=False)]
        for chunk, part in zip((words[:cut], words[cut:]), labels, strict=True)
    ]
    parts = [pick(rng, "two_outputs", world.split, i=_said(i), o=o, p=p)] if rng.random() < 0.7 else []
    for name, its, part in zip((o, p), rules, labels, strict=True):
        head = pick(rng, "for_output", world.split, o=name)
        parts.append(f"{head} {rule_lines(rng, world.split, its, part[-1], _said(i), name)}")
    every = [word for its in rules for rule in its for word in rule.keywords]

    def draw(inner: Random) -> Draw:
        picked = [inner.choice([*its, None]) for its in rules]
        hits = [inner.choice(rule.keywords) for rule in picked if rule]
        answers = [rule.label if rule else part[-1] for rule, part in zip(picked, labels, strict=True)]
        seen = " and ".join(f'"{hit}"' for hit in hits) or "none of the words"
        reason = f"The {_said(i)} mentions {seen}, so {o} is {answers[0]} and {p} is {answers[1]}."
        inner.shuffle(hits)
        return Draw({i: text_with(inner, world, hits, every)}, {o: answers[0], p: answers[1]}, reason)

    fields = [Field(o, _type(rng, labels[0])), Field(p, _type(rng, labels[1]))]
    return Task("two_outputs", "\n".join(parts), [Field(i)], fields, draw, max(map(len, labels)))


def threshold(rng: Random, world: World) -> Task:
    """A number in the text above or below a limit."""
    (i,), (o,) = field_names(rng, world.split, 1, 1)
    labels, limit = label_set(rng, world.split, 2), rng.choice((5, 10, 20, 50, 100, 200, 500, 1000))
    rule = pick(rng, "threshold", world.split, i=_said(i), o=_said(o), T=str(limit), L=labels[0], N=labels[1])

    def draw(inner: Random) -> Draw:
        high = inner.random() < 0.5
        number = inner.randint(limit + 1, limit * 3) if high else inner.randint(0, limit)
        text = insert(inner, world.pool.draw(inner, "0123456789"), str(number)) if inner.random() < 0.7 else str(number)
        label = labels[0] if high else labels[1]
        return Draw({i: text}, {o: label}, f"{number} is {'above' if high else 'not above'} {limit}, so it is {label}.")

    return Task("threshold", rule, [Field(i)], [Field(o, _type(rng, labels))], draw, 2)


def shape(rng: Random, world: World) -> Task:
    """How the text begins, ends, or what signs it holds."""
    (i,), (o,) = field_names(rng, world.split, 1, 1)
    labels = label_set(rng, world.split, 2)
    mark = keyword_sets(rng, world.split, world.pool, [1])[0][0]
    kind = rng.choice(("start", "end", "digit", "question", "upper"))
    said = {
        "start": rng.choice((f'starts with "{mark}"', f'begins with the word "{mark}"')),
        "end": rng.choice((f'ends with "{mark}"', f'has "{mark}" as its last word')),
        "digit": rng.choice(("contains a number", "has a digit in it")),
        "question": rng.choice(("ends with a question mark", "asks a question", "is a question")),
        "upper": rng.choice(("is written in capital letters", "is all in upper case")),
    }[kind]
    rule = pick(rng, "shape", world.split, i=_said(i), o=_said(o), C=said, L=labels[0], N=labels[1])

    def draw(inner: Random) -> Draw:
        yes = inner.random() < 0.5
        text = re.sub(r"[?]", ".", world.pool.draw(inner, [mark, *"0123456789"])).rstrip(".”\"!")
        if kind in ("start", "end"):
            put = (f"{mark} {text}" if kind == "start" else f"{text} {mark}") if yes else text
            # The word elsewhere in the text must not count.
            text = put if yes or inner.random() < 0.5 else _inside(text, mark)
        elif kind == "digit":
            text = insert(inner, text, str(inner.randrange(1, 3000))) if yes else text
        elif kind == "question":
            text += "?" if yes else inner.choice((".", "!"))
        else:
            text = text.upper() if yes else text
        label = labels[0] if yes else labels[1]
        return Draw({i: text}, {o: label}, f"It {'does' if yes else 'does not'} fit, so it is {label}.")

    return Task("shape", rule, [Field(i)], [Field(o, _type(rng, labels))], draw, 2)


def _inside(text: str, mark: str) -> str:
    words = text.split(" ")
    return " ".join([*words[: len(words) // 2], mark, *words[len(words) // 2 :]])


def flag(rng: Random, world: World) -> Task:
    """A bool: whether any word of a list occurs."""
    (i,), (o,) = field_names(rng, world.split, 1, 1)
    words = keyword_sets(rng, world.split, world.pool, [rng.randint(1, 3)])[0]
    rule = pick(rng, "negative", world.split, i=_said(i), o=_said(o), K=written(words, list_style(rng)), L="True", N="False")  # fmt: skip

    def draw(inner: Random) -> Draw:
        hit = inner.choice(words) if inner.random() < 0.5 else None
        text = text_with(inner, world, [hit] if hit else [], list(words))
        reason = f'The {_said(i)} mentions "{hit}".' if hit else f"The {_said(i)} does not mention it."
        return Draw({i: text}, {o: bool(hit)}, reason)

    return Task("flag", rule, [Field(i)], [Field(o, bool)], draw, 2)


#: The rule tasks with their shares (in parts of 100 of the rule tasks).
RULE_TASKS: dict[Callable[[Random, World], Task], float] = {
    keyword: 46, priority: 6, negative: 6, both: 4, by_field: 7, by_description: 5, by_demos: 9, two_outputs: 8,
    threshold: 3, shape: 3, flag: 3,
}  # fmt: skip
