"""Which LoRA products vLLM computes on a GPU for a model, from its config.json."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from dspy_lora.errors import ConfigError

Op = Literal["shrink", "expand"]

# Dense decoders whose layers vLLM fuses into qkv, o, gate_up and down.
_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Product:
    """One call of a kernel, for all the slices of a fused linear module.

    Attributes:
        op: ``"shrink"`` multiplies a module's input with A, ``"expand"`` the result with B.
        widths: Of each slice, the inputs of A (shrink) or the outputs of B (expand).
    """

    op: Op
    widths: tuple[int, ...]

    @property
    def slices(self) -> int:
        """Number of slices: 3 for qkv, 2 for gate_up, else 1."""
        return len(self.widths)

    def sizes(self, rank: int) -> tuple[int, int]:
        """Inputs that an output sums over, and outputs of a slice, the largest: k and n."""
        return (self.width, rank) if self.op == "shrink" else (rank, self.width)

    @property
    def width(self) -> int:
        """The width by which vLLM looks a setting up: of unequal slices the largest (lora_expand_op.py, MAX_N)."""
        return max(self.widths)

    def __str__(self) -> str:
        even = len(set(self.widths)) == 1
        return f"{self.op} {f'{self.slices} x {self.width}' if even else '+'.join(map(str, self.widths))}"


def products(config: dict[str, Any]) -> dict[Product, int]:
    """Lists the products of a decoder layer on one GPU (no tensor parallelism).

    Args:
        config: A model's config.json.

    Returns:
        How often a layer computes each distinct product.

    Raises:
        ConfigError: Not a dense model of a known type, or a size is missing.
    """
    _require_dense(config)
    hidden, inner = _size(config, "hidden_size"), _size(config, "intermediate_size")
    heads = _size(config, "num_attention_heads")
    head = _size(config, "head_dim") if config.get("head_dim") is not None else hidden // heads
    queries = heads * head
    keys = head * (_size(config, "num_key_value_heads") if config.get("num_key_value_heads") is not None else heads)
    modules = [(hidden, (queries, keys, keys)), (queries, (hidden,)), (hidden, (inner, inner)), (inner, (hidden,))]
    found: Counter[Product] = Counter()
    for inputs, outputs in modules:
        found[Product("shrink", (inputs,) * len(outputs))] += 1
        found[Product("expand", outputs)] += 1
    return dict(found)


def _require_dense(config: dict[str, Any]) -> None:
    kind = config.get("model_type")
    if kind not in _MODEL_TYPES:
        raise ConfigError(
            f"model_type {kind!r}: tiles are tuned for {', '.join(_MODEL_TYPES)}. Other models take the usual ones; "
            "mixtures of experts and models of text and images have other kernels or modules."
        )
    if experts := sorted(key for key in config if "experts" in key and config[key]):
        raise ConfigError(f"a mixture of experts ({', '.join(experts)}): tiles are tuned for dense models only.")


def _size(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"config.json has {key} {value!r}: give the model's own config.json, with a whole number.")
    return value
