"""How many tokens a text is to a model."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import dspy

from dspy_lora.lm import LoRALM

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

CountTokens = Callable[[str], int]

# UTF-8 bytes a token in the estimate. With cl100k (GPT-4) and with the Anthropic tokenizer in LiteLLM, contexts of 20
# rows from 22 English data sets have 4.6 bytes a token: the estimate is 1.5 times the truth and never below it. Python
# files have 4.0 and 3.7. Two sentences of Chinese have 2.4 with cl100k: there the estimate is 0.8 times the truth.
_BYTES_A_TOKEN = 3


@dataclass(frozen=True)
class TokenizerFile:
    """Counts with a ``tokenizer.json``, as the engine tokenizes a prompt: without special tokens around it.

    Copies and pickles carry the path alone; the tokenizer is loaded once a process. Safe from many threads.

    Attributes:
        path: The file.
    """

    path: str

    def __call__(self, text: str) -> int:
        """The number of tokens."""
        return len(_tokenizer(self.path).encode(text, add_special_tokens=False).ids)


def count_tokens_of(lm: dspy.BaseLM) -> CountTokens:
    """Finds the way to count a model's tokens.

    Args:
        lm: The LM that will read the text.

    Returns:
        For a LoRALM whose base lies on this disk with a ``tokenizer.json``: that tokenizer, whether the engine is here
        or on a server. For any other LM ``estimate_tokens``, and a line in the log says so; give
        ``ContextAssembler`` your own ``count_tokens`` where that is too rough.
    """
    folder = lm.base.folder if isinstance(lm, LoRALM) else None
    if folder is not None and (folder / "tokenizer.json").is_file():
        return TokenizerFile(str(folder / "tokenizer.json"))
    where = f"{folder} has no tokenizer.json" if folder else "its tokenizer is not on this disk"
    logger.warning("tokens of %s are estimated from the text's length: %s", lm.model, where)
    return estimate_tokens


def estimate_tokens(text: str) -> int:
    """A token for every 3 bytes of UTF-8, rounded up: for English and code more than large models need.

    For Chinese it may be a fifth too low, as for a model with a small vocabulary.
    """
    return -(-len(text.encode(errors="replace")) // _BYTES_A_TOKEN)


@functools.lru_cache(maxsize=8)
def _tokenizer(path: str) -> "Tokenizer":
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
    tokenizer.no_truncation()  # a file may ask for a cut, which would hide the tokens behind it
    tokenizer.no_padding()
    return tokenizer
