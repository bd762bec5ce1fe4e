"""ACE's Reflector and Curator, each as a language model's part and as one that only counts.

The Generator is the user's own program. A Reflector looks at what it did and says what to learn and which bullets
helped; a Curator turns that into operations on the playbook. The counting ones read recorded feedback alone, and their
bullets are label rules: ``If it mentions refund or invoice, answer billing.``
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import dspy
import pydantic
from dspy_lora.optimizers import proposers
from dspy_lora.optimizers.proposers import RIGHT_ANSWER, Row, RuleProposer, telling_words

from dspy_lora.context.bullets import Bullet
from dspy_lora.context.deltas import Add, Delta, Merge, Remove, Update
from dspy_lora.context.playbook import Playbook

Record = Mapping[str, Any]  # "Inputs", "Generated Outputs", "Feedback", "Score", and RIGHT_ANSWER where it is known

RULES = "Use these rules"  # the counting curator's section, headed as the seedling knows it
_RULE = re.compile(r"If it mentions (?P<words>.+), answer (?P<label>.+)\.|Otherwise answer (?P<default>.+)\.")
_JOINTS = re.compile(r", | or ")
_WORDS = 4  # in a rule
_FEW = 2  # rows that a word, or an "Otherwise", must at least have for it
_SHARE = 0.1  # of a label's rows that a word must add to those its rule covers
_Z = 1.96  # least z-score of a word's log-odds ratio: 5 %, two-sided
_HARM = 3  # times that a rule must have misled before it can go
_MEMORY = 1_000  # rows of a predictor that are remembered


class Tag(pydantic.BaseModel):
    """What a bullet did in the attempts."""

    id: str = pydantic.Field(min_length=1)
    verdict: Literal["helpful", "harmful", "neutral"]


class Reflect(dspy.Signature):
    """Find out why a program's attempts went right or wrong, and what it should be told to do better.

    Insights are short, general and self-contained: rules, facts and strategies that hold for new inputs too. Do not
    repeat the playbook. Improve on the earlier insights where there are some: correct them, sharpen them, drop what the
    attempts do not support.
    """

    task: str = dspy.InputField(desc="the instruction that the program followed")
    playbook: str = dspy.InputField(desc="bullets that it was told, each with its id")
    attempts: list[dict[str, Any]] = dspy.InputField(desc="inputs, outputs, score and feedback")
    earlier: list[str] = dspy.InputField(desc="insights of the round before; empty in the first one")
    insights: list[str] = dspy.OutputField(desc="what to learn; empty where there is nothing new")
    tags: list[Tag] = dspy.OutputField(desc="for bullets that mattered: did they help or mislead?")


class Curate(dspy.Signature):
    """Bring insights into a playbook by few small operations; never rewrite it.

    ADD what is new, one idea a bullet. UPDATE a bullet that must say it more exactly, MERGE bullets that say the same,
    REMOVE what is wrong. No operation where the playbook already says it. Ids are those of the playbook.
    """

    playbook: str = dspy.InputField(desc="sections of bullets with id and counters")
    insights: list[str] = dspy.InputField()
    sections: list[str] = dspy.InputField(desc="sections that new bullets may go to")
    tokens_left: int = dspy.InputField(desc="room in the playbook; below zero the least useful bullets will go")
    operations: list[Delta] = dspy.OutputField()


class Reflector(dspy.Module):
    """Reflects with an LM, in several rounds that each improve on the one before.

    Args:
        rounds: The most rounds; it ends early where a round changes no insight.
    """

    def __init__(self, rounds: int = 3) -> None:
        super().__init__()
        self.rounds = rounds
        self.reflect = dspy.ChainOfThought(Reflect)

    def forward(self, task: str, playbook: Playbook, section: str, records: Sequence[Record]) -> dspy.Prediction:
        """What to learn from some attempts.

        Args:
            task: The instruction that was followed.
            playbook: The bullets that it was told.
            section: Begins the names of the sections of this predictor alone; empty for a program's only one.
            records: The attempts.

        Returns:
            ``insights``, and ``counts`` for bullets that helped or misled.
        """
        told, insights, tags = playbook.listing(), list[str](), list[Tag]()
        attempts = [{key: each[key] for key in each if key != RIGHT_ANSWER} for each in records]  # Feedback says it
        for _ in range(self.rounds):
            earlier = insights
            found = self.reflect(task=task, playbook=told, attempts=attempts, earlier=earlier)
            insights, tags = found.insights, found.tags
            if insights == earlier:
                break
        counts = [
            Update(id=tag.id, helpful=int(tag.verdict == "helpful"), harmful=int(tag.verdict == "harmful"))
            for tag in tags
            if tag.verdict != "neutral"
        ]
        return dspy.Prediction(insights=insights, counts=counts)


class Curator(dspy.Module):
    """Curates with an LM.

    Args:
        sections: Where bullets may go.
    """

    def __init__(self, sections: Sequence[str] = ("Strategies", "Rules", "Mistakes to avoid")) -> None:
        super().__init__()
        self.sections = list(sections)
        self.curate = dspy.Predict(Curate)

    def forward(self, playbook: Playbook, section: str, insights: list[str], tokens_left: int) -> dspy.Prediction:
        """``operations`` that bring insights into a playbook.

        Args:
            playbook: As it is.
            section: Put in front of the sections of new bullets.
            insights: What the Reflector found.
            tokens_left: Of the budget.
        """
        if not insights:
            return dspy.Prediction(operations=[])
        found = self.curate(
            playbook=playbook.listing(), insights=insights, sections=self.sections, tokens_left=tokens_left
        )
        placed = [
            delta.model_copy(update={"section": section + delta.section}) if isinstance(delta, Add) else delta
            for delta in found.operations
        ]
        return dspy.Prediction(operations=placed)


class RuleReflector(dspy.Module):
    """Reflects by counting, on every row that it has seen: which words tell the labels apart.

    Words come from ``telling_words`` (z-scores of log-odds ratios). A label's rule takes them from the most telling on,
    as long as each adds a tenth of the label's rows, two at least, and mostly means that label; a word that the
    playbook's rule has stays until two rows have held it. What is left over decides whether there is an "Otherwise".
    Where answers are no labels, the insights say how answers are written.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[str, dict[str, Row]] = defaultdict(dict)

    def forward(self, task: str, playbook: Playbook, section: str, records: Sequence[Record]) -> dspy.Prediction:
        """As ``Reflector.forward``; a bullet that is no label rule is not judged."""
        new = [row for row in map(RuleProposer().row_of, records) if row]
        seen = self._rows[section]
        for row in new:
            seen.pop(row.text, None)
            seen[row.text] = row
        for text in list(seen)[: len(seen) - _MEMORY]:
            del seen[text]
        bullets = [bullet for bullet in playbook.bullets if bullet.section == section + RULES]
        return dspy.Prediction(insights=_insights(list(seen.values()), bullets), counts=_counts(bullets, new))


class RuleCurator(dspy.Module):
    """Curates label rules: one bullet a label, updated where its words change, merged where there are several.

    A rule that misled more often than it helped, three times at least, and is no insight any more is removed.
    """

    def forward(self, playbook: Playbook, section: str, insights: list[str], tokens_left: int) -> dspy.Prediction:
        """As ``Curator.forward``."""
        there: dict[str, list[Bullet]] = defaultdict(list)
        for bullet in playbook.bullets:
            if bullet.section == section + RULES:
                there[_subject(bullet.text)].append(bullet)
        operations: list[Delta] = []
        for text in insights:
            old = there.pop(_subject(text), [])
            if not old:
                operations.append(Add(section=section + RULES, text=text))
            elif len(old) > 1:
                operations.append(Merge(ids=tuple(bullet.id for bullet in old), text=text))
            elif old[0].text != text:
                operations.append(Update(id=old[0].id, text=text))
        stale = [bullet for old in there.values() for bullet in old]
        operations += [Remove(id=bullet.id) for bullet in stale if bullet.harmful >= _HARM and bullet.worth < 0]
        return dspy.Prediction(operations=operations)


def _insights(rows: Sequence[Row], bullets: Sequence[Bullet]) -> list[str]:
    labels = Counter(row.gold for row in rows)
    if len(labels) > len(rows) / 2:
        return proposers.form_rules(rows) if len(rows) > 1 else []
    telling, told, rules, left = telling_words(rows, _Z), _told(bullets), list[str](), Counter[str]()
    for label in sorted(labels):
        words, uncovered = _cover(label, telling.get(label, []), told[label], rows)
        if words:
            rules.append(f"If it mentions {proposers.either(words)}, answer {label}.")
        if uncovered > max(_FEW, labels[label] / 2):
            left[label] = uncovered
    if rules and left:
        rules.append(f"Otherwise answer {max(sorted(left), key=lambda label: left[label])}.")
    return rules


def _told(bullets: Sequence[Bullet]) -> dict[str, list[str]]:
    """The words of each label's rules."""
    told: dict[str, list[str]] = defaultdict(list)
    for bullet in bullets:
        if (match := _RULE.fullmatch(bullet.text)) and match["words"]:
            told[match["label"]] += _JOINTS.split(match["words"])
    return told


def _cover(label: str, words: Sequence[str], told: Sequence[str], rows: Sequence[Row]) -> tuple[list[str], int]:
    """Words that together stand for a label, and how many of its rows hold none of them."""
    own = {row.text for row in rows if row.gold == label}
    least, chosen = max(_FEW, _SHARE * len(own)), list[str]()
    for word in words:
        holding = [row for row in rows if _mentions(row.text, word)]
        new = {row.text for row in holding if row.gold == label} & own
        if len(new) >= least and sum(row.gold == label for row in holding) > len(holding) / 2:
            chosen.append(word)
            own -= new
        if len(chosen) == _WORDS:
            break
    chosen += [word for word in told if word not in chosen and sum(_mentions(r.text, word) for r in rows) < _FEW]
    return chosen[:_WORDS], len(own)


def _counts(bullets: Sequence[Bullet], rows: Sequence[Row]) -> list[Update]:
    """How often each rule spoke, rightly and wrongly; "Otherwise" speaks where no other rule does."""
    helpful, harmful = Counter[str](), Counter[str]()
    rules = [(bullet.id, match) for bullet in bullets if (match := _RULE.fullmatch(bullet.text))]
    for row in rows:
        named = [(id, match) for id, match in rules if match["words"] and _speaks(match["words"], row.text)]
        for id, match in named or [(id, match) for id, match in rules if match["default"]]:
            (helpful if row.gold in (match["label"], match["default"]) else harmful)[id] += 1
    ids = sorted({*helpful, *harmful})
    return [Update(id=id, helpful=helpful[id], harmful=harmful[id]) for id in ids]


def _subject(text: str) -> str:
    """What a bullet is about: a label, the "Otherwise", else its own text."""
    match = _RULE.fullmatch(text)
    if match is None:
        return text
    return f"answer {match['label']}" if match["label"] else "otherwise"


def _speaks(words: str, text: str) -> bool:
    return any(_mentions(text, word) for word in _JOINTS.split(words))


def _mentions(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word.lower())}(?!\w)", text.lower()) is not None
