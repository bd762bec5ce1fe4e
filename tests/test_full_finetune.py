"""A fully fine-tuned copy of a small model: which weights train, what is written, what is refused."""

import argparse
import json

import dspy
import pytest

torch = pytest.importorskip("torch")
for package in ("transformers", "peft", "trl", "datasets"):
    pytest.importorskip(package)

from dspy_lora.adapters.base import SEEDLING_FOLDER, resolve_base  # noqa: E402
from dspy_lora.config import load_config  # noqa: E402
from dspy_lora.training import command, sft  # noqa: E402
from dspy_lora.training.sft import TrainConfig, train  # noqa: E402

SIGNATURE = dspy.Signature("text -> label", "Say which animal it is.")
ROWS = [{"text": f"Number {i} {'barks' if i % 2 else 'meows'}.", "label": "dog" if i % 2 else "cat"} for i in range(8)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The seedling's tokenizer and shape, narrower, with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("base")
    narrow = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.from_pretrained(SEEDLING_FOLDER, **narrow, **heads)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(SEEDLING_FOLDER).save_pretrained(folder)
    return folder


def settings(base, folder, **changes):
    steps = {"max_steps": 2, "batch_size": 4, "eval_rows": 1, "eval_every": 2, "learning_rate": 1e-2}
    rows = {"train": ROWS, "dev": ROWS[:2]}
    whole = rows | steps | changes
    return TrainConfig(base=str(base), signature=SIGNATURE, output_dir=folder, full_finetune=True, **whole)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    return train(settings(base, tmp_path_factory.mktemp("run") / "copy"))


def test_every_weight_trains_and_the_copy_is_a_model_of_its_own(base, trained):
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    before, after = (load_file(folder / "model.safetensors") for folder in (base, trained / "model"))
    assert before.keys() == after.keys()
    assert all(after[name].dtype == torch.bfloat16 for name in after)
    matrices = [name for name in after if after[name].dim() == 2]
    assert all((before[name].float() != after[name].float()).any() for name in matrices)
    copy = resolve_base(str(trained / "model"))
    assert copy.revision != resolve_base(str(base)).revision
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (copy.path, base))
    assert ours.chat_template == theirs.chat_template and ours("A word.") == theirs("A word.")
    assert {path.name for path in trained.iterdir()} == {".training", "loss.png", "metrics.jsonl", "model", "run.json"}


def test_the_card_says_that_everything_was_trained(trained):
    card = json.loads((trained / "run.json").read_text())
    assert card["config"]["full_finetune"] is True
    assert card["result"]["trainable_parameters"] == card["result"]["parameters"] > 0
    assert 0 <= card["result"]["base_exact_match"] <= 1


def test_a_finished_copy_is_left_as_it_is(base, trained, capsys):
    train(settings(base, trained), resume=True)
    assert "is finished already" in capsys.readouterr().out


@pytest.mark.parametrize("step", [3, 4, None])
def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(step, base, tmp_path, monkeypatch, capsys):
    """Killed between two checkpoints, at its last step, and after it."""
    from dspy_lora.training.watch import Watch

    def on_step_end(self, args, state, control, **_):
        if state.global_step == step:
            raise KeyboardInterrupt

    def save_model(*_):
        raise KeyboardInterrupt

    longer = {"max_steps": 4, "select_by": "loss", "adapter_dtype": "float32"}
    whole, killed = (settings(base, tmp_path / name, **longer) for name in ("whole", "killed"))
    train(whole)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if step is None:
            patch.setattr(sft, "save_model", save_model)
        else:
            patch.setattr(Watch, "on_step_end", on_step_end)
        train(killed)
    train(killed, resume=True)
    assert f"going on from step {2 if step else 4}, " in capsys.readouterr().out
    first, second = ((config.output_dir / "model" / "model.safetensors").read_bytes() for config in (whole, killed))
    assert first == second


@pytest.mark.parametrize(
    ("change", "named"),
    [({"qlora": True}, "qlora"), ({"use_dora": True}, "use_dora"), ({"registry": "r"}, "--publish")],
)
def test_what_makes_an_adapter_is_refused(tmp_path, change, named):
    with pytest.raises(ValueError, match=f"not go together with .*{named}"):
        settings("seedling", tmp_path, **change)


def test_the_command_takes_a_tenth_of_the_domains_learning_rate(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)

    def rate(*words):
        args = parser.parse_args(["--domain", "legal", "--data", str(tmp_path), *words])
        return command.plan(args, load_config(), "legal").learning_rate

    domain = load_config().domain("legal").learning_rate
    assert rate() == domain
    assert rate("--full-finetune") == pytest.approx(domain / 10)
    assert rate("--full-finetune", "--learning-rate", "0.5") == 0.5
