"""Instruction-following tasks without end. The prompt alone decides every answer.

A task is one signature with several rows. Each ``kind`` below makes tasks of one sort; what varies is everything a
reader should not rely on: field names, wording, order, types, label sets. One wording in five is held out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

from dspy_lora.seedling.sentences import Texts
from dspy_lora.seedling.words import Split, distinct, field_names, names, word

ROWS = 6


@dataclass
class Task:
    """One signature and its rows.

    Attributes:
        kind: Which sort of task.
        instruction: The signature's instruction.
        inputs: Field name to type.
        outputs: Field name to type.
        rows: Field name to value, for all fields; ``reasoning`` is set where the answer has a reason to give.
        needs_demos: The answer follows from the demos only.
        labels: Number of labels where rules decide among labels, else 0.
        descriptions: Field name to description, for some fields.
    """

    kind: str
    instruction: str
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    rows: list[dict[str, Any]]
    needs_demos: bool = False
    labels: int = 0
    descriptions: dict[str, str] = field(default_factory=dict)


def pick(rng: Random, wordings: Sequence[str], split: Split) -> str:
    """One wording; every fifth is held out."""
    return rng.choice([w for i, w in enumerate(wordings) if (i % 5 == 4) == (split == "heldout")])


# -- rules ---------------------------------------------------------------------------------------------------------

_INTRO = (
    "Classify the {f}.",
    "Assign the right {o} to the {f}.",
    "Decide which {o} fits.",
    "Read the {f} and give its {o}.",
    "Choose one {o} for the {f}.",
    "Label the {f}.",
    "Work out the {o} by these rules.",
    "Sort the {f} into one of the groups below.",
    "You are given a {f}. Answer with its {o}.",
    "Pick the {o} that the rules below give.",
    "Route the {f}.",
    "Tag the {f} with one {o}.",
    "Follow the rules to find the {o}.",
    "Determine the {o} of the {f}.",
    "Say which {o} this {f} gets.",
    "Use the guide below.",
    "Apply these rules to the {f}.",
    "Give the {o}.",
    "",
    "State the {o} for the {f} below.",
)
_RULE = (
    "If it mentions {w}, answer {l}.",
    "{l}: mentions {w}.",
    "Answer {l} when the {f} contains {w}.",
    "{l} if {w} appears.",
    "If {w} is in the {f}, the {o} is {l}.",
    "When you see {w}, say {l}.",
    "{w} -> {l}",
    "Use {l} for anything about {w}.",
    "Texts that talk about {w} are {l}.",
    "If the {f} speaks of {w}, choose {l}.",
    "{l} = {w}",
    "Output {l} whenever {w} occurs.",
    "For {w}: {l}.",
    "Anything with {w} is {l}.",
    "Should {w} be mentioned, return {l}.",
    "{l} - the {f} refers to {w}",
    "The {o} is {l} if the {f} has {w}.",
    "Write {l} if you find {w}.",
    "{w} means {l}.",
    "Reply with {l} in case the {f} names {w}.",
)
_DEFAULT = (
    "Otherwise answer {l}.",
    "If nothing fits, {l}.",
    "{l} in all other cases.",
    "Else: {l}.",
    "When no rule applies, use {l}.",
    "Everything else is {l}.",
    "Default: {l}",
    "If none of these appear, say {l}.",
    "Any other {f} is {l}.",
    "{l} for the rest.",
)
_FIRST_WINS = (
    "The first rule that applies wins.",
    "If several rules apply, use the earliest one.",
    "Stop at the first match.",
    "Check the rules from top to bottom.",
    "Should two rules match, the one listed first counts.",
)
_BECAUSE = (
    'The {f} mentions "{k}", so the {o} is {l}.',
    'It contains "{k}", which means {l}.',
    '"{k}" appears, so the answer is {l}.',
    'I see "{k}" in the {f}; the rule says {l}.',
    'The word "{k}" points to {l}.',
)
_NO_MATCH = (
    "None of the words appear, so the {o} is {l}.",
    "No rule applies, which leaves {l}.",
    "Nothing matches, so the answer is {l}.",
    "The {f} mentions none of them; the default is {l}.",
    "There is no match, hence {l}.",
)


def make_labels(rng: Random, split: Split, count: int) -> list[str]:
    """Different labels of one style: words, phrases, codes, numbers."""
    style = rng.choice(("lower", "lower", "title", "upper", "snake", "phrase", "code", "number"))
    words = distinct(rng, split, 2 * count, made_up=0.2)
    first, second = words[:count], words[count:]
    if style == "code":
        letter = rng.choice("ABCDEFGHKLMPQRSTX")
        return [f"{letter}{number}" for number in rng.sample(range(1, 99), count)]
    if style == "number":
        return [str(number) for number in rng.sample(range(0, 30), count)]
    styles: dict[str, Callable[[str, str], str]] = {
        "lower": lambda a, b: a,
        "title": lambda a, b: a.capitalize(),
        "upper": lambda a, b: a.upper(),
        "snake": lambda a, b: f"{a}_{b}",
        "phrase": lambda a, b: f"{a} {b}",
    }
    return [styles[style](a, b) for a, b in zip(first, second, strict=True)]


def _either(rng: Random, words: Sequence[str], quoted: bool) -> str:
    shown = [f'"{w}"' if quoted else w for w in words]
    if len(shown) == 1:
        return shown[0]
    join = rng.choice((" or ", " or ", ", ", " / "))
    return join.join(shown) if join != " or " else ", ".join(shown[:-1]) + " or " + shown[-1]


def insert(rng: Random, text: str, phrase: str) -> str:
    """The text with a word put in: between two words, or in a clause of its own."""
    way = rng.random()
    if way < 0.6:
        parts = text.split(" ")
        parts.insert(rng.randint(0, len(parts)), phrase)
        return " ".join(parts)
    clause = rng.choice(
        ("It is about {}.", "This concerns the {}.", "See the {} too.", "Also, the {}.", "What about {}?")
    )
    return f"{text} {clause.format(phrase)}" if way < 0.8 else f"{clause.format(phrase)} {text}"


def _clean(rng: Random, texts: Texts, split: Split, words: Sequence[str]) -> str:
    """A text that contains none of the words."""
    for _ in range(20):
        text = texts.text(rng, split)
        low = text.lower()
        if not any(w.lower() in low for w in words):
            return text
    return "Nothing more to say."


@dataclass
class Rules:
    """Label rules, their instruction, and rows that obey them."""

    labels: list[str]
    keywords: list[list[str]]
    default: str | None
    instruction: str
    ordered: bool


def make_rules(rng: Random, split: Split, source: str, target: str, fewest: int = 2, most: int = 8) -> Rules:
    """Rules for 2 to 8 labels in some wording."""
    count = rng.randint(fewest, most)
    labels = make_labels(rng, split, count)
    has_default = rng.random() < 0.6
    ruled = count - 1 if has_default and count > 1 else count
    words = distinct(rng, split, ruled * 3)
    keywords = [words[3 * i : 3 * i + rng.choice((1, 1, 2, 2, 3))] for i in range(ruled)]
    default = labels[-1] if ruled < count else None
    quoted, ordered = rng.random() < 0.4, rng.random() < 0.25 and ruled > 1
    same = pick(rng, _RULE, split) if rng.random() < 0.6 else None
    lines = [
        (same or pick(rng, _RULE, split)).format(w=_either(rng, group, quoted), l=label, f=source, o=target)
        for group, label in zip(keywords, labels, strict=False)
    ]
    head = [pick(rng, _INTRO, split).format(f=source, o=target)]
    if rng.random() < 0.35:
        head.append(rng.choice(("Labels: {}.", "Possible values: {}.", "One of: {}.")).format(", ".join(labels)))
    tail = [pick(rng, _DEFAULT, split).format(l=default, f=source)] if default else []
    if ordered:
        (head if rng.random() < 0.5 else tail).append(pick(rng, _FIRST_WINS, split))
    layout = rng.choice(("lines", "bullets", "numbers", "paragraph"))
    if layout == "paragraph":
        lines = [line if line.endswith(".") else f"{line};" for line in lines]
        instruction = " ".join([*head, *lines, *tail])
    else:
        marks = {"lines": "", "bullets": "- ", "numbers": "{}. "}
        lines = [marks[layout].format(n) + line for n, line in enumerate(lines, 1)]
        instruction = "\n".join([*head, *lines, *tail])
    return Rules(labels, keywords, default, instruction.strip(), ordered)


def apply_rules(
    rng: Random, rules: Rules, texts: Texts, split: Split, source: str, target: str
) -> tuple[str, str, str]:
    """A text, its label and the reason."""
    every = [w for group in rules.keywords for w in group]
    text = _clean(rng, texts, split, every)
    options = len(rules.keywords) + (rules.default is not None)
    which = rng.randrange(options)
    if which == len(rules.keywords):
        label = str(rules.default)
        return text, label, pick(rng, _NO_MATCH, split).format(f=source, o=target, l=label)
    keyword = rng.choice(rules.keywords[which])
    if rules.ordered and which + 1 < len(rules.keywords) and rng.random() < 0.5:
        text = insert(rng, text, rng.choice(rules.keywords[rng.randrange(which + 1, len(rules.keywords))]))
    text = insert(rng, text, keyword if rng.random() < 0.85 else keyword.capitalize())
    label = rules.labels[which]
    return text, label, pick(rng, _BECAUSE, split).format(k=keyword, f=source, o=target, l=label)


def rules_task(rng: Random, split: Split, texts: Texts) -> Task:
    """Keyword rules decide among 2 to 8 labels."""
    [source], [target] = field_names(rng, split, 1, 1)
    rules = make_rules(rng, split, source, target)
    kind: Any = str
    if rng.random() < 0.3:
        kind = Literal[tuple(rules.labels)]  # type: ignore[misc]
    rows = []
    for _ in range(ROWS):
        text, label, reason = apply_rules(rng, rules, texts, split, source, target)
        rows.append({source: text, target: label, "reasoning": reason})
    return Task("rules", rules.instruction, {source: str}, {target: kind}, rows, labels=len(rules.labels))


def demos_task(rng: Random, split: Split, texts: Texts) -> Task:
    """The demos alone show which word means which label."""
    [source], [target] = field_names(rng, split, 1, 1)
    count = rng.randint(2, 3)
    labels, words = make_labels(rng, split, count), distinct(rng, split, count)
    instruction = pick(
        rng,
        (
            "Do as in the examples.",
            "Label the text like the examples.",
            "The examples show what to do.",
            "",
            "Follow the pattern of the examples.",
        ),
        split,
    )
    order = [*range(count), *(rng.randrange(count) for _ in range(ROWS - count))]
    head = order[: ROWS - 1]
    rng.shuffle(head)
    rows = []
    for which in [*head, order[-1]]:
        text = insert(rng, _clean(rng, texts, split, words), words[which])
        rows.append({source: text, target: labels[which], "reasoning": f'"{words[which]}" goes with {labels[which]}.'})
    return Task("demos", instruction, {source: str}, {target: str}, rows, needs_demos=True)


def number_task(rng: Random, split: Split, texts: Texts) -> Task:
    """A threshold decides between two labels."""
    [source], [target] = field_names(rng, split, 1, 1)
    low, high = make_labels(rng, split, 2)
    limit = rng.choice((5, 10, 20, 50, 100, 200, 500, 1000))
    wording = pick(
        rng,
        (
            "If {f} is above {n}, answer {h}; otherwise {l}.",
            "{h} for more than {n}, {l} for {n} or less.",
            "Answer {h} when {f} is larger than {n}, else {l}.",
            "Values over {n} are {h}. All others are {l}.",
            "Say {h} if {f} exceeds {n} and {l} if it does not.",
        ),
        split,
    )
    rows = []
    for _ in range(ROWS):
        value = rng.randint(0, 2 * limit)
        above = value > limit
        reason = f"{value} is {'more' if above else 'not more'} than {limit}, so {high if above else low}."
        rows.append({source: value, target: high if above else low, "reasoning": reason})
    instruction = wording.format(f=source, n=limit, h=high, l=low)
    return Task("number", instruction, {source: rng.choice((int, int, str))}, {target: str}, rows)


# -- one output from one text ----------------------------------------------------------------------------------------

_ASK = {
    "copy": ("Copy the {f}.", "Repeat the {f} exactly.", "Return the {f} unchanged.", "Echo the {f}.", "Give back the {f} as it is."),
    "first": ("Give the first word of the {f}.", "What is the first word?", "Return the word the {f} starts with.", "First word only.", "Name the word that opens the {f}."),
    "last": ("Give the last word of the {f}, without punctuation.", "What is the last word?", "Return the word the {f} ends with.", "Last word only.", "Name the word that closes the {f}."),
    "upper": ("Write the {f} in capital letters.", "Turn the {f} into upper case.", "Uppercase the {f}.", "Return the {f} in capitals.", "Put the {f} in all caps."),
    "name": ("Who is named in the {f}?", "Give the name of the person.", "Extract the person's name.", "Find the person mentioned.", "Which person does the {f} name?"),
    "city": ("Which city is mentioned?", "Give the city in the {f}.", "Extract the city.", "Find the place name.", "Name the city that the {f} mentions."),
    "quote": ("Extract the words in quotation marks.", "Return what is quoted.", "Give the quoted phrase.", "What stands between the quotes?", "Copy the quotation in the {f}."),
    "number": ("Which number does the {f} contain?", "Extract the number.", "Return the number in the {f}.", "Find the figure.", "Give the number that is mentioned."),
}  # fmt: skip


def extract_task(rng: Random, split: Split, texts: Texts) -> Task:
    """Copying, the first or last word, a name, a city, a quotation, a number."""
    [source], [target] = field_names(rng, split, 1, 1)
    what = rng.choice(list(_ASK))
    rows = []
    for _ in range(ROWS):
        text, answer = _extracted(rng, split, texts, what)
        rows.append({source: text, target: answer, "reasoning": f"The answer is {answer}."})
    kind = int if what == "number" and rng.random() < 0.6 else str
    if kind is int:
        rows = [row | {target: int(row[target])} for row in rows]
    return Task(what, pick(rng, _ASK[what], split).format(f=source), {source: str}, {target: kind}, rows)


def _extracted(rng: Random, split: Split, texts: Texts, what: str) -> tuple[str, str]:
    if what in ("copy", "upper"):
        text = (
            " ".join(distinct(rng, split, rng.randint(1, 6)))
            if rng.random() < 0.6
            else texts.sentence(rng, split)[:90].strip()
        )
        return text, text.upper() if what == "upper" else text
    if what in ("first", "last"):
        words = distinct(rng, split, rng.randint(2, 9))
        return " ".join(words), words[0 if what == "first" else -1]
    plain = " ".join(distinct(rng, split, rng.randint(4, 12)))
    if what == "quote":
        answer = " ".join(distinct(rng, split, rng.randint(1, 4)))
        return insert(rng, plain, f'"{answer}"'), answer
    if what == "number":
        answer = str(rng.randint(2, 9999))
        return insert(rng, plain, answer), answer
    first = rng.choice(names("first", split))
    if what == "name":
        answer = f"{first} {rng.choice(names('last', split))}" if rng.random() < 0.6 else first
        return insert(rng, plain, answer), answer
    answer = rng.choice(names("city", split))
    return insert(rng, plain, f"{rng.choice(('in', 'near', 'from', 'to'))} {answer}"), answer


def contains_task(rng: Random, split: Split, texts: Texts) -> Task:
    """Whether the text contains a word: a bool, or yes and no."""
    [source], [target] = field_names(rng, split, 1, 1)
    [keyword] = distinct(rng, split, 1)
    wording = pick(
        rng,
        (
            "Does the {f} mention {w}?",
            "True if {w} appears in the {f}.",
            "Check whether the {f} contains {w}.",
            "Is {w} in the {f}?",
            "Tell whether {w} is mentioned.",
        ),
        split,
    )
    as_bool = rng.random() < 0.7
    rows = []
    for _ in range(ROWS):
        there = rng.random() < 0.5
        text = _clean(rng, texts, split, [keyword])
        text = (
            insert(rng, text, keyword)
            if there
            else insert(rng, text, distinct(rng, split, 1)[0])
            if rng.random() < 0.3
            else text
        )
        there = keyword.lower() in text.lower()
        reason = f'"{keyword}" is in the {source}.' if there else f'"{keyword}" is not in the {source}.'
        rows.append({source: text, target: there if as_bool else ("yes" if there else "no"), "reasoning": reason})
    instruction = wording.format(f=source, w=keyword) + ("" if as_bool else " Answer yes or no.")
    return Task("contains", instruction, {source: str}, {target: bool if as_bool else str}, rows)


def list_task(rng: Random, split: Split, texts: Texts) -> Task:
    """All cities, names or colours of a text, as a list or as a count."""
    [source], [target] = field_names(rng, split, 1, 1)
    which, plural = rng.choice((("city", "cities"), ("first", "people"), ("color", "colours")))
    count = rng.random() < 0.35
    ask = (
        ("How many {p} are mentioned?", "Count the {p}.", "Give the number of {p}.", "Number of {p} in the {f}.", "Say how many {p} there are.")
        if count
        else ("List the {p}.", "Which {p} are mentioned?", "Extract all {p} in order.", "Return every one of the {p}.", "Give the {p} in the {f}.")
    )  # fmt: skip
    rows = []
    for _ in range(ROWS):
        pool = names(which, split)
        found = rng.sample(pool, rng.randint(0 if count else 1, min(4, len(pool))))
        parts = distinct(rng, split, rng.randint(3, 9))
        places = sorted(rng.sample(range(len(parts) + len(found)), len(found)))
        for place, item in zip(places, found, strict=True):
            parts.insert(place, item)
        reason = f"I find {', '.join(found)}." if found else "There are none."
        rows.append({source: " ".join(parts), target: len(found) if count else found, "reasoning": reason})
    kind = int if count else list[str]
    return Task(
        "count" if count else "list",
        pick(rng, ask, split).format(p=plural, f=source),
        {source: str},
        {target: kind},
        rows,
    )


# -- several inputs --------------------------------------------------------------------------------------------------


def lookup_task(rng: Random, split: Split, texts: Texts) -> Task:
    """The value of a key in a small table."""
    [table, key], [target] = field_names(rng, split, 2, 1)
    wording = pick(
        rng,
        (
            "Look up the {k} in the {t}.",
            "Give the value that belongs to {k}.",
            "Find the {k} in the {t} and return its value.",
            "Which value does {k} have?",
            "Return the entry of the {t} for {k}.",
        ),
        split,
    )
    rows = []
    for _ in range(ROWS):
        keys = distinct(rng, split, rng.randint(2, 7))
        values = [str(rng.randint(1, 999)) if rng.random() < 0.4 else word(rng, split) for _ in keys]
        wanted = rng.randrange(len(keys))
        join = rng.choice((", ", "; ", "\n"))
        shown = join.join(f"{k}: {v}" for k, v in zip(keys, values, strict=True))
        reason = f"{keys[wanted]} has {values[wanted]}."
        rows.append({table: shown, key: keys[wanted], target: values[wanted], "reasoning": reason})
    return Task("lookup", wording.format(k=key, t=table), {table: str, key: str}, {target: str}, rows)


def option_task(rng: Random, split: Split, texts: Texts) -> Task:
    """The option that fits: which contains a word, which fits a gap, which sentence comes next."""
    [source, options], [target] = field_names(rng, split, 2, 1)
    what = rng.choice(("mention", "gap", "gap", "next", "next") if texts.sentences else ("mention",))
    ask = {
        "mention": ("Which option mentions the {s}?", "Choose the option that contains the {s}.", "Pick the text with the {s} in it.", "Return the option that has the {s}.", "Find the option naming the {s}."),
        "gap": ("Which word fits the gap?", "Fill the blank with one of the options.", "Choose the missing word.", "Pick the word that belongs at ____.", "Complete the text with the right option."),
        "next": ("Which sentence comes next?", "Choose the sentence that follows.", "Pick the continuation.", "What follows the {s}?", "Select the option that continues the {s}."),
    }[what]  # fmt: skip
    letters = rng.random() < 0.4
    rows = [_choice(rng, split, texts, what, source, options, target, letters) for _ in range(ROWS)]
    instruction = pick(rng, ask, split).format(s=source) + (" Answer with the letter." if letters else "")
    return Task(what, instruction, {source: str, options: str if letters else list[str]}, {target: str}, rows)


def _choice(
    rng: Random, split: Split, texts: Texts, what: str, source: str, options: str, target: str, letters: bool
) -> dict[str, Any]:
    count = rng.randint(2, 4)
    if what == "mention":
        wanted, *others = distinct(rng, split, count)
        pool = [" ".join(rng.sample([w, *distinct(rng, split, 3)], 4)) for w in (wanted, *others)]
        text = wanted
    elif what == "gap":
        words: list[str] = []
        while len(words) < 6:
            text = texts.sentence(rng, split)
            words = [w for w in text.split(" ") if w.isalpha()]
        answer = rng.choice(words)
        others = [
            rng.choice([w for w in texts.sentence(rng, split).split(" ") if w.isalpha()] or ["so"])
            for _ in range(count - 1)
        ]
        pool, text = (
            [answer, *others],
            text.replace(f" {answer}", " ____", 1) if f" {answer}" in text else text.replace(answer, "____", 1),
        )
    else:
        text, following = texts.neighbours(rng, split, 2)
        pool = [following[:160], *(texts.sentence(rng, split)[:160] for _ in range(min(count, 3) - 1))]
    answer, order = pool[0], rng.sample(range(len(pool)), len(pool))
    shown = [pool[i] for i in order]
    if letters:
        letter = "ABCD"[order.index(0)]
        listing = "\n".join(f"{'ABCD'[n]}) {option}" for n, option in enumerate(shown))
        return {source: text, options: listing, target: letter, "reasoning": f"{letter} is right."}
    return {source: text, options: shown, target: answer, "reasoning": f"It is {answer}."}


def compare_task(rng: Random, split: Split, texts: Texts) -> Task:
    """The larger or smaller of two numbers."""
    [one, two], [target] = field_names(rng, split, 2, 1)
    larger = rng.random() < 0.5
    ask = (
        ("Give the larger of {a} and {b}.", "Which is greater?", "Return the bigger number.", "The maximum of both.", "Name the higher value.")
        if larger
        else ("Give the smaller of {a} and {b}.", "Which is less?", "Return the lesser number.", "The minimum of both.", "Name the lower value.")
    )  # fmt: skip
    rows = []
    for _ in range(ROWS):
        a, b = rng.sample(range(1, 10 ** rng.randint(1, 4)), 2)
        answer = max(a, b) if larger else min(a, b)
        rows.append({one: a, two: b, target: answer, "reasoning": f"{answer} is {'larger' if larger else 'smaller'}."})
    return Task("compare", pick(rng, ask, split).format(a=one, b=two), {one: int, two: int}, {target: int}, rows)


def topic_task(rng: Random, split: Split, texts: Texts) -> Task:
    """The subject of a textbook passage among given subjects."""
    if not texts.passages:
        return rules_task(rng, split, texts)
    [source], [target] = field_names(rng, split, 1, 1)
    chosen: dict[str, str] = {}
    while len(chosen) < ROWS:
        subject, passage = rng.choice(texts.passages)
        chosen.setdefault(subject, passage) if len(chosen) < ROWS else None
        if len({s for s, _ in texts.passages[:2000]}) < ROWS:
            break
    subjects = list(chosen)
    rng.shuffle(subjects)
    ask = ("Which subject is the {f} about?", "Name the field of study.", "Give the topic.", "Choose the subject of the {f}.", "What is the {f} taken from?")  # fmt: skip
    instruction = f"{pick(rng, ask, split).format(f=source)} One of: {', '.join(subjects)}."
    kind: Any = Literal[tuple(subjects)] if rng.random() < 0.5 else str  # type: ignore[misc]
    rows = [
        {source: passage, target: subject, "reasoning": f"This is about {subject}."}
        for subject, passage in chosen.items()
    ]
    return Task("topic", instruction, {source: str}, {target: kind}, rows)


def several_task(rng: Random, split: Split, texts: Texts) -> Task:
    """Two or three outputs: a label by rules, whether a word is there, and a number or a name."""
    outputs = rng.choice((2, 2, 3))
    [source], targets = field_names(rng, split, 1, outputs)
    rules = make_rules(rng, split, source, targets[0], most=4)
    lines = [f"For {targets[0]}: {rules.instruction}"]
    [flag] = distinct(rng, split, 1)
    lines.append(
        rng.choice(("{t} is true if {w} is mentioned.", "{t}: does it mention {w}?")).format(t=targets[1], w=flag)
    )
    if outputs == 3:
        lines.append(rng.choice(("{t} is the city named.", "{t}: the city in the text.")).format(t=targets[2]))
    rows = []
    for _ in range(ROWS):
        text, label, reason = apply_rules(rng, rules, texts, split, source, targets[0])
        city = rng.choice(names("city", split))
        if outputs == 3:
            text = f"{text} We are in {city}."
        if rng.random() < 0.5:
            text = insert(rng, text, flag)
        row = {source: text, targets[0]: label, targets[1]: flag.lower() in text.lower(), "reasoning": reason}
        rows.append(row | ({targets[2]: city} if outputs == 3 else {}))
    kinds: dict[str, Any] = dict(zip(targets, (str, bool, str), strict=False))
    return Task("several", "\n".join(lines), {source: str}, kinds, rows)


KINDS: tuple[tuple[Callable[[Random, Split, Texts], Task], float], ...] = (
    (rules_task, 0.38),
    (demos_task, 0.06),
    (number_task, 0.04),
    (extract_task, 0.12),
    (contains_task, 0.06),
    (list_task, 0.06),
    (lookup_task, 0.05),
    (option_task, 0.07),
    (compare_task, 0.02),
    (topic_task, 0.06),
    (several_task, 0.08),
)


def make_task(rng: Random, split: Split, texts: Texts, kind: str | None = None) -> Task:
    """A task of any kind, or of the kind whose function is ``<kind>_task``."""
    makers = [maker for maker, _ in KINDS]
    if kind is not None:
        maker = next(maker for maker in makers if maker.__name__ == f"{kind}_task")
    else:
        [maker] = rng.choices(makers, [share for _, share in KINDS])
    task = maker(rng, split, texts)
    if rng.random() < 0.25:
        described = rng.choice([*task.inputs, *task.outputs])
        task.descriptions[described] = pick(rng, _DESCRIPTIONS, split).format(f=described.replace("_", " "))
    return task


_DESCRIPTIONS = ("the {f}", "The {f} to look at.", "{f}", "what is given as {f}", "a {f}", "the {f} of this case")
