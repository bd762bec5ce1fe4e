"""Adapters that come into vLLM and out, on a stand-in for it."""

import sys
from types import SimpleNamespace

import pytest

from dspy_lora.engine.protocol import Adapter
from dspy_lora.engine.residents import Residents


class Engine:
    """vLLM's adapters by id, and what was asked of it."""

    def __init__(self):
        self.there, self.asked = set(), []

    async def collective_rpc(self, name, args):
        self.there.add(args[1])
        return [True]

    async def add_lora(self, lora):
        self.asked.append(("add", lora.lora_int_id))
        self.there.add(lora.lora_int_id)

    async def remove_lora(self, id):
        self.asked.append(("remove", id))
        return id in self.there and (self.there.remove(id) or True)

    async def list_loras(self):
        return self.there


@pytest.fixture
def engine(monkeypatch):
    def request(name, id, path):
        return SimpleNamespace(lora_name=name, lora_int_id=id, lora_path=path)

    monkeypatch.setitem(sys.modules, "vllm.lora.request", SimpleNamespace(LoRARequest=request))
    monkeypatch.setitem(sys.modules, "vllm.v1.engine.exceptions", SimpleNamespace(EngineDeadError=OSError))
    monkeypatch.setattr(Residents, "_check", lambda self, adapter: None)
    return Engine()


@pytest.fixture
def residents(engine):
    return Residents(engine, {"max_loras": 2, "max_lora_rank": 16, "loads_aside": True})


@pytest.fixture
def adapter(tmp_path):
    (tmp_path / "adapter_model.safetensors").touch()
    return Adapter("a@1", str(tmp_path))


async def test_an_adapter_that_was_brought_in_ahead_is_unloaded(engine, residents, adapter):
    assert not await residents.unload(adapter)
    await residents.ahead(adapter)
    assert (await residents.figures())["adapters_in_memory"] == 1
    assert await residents.unload(adapter)
    assert (await residents.figures())["adapters_in_memory"] == 0
    assert not await residents.unload(adapter)


async def test_an_adapter_that_was_unloaded_while_its_request_waited_is_loaded_before_it_runs(
    engine, residents, adapter
):
    lora = await residents.lora(adapter)
    await residents.swap_in(lora)  # which has nothing to do
    await residents.unload(adapter)
    await residents.swap_in(lora)
    assert engine.asked == [("add", 1), ("remove", 1), ("add", 1)]
    assert (await residents.figures())["adapters"] == ["a@1"]
