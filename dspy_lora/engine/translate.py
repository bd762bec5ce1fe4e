"""``dspy.lm15`` requests and responses to and from the engine's messages. Pure: no vLLM, no process."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dspy import lm15

from dspy_lora.engine.protocol import Candidate, Delta, Done, Failed, Generate, Token
from dspy_lora.errors import EngineError, near

# vLLM sampling parameters that DSPy's own vocabulary lacks. LoRALM carries them in ``metadata``, which reaches the
# engine as Config.extensions["metadata"] and is part of DSPy's cache key.
VLLM_SAMPLING = frozenset(
    {
        "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "bad_words", "allowed_token_ids",
        "include_stop_str_in_output", "structured_outputs", "thinking_token_budget",
    }
)  # fmt: skip
VLLM_TEMPLATE = "chat_template_kwargs"
VLLM_KNOBS = VLLM_SAMPLING | {VLLM_TEMPLATE}
# What comes along with them for DSPy's cache alone, which does not see the engine: `EngineSettings.answers`.
ANSWERS = "engine_settings"

_ERRORS: dict[str, type[lm15.LM15Error]] = {
    "context": lm15.ContextLengthError,
    "invalid": lm15.InvalidRequestError,
    "adapter": lm15.ConfigurationError,
    "server": lm15.ServerError,
}
_FINISH: dict[str, lm15.FinishReason] = {"stop": "stop", "length": "length", "tool_calls": "tool_call"}


def to_generate(request: lm15.Request, *, n: int = 1, stream: bool = False) -> Generate:
    """The engine's message for a request; the adapter and the id are set by the caller.

    Args:
        request: What DSPy asks.
        n: Samples to draw.
        stream: Whether tokens are wanted as they come.

    Returns:
        The message.

    Raises:
        lm15.UnsupportedFeatureError: Images, audio, built-in tools or another thing vLLM's text path cannot take.
        lm15.InvalidRequestError: An unknown extension.
    """
    knobs = vllm_knobs(request.config)
    template = dict(knobs.pop(VLLM_TEMPLATE, None) or {})
    if request.config.reasoning is not None:
        template.setdefault("enable_thinking", request.config.reasoning.effort != "off")
    sampling = _sampling(request.config) | knobs
    if n > 1:
        sampling["n"] = n
    return Generate(
        id=0,
        messages=to_messages(request),
        sampling=sampling,
        tools=_tools(request),
        stream=stream,
        template=template,
    )


def vllm_knobs(config: lm15.Config) -> dict[str, Any]:
    """The vLLM-only settings of a request, from its extensions or their ``metadata``.

    Raises:
        lm15.InvalidRequestError: A key that vLLM does not take.
    """
    extensions = dict(config.extensions or {})
    knobs = dict(extensions.pop("metadata", None) or {})
    knobs |= extensions
    knobs.pop(ANSWERS, None)
    bias = knobs.pop("logit_bias", None)
    for key in knobs:
        if key not in VLLM_KNOBS:
            raise lm15.InvalidRequestError(f"{key!r} is no sampling setting of the engine. {near(key, VLLM_KNOBS)}")
    if bias:
        knobs["logit_bias"] = {int(token): value for token, value in bias.items()}
    return knobs


def _sampling(config: lm15.Config) -> dict[str, Any]:
    """Arguments of ``vllm.SamplingParams`` for the settings that DSPy names itself."""
    named = {
        "max_tokens": config.max_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "seed": config.seed,
        "frequency_penalty": config.frequency_penalty,
        "presence_penalty": config.presence_penalty,
        "logprobs": config.logprobs,
        "stop": list(config.stop) or None,
        "structured_outputs": _structured_outputs(config.response_format),
    }
    return {key: value for key, value in named.items() if value is not None}


def _structured_outputs(response_format: Any) -> dict[str, Any] | None:
    """vLLM's constraint for a response format: a JSON schema, or any JSON object."""
    if not response_format:
        return None
    if response_format.get("type") == "json_object":
        return {"json_object": True}
    if "schema" in response_format:
        return {"json": response_format["schema"]}
    if response_format.get("type") == "text":
        return None
    raise lm15.InvalidRequestError(f"response_format={response_format!r}: give a JSON schema or 'json_object'.")


def to_messages(request: lm15.Request) -> list[dict[str, Any]]:
    """Chat messages in the form chat templates take.

    Raises:
        lm15.UnsupportedFeatureError: A part that is not text, a tool call or a tool result.
    """
    messages: list[dict[str, Any]] = []
    if request.system is not None:
        system = request.system if isinstance(request.system, str) else _text(request.system)
        messages.append({"role": "system", "content": system})
    for message in request.messages:
        messages.extend(_message(message))
    return messages


def _message(message: lm15.Message) -> Iterator[dict[str, Any]]:
    if message.role == "tool":
        for result in message.parts:
            if not isinstance(result, lm15.ToolResultPart):
                raise _unsupported(result)
            yield {"role": "tool", "tool_call_id": result.id, "name": result.name, "content": _text(result.content)}
        return
    role = "system" if message.role == "developer" else message.role
    calls = [part for part in message.parts if isinstance(part, lm15.ToolCallPart)]
    thinking = "".join(part.text for part in message.parts if isinstance(part, lm15.ThinkingPart))
    rest = [part for part in message.parts if not isinstance(part, lm15.ToolCallPart | lm15.ThinkingPart)]
    entry: dict[str, Any] = {"role": role, "content": _text(rest)}
    if thinking:
        entry["reasoning_content"] = thinking
    if calls:
        entry["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": dict(call.input)}}
            for call in calls
        ]
    yield entry


def _text(parts: Any) -> str:
    for part in parts:
        if not isinstance(part, lm15.TextPart):
            raise _unsupported(part)
    return "".join(part.text for part in parts)


def _unsupported(part: Any) -> lm15.UnsupportedFeatureError:
    return lm15.UnsupportedFeatureError(
        f"LoRALM sends text; a {part.type!r} part cannot reach the model. Describe it in words, or use another LM."
    )


def _tools(request: lm15.Request) -> list[dict[str, Any]] | None:
    """The tools that the model may call, None for none.

    Raises:
        lm15.UnsupportedFeatureError: A call is demanded: a parser finds calls in what the model writes, and cannot make
            it write one.
    """
    choice = request.config.tool_choice or lm15.ToolChoice()
    if choice.mode == "required":
        raise lm15.UnsupportedFeatureError(
            f"tool_choice={list(choice.allowed) or 'required'!r}: LoRALM lets the model choose. Leave tool_choice out, "
            "or give one tool and say in the instruction that it must be called."
        )
    tools = [tool for tool in request.tools if not choice.allowed or tool.name in choice.allowed]
    return None if choice.mode == "none" else [_tool(tool) for tool in tools] or None


def _tool(tool: Any) -> dict[str, Any]:
    if not isinstance(tool, lm15.FunctionTool):
        raise lm15.UnsupportedFeatureError(f"LoRALM calls functions only; {tool!r} is run by a provider's server.")
    function = {"name": tool.name, "description": tool.description or "", "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def to_responses(done: Done, model: str) -> list[lm15.Response]:
    """One response for each sample; the prompt's tokens are counted in the first one only.

    Args:
        done: The engine's answer.
        model: The model string of the request.
    """
    responses = []
    for index, candidate in enumerate(done.candidates):
        usage = lm15.Usage(
            input_tokens=done.prompt_tokens if index == 0 else 0,
            output_tokens=candidate.output_tokens,
            cache_read_tokens=done.cached_tokens if index == 0 else 0,
            reasoning_tokens=candidate.reasoning_tokens or None,
        )
        responses.append(
            lm15.Response(
                id=f"{done.id}-{index}",
                model=model,
                message=lm15.Message(role="assistant", parts=_parts(candidate)),
                finish_reason=_FINISH.get(candidate.finish_reason, "stop"),
                usage=usage,
                logprobs=None if candidate.logprobs is None else tuple(map(_logprob, candidate.logprobs)),
            )
        )
    return responses


def _parts(candidate: Candidate) -> tuple[Any, ...]:
    parts: list[Any] = []
    if candidate.thinking:
        parts.append(lm15.ThinkingPart(candidate.thinking))
    if candidate.text or not candidate.tool_calls:
        parts.append(lm15.TextPart(candidate.text))
    for call in candidate.tool_calls:
        parts.append(lm15.ToolCallPart(call.id, call.name, _arguments(call.arguments)))
    return tuple(parts)


def _arguments(text: str) -> dict[str, Any]:
    """Arguments of a tool call; what is no JSON object comes under the names that lm15 gives a server's."""
    try:
        value = json.loads(text or "{}")
    except json.JSONDecodeError:
        return {"partial_json": text}
    return value if isinstance(value, dict) else {"value": value}


def _logprob(token: Token) -> lm15.TokenLogprob:
    top = tuple(lm15.TopLogprob(text, logprob, token_id=id) for text, logprob, id in token.top)
    return lm15.TokenLogprob(token.text, token.logprob, token_id=token.id, top=top)


@dataclass
class Shown:
    """The stream events of one request: deltas as they come, then what they did not show.

    Reasoning is part 0, text part 1, tool calls follow.

    Attributes:
        text: Answer text shown so far.
        thinking: Reasoning text shown so far.
        scored: Number of tokens whose log-probabilities were shown.
        held: Log-probabilities of tokens that made no text yet: reasoning, or half of a character.
    """

    text: str = ""
    thinking: str = ""
    scored: int = 0
    held: tuple[lm15.TokenLogprob, ...] = field(default=())

    def events(self, delta: Delta) -> Iterator[Any]:
        """The events of one delta."""
        self.held += tuple(map(_logprob, delta.logprobs))
        if delta.thinking:
            self.thinking += delta.thinking
            yield lm15.StreamDeltaEvent(lm15.ThinkingDelta(delta.thinking, part_index=0))
        if delta.text:
            yield self._text(delta.text, self.held)

    def rest(self, response: lm15.Response) -> Iterator[Any]:
        """The end of a stream: text that a parser held back, tool calls, finish reason and usage.

        Args:
            response: The whole answer.
        """
        text, thinking = (
            "".join(part.text for part in _of(response, kind)) for kind in (lm15.TextPart, lm15.ThinkingPart)
        )
        if more := _after(thinking, self.thinking):
            yield lm15.StreamDeltaEvent(lm15.ThinkingDelta(more, part_index=0))
        unscored = (response.logprobs or ())[self.scored :]
        if (more := _after(text, self.text)) or unscored:
            yield self._text(more, unscored)
        for index, call in enumerate(_of(response, lm15.ToolCallPart), start=2):
            delta = lm15.ToolCallDelta(json.dumps(dict(call.input)), part_index=index, id=call.id, name=call.name)
            yield lm15.StreamDeltaEvent(delta)
        yield lm15.StreamEndEvent(finish_reason=response.finish_reason, usage=response.usage)

    def _text(self, text: str, logprobs: tuple[lm15.TokenLogprob, ...]) -> lm15.StreamDeltaEvent:
        self.text, self.scored, self.held = self.text + text, self.scored + len(logprobs), ()
        return lm15.StreamDeltaEvent(lm15.TextDelta(text, part_index=1, logprobs=logprobs))


def at_once(response: lm15.Response) -> Iterator[Any]:
    """The stream events of an answer that is there already."""
    yield lm15.StreamStartEvent(model=response.model)
    yield from Shown().rest(response)


def _of(response: lm15.Response, kind: type[Any]) -> list[Any]:
    return [part for part in response.message.parts if isinstance(part, kind)]


def _after(whole: str, shown: str) -> str:
    """What of ``whole`` was not shown; nothing where a parser changed its mind about what it had shown."""
    return whole[len(shown) :] if whole.startswith(shown) else ""


def to_error(failed: Failed) -> lm15.LM15Error:
    """The ``lm15`` error for a refusal: context and parameter errors are final, server errors are retried."""
    return _ERRORS[failed.kind](failed.message)


def engine_error(error: EngineError) -> lm15.LM15Error:
    """A dead or unstartable engine, as an error DSPy does not retry: the restart was already tried."""
    return lm15.ProviderError(str(error))
