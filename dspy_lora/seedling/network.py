"""The network that is trained: Llama, named as in ``transformers.LlamaForCausalLM``, packed rows in, losses out."""

from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 10,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "bos_token_id": None,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}

Mask: TypeAlias = torch.Tensor | BlockMask


class Attention(nn.Module):
    """Grouped-query attention with rotary positions (the halves of a head are rotated against each other)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, self.dim = config["hidden_size"], config["head_dim"]
        heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
        self.q_proj = nn.Linear(width, heads * self.dim, bias=False)
        self.k_proj = nn.Linear(width, kv * self.dim, bias=False)
        self.v_proj = nn.Linear(width, kv * self.dim, bias=False)
        self.o_proj = nn.Linear(heads * self.dim, width, bias=False)

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], mask: Mask) -> torch.Tensor:
        """``x`` [rows, tokens, width]."""
        rows, tokens, _ = x.shape
        q, k, v = (
            p(x).view(rows, tokens, -1, self.dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = attend(rotate(q, rope), rotate(k, rope), v, mask)
        result: torch.Tensor = self.o_proj(out.transpose(1, 2).reshape(rows, tokens, -1))
        return result


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., width]."""
        result: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class Block(nn.Module):
    """One layer."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["rms_norm_eps"]
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = nn.RMSNorm(width, eps)
        self.post_attention_layernorm = nn.RMSNorm(width, eps)

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], mask: Mask) -> torch.Tensor:
        """``x`` [rows, tokens, width]."""
        x = x + self.self_attn(self.input_layernorm(x), rope, mask)
        out: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Llama(nn.Module):
    """The whole network; ``model.*`` are the names of the Hugging Face weights."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config["vocab_size"], config["hidden_size"]),
                "layers": nn.ModuleList(Block(config) for _ in range(config["num_hidden_layers"])),
                "norm": nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"]),
            }
        )
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                scale = (2 * config["num_hidden_layers"]) ** -0.5 if "o_proj" in name or "down_proj" in name else 1.0
                nn.init.normal_(weight, std=config["initializer_range"] * scale)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Logits [rows, tokens, vocabulary] of token ids and positions [rows, tokens]."""
        rope = rotation(positions, self.config["head_dim"], self.config["rope_parameters"]["rope_theta"])
        x = self.model["embed_tokens"](tokens)
        for layer in self.model["layers"]:
            x = layer(x, rope, mask)
        return F.linear(self.model["norm"](x), self.model["embed_tokens"].weight)


def rotation(positions: torch.Tensor, dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of each position's angles, [rows, 1, tokens, dim]."""
    frequencies = theta ** (-torch.arange(0, dim, 2, device=positions.device).float() / dim)
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary position embedding of ``x`` [rows, heads, tokens, dim]."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> torch.Tensor:
    """Attention under a mask; ``q`` [rows, heads, tokens, dim], ``k`` and ``v`` with fewer heads."""
    if isinstance(mask, BlockMask):
        out: torch.Tensor = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        return out
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def mask_within(documents: torch.Tensor, flex: bool) -> Mask:
    """A causal mask that stays inside a document.

    Args:
        documents: Number of each token's document, [rows, tokens].
        flex: FlexAttention's block mask (needs a GPU); else a dense one, [rows, 1, tokens, tokens].
    """
    rows, tokens = documents.shape
    if not flex:
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=documents.device).tril()
        return (causal & (documents[:, :, None] == documents[:, None, :]))[:, None]

    def inside(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query >= key) & (documents[row, query] == documents[row, key])

    return create_block_mask(inside, rows, None, tokens, tokens, device=documents.device)
