"""Messages between the user's process and the engine host, msgpack over a ZeroMQ ``ipc://`` socket.

Both sides are the same version of this package, so there is no versioning. Every request carries an integer id that
is unique in the client; every answer names it.
"""

from typing import Any

import msgspec


class Adapter(msgspec.Struct, frozen=True):
    """A LoRA adapter revision as the host loads it.

    Attributes:
        name: ``"legal@0123456789ab"``: content-addressed, so a name never comes back with other weights.
        path: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
    """

    name: str
    path: str


class Generate(msgspec.Struct, tag=True, omit_defaults=True):
    """One prompt, ``n`` samples.

    Attributes:
        id: Request id.
        messages: Chat messages as a chat template takes them.
        sampling: Arguments of ``vllm.SamplingParams``; ``max_tokens`` may exceed what the context leaves.
        adapter: None for the base model.
        tools: Function tools in OpenAI's form.
        stream: Send ``Delta`` messages as tokens come.
        template: Extra arguments of the chat template (``enable_thinking``...).
    """

    id: int
    messages: list[dict[str, Any]]
    sampling: dict[str, Any]
    adapter: Adapter | None = None
    tools: list[dict[str, Any]] | None = None
    stream: bool = False
    template: dict[str, Any] = {}


class Abort(msgspec.Struct, tag=True):
    """Forget request ``id``; no answer follows."""

    id: int


class Command(msgspec.Struct, tag=True, omit_defaults=True):
    """Something other than a prompt: ``ahead``, ``load``, ``unload`` (an adapter), ``stats``.

    ``load`` brings an adapter into a slot, ``ahead`` into the engine's CPU memory; ``unload`` waits until no request of
    the adapter runs.
    """

    id: int
    name: str
    adapter: Adapter | None = None


class Token(msgspec.Struct, omit_defaults=True):
    """A sampled token with its log-probability and ranked alternatives ``(text, logprob, token id)``."""

    text: str
    logprob: float
    id: int
    top: list[tuple[str, float, int]] = []


class ToolCall(msgspec.Struct):
    """A call the model asks for; ``arguments`` is JSON text."""

    id: str
    name: str
    arguments: str


class Candidate(msgspec.Struct, omit_defaults=True):
    """One finished sample."""

    text: str
    finish_reason: str
    output_tokens: int
    thinking: str = ""
    reasoning_tokens: int = 0
    tool_calls: list[ToolCall] = []
    logprobs: list[Token] | None = None


class Ready(msgspec.Struct, tag=True):
    """The engine is up.

    Attributes:
        info: ``max_model_len``, ``max_num_seqs``, ``max_loras``, ``max_lora_rank`` and ``max_cpu_loras`` (0 in an
            engine without LoRA), ``loads_aside`` (whether the workers read adapters beside the running requests),
            ``vllm`` (version), ``device``.
    """

    info: dict[str, Any]


class StartFailed(msgspec.Struct, tag=True):
    """The engine will not come up; the host ends after this message."""

    message: str


class Delta(msgspec.Struct, tag=True, omit_defaults=True):
    """New text (or reasoning text) of a streamed request."""

    id: int
    text: str = ""
    thinking: str = ""
    logprobs: list[Token] = []


class Done(msgspec.Struct, tag=True):
    """All samples of a request. A streamed request's candidate repeats the whole text."""

    id: int
    candidates: list[Candidate]
    prompt_tokens: int
    cached_tokens: int


class Failed(msgspec.Struct, tag=True):
    """The request cannot be served.

    Attributes:
        kind: ``context`` (prompt too long), ``invalid`` (bad parameter), ``adapter`` (cannot be loaded) or ``server``.
    """

    id: int
    kind: str
    message: str


class Result(msgspec.Struct, tag=True):
    """The answer to a ``Command``."""

    id: int
    value: dict[str, Any]


Request = Generate | Abort | Command
Reply = Ready | StartFailed | Delta | Done | Failed | Result
