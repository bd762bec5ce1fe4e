"""LoRALM without an engine: what it may be given, what a copy and a file keep, and what DSPy's cache tells apart."""

import shutil
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
from dspy import lm15

from dspy_lora import AdapterRegistry, LoRALM
from dspy_lora.adapters.base import SEEDLING_FOLDER
from dspy_lora.engine.client import EngineClient
from dspy_lora.engine.protocol import Candidate, Done
from dspy_lora.errors import ConfigError

SERVER = "http://127.0.0.1:9/v1"


@pytest.fixture
def sent(monkeypatch):
    """Requests that reached an engine, each answered with its number."""
    requests = []

    def submit(client, request, on_delta=None):
        requests.append(request)
        future = Future()
        future.set_result(Done(1, [Candidate(f"answer {len(requests)}", "stop", 1)], 1, 0))
        return SimpleNamespace(future=future, request=request)

    monkeypatch.setattr(EngineClient, "submit", submit)
    return requests


# -- the cache ---------------------------------------------------------------------------------------------------------


async def test_engines_that_answer_differently_have_answers_of_their_own_in_the_cache(sent):
    plain = LoRALM("seedling", min_p=0.1)
    thinking, float32 = plain.copy(engine={"reasoning_parser": "qwen3"}), plain.copy(engine={"dtype": "float32"})
    answers = [lm("Which engine?") for lm in (plain, thinking, float32)]
    assert answers == [["answer 1"], ["answer 2"], ["answer 3"]]
    assert [lm("Which engine?") for lm in (plain, thinking, float32)] == answers
    assert [lm("Which engine?", min_p=0.2) for lm in (plain, thinking)] == [["answer 4"], ["answer 5"]]
    assert [await lm.acall("Which engine?") for lm in (plain, thinking)] == [["answer 6"], ["answer 7"]]
    assert [request.sampling["min_p"] for request in sent] == [0.1, 0.1, 0.1, 0.2, 0.2, 0.1, 0.1]
    assert not any("engine_settings" in request.sampling for request in sent)
    assert plain.model == thinking.model  # which training, files and usage go by


def test_typed_requests_are_told_apart_too(sent):
    plain = LoRALM("seedling")
    thinking = plain.copy(engine={"reasoning_parser": "qwen3"})
    request = lm15.Request(plain.model, (lm15.Message.user("A typed one."),))
    assert [lm(request).text for lm in (plain, thinking, plain)] == ["answer 1", "answer 2", "answer 1"]
    assert [lm(request=request).text for lm in (plain, thinking)] == ["answer 1", "answer 2"]


def test_settings_of_speed_share_the_cache(sent):
    plain, fast = LoRALM("seedling"), LoRALM("seedling", engine={"max_loras": 3})
    assert plain("How fast?") == fast("How fast?") == ["answer 1"]


def test_a_changed_chat_template_is_not_answered_from_before(sent, tmp_path):
    folder = shutil.copytree(SEEDLING_FOLDER, tmp_path / "base")
    before, template = LoRALM(folder), folder / "chat_template.jinja"
    assert before("Which one?") == ["answer 1"]
    template.write_text(template.read_text() + "{# changed #}")
    after = LoRALM(folder)
    assert after.model == before.model
    assert [lm("Which one?") for lm in (after, before)] == [["answer 2"], ["answer 1"]]


# -- names -------------------------------------------------------------------------------------------------------------


def test_an_adapter_may_be_named_as_a_model_of_openai_s(tmp_path):
    """DSPy tells OpenAI's reasoning models by the last part of a model string."""
    bundled = AdapterRegistry(base="seedling").resolve("legal")
    AdapterRegistry(tmp_path, base="seedling").publish(bundled.path, "gpt-5-distill")
    lm = LoRALM("seedling", domain="gpt-5-distill", registry=tmp_path, max_tokens=50)
    assert lm.kwargs == {"temperature": 0.0, "max_tokens": 50}
    again = LoRALM.load_state(lm.dump_state())
    assert (again.kwargs, again.model) == (lm.kwargs, lm.model)
    assert "rollout_id" not in LoRALM("seedling", rollout_id=None).kwargs


def test_a_base_may_be_given_as_a_path():
    assert LoRALM(SEEDLING_FOLDER).base == LoRALM(str(SEEDLING_FOLDER)).base
    assert LoRALM("seedling").copy(model=Path(SEEDLING_FOLDER)).base.name == str(SEEDLING_FOLDER)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"adapter": "legal"}, "adapter='legal': an adapter's name is LoRALM's argument `domain`"),
        ({"base": "Qwen/Qwen3-8B"}, "base='Qwen/Qwen3-8B': the base is LoRALM's first argument, `model`"),
        ({"max_loras": 4}, r"max_loras: .* LoRALM\(engine=\{'max_loras': 4\}\)"),
    ],
)
def test_arguments_of_other_names_are_refused_at_once(given, message):
    with pytest.raises(ConfigError, match=message):
        LoRALM("seedling", **given)
    with pytest.raises(ConfigError, match=message):
        LoRALM("seedling").copy(**given)


def test_what_a_caller_does_with_its_settings_later_changes_nothing():
    engine = {"max_loras": 2, "hf_overrides": {"rope_theta": 1.0}}
    lm = LoRALM("seedling", engine=engine)
    engine["hf_overrides"]["rope_theta"] = 2.0
    engine["max_loras"] = 4
    assert lm.copy(domain="legal").engine is lm.engine
    assert lm.dump_state()["engine"] == {"max_loras": 2, "hf_overrides": {"rope_theta": 1.0}}


# -- servers -----------------------------------------------------------------------------------------------------------


def test_a_server_tells_reasoning_from_the_answer_where_one_says_so(monkeypatch):
    assert not LoRALM("seedling", api_base=SERVER).supports_reasoning
    thinking = LoRALM("seedling", api_base=SERVER, engine={"reasoning_parser": "qwen3"})
    assert thinking.supports_reasoning and thinking.copy(domain="legal").supports_reasoning
    monkeypatch.setenv("DSPY_LORA_SERVING__REASONING_PARSER", "qwen3")
    assert LoRALM("seedling", api_base=SERVER).supports_reasoning


@pytest.mark.parametrize(
    "engine", [{"max_loras": 4}, {"kv_cache_gib": 2}, {"reasoning_parser": "qwen3", "dtype": "auto"}]
)
def test_settings_that_a_running_server_cannot_be_given_are_refused(engine):
    with pytest.raises(ConfigError, match="the server at api_base was started with settings of its own"):
        LoRALM("seedling", api_base=SERVER, engine=engine)
    own = LoRALM("seedling", engine=engine)
    thinks = {key: engine[key] for key in engine.keys() & {"reasoning_parser"}}
    assert own.copy(api_base=SERVER).dump_state()["engine"] == thinks  # the others were its own engine's
    with pytest.raises(ConfigError, match="the server at api_base"):
        own.copy(api_base=SERVER, engine=engine)
    saved = own.dump_state() | {"server": SERVER}  # as an earlier version wrote it
    assert LoRALM.load_state(saved).dump_state()["engine"] == thinks


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_file_keeps_what_dspy_s_own_keeps():
    kept = {"train_kwargs": {"max_steps": 7}, "launch_kwargs": {"a": 1}, "finetuning_model": "x"}
    again = LoRALM.load_state(LoRALM("seedling", use_developer_role=True, **kept).dump_state())
    assert {name: vars(again)[name] for name in kept} == kept and again.use_developer_role
    assert not kept.keys() & LoRALM("seedling").dump_state().keys()


def test_what_no_file_takes_is_left_out_of_it():
    lm = LoRALM("seedling", train_kwargs={"output_dir": Path("runs")})
    assert "train_kwargs" not in lm.dump_state()


def test_a_file_keeps_that_settings_were_taken_back():
    lm = LoRALM("seedling", max_tokens=7).copy(temperature=None)
    assert LoRALM.load_state(lm.dump_state()).kwargs == lm.kwargs == {"max_tokens": 7}
    free = lm.copy(max_tokens=None)
    assert LoRALM.load_state(free.dump_state()).kwargs == free.kwargs == {}
