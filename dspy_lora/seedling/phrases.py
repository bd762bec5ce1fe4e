"""Wordings made of parts, for training only: a reader of rules should go by their structure, not by known sentences.

Each function gives one wording with the places of ``wordings.py``: a held-out one of its list for the ``heldout``
split, for ``train`` one of the others or one that is composed here. No composed wording is a held-out one to the
letter, but it may differ from one by no more than a comma or a full stop.
"""

from collections.abc import Callable, Sequence
from random import Random

from dspy_lora.seedling import wordings
from dspy_lora.seedling.task import pick
from dspy_lora.seedling.words import Split, word

_COMPOSED = 0.7  # share of composed wordings in training

_OPENERS = (
    "if|when|whenever|in case|where|as soon as|once|provided|given that|only when|every time|so long "
    "as|assuming|in the event that|if ever|any time"
).split("|")
_SUBJECTS = (
    "it|the {f}|this {f}|the text|the writer|someone|the {f} text|what is written|the input|the author|a "
    "{f}|anyone|the wording|that {f}|the given {f}|any part"
).split("|")
_VERBS = (
    "mentions|contains|has|talks about|includes|names|refers to|is about|says|shows|uses|brings up|touches "
    "on|lists|holds|deals with|points to|asks about|carries|tells of|is on|features|comes with|goes "
    "into|cites|gives"
).split("|")
_PASSIVES = (
    "appears|is there|shows up|comes up|is found|is present|is used|is named|turns up|is read|stands "
    "there|is given|is seen|is part of it|occurs in it|can be found in the {f}|appears in the {f}|is "
    "listed|is brought up"
).split("|")
_TOPICS = (
    "for {w}|with {w}|about {w}|any mention of {w}|{w}|the words {w}|on {w}|a {f} about {w}|everything on "
    "{w}|on seeing {w}|all that has {w}|texts with {w}|concerning {w}|a hint of {w}|things like {w}|where we "
    "read {w}|a {f} on {w}|those about {w}|containing {w}|regarding {w}|the presence of {w}|found: "
    "{w}|matches {w}|words such as {w}"
).split("|")
_VERBS_OF_ANSWERS = (
    "answer|say|return|choose|pick|use|write|output|give|go with|take|put|tag it|label it|call "
    "it|assign|mark it as|respond with|reply|select|set|print|note|file it under|treat it as|send it "
    "to|classify it as|name it|decide on|the answer is|it is|this is|we want|the {o} is|the {o} should "
    "be|the {o} must be|{o} is|set {o} to|set the {o} to|the result is|it becomes|it counts as|it belongs "
    "to|it goes to|you get|then|that means|it has to be|{o}:|{o} ="
).split("|")
_SIGNS = (": |:| - | = | -> | <- | | | => | / | ~ |; | :: | >> | -- |, | == |: \u2192 | \u2190 | . ").split("|")
_PAIRS = (
    "connect {w} to|link {w} to|match {w} with|tie {w} to|turn {w} into|send {w} to|file {w} under|read {w} "
    "as|take {w} for|put {w} into|{w} goes to|{w} belongs to|{w} leads to|{w} stands for|{w} falls under|{w} "
    "points to|{w} gives|{w} makes|{w} calls for|{w} is a sign of|{w} counts as|translate {w} to|assign {w} "
    "to|route {w} to|sort {w} into"
).split("|")
_OTHERWISE = (
    "otherwise|else|in all other cases|if nothing fits|if none of these apply|when no rule applies|for "
    "anything else|by default|if no word matches|in any other case|if there is no match|when none of them "
    "appear|for all others|for the others|without a match|if you see none of these|in every other case|if "
    "the {f} has none of these|in the end|when in doubt|if no rule fits|elsewhere|if it is something "
    "else|for what is left|when nothing matches|lastly|if all fail"
).split("|")
_LEFT_OVER = (
    "the others|anything else|other texts|what is left|all others|no match|any other text|nothing of "
    "this|none|default|everything not named|other|no rule|all else|rest|remaining texts|every other "
    "{f}|unmatched|none of the above"
).split("|")
_LABELS = "labels|values|classes|choices|categories|answers|groups|outputs|names|results|kinds|{o}s".split("|")
_LISTED = (
    "The {x} are {{}}.|{x}: {{}}|Only these {x}: {{}}.|Known {x}: {{}}.|Use one of these {x}: {{}}.|We have "
    "the {x} {{}}.|Its {x} can be {{}}.|Take one from the {x} {{}}.|{{}} are the {x}.|Valid {x}: {{}}.|{x} = "
    "{{}}|({x}: {{}})"
).split("|")

Maker = Callable[[Random], str]


def rule(rng: Random, split: Split) -> str:
    """A rule: ``{w}`` leads to ``{l}``."""
    return _wording(rng, split, wordings.RULE, _rule)


def default(rng: Random, split: Split) -> str:
    """The label where no rule applies."""
    return _wording(rng, split, wordings.DEFAULT, _default)


def labels(rng: Random, split: Split) -> str:
    """The list of labels, ``{}``."""
    return _wording(rng, split, wordings.LABELS, lambda rng: rng.choice(_LISTED).format(x=rng.choice(_LABELS)))


def intro(rng: Random, split: Split) -> str:
    """What is wanted, or now and then words that say nothing."""
    if split == "train" and rng.random() < 0.25:
        return _sentence(rng, " ".join(word(rng, split) for _ in range(rng.randint(1, 8))))
    return pick(rng, wordings.INTRO, split)


def _wording(rng: Random, split: Split, written: Sequence[str], make: Maker) -> str:
    """One of the list, or a composed one that is not on it to the letter; near ones pass."""
    if split == "heldout" or rng.random() > _COMPOSED:
        return pick(rng, written, split)
    while (made := make(rng)) in written:
        pass
    return made


def _rule(rng: Random) -> str:
    way = rng.random()
    if way < 0.45:
        return _sentence(rng, _joined(rng, _condition(rng), f"{rng.choice(_VERBS_OF_ANSWERS)} {{l}}"))
    if way < 0.65:
        return _sentence(rng, _joined(rng, rng.choice(_TOPICS), f"{rng.choice(_VERBS_OF_ANSWERS)} {{l}}"))
    if way < 0.8:
        return _turned(rng, rng.choice(_SIGNS), rng.choice(("{w}", rng.choice(_TOPICS), _condition(rng))))
    if way < 0.9:
        return _sentence(rng, f"{rng.choice(_PAIRS)} {{l}}")
    return f"{_noise(rng, 0, 1)}{_turned(rng, f' {_noise(rng, 1, 2)}', '{w}')}"


def _default(rng: Random) -> str:
    way = rng.random()
    if way < 0.5:
        return _sentence(rng, _joined(rng, rng.choice(_OTHERWISE), f"{rng.choice(_VERBS_OF_ANSWERS)} {{l}}"))
    if way < 0.7:
        sign = rng.choice((", ", ": ", " "))
        return _sentence(rng, _turned(rng, sign, _noise(rng, 1, 3).strip()))
    connector = rng.choice((*_SIGNS, " is ", " get ", " means ", " for "))
    return _sentence(rng, _turned(rng, connector, rng.choice((*_LEFT_OVER, *_OTHERWISE))))


def _noise(rng: Random, fewest: int, most: int) -> str:
    """Words that mean nothing, each with a space after it."""
    return "".join(f"{word(rng, 'train')} " for _ in range(rng.randint(fewest, most)))


def _condition(rng: Random) -> str:
    if rng.random() < 0.3:
        return f"{rng.choice(_OPENERS)} {{w}} {rng.choice(_PASSIVES)}"
    return f"{rng.choice(_OPENERS)} {rng.choice(_SUBJECTS)} {rng.choice(_VERBS)} {{w}}"


def _joined(rng: Random, condition: str, action: str) -> str:
    if rng.random() < 0.45:
        return f"{action}{rng.choice((' ', ' ', ' ', ', ', ' - ', ': '))}{condition}"
    return f"{condition}{rng.choice((', ', ', ', ', ', ' ', ': ', ', then ', ' - ', '; ', ' -> '))}{action}"


def _turned(rng: Random, connector: str, condition: str) -> str:
    parts = (condition, "{l}") if rng.random() < 0.5 else ("{l}", condition)
    return connector.join(parts) + rng.choice(("", "", "."))


def _sentence(rng: Random, text: str) -> str:
    """With a capital and a full stop, mostly; now and then with a word in front."""
    if rng.random() < 0.08:
        text = f"{rng.choice(('please', 'note:', 'also,', 'rule:', 'and', word(rng, 'train')))} {text}"
    if rng.random() < 0.8 and not text.startswith("{"):
        text = text[:1].upper() + text[1:]
    return text + rng.choice((".", ".", ".", "", "!", ";"))
