"""What an engine is started with. Two LMs with equal settings share one engine process."""

import dataclasses
import hashlib
import json
from typing import Any

from dspy_lora.adapters.base import Base
from dspy_lora.config import Config, ServingConfig
from dspy_lora.errors import ConfigError, near

# Settings that are ours, not arguments of vLLM's AsyncEngineArgs.
_OURS = ("kv_cache_gib", "tool_parser", "reasoning_parser", "start_timeout_s")
# Arguments of vLLM that decide how fast and where it answers, not what.
_OF_SPEED = frozenset(
    {
        "max_loras", "max_lora_rank", "max_cpu_loras", "enable_lora", "max_num_seqs", "max_num_batched_tokens",
        "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "gpu_memory_utilization",
        "kv_cache_memory_bytes", "block_size", "swap_space", "enforce_eager", "enable_prefix_caching",
        "enable_chunked_prefill", "cudagraph_capture_sizes", "max_cudagraph_capture_size", "compilation_config",
        "performance_mode", "trust_remote_code", "disable_log_stats", "download_dir",
    }
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """Everything the host needs, hashable so that it can be the key of a running engine.

    Attributes:
        base: The base model.
        kv_cache_gib: Size of the KV cache in GiB on a CPU (on a GPU ``gpu_memory_utilization`` decides).
        tool_parser: Name of a vLLM tool parser, None for no function calling.
        reasoning_parser: Name of a vLLM reasoning parser, None for models that do not think.
        start_timeout_s: Seconds after which a start-up counts as hung; no other engine for that.
        args: JSON object of arguments for ``vllm.AsyncEngineArgs``.
    """

    base: Base
    kv_cache_gib: float
    tool_parser: str | None
    reasoning_parser: str | None
    start_timeout_s: float = dataclasses.field(compare=False)
    args: str

    def to_json(self) -> str:
        """The settings as the host reads them."""
        return json.dumps(dataclasses.asdict(self))

    @property
    def engine_args(self) -> dict[str, Any]:
        """Arguments for ``vllm.AsyncEngineArgs``."""
        return dict(json.loads(self.args))

    @property
    def answers(self) -> str | None:
        """Twelve hex digits over what answers depend on beside the base's revision, for a cache; None where nothing is.

        That is the base's chat template and tokenizer, and the settings that were given.
        """
        given = self.engine_args | {name: getattr(self, name) for name in ("tool_parser", "reasoning_parser")}
        given |= {"template": self.base.template or None}
        said = {key: value for key, value in given.items() if value is not None and key not in _OF_SPEED}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12] if said else None


def engine_settings(base: Base, config: Config, overrides: dict[str, Any] | None = None) -> EngineSettings:
    """The settings of an engine: the configuration's ``serving`` section under the caller's ``engine={...}``.

    Args:
        base: The base model.
        config: The loaded configuration.
        overrides: Keys of ``serving`` or any argument of ``vllm.AsyncEngineArgs`` (checked when the engine starts).

    Returns:
        The settings.

    Raises:
        ConfigError: A value that the ``serving`` section does not allow, or that is not JSON.
    """
    try:
        given = dict(overrides or {})
        if "model" in given:
            raise ValueError("the base model is LoRALM's first argument")
        if "revision" in given:
            raise ValueError(
                "a base is served as it lies on this disk. For another revision give its folder as the base, "
                "such as huggingface_hub.snapshot_download(ID, revision=REVISION) returns"
            )
        known = {key: value for key, value in given.items() if key in ServingConfig.model_fields}
        serving = ServingConfig.model_validate(config.serving.model_dump() | known)
        extra = {key: value for key, value in given.items() if key not in known}
        args = {key: value for key, value in serving.model_dump().items() if value is not None and key not in _OURS}
        encoded = json.dumps(args | extra, sort_keys=True)
    except (ValueError, TypeError) as exc:
        raise ConfigError(f"engine={overrides!r} is not allowed: {exc}") from exc
    return EngineSettings(
        base=base,
        kv_cache_gib=serving.kv_cache_gib,
        tool_parser=serving.tool_parser,
        reasoning_parser=serving.reasoning_parser,
        start_timeout_s=serving.start_timeout_s,
        args=encoded,
    )


def check_engine_args(args: dict[str, Any], allowed: set[str]) -> None:
    """Refuses arguments that this vLLM does not know.

    Raises:
        ConfigError: An unknown argument, with the near names.
    """
    for key in args:
        if key not in allowed:
            raise ConfigError(f"engine={{{key!r}: ...}} is no setting of this vLLM. {near(key, allowed)[:600]}")
