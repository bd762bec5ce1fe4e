"""The seedling's tokenizer: byte-level BPE of 8,192 tokens with a ChatML template that takes tools."""

from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from dspy_lora.seedling.chats import Chat, chats
from dspy_lora.seedling.sentences import Texts

VOCABULARY = 8192
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_CHATS = 20_000  # rendered chats that the merges are counted on, beside the text
_DIGITS = r"\p{N}"

# Hermes form: tools are listed in the system message, calls stand in <tool_call> tags.
CHAT_TEMPLATE = Path(__file__).parent / "base" / "chat_template.jinja"


def train_tokenizer(texts: list[str], corpus: Texts, folder: Path) -> None:
    """Counts merges on a sample of the text and on rendered chats, and writes the tokenizer's files.

    Args:
        texts: The pretraining texts.
        corpus: Where the chats' tasks take their texts from.
        folder: Written: tokenizer.json, tokenizer_config.json, chat_template.jinja.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_DIGITS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    sample = [line for text in texts for line in text[: 20 * 2**20].split("\n")]
    rendered = [m["content"] for chat in islice(chats(Random(1), "train", corpus), _CHATS) for m in chat.messages]
    tokenizer.train_from_iterator(sample + rendered, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END_OF_TEXT)
    fast.model_max_length = 2048
    fast.chat_template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    fast.save_pretrained(folder)


def chat_pieces(chat: Chat, template: Any) -> list[tuple[str, bool]]:
    """A chat as the template writes it, in pieces: ``(text, whether the model is to learn it)``.

    Args:
        chat: The chat; its last message is the assistant's.
        template: ``tokenizer.apply_chat_template``, used for chats with tools only (it is slower than the few lines
            here, which tests hold to it).
    """
    if chat.tools:
        *before, answer = chat.messages
        prompt = template(before, tools=chat.tools, add_generation_prompt=True, tokenize=False)
        return [(prompt, False), (f"{answer['content']}{END}\n", True)]
    pieces = []
    for index, message in enumerate(chat.messages):
        learn = message["role"] == "assistant" and (chat.learn_all or index == len(chat.messages) - 1)
        pieces.append((f"{START}{message['role']}\n", False))
        pieces.append((f"{message['content']}{END}\n", learn))
    return pieces
