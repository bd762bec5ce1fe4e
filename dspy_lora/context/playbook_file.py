"""A playbook as Markdown: sections of bullets, what was removed, what became of merged bullets, and a digest.

The digest tells a file that nobody touched from one that was edited by hand.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from dspy_lora.context.bullets import Bullet, bullet_id, by_section
from dspy_lora.errors import DataError

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


class Content(NamedTuple):
    """What a file says.

    Attributes:
        bullets: Removed ones too.
        merged: Ids of bullets that became others, each with the id of the one it means now.
        version: Of the playbook.
    """

    bullets: list[Bullet]
    merged: dict[str, str]
    version: int


def written(live: Sequence[Bullet], removed: Sequence[Bullet], merged: Mapping[str, str], version: int) -> str:
    """The file's text; ``read`` reads it back exactly."""
    body = "\n".join(
        [
            *_part(_LIVE, live),
            *(_part(_RETIRED, removed) if removed else []),
            *([_MERGES, ""] if merged else []),
            *(f"- [{id}] -> [{heir}]" for id, heir in sorted(merged.items())),
            "",
        ]
    )
    return f"---\nformat: {FORMAT}\nversion: {version}\ndigest: {_digest(version, body)}\n---\n{body}"


def listing(bullets: Sequence[Bullet]) -> str:
    """The bullets in the prompt as the file has them, with ids and counters."""
    return "\n".join(_part(_LIVE, bullets))


def untouched(text: str) -> bool:
    """Whether a file is a playbook as ``written`` left it."""
    head = _HEAD.match(text)
    return (
        head is not None and head["format"] == FORMAT and head["digest"] == _digest(head["version"], text[head.end() :])
    )


def read(text: str, source: str) -> Content:
    """Reads what ``written`` wrote, edited by hand or not. A plain ``- text`` under a section is a new bullet.

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
    return Content(list(reader.bullets.values()), reader.merged, int(head["version"]))


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


def _part(title: str, bullets: Iterable[Bullet]) -> list[str]:
    lines = [title, ""]
    for section, part in by_section(bullets):
        lines += [f"## {section}", "", *(bullet.line() for bullet in part), ""]
    return lines


def _digest(version: int | str, body: str) -> str:
    return hashlib.sha256(f"{version}\n{body}".encode()).hexdigest()[:12]
