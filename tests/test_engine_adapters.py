"""Adapters in a running engine with two slots: swapped, published, refused, unloaded; and its figures."""

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import dspy
import pytest
import torch
from safetensors.torch import load_file, save_file

from dspy_lora import AdapterRegistry, LoRALM
from dspy_lora.adapters.peft_config import read_peft_config
from dspy_lora.engine.residents import check_patterns
from dspy_lora.errors import AdapterError, UnknownAdapterError

pytestmark = pytest.mark.timeout(900)
DOMAINS = (
    "analytics customer_service education financial healthcare legal manufacturing marketing operations real_estate "
    "research specialized"
).split()
# float32: an answer does not depend on who else is in the batch.
ENGINE = {"max_loras": 2, "max_cpu_loras": 2, "dtype": "float32"}
ENGINE_WITHOUT = {"dtype": "float32", "enable_lora": False, "enforce_eager": True}  # not compiled, which takes a minute


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """A registry of this module's own, over the bundled adapters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("work"))
        yield AdapterRegistry()


@pytest.fixture(scope="module")
def make(registry):
    """Makes LMs of the one engine of this module."""

    def make(domain=None, **kwargs):
        settings = {"max_tokens": 12, "cache": False} | kwargs
        return LoRALM("seedling", domain=domain, engine=ENGINE, **settings)

    make().preload()
    yield make
    make().kill()


@pytest.fixture
def publish(registry, tmp_path):
    """Publishes the legal adapter, changed: its effect times a factor, its rank widened with zeros."""

    def publish(name, factor, rank=16):
        legal, folder = registry.resolve("legal").path, tmp_path / f"{name}-{factor}"
        shutil.copytree(legal, folder, ignore=shutil.ignore_patterns("revision.json", "metadata.json"))
        config, path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
        config.write_text(config.read_text().replace('"r": 16', f'"r": {rank}'))
        assert read_peft_config(folder).r == rank
        save_file({key: change(key, value, factor, rank) for key, value in load_file(path).items()}, path)
        return registry.publish(folder, name)

    return publish


def change(key, value, factor, rank):
    missing = rank - 16
    if "lora_A" in key:
        return torch.nn.functional.pad(value, (0, 0, 0, missing))
    return torch.nn.functional.pad(value * factor, (0, missing))


def ask(lm, question="What is asked here?"):
    return lm(question)[0]


def refusal(lm):
    with pytest.raises(dspy.LMError) as caught:
        ask(lm)
    return str(caught.value)


def test_adapters_that_the_registry_knows_are_in_memory_before_anyone_asks_for_them(make):
    deadline = time.monotonic() + 60
    while (stats := make().engine_stats())["adapters_in_memory"] < ENGINE["max_cpu_loras"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)

    assert stats["adapters_in_memory"] == ENGINE["max_cpu_loras"]
    assert stats["adapters"] == []


def test_twelve_adapters_and_the_base_take_turns_in_two_slots_and_answer_as_alone(make):
    lms = [make(domain) for domain in [*DOMAINS, None]]
    alone = [ask(lm) for lm in lms]
    assert len(set(alone)) > 6
    assert len(make().engine_stats()["adapters"]) == 2
    with ThreadPoolExecutor(64) as pool:
        mixed = list(pool.map(ask, lms * 8))
    assert mixed == alone * 8
    assert [ask(lm) for lm in lms] == alone
    assert make().engine_stats()["restarts"] == 0


def test_a_rare_adapter_is_answered_among_busy_ones_that_hold_every_slot(make):
    stop, answered = threading.Event(), []

    def keep_asking(domain, tokens):
        lm = make(domain, max_tokens=tokens, ignore_eos=True)
        while not stop.is_set():
            answered.append(lm(f"Question {len(answered)}."))

    with ThreadPoolExecutor(9) as pool:
        lengths = (31, 41, 53, 67)  # the requests of an adapter never end all at once
        busy = [pool.submit(keep_asking, domain, tokens) for domain in ("legal", "financial") for tokens in lengths]
        try:
            while len(answered) < 16:  # from here on both adapters always have a request running
                time.sleep(0.01)
            rare = pool.submit(lambda: make("research", max_tokens=4)("Which intent?"))
            assert rare.result(timeout=120)
            assert not any(task.done() for task in busy)
        finally:
            stop.set()
    assert all(task.result() is None for task in busy)


def test_an_adapter_published_while_the_engine_runs_is_served_without_a_restart(make, publish):
    before = make().engine_stats()
    legal = ask(make("legal"))
    first = publish("fresh", 3.0)
    old = make("fresh")
    answer = ask(old)
    assert answer != legal
    second = publish("fresh", -3.0)
    new = make("fresh")
    assert (old.adapter.ref, new.adapter.ref) == (first.ref, second.ref)
    assert ask(new) != answer
    assert ask(old) == answer  # a revision stays what it was
    after = make().engine_stats()
    assert (after["pid"], after["restarts"]) == (before["pid"], before["restarts"])


def test_an_adapter_above_the_engines_rank_is_refused_and_the_others_go_on(make, publish):
    legal = ask(make("legal"))
    wide = make(publish("wide", 1.0, rank=24).ref)
    message = refusal(wide)
    assert f"adapter {wide.adapter.ref!r} has rank 24; this engine takes ranks up to 16" in message
    assert "LoRALM(engine={'max_lora_rank': 32})" in message
    with pytest.raises(AdapterError, match="has rank 24"):
        wide.preload()
    assert ask(make("legal")) == legal


def test_a_vllm_that_does_not_read_an_adapter_s_patterns_is_not_given_it(monkeypatch):
    """vLLM 0.26 scales every module by the adapter's own rank and alpha."""
    from vllm.lora.peft_helper import PEFTHelper

    legal = read_peft_config(AdapterRegistry().resolve("legal").path)
    own = legal.model_copy(update={"alpha_pattern": {"q_proj": 2.0}})
    check_patterns("own", own)
    monkeypatch.delitem(PEFTHelper.__dataclass_fields__, "alpha_pattern")
    check_patterns("legal", legal)
    with pytest.raises(AdapterError, match=r"adapter 'own' has its own alpha_pattern, .* with `dspy-lora merge`"):
        check_patterns("own", own)


def test_an_adapter_that_is_gone_is_named_and_the_others_go_on(make, publish, registry):
    gone = make(publish("gone", 2.0).ref)
    ask(gone)
    shutil.rmtree(gone.adapter.path)
    for _ in range(2):
        message = refusal(gone)
        assert f"adapter {gone.adapter.ref!r} is gone from {str(gone.adapter.path)!r}" in message
        assert "Publish it again" in message
    with pytest.raises(AdapterError, match="is gone"):
        gone.preload()
    assert ask(make("legal"))
    assert make().engine_stats()["restarts"] == 0
    shutil.rmtree(registry.root / "gone")
    with pytest.raises(UnknownAdapterError, match="'gone'"):
        make("gone")


def test_a_damaged_adapter_is_named_and_the_others_go_on(make, publish):
    damaged = make(publish("damaged", 2.0).ref)
    with (damaged.adapter.path / "adapter_model.safetensors").open("r+b") as weights:
        weights.truncate(1000)
    message = refusal(damaged)
    assert f"vLLM cannot load adapter {damaged.adapter.ref!r} from {str(damaged.adapter.path)!r}" in message
    assert ask(make("legal"))
    assert make().engine_stats()["restarts"] == 0


def test_an_unknown_domain_is_refused_with_the_near_names(make):
    with pytest.raises(UnknownAdapterError, match=r"Did you mean 'legal'\?"):
        make("legl")


def test_preload_and_unload_change_what_is_resident(make):
    legal, financial = make("legal"), make("financial")
    answer = ask(legal)
    for lm in (legal, financial):
        lm.preload()
    assert make().engine_stats()["adapters"] == [financial.adapter.ref, legal.adapter.ref]
    legal.unload()
    assert make().engine_stats()["adapters"] == [financial.adapter.ref]
    legal.unload()  # again
    assert ask(legal) == answer
    for domain in ("marketing", "research"):  # which take both slots
        make(domain).preload()
    assert legal.adapter.ref not in make().engine_stats()["adapters"]
    legal.preload()
    assert legal.adapter.ref in make().engine_stats()["adapters"]


def test_an_adapter_unloaded_under_its_calls_is_loaded_again(make):
    legal = make("legal", max_tokens=32)
    answer = ask(legal)
    with ThreadPoolExecutor(32) as pool:
        calls = [pool.submit(ask, legal) for _ in range(64)]
        while not all(call.done() for call in calls):
            legal.unload()
            time.sleep(0.02)
    assert {call.result() for call in calls} == {answer}
    assert make().engine_stats()["restarts"] == 0


def test_an_adapter_is_unloaded_under_calls_that_never_pause(make):
    legal, unloaded = make("legal", max_tokens=32), threading.Event()

    def keep_asking():
        return {ask(legal) for _ in iter(unloaded.is_set, True)}

    with ThreadPoolExecutor(8) as pool:
        callers = [pool.submit(keep_asking) for _ in range(8)]
        try:
            for _ in range(3):
                time.sleep(0.2)
                legal.unload()
        finally:
            unloaded.set()
    assert set.union(*(caller.result() for caller in callers)) == {ask(legal)}


def test_an_adapter_unloaded_and_removed_under_a_call_ends_nobody_s_engine(make, publish, registry):
    """Without a wait for the call vLLM would read the adapter again in its next step, and die."""
    leaving = make(publish("leaving", 2.0).ref, max_tokens=300, ignore_eos=True)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(ask, lm) for lm in (leaving, make("legal", max_tokens=300, ignore_eos=True))]
        while make().engine_stats()["running"] < 2:
            assert not any(call.done() for call in calls)
            time.sleep(0.01)
        registry.remove("leaving")
        leaving.unload()
        assert all(call.result() for call in calls)
    stats = make().engine_stats()
    assert stats["restarts"] == 0 and leaving.adapter.ref not in stats["adapters"]


def test_an_engine_without_lora_starts_is_counted_and_refuses_adapters(make):
    base = LoRALM("seedling", engine=ENGINE_WITHOUT, max_tokens=12, cache=False)
    legal = base.copy(domain="legal")
    try:
        base.preload()
        assert ask(base) == ask(make())
        message = refusal(legal)
        assert f"adapter {legal.adapter.ref!r} needs LoRA; this engine was started without it" in message
        assert "Leave 'enable_lora' out of LoRALM(engine=...), or ask without a domain." in message
        with pytest.raises(AdapterError, match="needs LoRA"):
            legal.preload()
        legal.unload()  # of what was never loaded: nothing
        stats = base.engine_stats()
    finally:
        base.kill()
    assert (stats["adapters"], stats["adapters_in_memory"], stats["requests"]) == ([], 0, 1)
    assert (stats["max_loras"], stats["max_lora_rank"], stats["max_cpu_loras"]) == (0, 0, 0)
    assert stats["restarts"] == 0


def test_the_engine_counts_what_runs_and_what_waits(make):
    before = make().engine_stats()
    lm = make("legal", max_tokens=200, ignore_eos=True)
    with ThreadPoolExecutor(32) as pool:
        calls = [pool.submit(ask, lm) for _ in range(32)]
        seen = []
        while not all(call.done() for call in calls):
            seen.append(make().engine_stats())
            time.sleep(0.02)
    after = make().engine_stats()
    assert max(stats["running"] for stats in seen) > 16
    assert max(stats["output_tokens_per_s"] for stats in seen) > 0
    assert max(stats["kv_cache_usage"] for stats in seen) > 0
    assert after["requests"] - before["requests"] == 32
    assert after["output_tokens"] - before["output_tokens"] == 32 * 200
    assert (after["running"], after["waiting"]) == (0, 0)


def test_the_engine_counts_prefix_cache_hits(make):
    prompt = "The same words again. " * 100  # several blocks of 128 tokens
    ask(make("legal"), prompt)
    before = make().engine_stats()
    ask(make("legal"), prompt)
    after = make().engine_stats()
    hits = after["prefix_cache_hits"] - before["prefix_cache_hits"]
    queries = after["prefix_cache_queries"] - before["prefix_cache_queries"]
    assert 128 <= hits < queries
    ask(make("financial"), prompt)  # whose keys and values are others
    assert make().engine_stats()["prefix_cache_hits"] == after["prefix_cache_hits"]


def test_a_killed_engine_comes_back_at_the_next_call(make):
    lm = make("legal")
    answer, pid = ask(lm), lm.engine_stats()["pid"]
    lm.kill()
    assert not lm._engine_spec.client.running
    lm.kill()  # again
    lm.unload()  # of what does not run: nothing
    assert not lm._engine_spec.client.running
    assert ask(lm) == answer
    assert lm.engine_stats()["pid"] != pid
