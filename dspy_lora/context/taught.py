"""A program that was taught a playbook: the block in its instructions, and the playbook that is saved with it."""

import re
from collections.abc import Mapping
from typing import Any

import dspy

from dspy_lora.context.playbook import Playbook
from dspy_lora.errors import DataError

OPENING, CLOSING = "[Playbook]", "[End of playbook]"

_BLOCK = re.compile(rf"\n*{re.escape(OPENING)}\n(?P<text>.*?)\n{re.escape(CLOSING)}(?=\n|$)", re.DOTALL)


def with_playbook(instruction: str, text: str) -> str:
    """An instruction that ends in a playbook's prompt, between markers; another one's is replaced."""
    bare = without_playbook(instruction)
    return f"{bare}\n\n{OPENING}\n{text}\n{CLOSING}" if text else bare


def without_playbook(instruction: str) -> str:
    """An instruction without a playbook's prompt."""
    return _BLOCK.sub("", instruction)


def told_bullets(instruction: str) -> list[tuple[str, str]]:
    """The bullets that an instruction tells: each one's heading and text, all that ``prompt`` shows of it.

    Raises:
        DataError: A line between the markers is neither a heading nor a bullet under one.
    """
    found, heading = list[tuple[str, str]](), ""
    for line in (line.strip() for block in _BLOCK.finditer(instruction) for line in block["text"].split("\n")):
        if line.endswith(":") and not line.startswith("- "):
            heading = line[:-1]
        elif line.startswith("- ") and heading:
            found.append((heading, line[2:]))
        elif line:
            raise DataError(
                f"the playbook in an instruction has the line {line[:80]!r}, neither 'heading:' nor a '- bullet' under "
                f"one, and the program has no playbook object. Give it: dspy_lora.load(program, path) where one was "
                f"saved, or ACE(playbook=...). Else mend the line, or take out all from {OPENING} to {CLOSING}."
            )
    return found


class TaughtPredict(dspy.Predict):
    """A bare ``dspy.Predict`` whose saved state holds its playbook too, which DSPy would leave out."""

    def dump_state(self, json_mode: bool = True) -> dict[str, Any]:
        """As DSPy's, with the playbook."""
        state: dict[str, Any] = super().dump_state(json_mode=json_mode)
        own = own_playbook(self)
        return state if own is None else state | {"playbook": own.dump_state(json_mode)}

    def load_state(self, state: dict[str, Any], **kwargs: Any) -> "TaughtPredict":
        """As DSPy's, with the playbook."""
        saved = saved_playbook(state)
        super().load_state({key: value for key, value in state.items() if key != "playbook"}, **kwargs)
        if saved is not None:
            self.playbook = saved
        return self


def attach(program: dspy.Module, playbook: Playbook) -> None:
    """Makes a playbook a program's own, saved and loaded with it."""
    program.playbook = playbook
    if type(program) is dspy.Predict:
        program.__class__ = TaughtPredict


def own_playbook(program: dspy.Module) -> Playbook | None:
    """A program's playbook, None where it has none."""
    own = vars(program).get("playbook")
    if isinstance(program, dspy.Predict) and isinstance(own, Mapping):  # its `load` makes attributes of all states
        return saved_playbook(vars(program))
    return own if isinstance(own, Playbook) else None


def saved_playbook(state: Mapping[str, Any]) -> Playbook | None:
    """The playbook that a program's saved state holds, None where it holds none.

    Raises:
        DataError: It cannot be read.
    """
    saved = state.get("playbook")
    if not isinstance(saved, Mapping) or saved.keys() != {"playbook"}:  # a predictor may be called so
        return None
    playbook = Playbook()
    playbook.load_state(saved)
    return playbook
