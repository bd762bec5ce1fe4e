"""Tasks other than rules: copying, finding, listing, counting, looking up, choosing, comparing, several outputs."""

from random import Random
from typing import Any, Literal

from dspy_lora.seedling.rules import apply_rules, clean, insert, instruction, make_rules, rules_task, text_with
from dspy_lora.seedling.sentences import Texts
from dspy_lora.seedling.task import ROWS, Task, pick
from dspy_lora.seedling.words import Split, distinct, field_names, names, word

# -- one output from one text ----------------------------------------------------------------------------------------

_ASK = {
    "copy": (
        "Copy the {f}.",
        "Repeat the {f} exactly.",
        "Return the {f} unchanged.",
        "Echo the {f}.",
        "Give back the {f} as it is.",
    ),
    "first": (
        "Give the first word of the {f}.",
        "What is the first word?",
        "Return the word the {f} starts with.",
        "First word only.",
        "Name the word that opens the {f}.",
    ),
    "last": (
        "Give the last word of the {f}, without punctuation.",
        "What is the last word?",
        "Return the word the {f} ends with.",
        "Last word only.",
        "Name the word that closes the {f}.",
    ),
    "upper": (
        "Write the {f} in capital letters.",
        "Turn the {f} into upper case.",
        "Uppercase the {f}.",
        "Return the {f} in capitals.",
        "Put the {f} in all caps.",
    ),
    "name": (
        "Who is named in the {f}?",
        "Give the name of the person.",
        "Extract the person's name.",
        "Find the person mentioned.",
        "Which person does the {f} name?",
    ),
    "city": (
        "Which city is mentioned?",
        "Give the city in the {f}.",
        "Extract the city.",
        "Find the place name.",
        "Name the city that the {f} mentions.",
    ),
    "quote": (
        "Extract the words in quotation marks.",
        "Return what is quoted.",
        "Give the quoted phrase.",
        "What stands between the quotes?",
        "Copy the quotation in the {f}.",
    ),
    "number": (
        "Which number does the {f} contain?",
        "Extract the number.",
        "Return the number in the {f}.",
        "Find the figure.",
        "Give the number that is mentioned.",
    ),
}


def extract_task(rng: Random, split: Split, texts: Texts) -> Task:
    """Copying, the first or last word, a name, a city, a quotation, a number."""
    [source], [target] = field_names(rng, split, 1, 1)
    what = rng.choice(list(_ASK))
    rows = []
    for _ in range(ROWS):
        text, answer = _extracted(rng, split, texts, what)
        rows.append({source: text, target: answer, "reasoning": f"The answer is {answer}."})
    kind = int if what == "number" and rng.random() < 0.6 else str
    typed: list[dict[str, Any]] = [{**row, target: kind(row[target])} for row in rows]
    return Task(what, pick(rng, _ASK[what], split).format(f=source), {source: str}, {target: kind}, typed)


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
    if what in ("quote", "number") and rng.random() < 0.5:
        plain = clean(rng, split, texts, [*"0123456789", '"', "\u201c"])
    else:
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


_CONTAINS = (
    "Does the {f} mention {w}?",
    "True if {w} appears in the {f}.",
    "Check whether the {f} contains {w}.",
    'Is "{w}" in the {f}?',
    "Tell whether {w} is mentioned.",
    'Say whether the {f} mentions "{w}".',
    "Look for {w} in the {f}.",
    "Is {w} named in the {f}?",
    'Does "{w}" occur?',
    "Find out if the {f} speaks of {w}.",
)


def contains_task(rng: Random, split: Split, texts: Texts) -> Task:
    """Whether the text contains a word: a bool, or yes and no."""
    [source], [target] = field_names(rng, split, 1, 1)
    [keyword] = distinct(rng, split, 1)
    wording = pick(rng, _CONTAINS, split)
    as_bool = rng.random() < 0.7
    rows = []
    for _ in range(ROWS):
        there = rng.random() < 0.5
        text = text_with(rng, split, texts, keyword, [keyword]) if there else clean(rng, split, texts, [keyword])
        reason = f'"{keyword}" is in the {source}.' if there else f'"{keyword}" is not in the {source}.'
        rows.append({source: text, target: there if as_bool else ("yes" if there else "no"), "reasoning": reason})
    told = wording.format(f=source, w=keyword) + ("" if as_bool else " Answer yes or no.")
    return Task("contains", told, {source: str}, {target: bool if as_bool else str}, rows)


_LIST = (
    "List the {p}.",
    "Which {p} are mentioned?",
    "Extract all {p} in order.",
    "Return every one of the {p}.",
    "Give the {p} in the {f}.",
)
_COUNT = (
    "How many {p} are mentioned?",
    "Count the {p}.",
    "Give the number of {p}.",
    "Number of {p} in the {f}.",
    "Say how many {p} there are.",
)


def list_task(rng: Random, split: Split, texts: Texts) -> Task:
    """All cities, names or colours of a text, as a list or as a count."""
    [source], [target] = field_names(rng, split, 1, 1)
    which, plural = rng.choice((("city", "cities"), ("first", "people"), ("color", "colours")))
    count = rng.random() < 0.35
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
        pick(rng, _COUNT if count else _LIST, split).format(p=plural, f=source),
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


_CHOOSE = {
    "mention": (
        "Which option mentions the {s}?",
        "Choose the option that contains the {s}.",
        "Pick the text with the {s} in it.",
        "Return the option that has the {s}.",
        "Find the option naming the {s}.",
    ),
    "gap": (
        "Which word fits the gap?",
        "Fill the blank with one of the options.",
        "Choose the missing word.",
        "Pick the word that belongs at ____.",
        "Complete the text with the right option.",
    ),
    "next": (
        "Which sentence comes next?",
        "Choose the sentence that follows.",
        "Pick the continuation.",
        "What follows the {s}?",
        "Select the option that continues the {s}.",
    ),
}


def option_task(rng: Random, split: Split, texts: Texts) -> Task:
    """The option that fits: which contains a word, which fits a gap, which sentence comes next."""
    [source, options], [target] = field_names(rng, split, 2, 1)
    what = rng.choice(("mention", "mention", "mention", "gap", "next") if texts.sentences else ("mention",))
    letters = rng.random() < 0.4
    rows = [_choice(rng, split, texts, what, source, options, target, letters) for _ in range(ROWS)]
    instruction = pick(rng, _CHOOSE[what], split).format(s=source) + (" Answer with the letter." if letters else "")
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


_LARGER = (
    "Give the larger of {a} and {b}.",
    "Which is greater?",
    "Return the bigger number.",
    "The maximum of both.",
    "Name the higher value.",
)
_SMALLER = (
    "Give the smaller of {a} and {b}.",
    "Which is less?",
    "Return the lesser number.",
    "The minimum of both.",
    "Name the lower value.",
)


def compare_task(rng: Random, split: Split, texts: Texts) -> Task:
    """The larger or smaller of two numbers."""
    [one, two], [target] = field_names(rng, split, 2, 1)
    larger = rng.random() < 0.5
    rows = []
    for _ in range(ROWS):
        a, b = rng.sample(range(1, 10 ** rng.randint(1, 4)), 2)
        answer = max(a, b) if larger else min(a, b)
        rows.append({one: a, two: b, target: answer, "reasoning": f"{answer} is {'larger' if larger else 'smaller'}."})
    return Task(
        "compare",
        pick(rng, _LARGER if larger else _SMALLER, split).format(a=one, b=two),
        {one: int, two: int},
        {target: int},
        rows,
    )


_TOPIC = (
    "Which subject is the {f} about?",
    "Name the field of study.",
    "Give the topic.",
    "Choose the subject of the {f}.",
    "What is the {f} taken from?",
)


def topic_task(rng: Random, split: Split, texts: Texts) -> Task:
    """The subject of a textbook passage among given subjects, which are labels even where they hold held-out words."""
    if not texts.passages:
        return rules_task(rng, split, texts)
    [source], [target] = field_names(rng, split, 1, 1)
    chosen: dict[str, str] = {}
    for _ in range(5 * ROWS):
        subject, passage = rng.choice(texts.passages)
        if len(chosen) < ROWS:
            chosen.setdefault(subject, passage)
    subjects = list(chosen)
    rng.shuffle(subjects)
    instruction = f"{pick(rng, _TOPIC, split).format(f=source)} One of: {', '.join(subjects)}."
    kind: Any = Literal[tuple(subjects)] if rng.random() < 0.5 else str
    rows = [
        {source: passage, target: subject, "reasoning": f"This is about {subject}."}
        for subject, passage in chosen.items()
    ]
    return Task("topic", instruction, {source: str}, {target: kind}, rows)


_FLAG = (
    "{t} is true if {w} is mentioned.",
    "{t}: does it mention {w}?",
    "Set {t} to True when {w} occurs.",
    'For {t}, say whether "{w}" is there.',
    "{t} tells whether {w} appears.",
)
_CITY = (
    "{t} is the city named.",
    "{t}: the city in the text.",
    "Put the city into {t}.",
    "For {t}, give the city.",
    "{t} holds the city that is mentioned.",
)


def several_task(rng: Random, split: Split, texts: Texts) -> Task:
    """Two or three outputs: a label by rules, whether a word is there, and a number or a name."""
    outputs = rng.choice((2, 2, 3))
    [source], targets = field_names(rng, split, 1, outputs)
    rules = make_rules(rng, split, texts, source, targets[0], most=4)
    lines = [f"For {targets[0]}: {instruction(rng, split, rules, source, targets[0])}"]
    [flag] = distinct(rng, split, 1)
    lines.append(pick(rng, _FLAG, split).format(t=targets[1], w=flag))
    if outputs == 3:
        lines.append(pick(rng, _CITY, split).format(t=targets[2]))
    rows = []
    for _ in range(ROWS):
        text, label, reason = apply_rules(rng, split, texts, rules, source, targets[0])
        city = rng.choice(names("city", split))
        if outputs == 3:
            text = f"{text} We are in {city}."
        if rng.random() < 0.5:
            text = insert(rng, text, flag)
        row = {source: text, targets[0]: label, targets[1]: flag.lower() in text.lower(), "reasoning": reason}
        rows.append(row | ({targets[2]: city} if outputs == 3 else {}))
    kinds: dict[str, Any] = dict(zip(targets, (str, bool, str), strict=False))
    return Task("several", "\n".join(lines), {source: str}, kinds, rows)
