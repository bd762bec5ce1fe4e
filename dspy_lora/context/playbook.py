"""A playbook: what a program has learned, as itemised bullets that count how often they helped and misled.

As in ACE (Zhang et al. 2025, "Agentic Context Engineering", arXiv 2510.04618) bullets change by small operations
(``deltas.py``) that are carried out by rule, never by rewriting the text. Counters are never lost: a merged bullet's
move to the bullet it became, a removed one's stay with it, and it comes back with them where it is added again.

Operations on different bullets commute, and so do additions, counts and merges of any bullets; a bullet's latest text
stays. Inside a batch the order never matters.
"""

import hashlib
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from dspy.predict.parameter import Parameter

from dspy_lora.adapters.disk import staging, write, writing
from dspy_lora.context.deltas import Add, Delta, Merge, Remove, Update, named, ordered
from dspy_lora.errors import DataError, near

FORMAT = "dspy-lora playbook 1"

_HEAD = re.compile(
    r"---\nformat: (?P<format>[^\n]*)\nversion: (?P<version>\d{1,18})\n(?:digest: (?P<digest>\w*)\n)?---\n"
)
_BULLET = re.compile(
    r"- \[(?P<id>[^\s\]]+)\] helpful=(?P<helpful>\d{1,18}) harmful=(?P<harmful>\d{1,18}) :: (?P<text>\S.*)"
)
_MERGED = re.compile(r"- \[(?P<id>[^\s\]]+)\] -> \[(?P<heir>[^\s\]]+)\]")
_LIVE, _RETIRED, _MERGES = "# Playbook", "# Removed", "# Merged"
_SHOWN = 5  # problems of a file that are spelled out

Embed = Callable[[list[str]], Any]  # texts to vectors, [texts, dimensions]


@dataclass(frozen=True)
class Bullet:
    """One item of a playbook.

    Attributes:
        id: Made from its first section and text; it stays when the text changes.
        section: Where it belongs.
        text: One line.
        helpful: How often it was seen to help.
        harmful: How often it was seen to mislead.
        removed: Whether it was taken out of the prompt.
    """

    id: str
    section: str
    text: str
    helpful: int = 0
    harmful: int = 0
    removed: bool = False

    @property
    def worth(self) -> int:
        """Helpful minus harmful."""
        return self.helpful - self.harmful

    def line(self) -> str:
        """The bullet as the file has it."""
        return f"- [{self.id}] helpful={self.helpful} harmful={self.harmful} :: {self.text}"


class Playbook(Parameter):
    """Bullets by id. As an attribute of a program it is saved and loaded with the program's state.

    Any thread may read and change it. What the LM reads is ``prompt``; the file, with ids and counters, is ``render``.

    Args:
        bullets: Those it begins with.
        merged: Ids of bullets that became others, each with the id of the one it means now.
        version: Grows by one with every batch that changed something.
    """

    def __init__(
        self, bullets: Iterable[Bullet] = (), merged: Mapping[str, str] | None = None, version: int = 0
    ) -> None:
        self._bullets = {bullet.id: bullet for bullet in bullets}
        self._merged = dict(merged or {})
        self.version = version
        self._read: str | None = None
        self._lock = threading.RLock()

    # -- reading ---------------------------------------------------------------------------------------------------

    @property
    def bullets(self) -> list[Bullet]:
        """What the prompt holds, by section and text."""
        with self._lock:
            return sorted((b for b in self._bullets.values() if not b.removed), key=_place)

    @property
    def removed(self) -> list[Bullet]:
        """What it held, by section and text."""
        with self._lock:
            return sorted((b for b in self._bullets.values() if b.removed), key=_place)

    def __len__(self) -> int:
        return len(self.bullets)

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, id: str) -> Bullet:
        """The bullet that an id means, removed or not.

        Raises:
            DataError: There was never one.
        """
        with self._lock:
            bullet = self._bullets.get(self._merged.get(id, id))
            if bullet is None:
                raise DataError(f"the playbook has no bullet {id!r}. {near(id, [*self._bullets, *self._merged])}")
            return bullet

    def prompt(self) -> str:
        """What an LM reads: each section's name and its bullets, one a line, without ids and counters.

        A section ``"summarize / Length"`` is headed ``Length``.
        """
        lines: list[str] = []
        for section, bullets in _by_section(self.bullets):
            lines += [f"{section.split(' / ')[-1]}:", *(f"- {bullet.text}" for bullet in bullets)]
        return "\n".join(lines)

    def listing(self) -> str:
        """What a reflector or curator reads: the same bullets as ``prompt``, with ids and counters."""
        return "\n".join(_listed(_LIVE, self.bullets))

    # -- changing --------------------------------------------------------------------------------------------------

    def refusals(self, deltas: Sequence[Delta]) -> list[str | None]:
        """For each operation of a batch why ``apply`` would refuse it; None where it would not."""
        with self._lock:
            known = {
                *self._bullets,
                *self._merged,
                *(bullet_id(d.section, d.text) for d in deltas if isinstance(d, Add)),
            }
        found: list[str | None] = []
        for delta in deltas:
            missing = [id for id in named(delta) if id not in known]
            where = f"{delta.op} of {missing[0]!r}: the playbook has no such bullet." if missing else None
            found.append(f"{where} {near(missing[0], known)}" if where else None)
        return found

    def apply(self, deltas: Iterable[Delta]) -> int:
        """Carries out a batch, all of it or, where it raises, nothing.

        Args:
            deltas: In any order: see ``ordered``.

        Returns:
            The version afterwards.

        Raises:
            DataError: An operation names a bullet that never was.
        """
        batch = ordered(deltas)
        with self._lock:
            if refused := [reason for reason in self.refusals(batch) if reason]:
                raise DataError(f"{' '.join(refused[:_SHOWN])} Nothing was changed.")
            before = dict(self._bullets)
            for delta in batch:
                self._carry_out(delta)
            self.version += self._bullets != before
            return self.version

    def _carry_out(self, delta: Delta) -> None:
        if isinstance(delta, Add):
            new = Bullet(bullet_id(delta.section, delta.text), delta.section, delta.text)
            there = self._bullets.get(self._merged.get(new.id, new.id), new)
            self._bullets[there.id] = replace(there, removed=False)
        elif isinstance(delta, Update):
            old = self[delta.id]
            helpful, harmful = old.helpful + delta.helpful, old.harmful + delta.harmful
            self._bullets[old.id] = replace(old, text=delta.text or old.text, helpful=helpful, harmful=harmful)
        elif isinstance(delta, Merge):
            self._merge(delta)
        elif delta.id in self._bullets:  # one that was merged away is gone already
            self._bullets[delta.id] = replace(self._bullets[delta.id], removed=True)

    def _merge(self, delta: Merge) -> None:
        parts = {self[id].id: self[id] for id in delta.ids}
        first = parts[min(parts)]
        for id in parts.keys() - {first.id}:
            del self._bullets[id]
            self._merged = {old: first.id if heir == id else heir for old, heir in self._merged.items()} | {
                id: first.id
            }
        self._bullets[first.id] = replace(
            first,
            text=delta.text,
            helpful=sum(part.helpful for part in parts.values()),
            harmful=sum(part.harmful for part in parts.values()),
            removed=all(part.removed for part in parts.values()),
        )

    def refine(self, embed: Embed | None = None, threshold: float = 0.9) -> int:
        """Merges bullets of a section that say the same; the one of the greatest worth lends its text.

        Args:
            embed: Takes texts to vectors (``dspy.Embedder`` does). Without it two bullets say the same where they are
                equal but for case, punctuation and spaces: words alone cannot tell "answer A1" from "answer A2".
            threshold: Least cosine of two vectors that say the same.

        Returns:
            How many bullets went into others.
        """
        with self._lock:
            before = len(self)
            merges: list[Delta] = []
            for _, bullets in _by_section(self.bullets):
                for group in _groups(bullets, embed, threshold):
                    best = min(group, key=lambda bullet: (-bullet.worth, bullet.id))
                    merges += [Merge(ids=tuple(b.id for b in group), text=best.text)] if len(group) > 1 else []
            self.apply(merges)
            return before - len(self)

    def trim(self, budget: int, count: Callable[[str], int]) -> list[Bullet]:
        """Removes bullets until the prompt fits.

        The first to go is the one of the least worth (helpful minus harmful); of equals the one that helped less often,
        then the longer one, then the last by id.

        Args:
            budget: Most tokens of ``prompt``.
            count: Tokens of a text.

        Returns:
            What was removed, in that order; it stays in ``removed`` with its counters.
        """
        with self._lock:
            left = sorted(self.bullets, key=lambda b: (b.worth, b.helpful, -count(b.text), _backwards(b.id)))
            gone: list[Bullet] = []
            while left and count(Playbook(left).prompt()) > budget:
                gone.append(left.pop(0))
            self.apply(Remove(id=bullet.id) for bullet in gone)
            return gone

    # -- the file --------------------------------------------------------------------------------------------------

    def render(self) -> str:
        """The playbook as Markdown; ``parse`` reads it back exactly."""
        with self._lock:
            body = "\n".join(
                [
                    *_listed(_LIVE, self.bullets),
                    *_listed(_RETIRED, self.removed),
                    *([_MERGES, ""] if self._merged else []),
                    *(f"- [{id}] -> [{heir}]" for id, heir in sorted(self._merged.items())),
                    "",
                ]
            )
            return f"---\nformat: {FORMAT}\nversion: {self.version}\ndigest: {_digest(self.version, body)}\n---\n{body}"

    @classmethod
    def parse(cls, text: str, source: str = "the text") -> "Playbook":
        """Reads what ``render`` wrote, edited by hand or not. A plain ``- text`` under a section is a new bullet.

        Args:
            text: The Markdown.
            source: Its name in errors.

        Raises:
            DataError: Lines that mean nothing, each with its number.
        """
        head = _HEAD.match(text)
        if head is None or head["format"] != FORMAT:
            raise DataError(
                f"{source} is no playbook: it must begin with the lines '---', 'format: {FORMAT}', 'version: NUMBER' "
                f"(at most 18 digits) and '---'; it begins with {text[:60]!r}. Mend them by hand."
            )
        reader = _Reader()
        for number, line in enumerate(text[head.end() :].split("\n"), text[: head.end()].count("\n") + 1):
            reader.read(number, line.strip())
        reader.check_merges()
        if reader.problems:
            more = len(reader.problems) - _SHOWN
            raise DataError(
                f"{source} cannot be read as a playbook: {'; '.join(reader.problems[:_SHOWN])}"
                f"{f'; and {more} more' if more > 0 else ''}. Mend these lines; nothing was changed."
            )
        return cls(reader.bullets.values(), reader.merged, int(head["version"]))

    def save(self, path: str | Path) -> None:
        """Writes the Markdown file in one step.

        Raises:
            DataError: The file there is no playbook, or was edited by hand since: it is left as it is.
            PublishError: The disk refused; the file is as it was.
        """
        path = Path(path)
        with self._lock:
            self._check_place(path)
            with writing(f"save {path.name!r}", path.parent), staging(path.parent) as hidden:
                write(hidden / path.name, self.render())
                (hidden / path.name).replace(path)

    def _check_place(self, path: Path) -> None:
        if not path.exists():
            return
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        head = _HEAD.match(text)
        ours = head is not None and head["format"] == FORMAT
        if text == self._read or (head and ours and head["digest"] == _digest(head["version"], text[head.end() :])):
            return
        raise DataError(
            f"{str(path)!r} was edited by hand, or is no playbook, and is not overwritten. Playbook.load takes an "
            "edited one up; else move it away, or save under another name."
        )

    @classmethod
    def load(cls, path: str | Path) -> "Playbook":
        """Reads a file that ``save`` wrote, edited by hand or not.

        Raises:
            DataError: There is no such file, or it says things that mean nothing; it is left as it is.
        """
        try:
            text = Path(path).read_text(encoding="utf-8-sig")  # editors may put a byte order mark
        except (OSError, UnicodeDecodeError) as exc:
            raise DataError(f"cannot read the playbook {str(path)!r}: {exc}.") from exc
        playbook = cls.parse(text, repr(str(path)))
        playbook._read = text
        return playbook

    # -- as a part of a program ------------------------------------------------------------------------------------

    def dump_state(self, json_mode: bool = True) -> dict[str, str]:
        """What DSPy saves."""
        return {"playbook": self.render()}

    def load_state(self, state: Mapping[str, str]) -> None:
        """What DSPy loads.

        Raises:
            DataError: It is no playbook's state; this one is as it was.
        """
        text = state.get("playbook")
        if not isinstance(text, str):
            raise DataError(
                f"a saved playbook is a state with the text 'playbook', and this one has {sorted(state)}. Load a "
                "program that was saved with a playbook, or Playbook.load a Markdown file."
            )
        loaded = Playbook.parse(text, "the saved program's playbook")
        with self._lock:
            self._bullets, self._merged, self.version = loaded._bullets, loaded._merged, loaded.version

    def reset(self) -> None:
        """Empties it, as DSPy's ``reset_copy`` asks of every parameter."""
        with self._lock:
            self._bullets, self._merged, self.version = {}, {}, 0

    def copy(self) -> "Playbook":
        """Another one with the same content."""
        with self._lock:
            return Playbook(self._bullets.values(), self._merged, self.version)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Playbook":
        return self.copy()

    def __reduce__(self) -> tuple[Any, ...]:
        with self._lock:
            return Playbook, (list(self._bullets.values()), self._merged, self.version)

    def __repr__(self) -> str:
        return f"Playbook(version={self.version}, bullets={len(self)}, removed={len(self.removed)})"


def bullet_id(section: str, text: str) -> str:
    """The id of a new bullet: the section's letters and 40 bits of a hash of both."""
    slug = "-".join(re.findall(r"[a-z0-9]+", section.lower())[-3:]) or "bullet"
    digest = hashlib.sha256("\n".join((section, text)).encode()).hexdigest()
    return f"{slug}-{digest[:10]}"


class _Reader:
    """Reads a playbook's lines and collects what is wrong with them."""

    def __init__(self) -> None:
        self.bullets: dict[str, Bullet] = {}
        self.merged: dict[str, str] = {}
        self.problems: list[str] = []
        self._part, self._section = "", ""

    def read(self, number: int, line: str) -> None:
        """Takes one line."""
        if line in (_LIVE, _RETIRED, _MERGES):
            self._part, self._section = line, ""
        elif line.startswith("## ") and self._part in (_LIVE, _RETIRED):
            self._section = " ".join(line[3:].split())
        elif line and (problem := self._item(line)):
            self.problems.append(f"line {number} {problem}: {line[:80]!r}")

    def _item(self, line: str) -> str | None:
        if self._part == _MERGES:
            match = _MERGED.fullmatch(line)
            if match is None or match["id"] in self.merged:
                return "is no '- [id] -> [id]'" if match is None else "says what another line said"
            self.merged[match["id"]] = match["heir"]
            return None
        if not line.startswith("- ") or not self._section:
            return f"stands neither under a '## section' of {_LIVE!r} nor as a bullet '- text'"
        return self._bullet(line)

    def _bullet(self, line: str) -> str | None:
        match = _BULLET.fullmatch(line)
        if match is None and line.startswith("- ["):
            return "is no '- [id] helpful=NUMBER harmful=NUMBER :: text' with NUMBERs of at most 18 digits"
        text = " ".join((match["text"] if match else line[2:]).split())
        id = match["id"] if match else bullet_id(self._section, text)
        if id in self.bullets:
            return f"has the id {id!r} of an earlier line"
        counts = (int(match["helpful"]), int(match["harmful"])) if match else (0, 0)
        self.bullets[id] = Bullet(id, self._section, text, *counts, self._part == _RETIRED)
        return None

    def check_merges(self) -> None:
        """Every merged bullet must mean one that is there, and be none itself."""
        for id, heir in self.merged.items():
            if heir not in self.bullets or id in self.bullets:
                self.problems.append(
                    f"'[{id}] -> [{heir}]' does not lead from a bullet that is gone to one that is here"
                )


def _place(bullet: Bullet) -> tuple[str, str, str]:
    return bullet.section, bullet.text, bullet.id


def _by_section(bullets: Iterable[Bullet]) -> Iterator[tuple[str, list[Bullet]]]:
    found: dict[str, list[Bullet]] = {}
    for bullet in bullets:
        found.setdefault(bullet.section, []).append(bullet)
    yield from found.items()


def _listed(title: str, bullets: Iterable[Bullet]) -> list[str]:
    lines: list[str] = []
    for section, part in _by_section(bullets):
        lines += [f"## {section}", "", *(bullet.line() for bullet in part), ""]
    return [title, "", *lines] if lines or title == _LIVE else []


def _groups(bullets: Sequence[Bullet], embed: Embed | None, threshold: float) -> list[list[Bullet]]:
    """Bullets that say the same as the first of their group."""
    if embed is None:
        same: dict[str, list[Bullet]] = {}
        for bullet in bullets:
            same.setdefault(" ".join(re.findall(r"\w+", bullet.text.casefold())) or bullet.text, []).append(bullet)
        return list(same.values())
    vectors = np.asarray(embed([bullet.text for bullet in bullets]), dtype=float)
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    groups: list[list[int]] = []
    for place, vector in enumerate(vectors):
        near_one = next((group for group in groups if vectors[group[0]] @ vector >= threshold), None)
        if near_one is None:
            groups.append([place])
        else:
            near_one.append(place)
    return [[bullets[place] for place in group] for group in groups]


def _backwards(id: str) -> list[int]:
    return [-ord(letter) for letter in id]


def _digest(version: int | str, body: str) -> str:
    return hashlib.sha256(f"{version}\n{body}".encode()).hexdigest()[:12]
