"""Tasks in which rules decide among labels: keywords, defaults, orders, limits, examples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from dspy_lora.seedling import phrases, wordings
from dspy_lora.seedling.sentences import FEW_WORDS, Texts, generated
from dspy_lora.seedling.task import ROWS, Task, pick
from dspy_lora.seedling.words import Split, distinct, field_names

_QUOTES = ("", "", "", "", '"', "'", "`", "**")
_JOINS = (" or ", " or ", " or ", ", ", ", ", " / ", "; ", " | ")
_ENOUGH = 300  # natural words; the most that one task takes is 64, none a part of another
_CLAUSES = ("It is about {}.", "This concerns the {}.", "See the {} too.", "Also, the {}.", "What about {}?")


def make_labels(rng: Random, split: Split, count: int) -> list[str]:
    """Different labels of one style: words, phrases, codes, numbers."""
    style = rng.choice(
        ("lower", "lower", "title", "upper", "snake", "snake", "phrase", "titles", "kebab", "code", "number")
    )
    words = distinct(rng, split, 2 * count, made_up=0.2)
    first, second = words[:count], words[count:]
    if style == "code":
        letter = rng.choice("ABCDEFGHKLMPQRSTX")
        return [f"{letter}{number}" for number in rng.sample(range(1, 99), count)]
    if style == "number":
        return [str(number) for number in rng.sample(range(30), count)]
    styles: dict[str, Callable[[str, str], str]] = {
        "lower": lambda a, b: a,
        "title": lambda a, b: a.capitalize(),
        "upper": lambda a, b: a.upper(),
        "snake": lambda a, b: f"{a}_{b}",
        "phrase": lambda a, b: f"{a} {b}",
        "titles": lambda a, b: f"{a} {b}".title(),
        "kebab": lambda a, b: f"{a}-{b}",
    }
    return [styles[style](a, b) for a, b in zip(first, second, strict=True)]


def make_keywords(rng: Random, split: Split, texts: Texts, sizes: Sequence[int]) -> list[list[str]]:
    """Groups of keywords, none a part of another: words of the texts, any words, or pairs of words."""
    total, way, natural = sum(sizes), rng.random(), texts.natural(split)
    if way < 0.4 and len(natural) >= _ENOUGH:
        words = _apart(rng, natural, total)
    elif way < 0.9:
        words = distinct(rng, split, total)
    else:
        many = distinct(rng, split, 2 * total)
        words = [f"{a} {b}" for a, b in zip(many[::2], many[1::2], strict=True)]
    groups, at = [], 0
    for size in sizes:
        groups.append(words[at : at + size])
        at += size
    return groups


def _apart(rng: Random, words: Sequence[str], count: int) -> list[str]:
    found: list[str] = []
    while len(found) < count:
        new = rng.choice(words)
        if not any(new in old or old in new for old in found):
            found.append(new)
    return found


# -- texts -------------------------------------------------------------------------------------------------------------


def insert(rng: Random, text: str, phrase: str) -> str:
    """The text with a phrase put in: between two words, or in a clause of its own."""
    way = rng.random()
    if way < 0.6:
        parts = text.split(" ")
        parts.insert(rng.randint(0, len(parts)), phrase)
        return " ".join(parts)
    clause = rng.choice(_CLAUSES)
    return f"{text} {clause.format(phrase)}" if way < 0.8 else f"{clause.format(phrase)} {text}"


def has_any(text: str, words: Sequence[str]) -> bool:
    """Whether a text contains one of the words, in any case."""
    low = text.lower()
    return any(word.lower() in low for word in words)


def clean(rng: Random, split: Split, texts: Texts, avoid: Sequence[str]) -> str:
    """A text that contains none of the words."""
    for _ in range(20):
        text = texts.text(rng, split)
        if not has_any(text, avoid):
            return text
    return "Nothing more to say."


def text_with(rng: Random, split: Split, texts: Texts, keyword: str, avoid: Sequence[str]) -> str:
    """A text that contains a keyword and none of the others: where it occurs by nature, or put in."""
    others = [word for word in avoid if word != keyword]
    way = rng.random()
    found = texts.holding(rng, keyword) if way < 0.4 else None
    if found is None and way < 0.6:
        found = generated(rng, split, keyword)
    if found is None or has_any(found, others):
        return insert(rng, clean(rng, split, texts, avoid), keyword if rng.random() < 0.85 else keyword.capitalize())
    if rng.random() < 0.5:
        more = clean(rng, split, texts, avoid)
        return f"{more} {found}" if rng.random() < 0.5 else f"{found} {more}"
    return found


# -- keyword rules -----------------------------------------------------------------------------------------------------


@dataclass
class Rules:
    """Label rules and their wording.

    Attributes:
        labels: Every label, the default last where there is one.
        keywords: Those of each rule, in the order of the labels.
        default: The label where no rule applies; None where one always does.
        lines: The rules as text, one each, and the default's.
        ordered: Two rules may apply, and the first one wins.
        quote: What stands around a label.
    """

    labels: list[str]
    keywords: list[list[str]]
    default: str | None
    lines: list[str]
    ordered: bool
    quote: str

    @property
    def every(self) -> list[str]:
        """All keywords."""
        return [word for group in self.keywords for word in group]


def make_rules(
    rng: Random, split: Split, texts: Texts, source: str, target: str, fewest: int = 2, most: int = 8, top: int = 4
) -> Rules:
    """Rules for a number of labels in some wording, with at most ``top`` keywords each."""
    count = rng.randint(fewest, most)
    labels = make_labels(rng, split, count)
    ruled = count - 1 if rng.random() < 0.6 and count > 1 else count
    top = min(top, rng.choice((1, 2, 2, 3, 4)))
    keywords = make_keywords(rng, split, texts, [rng.randint(1, top) for _ in range(ruled)])
    default = labels[-1] if ruled < count else None
    quote, quoted, join = rng.choice(_QUOTES), rng.choice(("", "", "", '"', "'")), rng.choice(_JOINS)
    same = phrases.rule(rng, split) if rng.random() < 0.7 else None
    lines = []
    for group, label in zip(keywords, labels, strict=False):
        wording = same or phrases.rule(rng, split)
        words = written(group, quoted, join)
        lines.append(wording.format(w=words, l=f"{quote}{label}{quote}", f=source, o=target))
    if default is not None:
        lines.append(phrases.default(rng, split).format(l=f"{quote}{default}{quote}", f=source, o=target))
    return Rules(labels, keywords, default, lines, rng.random() < 0.25 and ruled > 1, quote)


def written(words: Sequence[str], quote: str, join: str) -> str:
    """A list of keywords as text: ``a, b or c``."""
    shown = [f"{quote}{word}{quote}" for word in words]
    if len(shown) == 1:
        return shown[0]
    return join.join(shown) if join != " or " else f"{', '.join(shown[:-1])} or {shown[-1]}"


def instruction(rng: Random, split: Split, rules: Rules, source: str, target: str) -> str:
    """Opening, list of labels, rules, closing: as lines, bullets, numbers or a paragraph."""
    head = [phrases.intro(rng, split).format(f=source, o=target)]
    if rng.random() < 0.3:
        shown = rng.sample(rules.labels, len(rules.labels))
        listed = ", ".join(f"{rules.quote}{x}{rules.quote}" for x in shown)
        head.append(phrases.labels(rng, split).format(listed, o=target))
    tail = [pick(rng, wordings.CLOSING, split).format(o=target)] if rng.random() < 0.15 else []
    if rules.ordered:
        (head if rng.random() < 0.5 else tail).append(pick(rng, wordings.FIRST_WINS, split))
    if rng.random() < 0.25:
        head.append(pick(rng, wordings.HEADER, split))
    layout = rng.choice(("lines", "lines", "bullets", "bullets", "numbers", "paragraph"))
    parts = [part for part in head if part]
    if layout == "paragraph":
        lines = [line if line.endswith(".") else f"{line};" for line in rules.lines]
        return " ".join([*parts, *lines, *tail])
    marks = {"lines": "", "bullets": "- ", "numbers": "{}. "}
    lines = [marks[layout].format(number) + line for number, line in enumerate(rules.lines, 1)]
    return "\n".join([*([" ".join(parts)] if parts and rng.random() < 0.5 else parts), *lines, *tail])


def apply_rules(
    rng: Random, split: Split, texts: Texts, rules: Rules, source: str, target: str
) -> tuple[str, str, str]:
    """A text, its label and the reason."""
    which = rng.randrange(len(rules.keywords) + (rules.default is not None))
    if which == len(rules.keywords):
        label = str(rules.default)
        reason = pick(rng, wordings.NO_MATCH, split).format(f=source, o=target, l=label)
        return clean(rng, split, texts, rules.every), label, reason
    keyword, label = rng.choice(rules.keywords[which]), rules.labels[which]
    text = text_with(rng, split, texts, keyword, rules.every)
    if rules.ordered and which + 1 < len(rules.keywords) and rng.random() < 0.5:
        text = insert(rng, text, rng.choice(rng.choice(rules.keywords[which + 1 :])))
    return text, label, pick(rng, wordings.BECAUSE, split).format(k=keyword, f=source, o=target, l=label)


def _kind(rng: Random, labels: list[str]) -> Any:
    """The output's type: str, or three times in ten a Literal of the labels in any order."""
    return Literal[tuple(rng.sample(labels, len(labels)))] if rng.random() < 0.3 else str


def rules_task(rng: Random, split: Split, texts: Texts) -> Task:
    """Keyword rules decide among 2 to 8 labels; in training a third are easy and a few have more labels."""
    [source], [target] = field_names(rng, split, 1, 1)
    way = rng.random() if split == "train" else 1.0
    if way < 0.35:
        texts = FEW_WORDS
        rules = make_rules(rng, split, texts, source, target, most=4, top=1)
    else:
        rules = make_rules(rng, split, texts, source, target, *((9, 16) if way < 0.4 else (2, 8)))
    rows = []
    for _ in range(ROWS):
        text, label, reason = apply_rules(rng, split, texts, rules, source, target)
        rows.append({source: text, target: label, "reasoning": reason})
    told = instruction(rng, split, rules, source, target)
    kind = _kind(rng, rules.labels)
    return Task("rules", told, {source: str}, {target: kind}, rows, labels=len(rules.labels))


def described_task(rng: Random, split: Split, texts: Texts) -> Task:
    """The rules stand in the output field's description."""
    task = rules_task(rng, split, texts)
    [source], [target] = task.inputs, task.outputs
    told = pick(rng, wordings.BY_DESCRIPTION, split).format(f=source, o=target)
    description = " ".join(task.instruction.split("\n"))
    return Task("described", told, task.inputs, task.outputs, task.rows, descriptions={target: description})


def field_rules_task(rng: Random, split: Split, texts: Texts) -> Task:
    """The rules come in an input field, new ones with each row."""
    [source, guide], [target] = field_names(rng, split, 2, 1)
    rows = []
    for _ in range(ROWS):
        rules = make_rules(rng, split, texts, source, target, most=5)
        rules.ordered = False
        text, label, reason = apply_rules(rng, split, texts, rules, source, target)
        shown = rng.choice((" ", "\n")).join(rules.lines)
        rows.append({source: text, guide: shown, target: label, "reasoning": reason})
    names = [source, guide] if rng.random() < 0.5 else [guide, source]
    told = pick(rng, wordings.BY_FIELD, split).format(f=source, o=target, r=guide)
    return Task("field_rules", told, dict.fromkeys(names, str), {target: str}, rows)


def unless_task(rng: Random, split: Split, texts: Texts) -> Task:
    """One label with any of some keywords, another without."""
    [source], [target] = field_names(rng, split, 1, 1)
    labels = make_labels(rng, split, 2)
    [words] = make_keywords(rng, split, texts, [rng.randint(1, 3)])
    shown = written(words, rng.choice(("", '"')), " or ")
    told = pick(rng, wordings.UNLESS, split).format(w=shown, l=labels[0], n=labels[1], f=source, o=target)
    rows = []
    for _ in range(ROWS):
        keyword = rng.choice(words) if rng.random() < 0.5 else None
        text = text_with(rng, split, texts, keyword, words) if keyword else clean(rng, split, texts, words)
        label = labels[0] if keyword else labels[1]
        reason = f'"{keyword}" appears, so it is {label}.' if keyword else f"It is not there, so it is {label}."
        rows.append({source: text, target: label, "reasoning": reason})
    return Task("unless", told, {source: str}, {target: _kind(rng, labels)}, rows, labels=2)


def both_task(rng: Random, split: Split, texts: Texts) -> Task:
    """Whether two keywords occur both, alone or not at all."""
    [source], [target] = field_names(rng, split, 1, 1)
    labels = make_labels(rng, split, 3)
    [[a], [b]] = make_keywords(rng, split, texts, [1, 1])
    told = pick(rng, wordings.BOTH, split).format(a=a, b=b, l=labels[0], m=labels[1], n=labels[2], f=source, o=target)
    rows = []
    for _ in range(ROWS):
        words = rng.choice(([a, b], [b, a], [a], [b], []))
        text = clean(rng, split, texts, [a, b])
        for word in words:
            text = insert(rng, text, word)
        label = labels[2 - len(words)]
        seen = " and ".join(f'"{word}"' for word in words) or "Neither word"
        reason = f"{seen} {'appear' if len(words) == 2 else 'appears'}, so it is {label}."
        rows.append({source: text, target: label, "reasoning": reason})
    return Task("both", told, {source: str}, {target: _kind(rng, labels)}, rows, labels=3)


def demos_task(rng: Random, split: Split, texts: Texts) -> Task:
    """The demos alone show which word means which label."""
    [source], [target] = field_names(rng, split, 1, 1)
    count = rng.randint(2, 3)
    labels, words = make_labels(rng, split, count), distinct(rng, split, count)
    told = pick(rng, wordings.BY_DEMOS, split).format(f=source, o=target)
    order = [*range(count), *(rng.randrange(count) for _ in range(ROWS - count))]
    head = order[: ROWS - 1]
    rng.shuffle(head)
    rows = []
    for which in [*head, order[-1]]:
        text = text_with(rng, split, texts, words[which], words)
        rows.append({source: text, target: labels[which], "reasoning": f'"{words[which]}" goes with {labels[which]}.'})
    return Task("demos", told, {source: str}, {target: str}, rows, needs_demos=True)


def number_task(rng: Random, split: Split, texts: Texts) -> Task:
    """A threshold decides between two labels."""
    [source], [target] = field_names(rng, split, 1, 1)
    low, high = make_labels(rng, split, 2)
    limit = rng.choice((5, 10, 20, 50, 100, 200, 500, 1000))
    told = pick(rng, wordings.ABOVE, split).format(f=source, o=target, t=limit, l=high, n=low)
    kind, rows = rng.choice((int, int, str)), []
    for _ in range(ROWS):
        value = rng.randint(0, 2 * limit)
        label = high if value > limit else low
        reason = f"{value} is {'more' if value > limit else 'not more'} than {limit}, so {label}."
        rows.append({source: kind(value), target: label, "reasoning": reason})
    return Task("number", told, {source: kind}, {target: str}, rows)
