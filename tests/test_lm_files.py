"""Programs with LoRALMs in files: saved, loaded in another process, and what a file may not ask for."""

import json
import pickle
import subprocess
import sys

import dspy
import pytest

import dspy_lora
from dspy_lora import AdapterRegistry, LoRALM
from dspy_lora.errors import ChangedAdapterError, ConfigError

QUESTIONS = ["What is due?", "Who pays?"]

# What another process does with the files: no guard, no settings.
CHILD = """
import json, pickle, sys
import dspy
import dspy_lora
from dspy_lora.engine.client import _clients

folder, questions = sys.argv[1], json.loads(sys.argv[2])


class Pair(dspy.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (dspy.Predict("question -> answer") for _ in range(3))


loaded = dspy_lora.load(Pair(), f"{folder}/program.json")
whole = dspy.load(f"{folder}/whole", allow_pickle=True)
with open(f"{folder}/lm.pkl", "rb") as file:
    pickled = pickle.load(file)

lms = [predictor.lm for program in (loaded, whole) for predictor in program.predictors()] + [pickled]
answers = [[lm(question, max_tokens=16, ignore_eos=True)[0] for question in questions] for lm in lms]
print(json.dumps({
    "models": [lm.model for lm in lms],
    "answers": answers,
    "engines": len(_clients),
    "adapters": pickled.engine_stats()["adapters"],
}))
"""


class Pair(dspy.Module):
    def __init__(self, *lms):
        super().__init__()
        self.first, self.second, self.third = (dspy.Predict("question -> answer") for _ in range(3))
        for predictor, lm in zip(self.predictors(), lms, strict=False):
            predictor.set_lm(lm)


@pytest.fixture
def registry(make_lm, tmp_path):
    """A registry of its own, with one adapter called passing."""
    registry, lm = AdapterRegistry(tmp_path / "registry"), make_lm("legal")
    registry.publish(lm.adapter.path, "passing", base=lm.base)
    return registry


@pytest.fixture
def saved(registry, tmp_path):
    """Saves a program that uses the adapter called passing, and returns the file."""
    path = tmp_path / "program.json"
    Pair(LoRALM("seedling", domain="passing", registry=registry.root)).save(path)
    return path


def edit(path, **changes):
    """Changes the state of the first predictor's LM in a saved program."""
    state = json.loads(path.read_text())
    state["first"]["lm"] |= changes
    path.write_text(json.dumps(state))
    return path


@pytest.mark.timeout(600)  # two engines start, one of them in the other process
def test_a_program_comes_back_in_another_process(make_lm, tmp_path):
    lms = [make_lm("legal", temperature=0.0), make_lm("research"), make_lm()]
    program = Pair(*lms)
    program.save(tmp_path / "program.json")
    # by value: the other process does not have this file
    program.save(tmp_path / "whole", save_program=True, modules_to_serialize=[sys.modules[__name__]])
    (tmp_path / "lm.pkl").write_bytes(pickle.dumps(lms[0]))
    expected = [[lm(question, max_tokens=16, ignore_eos=True)[0] for question in QUESTIONS] for lm in lms]
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    command = [sys.executable, str(script), str(tmp_path), json.dumps(QUESTIONS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    child = json.loads(done.stdout.splitlines()[-1])
    assert child["models"] == [lm.model for lm in lms] * 2 + [lms[0].model]
    assert child["answers"] == expected * 2 + [expected[0]]
    assert child["engines"] == 1
    assert child["adapters"] == sorted(lm.adapter.ref for lm in lms[:2])


def test_load_brings_back_settings_and_revision(registry, saved, tmp_path):
    lm = LoRALM("seedling", domain="passing", registry=registry.root, temperature=0.7, min_p=0.1, cache=False)
    Pair(lm).save(saved)
    loaded = dspy_lora.load(Pair(), saved).first.lm
    assert type(loaded) is LoRALM
    assert (loaded.model, loaded.kwargs, loaded.cache) == (lm.model, lm.kwargs, False)
    assert loaded.engine is lm.engine
    assert dspy_lora.load(Pair(), str(saved)).second.lm is None


def test_a_retrained_adapter_leaves_a_saved_program_on_its_revision(make_lm, registry, saved):
    old = registry.resolve("passing")
    new = registry.publish(make_lm("research").adapter.path, "passing", base=make_lm().base)
    assert registry.resolve("passing") == new != old
    assert dspy_lora.load(Pair(), saved).first.lm.adapter.ref == old.ref


def test_a_missing_adapter_is_refused_with_its_name(registry, saved):
    ref = registry.resolve("passing").ref
    registry.remove("passing")
    with pytest.raises(ChangedAdapterError, match=f"saved with adapter '{ref}'"):
        dspy_lora.load(Pair(), saved)


@pytest.mark.parametrize("damage", ["other weights", "truncated"])
def test_a_changed_adapter_is_refused_with_its_name(registry, saved, damage):
    adapter = registry.resolve("passing")
    file = adapter.path / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-2] + b"xx" if damage == "other weights" else content[:-100])
    with pytest.raises(ChangedAdapterError, match=adapter.ref):
        dspy_lora.load(Pair(), saved)


def test_another_base_is_refused(saved, make_lm):
    base = make_lm().base.revision
    model = json.loads(saved.read_text())["first"]["lm"]["model"].replace(base, "0123456789ab")
    with pytest.raises(ChangedAdapterError, match=f"'seedling' at revision {base}"):
        dspy_lora.load(Pair(), edit(saved, model=model))


def test_dspy_alone_refuses_the_class_and_takes_it_when_told(saved):
    with pytest.raises(ValueError, match=r"Refusing to import .*dspy_lora\.lm\.LoRALM"):
        Pair().load(saved)
    program = Pair()
    program.load(saved, allow_unsafe_lm_state=True)
    assert program.first.lm.domain == "passing"


@pytest.mark.parametrize(
    ("changes", "wish"),
    [
        ({"_dspy_lm_class": "subprocess.Popen"}, "class 'subprocess.Popen'"),
        ({"server": "https://elsewhere.example/v1"}, "the server server="),
        ({"engine": {"worker_cls": "elsewhere.Worker"}}, "engine setting 'worker_cls'"),
        ({"engine": {"trust_remote_code": True}}, "engine setting 'trust_remote_code'"),
        ({"_dspy_lm_class": "dspy.clients.lm.LM", "api_base": "https://elsewhere.example"}, "the server api_base="),
        ({"_dspy_lm_class": "dspy.clients.lm.LM", "engine": {"class": "os:system"}}, "engine "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_load_refuses_what_could_run_code_or_send_a_key(saved, changes, wish):
    with pytest.raises(ConfigError, match=f"asks for {wish}.*allow_unsafe_lm_state"):
        dspy_lora.load(Pair(), edit(saved, **changes))


def test_load_refuses_an_address_in_a_state_without_a_class(saved):
    state = json.loads(saved.read_text())
    state["first"]["lm"] = {"model": "openai/gpt-4o-mini", "api_base": "https://elsewhere.example"}
    saved.write_text(json.dumps(state))
    with pytest.raises(ConfigError, match="the server api_base="):
        dspy_lora.load(Pair(), saved)


def test_load_takes_a_plain_lm_beside_a_loralm(make_lm, tmp_path):
    path = tmp_path / "mixed.json"
    Pair(make_lm("legal"), dspy.LM("openai/gpt-4o-mini")).save(path)
    program = dspy_lora.load(Pair(), path)
    assert program.first.lm.domain == "legal" and program.second.lm.model == "openai/gpt-4o-mini"


@pytest.mark.parametrize("content", [b"\x80\x04pickle", b"[]", b"5", b"null", None])
def test_load_refuses_what_is_no_program(tmp_path, content):
    path = tmp_path / "program.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="is no program saved as JSON"):
        dspy_lora.load(Pair(), path)


def test_a_saved_state_holds_no_key():
    lm = LoRALM("seedling", domain="legal", api_base="http://127.0.0.1:9/v1", api_key="sk-secret")
    state = lm.dump_state()
    assert "sk-secret" not in json.dumps(state) and "sk-secret" not in repr(lm.__dict__["_binding"])
    assert state["server"] == "http://127.0.0.1:9/v1"
