"""Adapters that come into a worker beside its requests: read in a thread, written into a slot at once."""

import threading
from types import SimpleNamespace

import pytest
import torch

from dspy_lora.engine.lora_loading import LoadsAside, Writes

RANK, SLOTS = 2, 3


class Cache:
    """vLLM's adapter manager, as far as it is used."""

    capacity = 2

    def __init__(self, modules=()):
        self.modules = dict(modules)
        self.models = {}

    def __len__(self):
        return len(self.models)

    def list_adapters(self):
        return self.models

    def add_adapter(self, lora):
        self.models[lora.id] = lora

    def remove_oldest_adapter(self):
        del self.models[next(iter(self.models))]

    def _create_merged_loras_inplace(self, lora):
        lora.merged = True

    def activate_adapter(self, id):
        for name, module in self.modules.items():
            if name in (matrices := self.models[id].matrices):
                module.set_lora(1, *matrices[name])
        return True


class Model:
    """The worker below the mixin."""

    def __init__(self, load, cache):
        self.model_runner = SimpleNamespace(lora_manager=SimpleNamespace(_load_adapter=load, _adapter_manager=cache))

    lora_config = "LoRA is on"

    def load_model(self):
        pass


class Worker(LoadsAside, Model):
    pass


class Layer:
    """A LoRA layer of one or more slices with vLLM's way of writing: zeros first, then what there is."""

    tp_size = 1

    def __init__(self, *widths, inputs=4):
        self.n_slices = len(widths)
        self.lora_a_stacked = tuple(torch.ones(SLOTS, 1, RANK, inputs) for _ in widths)
        self.lora_b_stacked = tuple(torch.ones(SLOTS, 1, width, RANK) for width in widths)
        self.own = 0

    def set_lora(self, index, lora_a, lora_b):
        self.own += 1
        for stacked in (*self.lora_a_stacked, *self.lora_b_stacked):
            stacked[index] = 0


def started(load, cache=None):
    worker = Worker(load, cache or Cache())
    worker.load_model()
    return worker, worker.model_runner.lora_manager._adapter_manager


def brought(worker, *adapter):
    """Asks until the adapter is there."""
    for _ in range(1000):
        if worker.bring_adapter(*adapter):
            return True
        threading.Event().wait(0.01)
    return False


def test_an_adapter_is_read_in_a_thread_and_is_there_when_that_is_done():
    gate = threading.Event()

    def load(request):
        assert gate.wait(60)
        return SimpleNamespace(id=request.lora_int_id, path=request.lora_path)

    worker, cache = started(load)

    assert not worker.bring_adapter("legal@1", 7, "/adapters/legal")
    assert not worker.bring_adapter("legal@1", 7, "/adapters/legal")
    assert not cache.models
    gate.set()
    assert brought(worker, "legal@1", 7, "/adapters/legal")
    assert cache.models[7].path == "/adapters/legal"
    assert cache.models[7].merged


def test_an_engine_without_lora_loads_its_model_alone():
    worker = Worker(None, None)
    worker.lora_config, worker.model_runner = None, SimpleNamespace()  # which has no lora_manager

    worker.load_model()

    assert not hasattr(worker, "_reader")


def test_the_oldest_adapter_makes_room():
    worker, cache = started(lambda request: SimpleNamespace(id=request.lora_int_id))

    for id in (1, 2, 3):
        assert brought(worker, f"a@{id}", id, "/a")

    assert list(cache.models) == [2, 3]


def test_what_cannot_be_read_is_raised_once_and_read_again_at_the_next_call():
    reads = []

    def load(request):
        reads.append(request.lora_name)
        if len(reads) == 1:
            raise ValueError("no such rank")
        return SimpleNamespace(id=request.lora_int_id)

    worker, cache = started(load)

    with pytest.raises(ValueError, match="no such rank"):
        brought(worker, "legal@1", 1, "/a")
    assert brought(worker, "legal@1", 1, "/a")
    assert list(cache.models) == [1]


@pytest.fixture
def layers():
    return {"qkv": Layer(6, 2, 2), "o": Layer(4), "embed": SimpleNamespace(set_lora=lambda *args: None)}


def with_adapter(layers, **matrices):
    """A manager that has one adapter, taken over."""
    cache = Cache(layers)
    cache.models[5] = SimpleNamespace(id=5, matrices=matrices)
    Writes().take_over(cache)
    return cache


def drawn(*shapes):
    return [torch.rand(shape) for shape in shapes]


def test_matrices_that_fill_their_places_are_copied_and_other_slots_stay(layers):
    a, b = drawn((RANK, 4), (RANK, 4), (RANK, 4)), drawn((6, RANK), (2, RANK), (2, RANK))
    [o_a, o_b] = drawn((RANK, 4), (4, RANK))
    cache = with_adapter(layers, qkv=(a, b), o=(o_a, o_b))

    assert cache.activate_adapter(5)

    for stacked, matrix in zip(
        (*layers["qkv"].lora_a_stacked, *layers["qkv"].lora_b_stacked, *layers["o"].lora_a_stacked),
        (*a, *b, o_a),
        strict=True,
    ):
        assert torch.equal(stacked[1, 0], matrix)
        assert torch.equal(stacked[0], torch.ones_like(stacked[0]))
        assert torch.equal(stacked[2], torch.ones_like(stacked[2]))
    assert torch.equal(layers["o"].lora_b_stacked[0][1, 0], o_b)
    assert layers["qkv"].own == layers["o"].own == 0


@pytest.mark.parametrize("missing", ["a slice", "rank"])
def test_a_layer_with_a_part_missing_is_written_by_vllm(layers, missing):
    rank = RANK - 1 if missing == "rank" else RANK
    a, b = drawn((rank, 4), (rank, 4), (rank, 4)), drawn((6, rank), (2, rank), (2, rank))
    if missing == "a slice":
        a[1] = b[1] = None
    cache = with_adapter(layers, qkv=(a, b))

    cache.activate_adapter(5)

    assert layers["qkv"].own == 1


def test_a_write_that_fails_leaves_nothing_for_the_next_adapter(layers):
    [o_a, o_b] = drawn((RANK, 4), (4, RANK))
    cache = with_adapter(layers, qkv=(1, 2, 3), o=(o_a, o_b))
    cache.models[6] = SimpleNamespace(id=6, matrices={})
    cache.modules = dict(reversed(layers.items()))  # "o" is collected before "qkv" fails

    with pytest.raises(TypeError):
        cache.activate_adapter(5)
    cache.activate_adapter(6)

    assert torch.equal(layers["o"].lora_a_stacked[0], torch.ones(SLOTS, 1, RANK, 4))
