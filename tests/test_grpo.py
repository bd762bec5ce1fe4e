"""The GRPO loss against TRL's and against the formulas, and training on a tiny random Llama."""

import importlib
import math
import statistics
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
for package in ("transformers", "peft"):
    pytest.importorskip(package)

from dspy_lora.adapters.base import resolve_base  # noqa: E402
from dspy_lora.errors import DataError, DivergedError  # noqa: E402
from dspy_lora.training.grpo.batch import Answer, Batch  # noqa: E402
from dspy_lora.training.grpo.loss import advantages, token_losses, token_weights  # noqa: E402
from dspy_lora.training.grpo.settings import GRPOSettings  # noqa: E402
from dspy_lora.training.grpo.trainer import GroupTrainer  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_TOKENS = 12


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Llama of 2 layers with a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("base")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({token: place for place, token in enumerate([*special, *letters])}, []))
    bpe.add_special_tokens(special)
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return resolve_base(str(folder))


@pytest.fixture
def make(base: Any, tmp_path: Path) -> Any:
    def build(parent: Path | None = None, **changes: Any) -> GroupTrainer:
        settings = GRPOSettings(**{"learning_rate": 1e-2, "r": 4, "adapter_dtype": "float32"} | changes)
        return GroupTrainer(settings, base, parent, temperature=0.7, max_tokens=MAX_TOKENS, folder=tmp_path)

    return build


def group(question: str, rewards: dict[str, float]) -> list[dict[str, Any]]:
    messages = [{"role": "system", "content": "Answer."}, {"role": "user", "content": question}]
    return [
        {"messages": messages, "completion": {"role": "assistant", "content": text}, "reward": reward}
        for text, reward in rewards.items()
    ]


GROUPS = [group("one?", {"good": 1.0, "bad": 0.0, "worse": 0.0}), group("two or three?", {"good": 1.0, "b": -1.0})]


def logps_of(trainer: GroupTrainer, text: str) -> float:
    """Log-probability of an answer to the first question."""
    [answer] = trainer._answers([group("one?", {text: 0.0})])
    return float(trainer._frozen_logps(Batch.of([(answer, 1.0)], 0, "cpu")).sum())


# -- advantages ----------------------------------------------------------------------------------------------------

REWARDS = st.lists(st.lists(st.floats(-2, 2), min_size=1, max_size=6), min_size=1, max_size=4)


@given(REWARDS)
def test_advantages_of_a_group_add_up_to_nothing_and_keep_its_order(groups):
    for scale in ("group", "batch", "none"):
        for rewards, gains in zip(groups, advantages(groups, scale), strict=True):
            assert sum(gains) == pytest.approx(0, abs=1e-6 * sum(map(abs, gains)) + 1e-9)
            assert [x for _, x in sorted(zip(rewards, gains, strict=True))] == sorted(gains)


@given(st.floats(-2, 2), st.integers(1, 9))
def test_equal_rewards_give_no_advantage(reward, answers):
    for scale in ("group", "batch", "none"):
        assert advantages([[reward] * answers, [0.0, 1.0]], scale)[0] == [0.0] * answers


def test_advantages_are_divided_by_what_was_asked_for():
    groups = [[1.0, 0.0, 0.0], [3.0, 1.0]]
    assert advantages(groups, "none")[1] == [1.0, -1.0]
    assert advantages(groups, "group")[1][0] == pytest.approx(1 / (math.sqrt(2) + 1e-4))
    assert advantages(groups, "batch")[1][0] == pytest.approx(1 / (statistics.stdev([1, 0, 0, 3, 1]) + 1e-4))


# -- the loss ------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_weights_average_as_the_papers_do(lengths):
    def whole(kind):
        return sum(n * w for n, w in zip(lengths, token_weights(lengths, kind, 9), strict=True))

    assert whole("grpo") == pytest.approx(1)
    assert whole("dapo") == pytest.approx(1)
    assert whole("dr_grpo") == pytest.approx(sum(lengths) / (len(lengths) * 9))
    assert [n * w * len(lengths) for n, w in zip(lengths, token_weights(lengths, "grpo", 9), strict=True)] == (
        pytest.approx([1] * len(lengths))
    )


@pytest.fixture(scope="module")
def trl_trainer() -> Any:
    """TRL's GRPOTrainer, without the vLLM that it would import."""
    import_utils = pytest.importorskip("trl.import_utils")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_utils, "is_vllm_available", lambda *args, **kwargs: False)
        return importlib.import_module("trl.trainer.grpo_trainer").GRPOTrainer


def trl_loss(trl_trainer: Any, logps: Any, inputs: dict[str, Any], settings: GRPOSettings) -> Any:
    """``GRPOTrainer._compute_loss`` on log-probabilities that are given."""
    from collections import defaultdict

    alone = types.SimpleNamespace(
        reduce=lambda tensor, reduction: tensor, gather=lambda tensor: tensor, num_processes=1
    )
    high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
    trainer = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logps, torch.zeros_like(logps), None),
        _metrics={"train": defaultdict(list)},
        _entropy_bonus_enabled=False,
        accelerator=alone,
        args=types.SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        aux_loss_enabled=False,
        beta=settings.beta,
        current_gradient_accumulation_steps=1,
        epsilon_high=high,
        epsilon_low=settings.epsilon,
        importance_sampling_level="token",
        loss_type=settings.loss_type,
        max_completion_length=MAX_TOKENS,
        model=types.SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
    )
    return trl_trainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize(("beta", "epsilon_high"), [(0.0, None), (0.1, 0.28)])
def test_loss_and_gradient_are_trl_s(trl_trainer, loss_type, beta, epsilon_high):
    settings = GRPOSettings(loss_type=loss_type, beta=beta, epsilon_high=epsilon_high)
    lengths, gains = [3, 5, 1, 4], [1.2, -0.7, 0.0, -0.5]
    answers = [Answer([7] * (place + 1), [9] * length, gains[place]) for place, length in enumerate(lengths)]
    weights = token_weights(lengths, loss_type, MAX_TOKENS)
    batch = Batch.of(list(zip(answers, weights, strict=True)), 0, "cpu")
    draw = torch.Generator().manual_seed(0)
    logps = -torch.rand(4, 5, generator=draw)
    old, reference = logps + torch.randn(4, 5, generator=draw), logps + torch.randn(4, 5, generator=draw)
    mine, theirs = logps.clone().requires_grad_(), logps.clone().requires_grad_()

    losses = token_losses(mine, old, batch.advantage, settings, reference if beta else None)
    loss = (losses * batch.weights).sum()
    left = batch.ids.shape[1] - 5
    inputs = {
        "prompt_ids": batch.ids[:, :left],
        "prompt_mask": batch.attention[:, :left],
        "completion_ids": batch.answers,
        "completion_mask": batch.mask,
        "advantages": batch.advantage,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": batch.mask.sum(),
    }
    expected = trl_loss(trl_trainer, theirs, inputs, settings)

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(mine.grad, theirs.grad)
    assert (losses.detach() != token_losses(logps, logps, batch.advantage, settings)).any()  # some ratio was clipped


# -- training ------------------------------------------------------------------------------------------------------


def test_log_probabilities_are_those_of_the_answer_alone_whatever_the_padding(make):
    from transformers import AutoModelForCausalLM

    trainer = make()
    answers = trainer._answers(GROUPS)
    batch = Batch.of([(answer, 1.0) for answer in answers], 0, "cpu")
    plain = AutoModelForCausalLM.from_pretrained(trainer.base.path)
    for row, answer in zip(trainer._frozen_logps(batch), answers, strict=True):
        ids = torch.tensor([answer.prompt + answer.tokens])
        logps = (plain(ids).logits[0].detach() / 0.7).log_softmax(-1)
        expected = [logps[len(answer.prompt) - 1 + at, token] for at, token in enumerate(answer.tokens)]
        torch.testing.assert_close(row[: len(answer.tokens)], torch.stack(expected), atol=1e-5, rtol=1e-4)


def test_an_answer_that_was_cut_off_is_not_taught_to_end(make):
    trainer = make()
    short, long = trainer._answers([group("one?", {"x" * (MAX_TOKENS - 1): 1.0, "x" * MAX_TOKENS: 0.0})])
    assert short.tokens[-1] == trainer.tokenizer.eos_token_id
    assert len(short.tokens) == len(long.tokens) == MAX_TOKENS and long.tokens[-1] != short.tokens[-1]


def test_steps_make_the_better_answer_likelier(make):
    trainer = make()
    before = {text: logps_of(trainer, text) for text in ("good", "bad")}
    for _ in range(5):
        figures = trainer.step(GROUPS)
    assert logps_of(trainer, "good") > before["good"]
    assert logps_of(trainer, "bad") - before["bad"] < logps_of(trainer, "good") - before["good"]
    assert figures["steps"] == 1 and figures["groups"] == 2 and figures["reward"] == pytest.approx(0.2)
    assert (trainer.folder / "adapter" / "adapter_model.safetensors").is_file()


def test_a_step_has_a_gradient_of_its_own(make):
    trainer = make(learning_rate=1e-12, max_grad_norm=1e9)
    first, second = trainer.step(GROUPS), trainer.step(GROUPS)
    assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-3) != 0


def test_parts_of_a_batch_add_up_to_the_batch(make):
    weights = []
    for size in (1, 8):
        trainer = make(micro_batch_size=size, loss_type="grpo")
        trainer.step(GROUPS)
        weights.append(trainer.weights)
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one.data, other.data, atol=2e-3, rtol=1e-2)


def test_groups_without_a_difference_change_nothing(make):
    trainer = make(weight_decay=0.1)
    before = [weight.detach().clone() for weight in trainer.weights]
    figures = trainer.step([group("one?", {"good": 1.0, "bad": 1.0})])
    assert figures["steps"] == 0 and figures["even_groups"] == 1
    assert all(torch.equal(one, other) for one, other in zip(before, trainer.weights, strict=True))


def test_further_iterations_see_ratios_and_are_clipped(make):
    free, tight = (
        make(num_iterations=6, learning_rate=1e-3, epsilon=low, epsilon_high=high)
        for low, high in ((0.99, 9.0), (0.01, 0.01))
    )
    start = logps_of(tight, "good")
    loose, clipped = (trainer.step(GROUPS) for trainer in (free, tight))
    assert loose["steps"] == clipped["steps"] == 6
    assert logps_of(tight, "good") > start
    answers = tight._answers(GROUPS)
    lowest = sum(len(each.tokens) * (-each.advantage - 0.01 * abs(each.advantage)) for each in answers)
    lowest /= sum(len(each.tokens) for each in answers)  # every ratio at its bound: more gains nothing
    assert clipped["loss"] >= lowest - 1e-5
    assert loose["loss"] < 1.5 * lowest < 0


def test_beta_holds_the_policy_near_its_start(make):
    free, held = make(), make(beta=50.0)
    first = held.step(GROUPS)
    assert first["kl"] == pytest.approx(0, abs=1e-6)  # measured before the step
    start = [weight.clone() for weight in held.start]
    for _ in range(4):
        last = held.step(GROUPS)
    for _ in range(5):
        free.step(GROUPS)
    assert last["kl"] > 0
    assert logps_of(held, "good") < logps_of(free, "good")
    assert all(torch.equal(one, other) for one, other in zip(start, held.start, strict=True))


def test_an_adapter_goes_on_from_its_parent(make, tmp_path):
    trainer = make(lora_dropout=0.5)
    for _ in range(3):
        trainer.step(GROUPS)
    after = logps_of(trainer, "good")
    parent = tmp_path / "parent"
    (tmp_path / "adapter").rename(parent)
    child = make(parent=parent, r=64, learning_rate=1e-3)
    assert logps_of(child, "good") == pytest.approx(after, abs=1e-4)
    assert child.model.peft_config["default"].r == 4
    child.step(GROUPS)
    assert logps_of(child, "good") > after


def test_a_loss_that_is_no_number_changes_nothing(make):
    trainer = make()
    trainer.step(GROUPS)
    before = [weight.detach().clone() for weight in trainer.weights]
    trainer.temperature = 1e-50
    with pytest.raises(DivergedError, match="learning_rate"):
        trainer.step(GROUPS)
    assert all(torch.equal(one, other) for one, other in zip(before, trainer.weights, strict=True))


@pytest.mark.parametrize("reward", [math.nan, math.inf, None])
def test_a_reward_that_is_no_finite_number_is_refused(make, reward):
    trainer = make()
    with pytest.raises(DataError, match=f"a reward is {reward!r}. The metric must return a finite number"):
        trainer.step([group("one?", {"good": 1.0, "bad": reward})])
    assert trainer.step(GROUPS)["steps"] == 1


def test_answers_that_do_not_fit_are_left_out(make):
    trainer = make(max_length=60)
    assert (
        trainer.step([group("one?", {"good": 1.0, "bad": 0.0}), group("x" * 100, {"a": 1.0, "b": 0.0})])["answers"] == 2
    )
    with pytest.raises(DataError, match="max_length=60"):
        trainer.step([group("x" * 100, {"a": 1.0, "b": 0.0})])


def test_moving_keeps_the_moments(make):
    moved, still = make(), make()
    for trainer in (moved, still):
        trainer.step(GROUPS)
    moved.move("cpu")
    for trainer in (moved, still):
        trainer.step(GROUPS)
    for one, other in zip(moved.weights, still.weights, strict=True):
        torch.testing.assert_close(one.data, other.data)
