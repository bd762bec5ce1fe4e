"""A base model of a known shape and adapters for it, all of random weights: what speed depends on, with no download."""

import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

from dspy_lora.adapters.base import SEEDLING_FOLDER, resolve_base
from dspy_lora.adapters.registry import AdapterRegistry
from dspy_lora.config import Rank

# hidden size, layers, heads, key-value heads, size of a head, intermediate size, vocabulary
SHAPES = {
    "8b": (4096, 32, 32, 8, 128, 14336, 128256),  # Llama 3 8B
    "4b": (2560, 36, 32, 8, 128, 9728, 151936),  # Qwen3 4B's sizes in a Llama
    "0.6b": (1024, 28, 16, 8, 128, 3072, 151936),  # Qwen3 0.6B's
    "tiny": (128, 2, 4, 2, 32, 256, 8192),  # tries the benchmark out on a CPU
}
RANKS: tuple[int, ...] = get_args(Rank)
_DEVIATION = 0.02  # of the adapters' weights


def make_model(shape: str, folder: Path) -> Path:
    """Writes a model's folder: configuration, tokenizer, and a file of weights that says what they are and holds none.

    The file is sparse: it takes no space. The engine fills the weights itself (``load_format="dummy"``).

    Args:
        shape: A key of ``SHAPES``.
        folder: Where to.

    Returns:
        The folder.
    """
    hidden, layers, heads, kv_heads, head, inner, vocabulary = SHAPES[shape]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "head_dim": head,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "intermediate_size": inner, "vocab_size": vocabulary, "max_position_embeddings": 8192, "hidden_act": "silu",
        "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
        "tie_word_embeddings": False,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    _write_tokenizer(folder, vocabulary)
    tensors = [(f"{module}.weight", [rows, columns]) for module, columns, rows in _modules(shape)]
    _write_header(folder / "model.safetensors", [("model.embed_tokens.weight", [vocabulary, hidden]), *tensors])
    return folder


def publish_adapters(shape: str, base: Path, registry: Path, names: Sequence[str], rank: int) -> None:
    """Publishes an adapter a name, each with weights of its own on all seven projections.

    Args:
        shape: The base's.
        base: Its folder.
        registry: Where to.
        names: The adapters'.
        rank: Of each.
    """
    import torch
    from safetensors.torch import save_file

    modules = list(_modules(shape))
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none", "task_type": "CAUSAL_LM",
        "target_modules": sorted({module.rpartition(".")[2] for module, _, _ in modules}),
        "base_model_name_or_path": str(base),
    }  # fmt: skip
    folder = registry.with_name("adapter")
    for seed, name in enumerate(names):
        generator = torch.Generator().manual_seed(seed)

        def drawn(*size: int) -> "torch.Tensor":
            return (torch.randn(size, generator=generator) * _DEVIATION).bfloat16()  # noqa: B023 - called in this turn

        weights = {}
        for module, inputs, outputs in modules:
            weights[f"base_model.model.{module}.lora_A.weight"] = drawn(rank, inputs)
            weights[f"base_model.model.{module}.lora_B.weight"] = drawn(outputs, rank)
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(weights, folder / "adapter_model.safetensors")
        AdapterRegistry(registry).publish(folder, name, base=resolve_base(str(base)))
        shutil.rmtree(folder)


def _modules(shape: str) -> Iterator[tuple[str, int, int]]:
    """Every projection: its name, inputs and outputs."""
    hidden, layers, heads, kv_heads, head, inner, _ = SHAPES[shape]
    sizes = {
        "self_attn.q_proj": (hidden, heads * head), "self_attn.k_proj": (hidden, kv_heads * head),
        "self_attn.v_proj": (hidden, kv_heads * head), "self_attn.o_proj": (heads * head, hidden),
        "mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner), "mlp.down_proj": (inner, hidden),
    }  # fmt: skip
    for layer, (name, (inputs, outputs)) in itertools.product(range(layers), sizes.items()):
        yield f"model.layers.{layer}.{name}", inputs, outputs


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    """The seedling's tokenizer, with words that no text has for the tokens that it lacks."""
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(SEEDLING_FOLDER / name, folder)
    tokenizer = json.loads((SEEDLING_FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    known = tokenizer["model"]["vocab"]
    known.update({f"<{token}>": token for token in range(len(known), vocabulary)})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")


def _write_header(file: Path, tensors: Sequence[tuple[str, list[int]]]) -> None:
    """A safetensors file's header, and as much nothing after it as its tensors would take."""
    header, end = {}, 0
    for name, (rows, columns) in tensors:
        start, end = end, end + 2 * rows * columns
        header[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)
