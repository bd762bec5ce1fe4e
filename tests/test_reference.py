"""Every bundled adapter answers as transformers and PEFT do: float32, greedy, the same tokens."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from random import Random

import dspy
import pytest
from dspy import lm15

from dspy_lora import LoRALM
from dspy_lora.adapters.registry import PACKAGED_ROOT, AdapterRegistry
from dspy_lora.config import load_config
from dspy_lora.demo import QUESTIONS
from dspy_lora.seedling.sentences import Texts

PROMPTS = 9  # for each adapter
NEW_TOKENS = 40
SAME = 0.98  # share of prompts with the same tokens
APART = 1e-3  # difference of log-probabilities below which two tokens count as equally likely

pytestmark = pytest.mark.timeout(900)


def messages(domain: str) -> list[list[dict[str, str]]]:
    """Prompts of a domain's program: the demo's questions and texts that its training never saw."""
    rng = Random(domain)
    texts = [*QUESTIONS[domain], *(Texts().text(rng, "heldout") for _ in range(PROMPTS - len(QUESTIONS[domain])))]
    signature = load_config().domain(domain).signature()
    return [dspy.ChatAdapter().format(signature, [], {"text": text}) for text in texts]


@pytest.fixture(scope="module")
def reference():
    """Token ids by prompt, and the log-probabilities after any tokens, from transformers and PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = PACKAGED_ROOT.parent / "base"
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    registry = AdapterRegistry(PACKAGED_ROOT)
    first, *others = [registry.resolve(domain) for domain in QUESTIONS]
    peft = PeftModel.from_pretrained(model, first.path, adapter_name=first.adapter)
    for revision in others:
        peft.load_adapter(revision.path, adapter_name=revision.adapter)

    def prompt_ids(prompt: list[dict[str, str]]) -> "torch.Tensor":
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids

    @torch.inference_mode()
    def answer(domain: str, prompt: list[dict[str, str]]) -> list[int]:
        peft.set_adapter(domain)
        ids = prompt_ids(prompt)
        out = peft.generate(input_ids=ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        return out[0, ids.shape[1] :].tolist()

    @torch.inference_mode()
    def logprobs(domain: str, prompt: list[dict[str, str]], after: list[int]) -> "torch.Tensor":
        peft.set_adapter(domain)
        ids = torch.cat([prompt_ids(prompt), torch.tensor([after], dtype=torch.long)], dim=1)
        return peft(input_ids=ids).logits[0, -1].log_softmax(-1)

    return answer, logprobs


def served(lm: LoRALM, prompt: list[dict[str, str]]) -> list[int]:
    """Token ids of the engine's greedy answer, the end-of-sequence token among them."""
    system, user = (message["content"] for message in prompt)
    config = lm15.Config(max_tokens=NEW_TOKENS, temperature=0.0, logprobs=1)
    response = lm.engine.complete(lm15.Request(lm.model, (lm15.Message.user(user),), system=system, config=config))
    return [token.token_id for token in response.logprobs]


def test_all_adapters_give_the_tokens_that_peft_gives(reference):
    answer, logprobs = reference
    lm = LoRALM("seedling", engine={"dtype": "float32"}, cache=False)
    lms = {domain: lm.copy(domain=domain) for domain in QUESTIONS}
    asked = [(domain, prompt) for domain in QUESTIONS for prompt in messages(domain)]
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda each: served(lms[each[0]], each[1]), asked))
    lm.kill()
    same = 0
    for (domain, prompt), ours in zip(asked, answers, strict=True):
        theirs = answer(domain, prompt)
        if ours == theirs:
            same += 1
            continue
        at = next(i for i, (a, b) in enumerate(itertools.zip_longest(ours, theirs)) if a != b)
        after = logprobs(domain, prompt, theirs[:at])
        assert abs(after[ours[at]] - after[theirs[at]]) < APART, f"{domain}: {prompt[-1]['content'][:80]!r}"
    assert same / len(asked) >= SAME
