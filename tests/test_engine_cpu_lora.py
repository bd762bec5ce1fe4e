"""LoRA on the CPU: by adapter, with the same results as token by token, and nothing for tokens without an adapter."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

SLOTS, RANK, IN, WIDTHS = 4, 8, 24, (16, 8)
LAYERS = st.lists(st.tuples(st.integers(-1, SLOTS - 1), st.integers(1, 40)), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def cpu_lora():
    from dspy_lora.engine import cpu_lora

    return cpu_lora


@pytest.fixture(scope="module")
def weights():
    """For each slice A, [slots, 1, rank, in], and B, [slots, 1, out, rank]."""
    generator = torch.Generator().manual_seed(0)
    a = tuple(torch.randn(SLOTS, 1, RANK, IN, generator=generator) for _ in WIDTHS)
    b = tuple(torch.randn(SLOTS, 1, width, RANK, generator=generator) for width in WIDTHS)
    return a, b


def token_by_token(y, x, weights, slots, scale=1.0):
    """What LoRA is, [tokens, sum of widths]."""
    expected = y.clone()
    for token, slot in enumerate(slots):
        if slot >= 0:
            expected[token] += scale * torch.cat(
                [b[slot, 0] @ (a[slot, 0] @ x[token]) for a, b in zip(*weights, strict=True)]
            )
    return expected


def batch(slots):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(slots), sum(WIDTHS), generator=generator), torch.randn(len(slots), IN, generator=generator)


@settings(max_examples=60)
@given(runs=LAYERS)
def test_any_batch_gets_what_each_token_gets_alone(cpu_lora, weights, runs):
    slots = [slot for slot, length in runs for _ in range(length)]
    y, x = batch(slots)
    expected = token_by_token(y, x, weights, slots, scale=2.0)
    cpu_lora.ByAdapter.of(torch.tensor(slots)).apply(y, x, *weights, 2.0)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=60)
@given(slots=st.lists(st.integers(-1, 11), min_size=1, max_size=200))
def test_tiles_have_at_most_twice_the_rows_that_are_needed(cpu_lora, slots):
    tiles = cpu_lora.Tiles.of(torch.tensor(slots))
    with_adapter = [slot for slot in slots if slot >= 0]
    if not with_adapter:
        assert tiles is None
        return
    assert len(tiles.slots) <= 2 * len(set(with_adapter))
    assert len(tiles.rows) <= 2 * len(with_adapter) + len(tiles.slots)
    height = len(tiles.rows) // len(tiles.slots)
    assert torch.equal(tiles.rows[tiles.places], tiles.tokens)
    assert [slots[token] for token in tiles.tokens] == tiles.slots[tiles.places // height].tolist()


def test_prompts_are_multiplied_in_place_and_single_tokens_in_tiles(cpu_lora):
    groups = cpu_lora.ByAdapter.of(torch.tensor([0] * 40 + [1, 2, -1, 1] + [3] * 50 + [-1] * 60))
    assert groups.runs == ((0, 0, 40), (3, 44, 94))
    assert groups.tiles is not None
    assert groups.tiles.tokens.tolist() == [40, 43, 41]


def wrapper(kind, tokens):
    """A punica wrapper of vLLM whose slots 0 to 3 hold the adapters 11 to 14; a token's 0 is no adapter."""
    from vllm.lora.layers import LoRAMapping

    punica = kind(256, 64, "cpu")
    mapping = LoRAMapping(tuple(tokens), tuple(tokens), is_prefill=True)
    punica.update_metadata(mapping, [11, 12, 13, 14], SLOTS, 100)
    return punica


TOKENS = [11, 0, 13, 14, 0, 14]  # adapter ids
TOKEN_SLOTS = [0, -1, 2, 3, -1, 3]


def test_vllm_s_interface_gets_the_same_for_every_kind_of_layer(cpu_lora, weights):
    punica = wrapper(cpu_lora.GroupedPunica, TOKENS)
    y, x = batch(TOKENS)
    expected = token_by_token(y, x, weights, TOKEN_SLOTS)
    punica.add_lora_linear(y, x, *weights, 1.0, WIDTHS)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)

    [a, _], [b, _] = weights
    y, x = batch(TOKENS)
    expected = token_by_token(y[:, : WIDTHS[0]], x, ((a,), (b,)), TOKEN_SLOTS)
    rest = y[:, WIDTHS[0] :].clone()  # logits of padding, which no adapter touches
    punica.add_lora_logits(y, x, a, b, 1.0)
    torch.testing.assert_close(y, torch.cat([expected, rest], dim=1), rtol=1e-4, atol=1e-4)

    rows, y = torch.ones(len(TOKENS), RANK), torch.zeros(len(TOKENS), WIDTHS[0])
    punica.add_lora_embedding(y, rows, b)
    expected = torch.stack([b[slot, 0].sum(1) if slot >= 0 else torch.zeros(WIDTHS[0]) for slot in TOKEN_SLOTS])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_a_batch_without_adapters_is_left_alone(cpu_lora, weights):
    punica = wrapper(cpu_lora.GroupedPunica, [0, 0, 0])
    y, x = batch([0, 0, 0])
    before = y.clone()
    punica.add_lora_linear(y, x, *weights, 1.0, WIDTHS)
    punica.add_lora_logits(y, x, weights[0][0], weights[1][0], 1.0)
    assert torch.equal(y, before)


def test_vllm_s_own_path_gives_the_base_model_s_tokens_the_last_adapter(weights):
    """The reason for this module beside speed."""
    import vllm

    if not vllm.__version__.startswith("0.32."):
        pytest.skip("vllm: 0.33 has mended it")
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    punica = wrapper(PunicaWrapperCPU, TOKENS)
    y, x = batch(TOKENS)
    last_for_none = token_by_token(y, x, weights, [slot if slot >= 0 else SLOTS - 1 for slot in TOKEN_SLOTS])
    punica.add_lora_linear(y, x, *weights, 1.0, WIDTHS)
    torch.testing.assert_close(y, last_for_none, rtol=1e-4, atol=1e-4)


def test_the_base_model_answers_the_same_among_calls_to_twelve_adapters(make_lm):
    """All slots are taken, so that the last one holds an adapter."""
    from dspy_lora import load_config

    prompts = [f"Question {number}: what is asked here?" for number in range(4)]
    base = make_lm()
    alone = [base(prompt) for prompt in prompts]
    lms = [base, *(make_lm(domain) for domain in load_config().domains)]
    calls = [(lm, prompt) for prompt in prompts for lm in lms]
    with ThreadPoolExecutor(len(calls)) as pool:
        answers = list(pool.map(lambda call: call[0](call[1]), calls))
    assert [answer for (lm, _), answer in zip(calls, answers, strict=True) if lm is base] == alone
    assert any(answer not in alone for answer in answers)
