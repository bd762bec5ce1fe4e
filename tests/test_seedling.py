"""The seedling: its generated tasks, how chats become training rows, its network, and what ships."""

import contextlib
import json
import multiprocessing
import re
import sys
from itertools import islice
from pathlib import Path
from random import Random
from unittest.mock import patch

import dspy
import numpy as np
import pytest
from dspy.utils import DummyLM
from dspy.utils.exceptions import AdapterParseError

from dspy_lora.adapters.registry import PACKAGED_ROOT, AdapterRegistry
from dspy_lora.config import load_config
from dspy_lora.detection.classifier import DomainClassifier
from dspy_lora.errors import ConfigError, DataError, TrainingError
from dspy_lora.seedling import phrases, router, wordings
from dspy_lora.seedling.bars import ADAPTERS, ask, questions, report
from dspy_lora.seedling.chats import chats, signature
from dspy_lora.seedling.rules import has_any, make_rules, rules_task, text_with
from dspy_lora.seedling.sentences import Texts, read_texts
from dspy_lora.seedling.skills import compare_task
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


def test_sentences_that_follow_each_other_need_enough_of_them():
    assert Texts(["One.", "Two."]).neighbours(Random(0), "train", 2) == ["One.", "Two."]
    with pytest.raises(DataError, match=r"have 1 sentences .* needs 2 that follow each other"):
        Texts(["One."]).neighbours(Random(0), "train", 2)


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


def test_a_pool_whose_workers_died_says_so_at_once(monkeypatch):
    from dspy_lora.seedling import packing

    monkeypatch.setattr(packing, "_work", lambda *_: sys.exit(7))
    monkeypatch.setattr(packing, "_WAIT", 0.05)
    pool = packing.ChatPool(2, Texts(), SEEDLING / "base", 0, 0.0)
    for kept in ([], [packing.Rows(*np.zeros((3, 1, 1)))]):
        for process in multiprocessing.active_children():
            process.join()
        pool._kept = kept
        with pytest.raises(TrainingError, match=r"no worker is alive .*exit codes: 7, 7"):
            pool.take(1)


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
    assert not list((tmp_path / "whole").glob("*.part"))
    reference = LlamaForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    tokens = torch.randint(0, CONFIG["vocab_size"], (2, 40))
    positions = torch.arange(40).expand(2, 40)
    ours = network(tokens, positions, mask_within(torch.zeros(2, 40, dtype=torch.int32), flex=False))
    assert torch.allclose(ours, reference(tokens).logits, atol=1e-4)


def test_joining_a_wrong_folder_leaves_the_model_that_is_there(tmp_path):
    from dspy_lora.seedling.pretrain import join

    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model-00001.safetensors").write_bytes(b"a shard without a configuration")
    for wrong in ("none", "run"):
        with pytest.raises(DataError, match=f"{wrong} holds no model-.*name the --out folder of a run"):
            join(tmp_path / wrong, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"


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


class FakeRun:
    """What ``pretrain.train`` works with, on a clock that only its texts and steps move on."""

    def __init__(self, monkeypatch, folder, reading=0.0, a_step=0.0):
        import torch

        from dspy_lora.seedling import packing, pretrain

        self.now, self.steps, self.chats, self.seeds = 0.0, [], [], []
        self.folder, self.reading, self.a_step = folder, reading, a_step
        self.network = torch.nn.Linear(1, 1)
        self.rows = packing.Rows(*np.ones((3, 64, packing.ROW + 1), np.int16))
        for name, stub in {
            "read_texts": self.read,
            "exam": lambda _: None,
            "ChatPool": lambda *_: self,
            "Trainer": self.trainer,
        }.items():
            monkeypatch.setattr(pretrain, name, stub)
        monkeypatch.setattr(pretrain.time, "monotonic", lambda: self.now)
        self.fresh = self.repeated = 0
        self.close = lambda: None

    def read(self, _):
        self.now += self.reading
        return [" ".join(SENTENCES * 60)]

    def trainer(self, device, rate, flex, seed):
        self.seeds.append(seed)
        return self

    def take(self, count):
        self.chats.append(count)
        return self.rows[:count]

    def step(self, rows, progress, parts):
        import torch

        self.now += self.a_step
        self.steps.append(progress)
        return torch.ones(len(rows.tokens))

    def share_right(self, _):
        return 0.5

    def __call__(self, *words):
        from dspy_lora.seedling.pretrain import main

        words = ["--text", str(self.folder), "--out", str(self.folder / "run"), *words]
        with patch.object(sys, "argv", ["pretrain", *words]):
            main()


@pytest.mark.parametrize(
    ("a_step", "steps"),
    [(25, [0, 25 / 60, 50 / 60]), (15, [0, 0.25, 0.5, 0]), (10, [0, 1 / 6, 1 / 3, 0, 1 / 3, 2 / 3])],
)
def test_a_run_ends_with_its_deadline(monkeypatch, tmp_path, a_step, steps):
    run = FakeRun(monkeypatch, tmp_path, a_step=a_step)
    run("--minutes", "1", "--steps", "9", "--seed", "3")
    assert run.steps == pytest.approx(steps)
    assert run.seeds == [3]
    assert (tmp_path / "run" / "weights.pt").is_file()


def test_a_run_without_time_left_says_how_long_the_texts_took(monkeypatch, tmp_path):
    run = FakeRun(monkeypatch, tmp_path, reading=70)
    with pytest.raises(SystemExit, match="the texts took 70 s, give more --minutes"):
        run("--minutes", "1")
    assert not run.steps


def test_the_seed_decides_the_first_weights(monkeypatch):
    from dspy_lora.seedling import pretrain

    monkeypatch.setattr(pretrain, "CONFIG", pretrain.CONFIG | {"num_hidden_layers": 1, "vocab_size": 64})
    trainers = [pretrain.Trainer("cpu", 3e-3, False, *seed) for seed in ((), (0,), (1,))]
    first, same, other = (next(trainer.network.parameters()).detach().numpy() for trainer in trainers)
    assert (first == same).all()
    assert (first != other).any()


@pytest.mark.parametrize("rows", [2, 3, 4, 64])
def test_every_step_has_text_and_chats(monkeypatch, tmp_path, rows):
    from dspy_lora.seedling.pretrain import chat_count

    run = FakeRun(monkeypatch, tmp_path, a_step=1)
    run("--minutes", "1", "--rows", str(rows))
    assert len(run.chats) == len(run.steps) > 30
    assert all(1 <= chats <= rows - 1 for chats in run.chats)
    assert [chat_count(64, share) for share in (0.3, 0.9)] == [19, 58]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "1"], "--rows 1 is too few: give 2 or more"),
        (["--workers", "0"], "--workers 0 is too few: give 1 or more"),
        (["--out", "FOLDER/file"], r"--out .*file cannot be made .*name a folder"),
        (["--resume", "FOLDER/none.pt"], r"--resume .*none.pt is no file: name the weights.pt"),
    ],
)
def test_what_would_end_a_run_late_is_refused_before_the_texts_are_read(monkeypatch, tmp_path, words, message):
    (tmp_path / "file").write_text("")
    run = FakeRun(monkeypatch, tmp_path, reading=1)
    with pytest.raises(ConfigError, match=message):
        run(*[word.replace("FOLDER", str(tmp_path)) for word in words])
    assert run.now == 0


def test_a_folder_without_texts_is_named(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path} holds no "):
        read_texts(tmp_path)


def test_the_exam_of_a_run_asks_nothing_that_bars_asks():
    from dspy_lora.seedling import pretrain
    from dspy_lora.seedling.packing import Rows

    asked = []
    with (
        patch.object(pretrain, "questions", lambda *words: asked.extend(questions(*words)) or asked),
        patch.object(pretrain, "chat_rows", lambda *_: [Rows(*np.zeros((3, 1, 1)))]),
    ):
        pretrain.exam(None)
    assert len(asked) == 300
    for seed in (1, -1):
        rows = [str(question.row) for question in questions(seed, 400, rules_task)]
        assert not {str(question.row) for question in asked} & {*rows}


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
    assert "right structure 75.0% of 24 calls, rules followed 50.0% of 12, right 50.0% of 12 of all sorts" in text
    assert "right by kind: rules 6/12" in text
    assert all(q.labels in range(2, 9) for q in asked)
    [labels] = re.findall("rules by labels: (.*)", text)
    counts = {n: [q.labels == n for q in asked] for n in range(2, 9)}
    assert labels.split(", ") == [f"{n} {sum(here[:6])}/{sum(here)}" for n, here in counts.items() if sum(here)]
    assert set(ADAPTERS) == {"ChatAdapter", "JSONAdapter"}


def test_a_question_beyond_the_context_is_wrong_and_ends_nothing(monkeypatch):
    def too_long(*args, **kwargs):
        raise dspy.ContextWindowExceededError(model="short")

    monkeypatch.setattr(dspy.Predict, "__call__", too_long)
    [outcome] = ask(DummyLM([]), ADAPTERS["ChatAdapter"], questions(0, 1))
    assert (outcome.structure, outcome.right) == (False, False)


def test_bars_ask_in_held_out_wordings_or_in_those_of_the_training():
    held_out = {"Name the higher value.", "Name the lower value."}
    assert {question.signature.instructions for question in questions(0, 20, compare_task)} == held_out
    trained = {question.signature.instructions for question in questions(0, 20, compare_task, "train")}
    assert trained and not trained & held_out


def test_the_packaged_word_list_is_read():
    assert len(common_words("train")) > 5000
    assert Path(SEEDLING / "words.txt").is_file()


# -- the classifier that ships -----------------------------------------------------------------------------------------


def runs_of_five(text):
    words = re.findall("[a-z0-9]+", text.lower())
    return {tuple(words[at : at + 5]) for at in range(len(words) - 4)}


def test_no_vocabulary_borrows_from_a_set_that_is_kept_out(data_root):
    ours = {
        five for words in router.VOCABULARY.values() for phrase in words.split("; ") for five in runs_of_five(phrase)
    }
    used = {name for sets in router._SETS.values() for name in sets} | {router._ASSISTANT, router._HEADLINES}
    folder = data_root / "domains"
    kept_out = [file for file in folder.glob("*/*/*.jsonl") if str(file.parent.relative_to(folder)) not in used]
    assert folder / "financial" / "phrasebank" / "test.jsonl" in kept_out
    for file in kept_out:
        for line in file.read_text().splitlines():
            assert not ours & runs_of_five(json.loads(line)["text"])


def test_the_record_names_novels_only_where_they_were_read(tmp_path):
    assert "novels" not in router.sources(tmp_path)["no domain"]
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "eltec_novels.txt.xz").write_bytes(b"")
    assert "novels" in router.sources(tmp_path)["no domain"]
    assert DomainClassifier.packaged().trained_on["no domain"].endswith(router.sources(tmp_path)["no domain"])
