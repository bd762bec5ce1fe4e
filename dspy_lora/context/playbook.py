"""A playbook: what a program has learned, as itemised bullets that count how often they helped and misled.

As in ACE (Zhang et al. 2025, "Agentic Context Engineering", arXiv 2510.04618) bullets change by small operations
(``deltas.py``) that are carried out by rule, never by rewriting the text. Counters are never lost: a merged bullet's
move to the bullet it became, a removed one's stay with it, and it comes back with them where it is added again.

Operations on different bullets commute, and so do additions, counts and merges of any bullets; a bullet's latest text
stays. Inside a batch the order never matters.
"""

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dspy.predict.parameter import Parameter

from dspy_lora.adapters.disk import lock, staging, write, writing
from dspy_lora.context import playbook_file
from dspy_lora.context.bullets import Bullet, Embed, alike, bullet_id, by_section, place
from dspy_lora.context.deltas import Add, Delta, Merge, Remove, Update, named, ordered
from dspy_lora.errors import DataError, near

_SHOWN = 5  # refused operations that are spelled out


@dataclass
class _Shared:
    """A file that others may write too.

    Attributes:
        text: As the playbook last read or wrote it.
        since: The batches that it carried out since.
    """

    text: str
    since: list[list[Delta]] = field(default_factory=list)


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
        self._shared: dict[Path, _Shared] = {}
        self._lock = threading.RLock()

    # -- reading ---------------------------------------------------------------------------------------------------

    @property
    def bullets(self) -> list[Bullet]:
        """What the prompt holds, by section and text."""
        with self._lock:
            return sorted((b for b in self._bullets.values() if not b.removed), key=place)

    @property
    def removed(self) -> list[Bullet]:
        """What it held, by section and text."""
        with self._lock:
            return sorted((b for b in self._bullets.values() if b.removed), key=place)

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
        for section, bullets in by_section(self.bullets):
            lines += [f"{section.split(' / ')[-1]}:", *(f"- {bullet.text}" for bullet in bullets)]
        return "\n".join(lines)

    def listing(self) -> str:
        """What a reflector or curator reads: the same bullets as ``prompt``, with ids and counters."""
        return playbook_file.listing(self.bullets)

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
            for file in self._shared.values():
                file.since.append(batch)
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
                equal but for case, quotes, sentence marks and spaces: words cannot tell "answer A1" from "answer A2".
            threshold: Least cosine of two vectors that say the same.

        Returns:
            How many bullets went into others.
        """
        with self._lock:
            before = len(self)
            merges: list[Delta] = []
            for _, bullets in by_section(self.bullets):
                for group in alike(bullets, embed, threshold):
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
            return playbook_file.written(self.bullets, self.removed, self._merged, self.version)

    @classmethod
    def parse(cls, text: str, source: str = "the text") -> "Playbook":
        """Reads what ``render`` wrote, edited by hand or not. A plain ``- text`` under a section is a new bullet.

        Args:
            text: The Markdown.
            source: Its name in errors.

        Raises:
            DataError: Lines that mean nothing, each with its number.
        """
        return cls(*playbook_file.read(text, source))

    def save(self, path: str | Path) -> bool:
        """Writes the Markdown file in one step.

        Playbooks of any threads and processes may learn into one file, by any of its paths (a link stays one). Where
        another was saved there since this one read or wrote it, all operations that this one carried out meanwhile are
        carried out on what is there now, and that becomes this playbook too: additions, counts, merges and removals of
        both stay; of two new texts for one bullet the one saved last does; operations on bullets that the file has lost
        are left out. A playbook that never read or wrote the file, or was reset or loaded another state since, replaces
        what is there.

        Returns:
            Whether what another one had saved came in.

        Raises:
            DataError: The file there is no playbook, or was edited by hand since: it is left as it is.
            PublishError: The disk refused; the file and this playbook are as they were.
        """
        path = _file(path)
        what = f"save {path.name!r}"
        with self._lock, writing(what, path.parent), staging(path.parent) as hidden, lock(path.parent):
            newer = self._newer(path)
            text = (newer or self).render()
            write(hidden / path.name, text)
            (hidden / path.name).replace(path)
            if newer is not None:
                self._become(newer)
            self._shared[path] = _Shared(text)
            return newer is not None

    def share(self, path: str | Path) -> None:
        """Learns into a file from now on: where there is one by the time of ``save``, it is not replaced."""
        with self._lock:
            self._shared[_file(path)] = _Shared("")

    def _newer(self, path: Path) -> "Playbook | None":
        """What another playbook left in a file, with what this one did since; None where there is no such thing."""
        if not path.exists():
            return None
        text, file = self._replaceable(path), self._shared.get(path)
        if file is None or file.text == text:
            return None
        newer = Playbook.parse(text, repr(str(path)))
        for batch in file.since:
            newer.apply(delta for delta, reason in zip(batch, newer.refusals(batch), strict=True) if reason is None)
        return newer

    def _replaceable(self, path: Path) -> str:
        """The text of a file that may be written over."""
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        if text == self._read or playbook_file.untouched(text):
            return text
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
        playbook._shared[_file(path)] = _Shared(text)
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
            self._become(loaded)
            self._shared = {}

    def _become(self, other: "Playbook") -> None:
        self._bullets, self._merged, self.version = other._bullets, other._merged, other.version

    def reset(self) -> None:
        """Empties it, as DSPy's ``reset_copy`` asks of every parameter."""
        with self._lock:
            self._become(Playbook())
            self._shared = {}

    def copy(self) -> "Playbook":
        """Another one with the same content, which shares no file."""
        with self._lock:
            return Playbook(self._bullets.values(), self._merged, self.version)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Playbook":
        with self._lock:
            other = self.copy()
            other._shared = deepcopy(self._shared, memo)
            return other

    def __reduce__(self) -> tuple[Any, ...]:
        with self._lock:
            content = (list(self._bullets.values()), self._merged, self.version)
            return Playbook, content, {"_shared": deepcopy(self._shared)}

    def __repr__(self) -> str:
        return f"Playbook(version={self.version}, bullets={len(self)}, removed={len(self.removed)})"


def _file(path: str | Path) -> Path:
    """The file that a path means, by one name however it is spelled: without links, ``..`` and the working directory.

    Not ``Path.resolve``, which raises RuntimeError for links in a circle; opening one is an OSError.
    """
    return Path(os.path.realpath(path))


def _backwards(id: str) -> list[int]:
    return [-ord(letter) for letter in id]
