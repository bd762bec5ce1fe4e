"""Merging: what is written is what the unmerged model was, in full or not at all."""

import argparse
import dataclasses
import itertools
import json
import math
import resource
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspy_lora.adapters.base import SEEDLING_FOLDER, resolve_base
from dspy_lora.adapters.checks import check_adapter
from dspy_lora.adapters.registry import PACKAGED_ROOT, AdapterRegistry
from dspy_lora.errors import AdapterError, ConfigError, DataError, PublishError, UnknownAdapterError
from dspy_lora.merging import METHODS, Check, command, merge_adapters, merge_into_base, model, to_plain_lora
from dspy_lora.merging.agreement import Answers
from dspy_lora.merging.plain_lora import truncate
from dspy_lora.merging.source import find_source, record

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
# PEFT's words on the adapters that the tests make of a base with tied embeddings.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model (has|with) .tie_word_embeddings=True."),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to .True."),
]

save_file = pytest.importorskip("safetensors.torch").save_file
load_file = pytest.importorskip("safetensors.torch").load_file

ROWS = [{"question": "What happened to the letter?"}, {"question": "Name a day."}, {"question": "The team is in Rome."}]
ANY = Check(ROWS[:1], max_tokens=2, least_agreement=0.0)
SAME = Check(ROWS, max_tokens=3, least_agreement=1.0)
ATTENTION, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The seedling's first two layers: as fast as a made-up model, with a real tokenizer and tied embeddings."""
    folder = tmp_path_factory.mktemp("bases") / "slice"
    shutil.copytree(SEEDLING_FOLDER, folder)
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in weights.items() if "layers." not in k or "layers.0." in k or "layers.1." in k}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def make(base, tmp_path_factory):
    """Makes an adapter of the slice with random weights; returns its folder."""

    def make(seed=0, size=0.05, metadata=None, on=None, **config):
        torch.manual_seed(seed)
        plain = {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]}
        model = peft.get_peft_model(load(on or base), peft.LoraConfig(task_type="CAUSAL_LM", **(plain | config)))
        for weight in (weight for weight in model.parameters() if weight.requires_grad):
            weight.data += size * torch.randn_like(weight)
        folder = tmp_path_factory.mktemp("adapter") / "it"
        model.save_pretrained(folder)
        if metadata is not None:
            (folder / "metadata.json").write_text(json.dumps(metadata))
        return folder

    return make


@pytest.fixture(scope="module")
def first(make):
    return make(1)


@pytest.fixture(scope="module")
def second(make):
    return make(2, lora_alpha=2)


def change(folder, module):
    """What a plain adapter adds to a module's weight."""
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(folder / "adapter_model.safetensors")
    a, b = (weights[f"base_model.model.{module}.lora_{side}.weight"].float() for side in "AB")
    return b @ a * config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])


def modules(folder):
    """The modules that an adapter's tensors are for."""
    names = load_file(folder / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model.").split(".lora_")[0] for name in names}


def logits(model):
    with torch.inference_mode():
        return model(input_ids=torch.arange(20, 40)[None]).logits


def unmerged(base, folder):
    return peft.PeftModel.from_pretrained(load(base), folder)


def left(folder):
    return sorted(path.name for path in folder.rglob("*") if path.name != ".lock")


# -- into the base -----------------------------------------------------------------------------------------------------


def test_a_bundled_adapter_into_the_seedling(tmp_path):
    check = Check([{"text": row["question"]} for row in ROWS[:2]], max_tokens=8, least_agreement=1.0)
    merged = merge_into_base("legal", tmp_path / "out", base="seedling", registry=PACKAGED_ROOT, check=check)
    assert merged.dtype == "bfloat16"
    assert 0 < merged.agreement.largest_difference < 1
    source = AdapterRegistry(PACKAGED_ROOT).resolve("legal")
    before, after = (load_file(folder / "model.safetensors") for folder in (SEEDLING_FOLDER, tmp_path / "out"))
    for module in ("model.layers.3.mlp.down_proj", "model.layers.9.self_attn.v_proj"):
        exact = before[f"{module}.weight"].float() + change(source.path, module)
        error = (after[f"{module}.weight"].float() - exact).abs()
        assert after[f"{module}.weight"].dtype == torch.bfloat16
        assert (error <= 2**-8 * exact.abs() + 1e-7).all()  # rounded once: bfloat16 has 8 bits
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    text = "<|im_start|>user\nThe Party's rights, 1999"
    tokenizers = [transformers.AutoTokenizer.from_pretrained(each) for each in (SEEDLING_FOLDER, tmp_path / "out")]
    assert tokenizers[0](text).input_ids == tokenizers[1](text).input_ids
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    lineage = json.loads((tmp_path / "out" / "metadata.json").read_text())["merge"]
    assert (lineage["parents"][0]["adapter"], lineage["parents"][0]["revision"]) == (source.ref, source.revision)
    assert lineage["agreement"][0]["equal"] == 1.0
    assert resolve_base(str(tmp_path / "out")).revision != source.base


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": list(range(20, 40))},
    ],
    ids=lambda config: "-".join(map(str, config)),
)
def test_what_vllm_cannot_serve_into_the_base(make, base, tmp_path, config):
    folder = make(3, **config)
    merged = merge_into_base(folder, tmp_path / "out", base=base, check=ANY)
    model, adapted = load(tmp_path / "out"), unmerged(base, folder)
    assert merged.agreement.largest_difference < 0.2
    far, near = (logits(load(base)) - logits(adapted)).abs().max(), (logits(model) - logits(adapted)).abs().max()
    assert near < 0.05 * far
    untied = "lm_head" in str(config) or "embed_tokens" in str(config)
    assert model.config.tie_word_embeddings is not untied
    kept = "lm_head" if "embed_tokens" in str(config) else "model.embed_tokens"
    if "trainable_token_indices" not in config:
        assert torch.equal(model.get_submodule(kept).weight, load(base).get_submodule(kept).weight)


def test_a_head_that_is_untied_wrongly_shows_in_the_answers(first, base, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "_untie", lambda whole, _: whole.get_output_embeddings().weight.data.mul_(0.5))
    assert merge_into_base(first, tmp_path / "out", base=base, check=ANY).agreement.largest_difference > 0.2


def test_an_adapter_of_a_qlora_run(make, base, tmp_path, capsys):
    qlora = {"config": {"qlora": {"enabled": True}}, "base_revision": resolve_base(base).revision}
    folder, rows = make(1, metadata=qlora), tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one"}\n')
    asked = ["--base-model", base, "--data", str(rows), "--domain", "legal"]
    cli(str(folder), "--into-base", "--output", str(tmp_path / "out"), *asked)
    said = capsys.readouterr().out
    assert "not in 4 bit as in its QLoRA training; written in bfloat16 (16 bit)" in said
    assert {tensor.dtype for tensor in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}


def test_a_base_that_is_stored_quantised_is_refused(first, base, tmp_path):
    shutil.copytree(base, tmp_path / "quantised")
    config = json.loads((tmp_path / "quantised/config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "quantised/config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"stored quantised.*16-bit model"):
        merge_into_base(first, tmp_path / "out", base=str(tmp_path / "quantised"))


# -- a plain LoRA ------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 14), st.integers(0, 99))
def test_truncation_leaves_the_smallest_singular_values(rows, columns, rank, seed):
    matrix = torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, columns)))
    b, a = truncate(matrix, rank)
    assert b.shape == (rows, min(rank, rows, columns))
    assert a.shape == (min(rank, rows, columns), columns)
    rest = torch.linalg.svdvals(matrix)[rank:].square().sum().sqrt()
    assert torch.allclose((matrix - b @ a).norm(), rest, atol=1e-12)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pissa_is_exact_from_twice_its_rank_on(make, base, tmp_path, init):
    folder = make(4, init_lora_weights=init, target_modules=["q_proj"])
    exact = to_plain_lora(folder, 8, output=tmp_path / "exact", base=base, check=SAME)
    rough = to_plain_lora(folder, 1, output=tmp_path / "rough", base=base, check=ANY)
    assert exact.total.error < 1e-4
    assert exact.agreement.largest_difference < 1e-3
    assert rough.total.error > 0.1
    assert len(exact.modules) == 2
    assert check_adapter(tmp_path / "exact", resolve_base(base), 8).rank == 8
    difference = logits(unmerged(base, tmp_path / "exact")) - logits(unmerged(base, folder))
    assert difference.abs().max() < 1e-2


def test_dora_at_a_higher_rank_is_nearer_and_the_errors_add_up(make, base, tmp_path):
    folder = make(5, use_dora=True, target_modules=["q_proj"], layers_to_transform=[0])
    errors = []
    for rank in (1, 8, 64):
        plain = to_plain_lora(folder, rank, output=tmp_path / str(rank), base=base, check=ANY)
        (module,) = plain.modules
        weight = load(base).get_submodule(module).weight.detach()
        merged = unmerged(base, folder).merge_and_unload().get_submodule(module).weight.detach()
        tail = torch.linalg.svdvals(merged - weight)
        expected = tail[rank:].norm() / tail.norm()
        assert plain.modules[module].error == pytest.approx(float(expected), rel=1e-3)
        assert plain.total.error == pytest.approx(plain.modules[module].error)
        assert torch.allclose((merged - weight - change(tmp_path / str(rank), module)).norm() / tail.norm(), expected)
        errors.append(plain.total.error)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[-1]


def test_a_head_of_its_own_becomes_lora_on_the_head(make, base, tmp_path):
    folder = make(6, modules_to_save=["lm_head"], target_modules=["q_proj"], layers_to_transform=[0], size=0.003)
    plain = to_plain_lora(folder, 256, output=tmp_path / "out", base=base, check=ANY)
    assert set(plain.modules) == {"lm_head", ATTENTION}
    assert plain.modules[ATTENTION].error < 1e-4 < plain.modules["lm_head"].error < 0.6


def test_changes_outside_linear_modules_have_no_plain_lora(make, base, tmp_path):
    folder = make(6, modules_to_save=["norm"], target_modules=["q_proj"])
    with pytest.raises(AdapterError, match=r"changes 'model\..*norm\.weight'.*--into-base"):
        to_plain_lora(folder, 8, output=tmp_path / "out", base=base, check=ANY)
    assert left(tmp_path) == []


# -- several adapters --------------------------------------------------------------------------------------------------


def test_cat_is_the_weighted_sum(first, second, base, tmp_path):
    merged = merge_adapters([first, second], weights=[0.5, -2], output=tmp_path / "out", base=base, check=ANY)
    assert (merged.rank, merged.weights, merged.density) == (8, (0.5, -2.0), None)
    for module in (ATTENTION, UP):
        expected = 0.5 * change(first, module) - 2 * change(second, module)
        assert torch.allclose(change(tmp_path / "out", module), expected, atol=1e-5)


def test_svd_of_a_high_rank_is_the_sum_too(first, second, base, tmp_path):
    merge_adapters([first, second], method="svd", rank=256, output=tmp_path / "out", base=base, check=ANY)
    expected = change(first, ATTENTION) + change(second, ATTENTION)
    assert torch.allclose(change(tmp_path / "out", ATTENTION), expected, atol=1e-5)
    assert check_adapter(tmp_path / "out", resolve_base(base), 256).rank == 256


def test_one_adapter_and_nothing_of_another_is_the_one(first, second, base, tmp_path):
    check = [SAME, ANY]
    merged = merge_adapters(
        [first, second], method="linear", weights=[1, 0], output=tmp_path / "out", base=base, check=check
    )
    assert merged.rank == 4
    assert merged.agreements[0].largest_difference < 1e-3 < merged.agreements[1].largest_difference
    assert torch.allclose(change(tmp_path / "out", UP), change(first, UP), atol=1e-6)


@pytest.fixture
def unasked(monkeypatch):
    """No model answers anything, which is most of a merge's time."""
    monkeypatch.setattr(Answers, "of", classmethod(lambda *_: Answers([], [], [], [], 1)))
    monkeypatch.setattr(Answers, "compare", lambda *_: command.Agreement(1, 1.0, 0.0))


@pytest.mark.usefixtures("unasked")
def test_every_method_gives_what_vllm_serves(make, base, tmp_path):
    small = {"target_modules": ["k_proj"], "layers_to_transform": [0]}
    parents = [make(7, **small), make(8, **small)]
    for method in METHODS:
        merged = merge_adapters(parents, method=method, output=tmp_path / method, base=base)
        assert merged.density == (0.5 if method.split("_")[0] in ("ties", "dare", "magnitude") else None)
        assert check_adapter(tmp_path / method, resolve_base(base), 512).rank == merged.rank
    changes = [change(tmp_path / method, "model.layers.0.self_attn.k_proj") for method in METHODS]
    alike = [
        (a, b) for a, b in itertools.combinations(range(len(METHODS)), 2) if torch.allclose(changes[a], changes[b])
    ]
    assert alike == []


LIMITED = {
    "layers": {"layers_to_transform": [0]},
    "excluded": {"exclude_modules": ["layers.1.mlp.up_proj"]},
    "regex": {"target_modules": r".*\.1\.self_attn\.[qk]_proj"},
    "elsewhere": {"layers_to_transform": [1], "target_modules": ["k_proj"]},
}


@pytest.mark.parametrize("limits", LIMITED.values(), ids=LIMITED)
@pytest.mark.usefixtures("unasked")
def test_modules_of_one_adapter_alone_are_kept(make, base, tmp_path, limits):
    one, two = make(7, **limits), make(8, layers_to_transform=[0] if "elsewhere" in str(limits) else None)
    both = modules(one) | modules(two)
    assert modules(one) != both
    for name, order in (("a", (one, two)), ("b", (two, one))):
        merge_adapters(order, output=tmp_path / name, base=base)
        assert modules(tmp_path / name) == both
        for module in both:
            expected = sum(change(folder, module) for folder in order if module in modules(folder))
            assert torch.allclose(change(tmp_path / name, module), expected, atol=1e-5)
        check_adapter(tmp_path / name, resolve_base(base), 8)
    merge_adapters([one, two], method="ties", output=tmp_path / "ties", base=base)
    assert modules(tmp_path / "ties") == both


def test_dare_draws_by_its_seed_alone(make, base, tmp_path):
    small = {"target_modules": ["k_proj"], "layers_to_transform": [0]}
    parents = [make(7, **small), make(8, **small)]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        arguments = {"output": tmp_path / name, "base": base, "check": ANY}
        merge_adapters(parents, method="dare_linear", density=0.3, seed=seed, **arguments)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "tie"}, "no method 'tie'. Did you mean 'ties'"),
        ({"weights": [1.0]}, "1 weights for 2 adapters"),
        ({"weights": [math.nan, 1]}, "each is a finite number, and one at least is not 0"),
        ({"weights": [0, 0]}, "one at least is not 0"),
        ({"seed": 10**23}, "seed = 1000.* from 0 up to"),
        ({"method": "ties", "density": 0}, "density = 0: .* above 0 and up to 1"),
        ({"method": "ties", "density": 1.5}, "density = 1.5"),
        ({"method": "ties", "density": math.nan}, "density = nan"),
        ({"density": 0.5}, "'cat' keeps all values"),
        ({"method": "svd", "rank": 48}, "rank 48 is none that vLLM takes: 1, 8, 16, 32, 64"),
        ({"method": "linear", "rank": 8}, "'linear' cannot choose its rank.*ties_svd"),
        ({"check": [ANY]}, "1 checks for 2 adapters"),
        ({"publish": "too"}, "exactly one"),
    ],
)
def test_arguments_that_are_not_allowed(first, second, base, tmp_path, arguments, words):
    with pytest.raises(ConfigError, match=words):
        merge_adapters([first, second], output=tmp_path / "out", base=base, **arguments)
    assert left(tmp_path) == []


def test_one_adapter_is_not_several(first, base, tmp_path):
    with pytest.raises(ConfigError, match="two or more"):
        merge_adapters([first], output=tmp_path / "out", base=base)


def test_adapters_of_different_bases(first, make, base, tmp_path):
    other = make(1, metadata={"base_revision": "0123456789ab"})
    with pytest.raises(AdapterError, match=r"not for base .*0123456789ab.*--base-model"):
        merge_adapters([first, other], output=tmp_path / "out", base=base)
    seedlings = AdapterRegistry(PACKAGED_ROOT).resolve("legal").path
    with pytest.raises(AdapterError, match="not for base"):
        merge_adapters([first, seedlings], output=tmp_path / "out")  # by the bases that their configurations name


def test_an_adapter_that_does_not_fit(base, tmp_path):
    seedlings = AdapterRegistry(PACKAGED_ROOT).resolve("legal").path
    with pytest.raises(AdapterError, match=r"has no module 'model\.layers\.2"):
        merge_adapters([seedlings, seedlings], output=tmp_path / "out", base=base)
    shutil.copytree(seedlings, tmp_path / "narrow")
    weights = load_file(tmp_path / "narrow/adapter_model.safetensors")
    save_file(
        {name: weight[:, :1].clone() for name, weight in weights.items()}, tmp_path / "narrow/adapter_model.safetensors"
    )
    with pytest.raises(AdapterError, match="PEFT cannot load it on base 'seedling'"):
        merge_into_base(tmp_path / "narrow", tmp_path / "out", base="seedling")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "LOHA"}, "only 'LORA'"),
        ({"init_lora_weights": "pissa_niter_16"}, "cannot be found again.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "cannot be found again"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "several times.*Train again without layer_replication"),
    ],
)
def test_kinds_of_adapters_that_cannot_be_merged(first, base, tmp_path, change, words):
    shutil.copytree(first, tmp_path / "it")
    file = tmp_path / "it/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(AdapterError, match=words):
        merge_into_base(tmp_path / "it", tmp_path / "out", base=base)


def test_adapters_that_are_not_there(base, tmp_path):
    with pytest.raises(UnknownAdapterError, match=r"no adapter 'legall'.*Did you mean 'legal'"):
        merge_into_base("legall", tmp_path / "out", base="seedling", registry=PACKAGED_ROOT)
    with pytest.raises(AdapterError, match="no such folder"):
        merge_into_base(tmp_path / "missing", tmp_path / "out", base=base)
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        merge_into_base(tmp_path, tmp_path / "out", base=base)


def test_a_base_that_is_nowhere(first, tmp_path):
    with pytest.raises(ConfigError, match="'foo/bar' is not on this disk and cannot be downloaded"):
        merge_into_base(first, tmp_path / "out", base="foo/bar")


def test_nan_is_not_merged(make, base, tmp_path):
    folder = make(1)
    weights = load_file(folder / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = math.nan
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="NaN"):
        merge_into_base(folder, tmp_path / "out", base=base, check=ANY)
    assert left(tmp_path) == []


def test_rows_that_cannot_be_asked(first, base, tmp_path):
    for check, words in (
        (Check([]), "there are no rows"),
        (Check([{"text": "x"}]), "row 1: no 'question'"),
        (Check([{"question": "word " * 3000}]), "no row fits the model's 2048 tokens"),
    ):
        with pytest.raises(DataError, match=words):
            merge_into_base(first, tmp_path / "out", base=base, check=check)
    assert left(tmp_path) == []


def test_generated_prompts_ask_for_the_task_that_training_recorded(first):
    task = {"fields": "clause, side -> verdict", "instructions": "Name the winner."}
    source = find_source(first, AdapterRegistry(PACKAGED_ROOT))
    trained = dataclasses.replace(source, metadata={"config": {"signature": task}})
    prompts, plain = Check().prompts(trained), Check().prompts(source)
    assert len(prompts) == len(plain) == 16
    assert len({prompt[-1]["content"] for prompt in prompts}) == 16
    assert all("Name the winner." in prompt[0]["content"] for prompt in prompts)
    assert all("[[ ## side ## ]]" in prompt[-1]["content"] for prompt in prompts)
    assert all("[[ ## question ## ]]" in prompt[-1]["content"] for prompt in plain)
    assert prompts == Check().prompts(trained)


def test_a_result_keeps_the_task_of_its_parents_where_they_agree(make, base):
    tasks = [{"fields": "text -> label", "instructions": "Sort it."}, {"fields": "clause -> label", "instructions": ""}]
    registry = AdapterRegistry(PACKAGED_ROOT)
    sources = [find_source(make(1, metadata={"config": {"signature": task}}), registry) for task in (*tasks, None)]
    for parents, task in ((sources[:1] * 2, tasks[0]), (sources[:2], None), (sources[::2], None)):
        metadata = record("several adapters", iter(parents), resolve_base(base))
        assert dataclasses.replace(sources[2], metadata=metadata).task == task


# -- in full or not at all ---------------------------------------------------------------------------------------------


def test_other_answers_publish_nothing(first, second, base, tmp_path):
    registry = tmp_path / "registry"
    with pytest.raises(AdapterError, match=r"to \d+\.\d% of 3 prompts.*--least-agreement asks for 100\.0%"):
        merge_adapters([first, second], weights=[-9, 9], publish="both", registry=registry, base=base, check=SAME)
    assert left(tmp_path) == ["registry"]


def test_publishing_keeps_the_lineage(first, second, base, tmp_path):
    registry = AdapterRegistry(tmp_path / "registry", base=base)
    published = registry.publish(first, "first")
    merged = merge_adapters(
        ["first", second], method="ties", publish="both", registry=registry.root, base=base, check=ANY
    )
    assert registry.resolve("both") == merged.revision
    assert merged.folder == merged.revision.path
    lineage = merged.revision.metadata["merge"]
    assert [parent["adapter"] for parent in lineage["parents"]] == [published.ref, str(second)]
    assert lineage["parents"][0]["revision"] == published.revision
    assert (lineage["method"], lineage["weights"], lineage["density"], lineage["seed"]) == ("ties", [1, 1], 0.5, 0)
    assert merged.revision.metadata["base_revision"] == resolve_base(base).revision
    assert not [name for name in left(registry.root) if "staging" in name]


def test_an_output_is_replaced_only_when_asked(first, second, base, tmp_path):
    out = tmp_path / "out"
    merge_adapters([first, second], output=out, base=base, check=ANY)
    before = (out / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"exists.*--overwrite"):
        merge_adapters([first, second], output=out, base=base)
    merge_adapters([first, second], weights=[2, 1], output=out, base=base, check=ANY, overwrite=True)
    assert (out / "adapter_model.safetensors").read_bytes() != before
    assert left(tmp_path) == ["adapter_config.json", "adapter_model.safetensors", "metadata.json", "out"]
    with pytest.raises(ConfigError, match="what is merged, or holds it"):
        merge_into_base(out, out, base=base, overwrite=True)
    (tmp_path / "notes").mkdir()
    with pytest.raises(ConfigError, match="neither a model nor an adapter"):
        merge_into_base(out, tmp_path / "notes", base=base, overwrite=True)


def test_a_full_disk_leaves_what_was_there(first, base, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(PublishError, match=r"cannot save the result.*Nothing was changed"):
            merge_into_base(first, out, base=base, check=ANY, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert left(tmp_path) == ["config.json", "out"]
    assert (out / "config.json").read_text() == "old"


def test_ctrl_c_leaves_nothing(first, base, tmp_path, monkeypatch):
    def interrupt(*_):
        assert any("model.safetensors" in name for name in left(tmp_path))
        raise KeyboardInterrupt

    monkeypatch.setattr(Answers, "compare", interrupt)
    with pytest.raises(KeyboardInterrupt):
        merge_into_base(first, tmp_path / "out", base=base, check=ANY)
    assert left(tmp_path) == []


@pytest.mark.usefixtures("unasked")
def test_a_rename_that_fails_puts_the_old_folder_back(first, second, base, tmp_path, monkeypatch):
    out = tmp_path / "out"
    merge_adapters([first, second], output=out, base=base, check=ANY)
    rename = type(out).rename

    def fail(self, target):
        if self.name == "draft":
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(type(out), "rename", fail)
    with pytest.raises(PublishError, match="disk full"):
        merge_into_base(first, out, base=base, check=ANY, overwrite=True)
    assert left(tmp_path) == ["adapter_config.json", "adapter_model.safetensors", "metadata.json", "out"]


# -- the command -------------------------------------------------------------------------------------------------------


def cli(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([*words, "--max-tokens", "2", "--least-agreement", "0"]))


def test_the_command_prints_errors_by_module(make, base, tmp_path, capsys):
    folder, rows = make(4, init_lora_weights="pissa", target_modules=["q_proj"]), tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one"}\n')
    asked = ["--base-model", base, "--data", str(rows), "--domain", "legal"]
    assert cli(str(folder), "--rank", "8", "--output", str(tmp_path / "out"), *asked) == 0
    said = capsys.readouterr().out
    assert f"{ATTENTION}  " in said
    assert "all 2" in said
    assert "largest log-prob difference" in said
    assert f"Written: {tmp_path / 'out'}" in said


def test_the_command_compares_each_adapter_on_its_own_rows(first, second, base, tmp_path, capsys):
    for name, texts in (("a", ["one", "two"]), ("b", ["three"])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = ["--data", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "--domain", "legal", "financial"]
    place = ["--publish", "both", "--registry", str(tmp_path / "registry"), "--base-model", base]
    assert cli(str(first), str(second), "--method", "ties", "--weights", "1", "0.5", *data, *place) == 0
    said = capsys.readouterr().out.splitlines()
    assert "by ties, density 0.5: rank 4" in said[0]
    assert [line.split()[1] for line in said[3:5]] == ["2", "1"]
    assert said[-1].startswith("Published both@")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "--output", "out"], "give --into-base, or --rank"),
        (["a", "--rank", "8", "--method", "ties", "--output", "out"], "--method is for several adapters"),
        (["a", "b", "--into-base", "--output", "out"], "--into-base takes one adapter"),
        (["a", "--into-base", "--publish", "it"], "--into-base writes a model"),
        (["a", "b", "--data", "x.jsonl", "--output", "out"], "--data needs --domain"),
        (["a", "b", "--domain", "legal", "legal", "legal", "--output", "out"], "3 values for 2 adapters"),
    ],
)
def test_flags_that_do_not_go_together(words, message):
    with pytest.raises(ConfigError, match=message):
        cli(*words)
