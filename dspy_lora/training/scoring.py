"""Greedy answers of a model in training, in batches, through transformers' own ``generate``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dspy_lora.training.data import Row, is_match, prompt_ids, render

if TYPE_CHECKING:
    import dspy
    from transformers import PreTrainedTokenizerBase

_SPARE_TOKENS = 8  # room beyond the longest reference answer, so that a wrong one is not cut into a right one


@dataclass(frozen=True)
class Questions:
    """Validation rows ready to be asked.

    Attributes:
        prompts: Token ids of each prompt.
        rows: The rows, in the same order.
        signature: Their task.
        adapter: The DSPy adapter that parses the answers.
        max_new_tokens: Tokens an answer may take.
    """

    prompts: list[list[int]]
    rows: list[Row]
    signature: "type[dspy.Signature]"
    adapter: "dspy.Adapter"
    max_new_tokens: int

    @classmethod
    def prepare(
        cls,
        tokenizer: "PreTrainedTokenizerBase",
        signature: "type[dspy.Signature]",
        adapter: "dspy.Adapter",
        rows: Sequence[Row],
        context: int,
        demos: Sequence[Row] = (),
    ) -> "Questions":
        """Renders and tokenises rows; those whose prompt and answer pass ``context`` tokens count as wrong later."""
        examples = render(signature, rows, adapter, demos)
        prompts = prompt_ids(tokenizer, [example["prompt"] for example in examples])
        answers = tokenizer([example["completion"][0]["content"] for example in examples], add_special_tokens=False)
        room = max((len(ids) for ids in answers["input_ids"]), default=0) + 1 + _SPARE_TOKENS
        fitting = [ids if len(ids) + room <= context else [] for ids in prompts]
        return cls(fitting, list(rows), signature, adapter, room)


def exact_match(model: Any, tokenizer: "PreTrainedTokenizerBase", questions: Questions, batch_size: int) -> float:
    """Share of the rows (0 to 1) that the model answers exactly, decoding greedily."""
    match = is_match(questions.signature, questions.adapter)
    texts = greedy(model, tokenizer, questions.prompts, questions.max_new_tokens, batch_size)
    hits = sum(match(text, row) for text, row in zip(texts, questions.rows, strict=True))
    return hits / len(questions.rows)


def greedy(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """Decodes greedily, prompts of like length together, padded on the left.

    Args:
        model: A causal language model, with or without a PEFT adapter; left in the mode it came in.
        tokenizer: Its tokenizer.
        prompts: Token ids; an empty prompt is answered with an empty text.
        max_new_tokens: Tokens an answer may take.
        batch_size: Prompts in one batch.

    Returns:
        The answers without special tokens, in the prompts' order.
    """
    import torch
    from transformers import GenerationConfig

    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    order = sorted((i for i, ids in enumerate(prompts) if ids), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    training = model.training
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids, mask = _left_padded([prompts[i] for i in batch], tokenizer.pad_token_id)
            ids, mask = ids.to(model.device), mask.to(model.device)
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
            answers = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
            for i, text in zip(batch, answers, strict=True):
                texts[i] = text
    model.train(training)
    return texts


def _left_padded(prompts: list[list[int]], pad: int) -> tuple[Any, Any]:
    """Token ids and attention mask, each (prompts, longest prompt)."""
    import torch

    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    return ids, mask
