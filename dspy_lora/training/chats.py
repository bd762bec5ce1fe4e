"""Chat examples become an adapter: the child process of a training job.

DSPy's optimizers hand over finished conversations, of one predictor or of several mixed. A row here is such a
conversation and its last answer, so that the rest is as for any other rows. ``python -m dspy_lora.training.chats FILE``
trains one run; FILE holds its settings as JSON.
"""

import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dspy
import pydantic

from dspy_lora.errors import DataError, DspyLoraError
from dspy_lora.training.data import Row
from dspy_lora.training.settings import TrainConfig
from dspy_lora.training.sft import train

_SHOWN = 3  # malformed examples an error message spells out; the rest are counted
_ROLES = ("system", "user", "assistant")

CHAT = dspy.Signature(
    {"chat": (list[dict[str, str]], dspy.InputField()), "answer": (str, dspy.OutputField())},
    "Answer as the conversation asks.",
)


class Verbatim(dspy.Adapter):
    """Sends the conversation of a row as it is and takes the whole answer: DSPy's own adapter has written both."""

    def format(self, signature: Any, demos: list[dict[str, Any]], inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """The messages of the row."""
        return list(inputs["chat"])

    def format_assistant_message_content(
        self, signature: Any, outputs: dict[str, Any], missing_field_message: str | None = None
    ) -> str:
        """The answer of the row."""
        return str(outputs["answer"])

    def parse(self, signature: Any, completion: str) -> dict[str, Any]:
        """The whole text."""
        return {"answer": completion}


class ChatConfig(TrainConfig):
    """Everything one run on chats depends on."""

    signature: Any = CHAT
    adapter: Any = pydantic.Field(default_factory=Verbatim)

    def to_json(self) -> str:
        """The settings as the child process reads them; the rows must be in a file.

        Its lines are always in the log, and the adapter is published by the process that started it.
        """
        return self.model_dump_json(exclude={"signature", "adapter", "quiet", "registry"})


def chat_rows(examples: Sequence[dict[str, Any]]) -> list[Row]:
    """Takes DSPy's chat examples apart.

    Args:
        examples: ``{"messages": [{"role": ..., "content": ...}, ...]}`` each, the last message the assistant's.

    Returns:
        Rows ``{"chat": the messages before the last, "answer": the last one's text}``.

    Raises:
        DataError: There are none, or some are malformed; each is named by its place, counted from 1.
    """
    problems = [f"example {place}: {text}" for place, one in enumerate(examples, 1) if (text := _problem(one))]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise DataError(f"{len(problems)} of {len(examples)} are no chats: {'; '.join(problems[:_SHOWN])}{more}")
    if not examples:
        raise DataError(
            "there is no chat to train on: no example passed the metric, or no predictor was called. "
            "Give a better teacher, a teacher that answers from labels, or a metric that some examples pass."
        )
    return [{"chat": one["messages"][:-1], "answer": one["messages"][-1]["content"]} for one in examples]


def _problem(example: Any) -> str | None:
    """What keeps an example from being trained on."""
    messages = example.get("messages") if isinstance(example, dict) else None
    if not isinstance(messages, list) or len(messages) < 2:
        return "it needs 'messages', a prompt and an answer"
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            return f"a message needs a role, one of {', '.join(_ROLES)}"
        if not isinstance(message.get("content"), str):
            return f"the content of a message is text, not {type(message.get('content')).__name__}"
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        return "its last message is no answer of the assistant"
    return None


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone: nobody waits for the adapter any more."""
    sys.stdin.read()
    os._exit(1)


def main(file: str) -> int:
    """Trains the run whose settings a file holds.

    Returns:
        The exit status: 0, or 1 after a line that says why.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        train(ChatConfig.model_validate_json(Path(file).read_text(encoding="utf-8")), resume=True)
    except DspyLoraError as exc:
        print(exc, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
