"""What is tuned at a time: one product, at one rank and one number of tokens."""

from dataclasses import dataclass

from dspy_lora.engine.gpu_shapes import Product


@dataclass(frozen=True)
class Problem:
    """A product as an engine computes it.

    Attributes:
        product: Which product.
        rank: The engine's ``max_lora_rank``, to which vLLM pads every adapter.
        tokens: Tokens of the batch, m.
        max_loras: The engine's ``max_loras``.
    """

    product: Product
    rank: int
    tokens: int
    max_loras: int

    @property
    def outputs(self) -> int:
        """Outputs of a slice, the largest: n."""
        return self.product.sizes(self.rank)[1]

    @property
    def inputs(self) -> int:
        """Inputs that an output sums over: k."""
        return self.product.sizes(self.rank)[0]

    def __str__(self) -> str:
        return f"{self.product} at rank {self.rank}, {self.tokens} tokens, max_loras {self.max_loras}"
