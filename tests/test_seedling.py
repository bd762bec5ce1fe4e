"""The seedling: its generated tasks, how chats become training rows, its network, and what ships."""

import contextlib
import json
import sys
from itertools import islice
from pathlib import Path
from random import Random
from unittest.mock import patch

import dspy
import numpy as np
import pytest
from dspy.utils.exceptions import AdapterParseError

from dspy_lora.adapters.registry import PACKAGED_ROOT, AdapterRegistry
from dspy_lora.config import load_config
from dspy_lora.seedling import phrases, wordings
from dspy_lora.seedling.bars import ADAPTERS, questions, report
from dspy_lora.seedling.chats import chats, signature
from dspy_lora.seedling.rules import has_any, make_rules, rules_task, text_with
from dspy_lora.seedling.sentences import Texts
from dspy_lora.seedling.task import pick
from dspy_lora.seedling.tasks import KINDS, make_task
from dspy_lora.seedling.tokenizer import chat_pieces
from dspy_lora.seedling.words import common_words, is_held_out

SEEDLING = PACKAGED_ROOT.parent
SENTENCES = [
    "The service was slow and the business did not process the order.",
    "A customer asked about the property of the company last day.",
    "Nobody expects the account to show another entry without a current link.",
] * 5


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SEEDLING / "base")


# -- tasks -------------------------------------------------------------------------------------------------------------


def test_words_and_wordings_are_split_without_overlap():
    train, held = set(common_words("train")), set(common_words("heldout"))
    assert train and held and not train & held
    drawn = [{pick(Random(seed), wordings.RULE, split) for seed in range(800)} for split in ("train", "heldout")]
    assert not drawn[0] & drawn[1]
    assert drawn[0] | drawn[1] == set(wordings.RULE)


@pytest.mark.parametrize(
    ("make", "written"),
    [(phrases.rule, wordings.RULE), (phrases.default, wordings.DEFAULT), (phrases.labels, wordings.LABELS)],
)
def test_training_composes_wordings_and_sees_none_that_is_held_out(make, written):
    drawn = {split: {make(Random(seed), split) for seed in range(3000)} for split in ("train", "heldout")}
    assert drawn["heldout"] <= set(written)
    assert not drawn["train"] & drawn["heldout"]
    assert len(drawn["train"]) > 3 * len(written)
    places = {"{w}": 1} if make is phrases.rule else {}
    for wording in drawn["train"]:
        assert wording.count("{}" if make is phrases.labels else "{l}") == 1
        assert all(wording.count(place) == count for place, count in places.items())


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_keywords_are_words_of_the_asked_split(split):
    rules = [make_rules(Random(seed), split, Texts(SENTENCES), "text", "label") for seed in range(100)]
    words = {part for each in rules for keyword in each.every for part in keyword.split(" ")}
    assert {is_held_out(word) for word in words} == {split == "heldout"}


def test_a_text_holds_its_keyword_and_no_other():
    rng, texts = Random(0), Texts(SENTENCES)
    for _ in range(200):
        rules = make_rules(rng, "train", texts, "text", "label")
        keyword = rng.choice(rules.every)
        text = text_with(rng, "train", texts, keyword, rules.every)
        others = [word for word in rules.every if word != keyword]
        assert has_any(text, [keyword])
        assert not has_any(text, others)


def test_rules_tell_every_label_apart():
    rng = Random(1)
    for _ in range(100):
        rules = make_rules(rng, "train", Texts(), "text", "label")
        assert len(set(rules.labels)) == len(rules.labels)
        assert len(set(rules.every)) == len(rules.every)
        assert len(rules.lines) == len(rules.labels)
        assert all(label in line for label, line in zip(rules.labels, rules.lines, strict=True))


@pytest.mark.parametrize("maker", KINDS, ids=lambda maker: maker.__name__)
def test_every_sort_of_task_renders_and_parses_back(maker):
    rng = Random(2)
    for seed in range(10):
        task = make_task(Random(seed), "train", Texts(SENTENCES), maker)
        made = signature(task)
        for adapter in (dspy.ChatAdapter(), dspy.JSONAdapter()):
            row = rng.choice(task.rows)
            outputs = {name: row[name] for name in made.output_fields}
            text = adapter.format_assistant_message_content(made, outputs)
            assert adapter.parse(made, text) == outputs


def test_tasks_are_the_same_for_the_same_seed():
    first, second = (list(islice(chats(Random(7), "train", Texts(SENTENCES)), 20)) for _ in range(2))
    assert [chat.messages for chat in first] == [chat.messages for chat in second]


# -- chats as training rows --------------------------------------------------------------------------------------------


def test_a_chat_is_what_dspy_sends():
    task = rules_task(Random(3), "train", Texts())
    made = signature(task)
    lm = dspy.utils.DummyLM([dict.fromkeys(made.output_fields, "x")])
    # "x" may be no label of a Literal; the prompt is what matters.
    adapter = dspy.ChatAdapter(use_json_adapter_fallback=False)
    with dspy.context(lm=lm, adapter=adapter), contextlib.suppress(AdapterParseError):
        dspy.Predict(made)(**{name: task.rows[0][name] for name in made.input_fields})
    sent = lm.history[0]["messages"]
    rendered = dspy.ChatAdapter().format(made, [], {name: task.rows[0][name] for name in made.input_fields})
    assert [message["content"] for message in sent] == [message["content"] for message in rendered]


def test_pieces_put_together_are_the_chat_template(tokenizer):
    for chat in islice(chats(Random(4), "train", Texts()), 60):
        whole = "".join(text for text, _ in chat_pieces(chat, tokenizer.apply_chat_template))
        assert whole == tokenizer.apply_chat_template(chat.messages, tools=chat.tools, tokenize=False)


def test_a_training_row_learns_answers_and_keeps_documents_apart(tokenizer):
    from dspy_lora.seedling.packing import ROW, chat_rows

    rows = next(chat_rows(chats(Random(5), "train", Texts()), tokenizer, prompt_weight=0.0))
    assert rows.tokens.shape == rows.weights.shape == rows.documents.shape == (16, ROW + 1)
    learned = tokenizer.decode(rows.tokens[0][rows.weights[0] > 0])
    prompt = tokenizer.decode(rows.tokens[0][rows.weights[0] == 0])
    assert "[[ ## completed ## ]]" in learned or '"' in learned
    assert "objective is" in prompt
    assert "objective is" not in learned
    assert (np.diff(rows.documents[0][rows.documents[0] >= 0]) >= 0).all()


# -- the network -------------------------------------------------------------------------------------------------------


def test_the_trained_network_is_transformers_llama(tmp_path):
    import torch
    from transformers import LlamaForCausalLM

    from dspy_lora.seedling.network import CONFIG, Llama, mask_within
    from dspy_lora.seedling.pretrain import join, save

    torch.manual_seed(0)
    network = Llama(CONFIG).to(torch.bfloat16).float()
    save(network, tmp_path / "shards")
    (tmp_path / "whole").mkdir()
    join(tmp_path / "shards", tmp_path / "whole")
    reference = LlamaForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    tokens = torch.randint(0, CONFIG["vocab_size"], (2, 40))
    positions = torch.arange(40).expand(2, 40)
    ours = network(tokens, positions, mask_within(torch.zeros(2, 40, dtype=torch.int32), flex=False))
    assert torch.allclose(ours, reference(tokens).logits, atol=1e-4)


def test_documents_of_a_row_do_not_see_each_other():
    import torch

    from dspy_lora.seedling.network import CONFIG, Llama, mask_within
    from dspy_lora.seedling.pretrain import positions_of

    network = Llama(CONFIG | {"num_hidden_layers": 2})
    documents = torch.tensor([[0] * 6 + [1] * 6])
    tokens = torch.randint(0, 8192, (1, 12))
    packed = network(tokens, positions_of(documents), mask_within(documents, flex=False))
    alone = network(tokens[:, 6:], torch.arange(6)[None], mask_within(documents[:, 6:], flex=False))
    assert torch.allclose(packed[:, 6:], alone, atol=1e-5)


def test_a_step_of_pretraining_lowers_the_loss():
    from dspy_lora.seedling.packing import Rows
    from dspy_lora.seedling.pretrain import Trainer

    tokens = np.random.default_rng(0).integers(0, 8192, (2, 65)).astype(np.uint16)
    rows = Rows(tokens, np.ones(tokens.shape, np.float16), np.zeros(tokens.shape, np.int16))
    trainer = Trainer("cpu", rate=3e-3, flex=False)
    losses = [trainer.step(rows, progress=0.5, parts=2).mean().item() for _ in range(4)]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.slow  # a row has 2,048 tokens, which is minutes a step on a busy CPU
@pytest.mark.timeout(900)
def test_the_pretraining_command_writes_a_model(tmp_path):
    from dspy_lora.seedling.pretrain import main

    (tmp_path / "book.txt").write_text("\n".join(SENTENCES * 300))
    words = ["--text", str(tmp_path), "--out", str(tmp_path / "run"), "--steps", "3", "--rows", "2", "--workers", "1"]
    with patch.object(sys, "argv", ["pretrain", *words]):
        main()
    assert sorted(path.name for path in (tmp_path / "run").glob("*.safetensors"))


# -- what ships --------------------------------------------------------------------------------------------------------


def test_the_weights_that_ship_are_small_and_complete():
    from safetensors import safe_open

    base = SEEDLING / "base" / "model.safetensors"
    with safe_open(base, "np") as file:
        parameters = sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
    assert 15e6 <= parameters <= 20e6
    assert base.stat().st_size <= 40e6
    assert json.loads((SEEDLING / "base" / "config.json").read_text())["max_position_embeddings"] >= 2048
    weights = [*SEEDLING.rglob("*.safetensors")]
    assert len(weights) == 13
    assert sum(path.stat().st_size for path in weights) <= 70e6


def test_every_configured_domain_has_its_adapter():
    revisions = {revision.adapter: revision for revision in AdapterRegistry(PACKAGED_ROOT).list()}
    assert set(revisions) == set(load_config().domains)
    for revision in revisions.values():
        config = json.loads((revision.path / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (16, 32, True)
        assert len(config["target_modules"]) == 7
        assert revision.metadata["config"]["weight_decay"] == 1e-5
        AdapterRegistry(PACKAGED_ROOT).verify(revision)


def test_the_model_card_names_every_licence_and_limit():
    card = (SEEDLING / "MODEL_CARD.md").read_text()
    for domain in load_config().domains.values():
        assert str(domain.data).split("/")[1] in card
    assert "cannot" in card


def test_the_report_of_the_bars_counts_what_it_says():
    asked = questions(0, 12, rules_task)
    outcomes = [q.outcome({name: q.row[name] for name in q.signature.output_fields}) for q in asked[:6]]
    outcomes += [q.outcome(None) for q in asked[6:9]]
    outcomes += [q.outcome(dict.fromkeys(q.signature.output_fields, "wrong")) for q in asked[9:]]
    text = report("ChatAdapter", outcomes, outcomes)
    assert "right structure 75.0% of 24 calls, rules followed 50.0% of 12" in text
    assert all(q.labels in range(2, 9) for q in asked)
    assert set(ADAPTERS) == {"ChatAdapter", "JSONAdapter"}


def test_the_packaged_word_list_is_read():
    assert len(common_words("train")) > 5000
    assert Path(SEEDLING / "words.txt").is_file()
