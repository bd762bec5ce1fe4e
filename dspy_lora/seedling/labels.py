"""Label sets, keyword lists and rule texts: the material of rule-following tasks."""

from dataclasses import dataclass
from random import Random

from dspy_lora.seedling.phrasing import phrases, pick
from dspy_lora.seedling.texts import SentencePool
from dspy_lora.seedling.words import Split, common_words, distinct, invented, word


@dataclass(frozen=True)
class Rule:
    """Any of ``keywords`` in the text means ``label``."""

    keywords: tuple[str, ...]
    label: str


def _two_words(rng: Random, split: Split, separator: str) -> str:
    return separator.join(word(rng, split, made_up=0.1) for _ in range(2))


def _label(rng: Random, split: Split, style: str) -> str:
    """One label of a style; see ``label_set``."""
    if style == "word":
        return rng.choice(common_words(split))
    if style == "capital":
        return rng.choice(common_words(split)).capitalize()
    if style == "upper":
        return rng.choice(common_words(split)).upper()
    if style == "invented":
        return invented(rng, split)
    if style == "invented_capital":
        return invented(rng, split).capitalize()
    if style == "snake":
        return _two_words(rng, split, "_")
    if style == "two_words":
        return _two_words(rng, split, " ")
    if style == "two_capitals":
        return _two_words(rng, split, " ").title()
    if style == "kebab":
        return _two_words(rng, split, "-")
    if style == "code":
        return rng.choice("ABCDEFGHKLMNPQRSTX") + rng.choice(("", "-")) + str(rng.randrange(1, 1000))
    if style == "number":
        return str(rng.randrange(0, 10 if rng.random() < 0.5 else 1000))
    return rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


_STYLES = {"word": 26, "capital": 12, "upper": 5, "invented": 12, "invented_capital": 4, "snake": 12, "two_words": 10,
           "two_capitals": 5, "kebab": 3, "code": 5, "number": 3, "letter": 3}  # fmt: skip


def label_set(rng: Random, split: Split, count: int) -> list[str]:
    """``count`` different labels in one style (words, capitals, snake_case, two words, codes, numbers, letters)."""
    style = rng.choices(list(_STYLES), list(_STYLES.values()))[0]
    found: list[str] = []
    while len(found) < count:
        new = _label(rng, split, style)
        if new.lower() not in (label.lower() for label in found):
            found.append(new)
    return found


def keyword_sets(rng: Random, split: Split, pool: SentencePool, sizes: list[int]) -> list[tuple[str, ...]]:
    """Keyword lists of the given sizes; no keyword is a part of another.

    A third of the tasks use words that occur in the pool's sentences, the others any words, made-up ones, or pairs.
    """
    total, mode = sum(sizes), rng.random()
    if mode < 0.4:
        words = _natural(rng, pool.frequent(split), total)
    elif mode < 0.9:
        words = distinct(rng, split, total, made_up=rng.choice((0.0, 0.2, 1.0)))
    else:
        words = [f"{a} {b}" for a, b in zip(*[iter(distinct(rng, split, 2 * total))] * 2, strict=True)]
    cuts, at = [], 0
    for size in sizes:
        cuts.append(tuple(words[at : at + size]))
        at += size
    return cuts


def _natural(rng: Random, words: tuple[str, ...], count: int) -> list[str]:
    found: list[str] = []
    while len(found) < count:
        new = rng.choice(words)
        if not any(new in old or old in new for old in found):
            found.append(new)
    return found


def make_rules(rng: Random, split: Split, pool: SentencePool, labels: list[str]) -> list[Rule]:
    """One rule a label with one to four keywords each (fewer when there are many labels)."""
    most = 4 if len(labels) <= 4 else 3
    top = rng.choice((1, 2, 2, 3, most))
    sizes = [rng.randint(1, top) for _ in labels]
    return [Rule(words, label) for words, label in zip(keyword_sets(rng, split, pool, sizes), labels, strict=True)]


_QUOTES = (("", ""), ("", ""), ("", ""), ("'", "'"), ('"', '"'), ("`", "`"))
_JOINS = ((", ", " or "), (", ", " or "), (", ", ", or "), (", ", ", "), (" / ", " / "), (" or ", " or "), ("; ", "; "))


def list_style(rng: Random) -> tuple[str, str, str, str]:
    """How a task writes keyword lists: opening quote, closing quote, separator, last separator."""
    return (*rng.choice(_QUOTES), *rng.choice(_JOINS))


def written(words: tuple[str, ...] | list[str], style: tuple[str, str, str, str]) -> str:
    """A keyword list in a style: "a, b or c"."""
    left, right, between, last = style
    quoted = [f"{left}{word}{right}" for word in words]
    return quoted[0] if len(quoted) == 1 else between.join(quoted[:-1]) + last + quoted[-1]


def rule_lines(
    rng: Random, split: Split, rules: list[Rule], default: str | None, i: str, o: str, note: str = ""
) -> str:
    """The rules of a task as text: sentences, bullets, numbers, or one line with semicolons."""
    style, left = list_style(rng), rng.choice(("", "", "", "'", '"', "`"))
    layout = rng.choice(("sentences", "sentences", "lines", "lines", "bullets", "bullets", "numbers", "semicolons"))
    group = "rule_sentence" if layout == "sentences" or rng.random() < 0.4 else "rule_line"
    one, mixed = rng.choice(phrases(group, split)), rng.random() < 0.15
    parts = []
    for rule in rules:
        phrase = rng.choice(phrases(group, split)) if mixed else one
        filled = phrase.replace("{K}", written(rule.keywords, style)).replace("{L}", f"{left}{rule.label}{left}")
        filled = filled.replace("{i}", i).replace("{o}", o)
        parts.append(filled if rng.random() < 0.02 or not filled[0].isalpha() else _first_upper(filled, rule, rng))
    if default is not None:
        parts.append(pick(rng, "default", split, i=i, o=o, L=f"{left}{default}{left}"))
    if note:
        parts.append(note)
    return _lay_out(layout, parts)


def _first_upper(text: str, rule: Rule, rng: Random) -> str:
    """Capitalise a sentence's first letter unless it is a keyword's or the label's own."""
    if text.startswith(rule.label) or text.startswith(rule.keywords):
        return text
    return text[0].upper() + text[1:] if rng.random() < 0.9 else text


def _lay_out(layout: str, parts: list[str]) -> str:
    if layout == "sentences":
        return " ".join(parts)
    if layout == "semicolons":
        return "; ".join(part.rstrip(".") for part in parts) + "."
    if layout == "bullets":
        return "\n".join(f"- {part}" for part in parts)
    if layout == "numbers":
        return "\n".join(f"{number}. {part}" for number, part in enumerate(parts, 1))
    return "\n".join(parts)
