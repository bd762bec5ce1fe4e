"""vLLM's reasoning and tool parsers, around one finished or streamed sample."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dspy_lora.engine.protocol import Delta, Generate, ToolCall
from dspy_lora.errors import ConfigError, near


@dataclass
class Parsed:
    """A sample taken apart: answer text, reasoning text, and the tool calls in it."""

    text: str
    thinking: str = ""
    reasoning_tokens: int = 0
    tool_calls: list[ToolCall] = field(default_factory=list)


class Parsers:
    """The parsers chosen for a model.

    Args:
        tokenizer: The model's tokenizer.
        tool_parser: Name in vLLM's ``ToolParserManager``, or None.
        reasoning_parser: Name in vLLM's ``ReasoningParserManager``, or None.
    """

    def __init__(self, tokenizer: Any, tool_parser: str | None, reasoning_parser: str | None) -> None:
        from vllm.reasoning import ReasoningParserManager
        from vllm.tool_parsers import ToolParserManager

        self.tokenizer = tokenizer
        self.tool_class = self.reasoning_class = None
        if tool_parser:
            self.tool_class = ToolParserManager.get_tool_parser(tool_parser)
        if reasoning_parser:
            self.reasoning_class = ReasoningParserManager.get_reasoning_parser(reasoning_parser)

    def sampling(self, request: Generate) -> dict[str, Any]:
        """Sampling arguments that the parsers need: markers of reasoning and tool calls may be special tokens."""
        if self.tool_class and request.tools:
            return {"skip_special_tokens": False}
        if self.reasoning_class:
            parser = self.reasoning_class(self.tokenizer, chat_template_kwargs=request.template)
            skips = parser.adjust_request(self._chat_request(request)).skip_special_tokens
            return {} if skips is None else {"skip_special_tokens": skips}  # vLLM 0.33 says None for as it is
        return {}

    def parse(self, request: Generate, text: str, token_ids: Sequence[int]) -> Parsed:
        """Takes a whole sample apart."""
        parsed = Parsed(text)
        chat = self._chat_request(request)
        if self.reasoning_class:
            parser = self.reasoning_class(self.tokenizer, chat_template_kwargs=request.template)
            thinking, answer = parser.extract_reasoning(text, request=chat)
            parsed = Parsed(answer or "", thinking or "", parser.count_reasoning_tokens(list(token_ids)))
        if self.tool_class and request.tools:
            found = self.tool_class(self.tokenizer, chat.tools).extract_tool_calls(parsed.text, chat)
            parsed.text = self._without_markers(found.content or "")
            parsed.tool_calls = [
                ToolCall(call.id, call.function.name, call.function.arguments) for call in found.tool_calls
            ]
        return parsed

    def splitter(self, request: Generate, prompt: list[int]) -> "Splitter":
        """Tells reasoning from answer while tokens stream."""
        if self.tool_class and request.tools:
            return Splitter(None, hold=True)  # a tool call cannot be shown before it is whole
        if not self.reasoning_class:
            return Splitter(None)
        parser = self.reasoning_class(self.tokenizer, chat_template_kwargs=request.template)
        parser.adjust_initial_state_from_prompt(prompt)
        return Splitter(parser)

    def _without_markers(self, text: str) -> str:
        """Drops the special tokens that were kept for the tool parser."""
        for marker in self.tokenizer.all_special_tokens:
            text = text.replace(marker, "")
        return text.strip()

    def _chat_request(self, request: Generate) -> Any:
        """The request as vLLM's parsers want to see it."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        if not (self.reasoning_class or (self.tool_class and request.tools)):
            return None
        return ChatCompletionRequest(messages=[*map(_openai, request.messages)], model="", tools=request.tools)


def _openai(message: dict[str, Any]) -> dict[str, Any]:
    """A message in OpenAI's form: a tool call's arguments are JSON text there, and an object for chat templates."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"])
        calls.append(call | {"function": call["function"] | {"arguments": arguments}})
    return message | {"tool_calls": calls}


class Splitter:
    """Splits streamed text into reasoning and answer.

    Args:
        parser: A vLLM reasoning parser, None where all text is answer.
        hold: Show nothing until the sample is whole.
    """

    def __init__(self, parser: Any, hold: bool = False) -> None:
        self.parser = parser
        self.hold = hold
        self.text = ""
        self.ids: list[int] = []

    def feed(self, text: str, ids: Sequence[int]) -> Delta:
        """The part of new text that may be shown."""
        if self.hold:
            return Delta(0)
        if self.parser is None:
            return Delta(0, text)
        before, before_ids = self.text, self.ids
        self.text, self.ids = before + text, before_ids + list(ids)
        message = self.parser.extract_reasoning_streaming(before, self.text, text, before_ids, self.ids, list(ids))
        if message is None:
            return Delta(0)
        return Delta(0, message.content or "", message.reasoning or "")


def check_parsers(tool_parser: str | None, reasoning_parser: str | None) -> None:
    """Looks the names up, before the model is loaded.

    Raises:
        ConfigError: A name that this vLLM does not know.
    """
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    known = {
        "tool_parser": (tool_parser, ToolParserManager.list_registered()),
        "reasoning_parser": (reasoning_parser, ReasoningParserManager.list_registered()),
    }
    for setting, (name, allowed) in known.items():
        if name and name not in allowed:
            raise ConfigError(f"{setting}={name!r} is no parser of this vLLM. {near(name, allowed)}")
