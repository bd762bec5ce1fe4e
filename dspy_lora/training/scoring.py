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
        needed: Tokens that each answer must have room for: the reference's, and spare ones where the context has them.
        context: Tokens that a prompt and its answer may take together.
    """

    prompts: list[list[int]]
    rows: list[Row]
    signature: "type[dspy.Signature]"
    adapter: "dspy.Adapter"
    needed: list[int]
    context: int

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
        lengths = [len(ids) + 1 for ids in answers["input_ids"]]  # with the end-of-sequence token
        fitting = [ids if len(ids) + own <= context else [] for ids, own in zip(prompts, lengths, strict=True)]
        needed = [min(own + _SPARE_TOKENS, context - len(ids)) for ids, own in zip(fitting, lengths, strict=True)]
        return cls(fitting, list(rows), signature, adapter, needed, context)

    def batches(self, size: int) -> list[tuple[list[int], int]]:
        """Which rows are asked together, prompts of like length, and how many tokens their answers may take.

        That is what the longest reference answer of all rows needs, as far as the batch's longest prompt leaves the
        context room for it. A prompt that would leave a shorter one of the batch too little begins a batch of its own.

        Args:
            size: Most rows in a batch.

        Returns:
            Places of rows, and tokens. Rows without a prompt are in no batch.
        """
        longest = max((need for ids, need in zip(self.prompts, self.needed, strict=True) if ids), default=0)
        found: list[tuple[list[int], int]] = []
        for place in sorted((i for i, ids in enumerate(self.prompts) if ids), key=lambda i: len(self.prompts[i])):
            most = min(longest, self.context - len(self.prompts[place]))
            batch = found[-1][0] if found else []
            if batch and len(batch) < size and max(self.needed[i] for i in batch) <= most:
                found[-1] = [*batch, place], most
            else:
                found.append(([place], most))
        return found


def exact_match(model: Any, tokenizer: "PreTrainedTokenizerBase", questions: Questions, batch_size: int) -> float:
    """Share of the rows (0 to 1) that the model answers exactly, decoding greedily."""
    match = is_match(questions.signature, questions.adapter)
    hits = 0
    for batch, room in questions.batches(batch_size):
        texts = greedy(model, tokenizer, [questions.prompts[i] for i in batch], room, batch_size)
        hits += sum(match(text, questions.rows[i]) for text, i in zip(texts, batch, strict=True))
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
    # TRL has a mixture of experts return its router's logits, which transformers cannot match with the mask of a cache.
    routed = model.config.get_text_config().to_dict().get("output_router_logits", False)
    switches = {"output_router_logits": False} if routed else {}
    order = sorted((i for i, ids in enumerate(prompts) if ids), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    training = model.training
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids, mask = _left_padded([prompts[i] for i in batch], tokenizer.pad_token_id)
            ids, mask = ids.to(model.device), mask.to(model.device)
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, **switches)
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
