"""The words that generated tasks are made of, and which of them are held out from training.

A word is held out by the CRC-32 of its lower-case form, so the split needs no list and is the same everywhere.
Held out means: never a keyword or an invented field name in training. Texts hold such words, and so do answers copied
from texts; the subjects of textbooks are labels whatever they are.

``words.txt`` holds about 6,000 common English words, most frequent first, counted in the pretraining text.
"""

import zlib
from functools import cache
from pathlib import Path
from random import Random
from typing import Literal

Split = Literal["train", "heldout"]

#: One word in ten is held out.
HELD_OUT_ONE_IN = 10

FIRST_NAMES = (
    "Ada Ben Cara Dan Elena Felix Grace Hugo Iris Jack Karen Leo Maria Nina Oscar Paula Quentin Rosa Sam Tara Umar "
    "Vera Walter Xenia Yusuf Zoe Aisha Boris Chloe Diego Emma Farid Gita Hans Ines Jonas Kofi Lena Marco Noor Olga "
    "Pedro Ravi Sofia Tomas Ursula Victor Wanda Yara Zack Alice Bruno Clara David Ethan Fiona George Hannah Ivan Julia"
).split()
LAST_NAMES = (
    "Adams Baker Clark Davis Evans Foster Garcia Hughes Ibrahim Jensen Khan Lopez Meyer Novak Okafor Patel Quinn Rossi "
    "Smith Tanaka Urban Vargas Walker Xu Young Zhang Becker Cohen Dubois Eriksen Fischer Grant Haddad Ito Jones Kim "
    "Larsen Moreno Nguyen Olsen Peters Reyes Silva Turner Ueda Vogel Wright Yilmaz Ziegler Brown Carter Diaz Ellis"
).split()
CITIES = (
    "London Paris Oslo Madrid Rome Berlin Vienna Dublin Lisbon Prague Athens Cairo Lagos Nairobi Tokyo Osaka "
    "Seoul Delhi Mumbai Sydney Perth Toronto Boston Chicago Denver Dallas Lima Bogota Quito Havana Warsaw "
    "Helsinki Zurich Milan Geneva Munich Hamburg Porto Seville Kyoto Hanoi Manila Jakarta Accra Tunis Doha "
    "Dubai Riga Tallinn Vilnius"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
COLORS = "red blue green yellow black white brown grey orange purple pink silver golden violet amber".split()

#: Field names that real programs use; training sees all of them.
COMMON_INPUTS = (
    "text question passage document email review message query context ticket sentence article comment request note "
    "report description input content paragraph title body subject transcript post clause record entry statement"
).split()
COMMON_OUTPUTS = (
    "label answer category topic intent result output sentiment class decision summary response tag priority status "
    "type department team value name verdict choice code score kind group severity language route"
).split()

_ONSETS = "b c d f g h j k l m n p r s t v w z bl br cl cr dr fl gr kl pl pr sk sl sn sp st tr th sh".split()
_VOWELS = "a e i o u a e i o u ai ea oo ou".split()
_CODAS = ["", "", "", "n", "r", "l", "m", "s", "t", "k", "x", "nd", "rt", "sk"]


def is_held_out(word: str) -> bool:
    """Whether training never uses this word as a keyword, in a made label or as an invented field name."""
    return zlib.crc32(word.lower().encode()) % HELD_OUT_ONE_IN == 0


def keep(words: list[str], split: Split) -> list[str]:
    """The words of one side of the split."""
    return [word for word in words if is_held_out(word) == (split == "heldout")]


@cache
def common_words(split: Split) -> tuple[str, ...]:
    """The common English words of one side of the split, most frequent first."""
    lines = (Path(__file__).parent / "words.txt").read_text(encoding="utf-8").split()
    return tuple(keep(lines, split))


@cache
def names(which: str, split: Split) -> tuple[str, ...]:
    """First names, last names, cities or colours of one side of the split."""
    table = {"first": FIRST_NAMES, "last": LAST_NAMES, "city": CITIES, "color": COLORS}
    return tuple(keep(table[which], split))


def invented(rng: Random, split: Split) -> str:
    """A made-up word of two or three syllables, such as "brunoska"."""
    while True:
        word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.choice((1, 2, 2, 3))))
        word += rng.choice(_CODAS)
        if 4 <= len(word) <= 11 and is_held_out(word) == (split == "heldout"):
            return word


def spliced(rng: Random, split: Split) -> str:
    """The beginning of one common word with the end of another, such as "wintory"."""
    while True:
        first, second = rng.sample(common_words("train"), 2)
        made = first[: rng.randint(2, 5)] + second[-rng.randint(2, 5) :]
        if len(made) >= 4 and is_held_out(made) == (split == "heldout"):
            return made


def word(rng: Random, split: Split, made_up: float = 0.25) -> str:
    """A common word, or with probability ``made_up`` an invented one; in training now and then a spliced one."""
    if split == "train" and rng.random() < 0.25:
        return spliced(rng, split)
    return invented(rng, split) if rng.random() < made_up else rng.choice(common_words(split))


def distinct(rng: Random, split: Split, count: int, made_up: float = 0.25) -> list[str]:
    """``count`` different words, none a part of another (so "contains" has one reading)."""
    found: list[str] = []
    while len(found) < count:
        new = word(rng, split, made_up)
        if not any(new in old or old in new for old in found):
            found.append(new)
    return found


def field_name(rng: Random, split: Split, role: Literal["input", "output"]) -> str:
    """A field name: a usual one, or one invented from one or two words."""
    if rng.random() < 0.5:
        return rng.choice(COMMON_INPUTS if role == "input" else COMMON_OUTPUTS)
    first = word(rng, split, made_up=0.1)
    return first if rng.random() < 0.45 else f"{first}_{word(rng, split, made_up=0.05)}"


def field_names(rng: Random, split: Split, inputs: int, outputs: int) -> tuple[list[str], list[str]]:
    """Different names for a signature's fields, none of them one that DSPy or pydantic reserves."""
    found: list[str] = []
    while len(found) < inputs + outputs:
        new = field_name(rng, split, "input" if len(found) < inputs else "output")
        if new not in found and new not in _RESERVED:
            found.append(new)
    return found[:inputs], found[inputs:]


# Names that Python, pydantic's BaseModel or dspy's Signature already use.
_RESERVED = frozenset(
    "reasoning copy json dict schema fields instructions signature construct validate class with_instructions "
    "append prepend insert delete from import while with for and not pass break return yield global lambda is in if "
    "else try except raise del assert async await continue def elif finally nonlocal or as None True False "
    "equals load dump input_fields output_fields completed register parse_obj parse_raw".split()
)
