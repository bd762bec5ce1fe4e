"""LoRA's Triton kernels against plain arithmetic: here in Triton's interpreter, on a GPU beside vLLM's own."""

import importlib
from types import SimpleNamespace

import pytest
import torch

RANK = 16
WIDTHS = [(64,), (48, 48), (96, 32, 32)]
# Slot of each token: none has an adapter, all the same, some without, all kinds in turn, one token.
BATCHES = [[-1] * 5, [2] * 40, [0, -1, 1] * 9, [*range(-1, 5)] * 7, [3]]


@pytest.fixture(scope="module")
def gpu_lora():
    """The module; where there is no GPU, Triton's interpreter runs its kernels (conftest.py)."""
    pytest.importorskip("triton", reason="Triton is not installed: its kernels run on a machine with a GPU")
    from dspy_lora.engine import gpu_lora

    return gpu_lora


@pytest.fixture(scope="module")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def batch(slots, loras, device):
    """vLLM's description of whose the tokens are, by the names of its kernels' arguments."""
    slots = torch.tensor(slots)
    ids, counts = slots.unique(return_counts=True)
    described = {
        "token_indices_sorted_by_lora_ids": slots.sort(stable=True).indices.int(),
        "num_tokens_per_lora": torch.zeros(loras + 1, dtype=torch.int32),
        "lora_token_start_loc": torch.zeros(loras + 2, dtype=torch.int32),
        "lora_ids": torch.full((loras + 1,), -1, dtype=torch.int32),
    }
    described["num_tokens_per_lora"][: len(ids)] = counts
    described["lora_token_start_loc"][1 : len(ids) + 1] = counts.cumsum(0)
    described["lora_ids"][: len(ids)] = ids
    return {name: value.to(device) for name, value in described.items()} | {"M": len(slots)}


def drawn(*shape, device):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(torch.float16).to(device)  # the interpreter has no bfloat16


def addresses(weights):
    """As vLLM hands several slices over; one slice goes as it is."""
    pointers = torch.tensor([each.data_ptr() for each in weights], dtype=torch.uint64, device=weights[0].device)
    return weights[0] if len(weights) == 1 else pointers


@pytest.mark.parametrize("rank", [8, 16, 32, 64])
@pytest.mark.parametrize("slots", BATCHES, ids=str)
@pytest.mark.parametrize("slices", [1, 2, 3])
def test_shrink_multiplies_every_token_with_its_adapter_s_a(gpu_lora, device, slots, slices, rank):
    loras, inputs = 5, 272  # not a multiple of a step
    x = drawn(len(slots), inputs, device=device)
    weights = [drawn(loras, rank, inputs, device=device) * (1 + at) / inputs**0.5 for at in range(slices)]
    out = torch.zeros(slices, len(slots), rank, device=device)
    given = batch(slots, loras, device) | {
        "input_ptr": x, "lora_ptr": addresses(weights), "out_ptr": out, "N": rank, "K": inputs, "scaling": 0.5,
        "input_d0_stride": x.stride(0), "lora_d0_stride": weights[0].stride(0), "output_d0_stride": out.stride(0),
        "output_d1_stride": out.stride(1), "SLICE_NUM": slices,
    }  # fmt: skip
    assert gpu_lora.shrink(loras + 1, given)
    for token, slot in enumerate(slots):
        for weight, got in zip(weights, out[:, token], strict=True):
            expected = 0.5 * weight[slot].float() @ x[token].float() if slot >= 0 else torch.zeros_like(got)
            torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("slots", BATCHES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_expand_adds_the_product_with_b_and_leaves_other_tokens_alone(gpu_lora, device, slots, widths, add):
    loras, even = 5, len(set(widths)) == 1
    x = drawn(len(widths), len(slots), RANK, device=device).float()
    weights = [drawn(loras, width, RANK, device=device) / 4 for width in widths]
    before = drawn(len(slots), sum(widths), device=device)
    out = before.clone()
    starts = torch.tensor([sum(widths[:at]) for at in range(len(widths))], device=device)
    given = batch(slots, loras, device) | {
        "input_ptr": x, "lora_ptr": addresses(weights), "out_ptr": out, "N": max(widths), "K": RANK,
        "slice_start_loc": starts if len(widths) > 1 else 0, "input_d0_stride": x.stride(0),
        "input_d1_stride": x.stride(1), "output_d0_stride": out.stride(0), "ADD_INPUTS": add,
        "ls_d0_ptr": weights[0].stride(0) if even else torch.tensor([w.stride(0) for w in weights], device=device),
        "output_hs_ptr": widths[0] if even else torch.tensor(widths, device=device), "SLICE_NUM": len(widths),
        "SAME_STRIDE": even,
    }  # fmt: skip
    assert gpu_lora.expand(loras + 1, given)
    for token, slot in enumerate(slots):
        expected = before[token].float()
        if slot >= 0:
            product = torch.cat([w[slot].float() @ part.half().float() for w, part in zip(weights, x[:, token])])  # noqa: B905
            expected = expected * add + product
        torch.testing.assert_close(out[token].float(), expected, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize(
    "changed", [{"K": 24}, {"N": 40}, {"slice_start_loc": 8}, {"K": 256}], ids=["rank 24", "width 40", "start 8", "256"]
)
def test_what_the_kernels_do_not_take_goes_vllm_s_own_way(gpu_lora, changed):
    launched = []

    class Kernel:
        arg_names = ("K", "N", "slice_start_loc", "SAME_STRIDE", "SLICE_NUM")

        def __getitem__(self, grid):
            return lambda *args, **kwargs: launched.append((grid, args, kwargs))

    arguments = {"K": 16, "N": 64, "slice_start_loc": 0} | changed
    launcher = gpu_lora.Launcher(Kernel(), gpu_lora.expand)
    launcher[4, 1, 13](*arguments.values(), SAME_STRIDE=True, SLICE_NUM=1)
    assert launched == [((4, 1, 13), tuple(arguments.values()), {"SAME_STRIDE": True, "SLICE_NUM": 1})]


def test_a_kernel_with_other_arguments_is_left_in_its_place(gpu_lora, monkeypatch, capsys):
    module = importlib.import_module("vllm.lora.ops.triton_ops.lora_expand_op")
    shrink = importlib.import_module("vllm.lora.ops.triton_ops.lora_shrink_op")
    monkeypatch.setattr(shrink, "_lora_shrink_kernel", shrink._lora_shrink_kernel)
    monkeypatch.setattr(module, "_lora_expand_kernel", other := lambda: None)
    gpu_lora.install(tuned=False)
    assert module._lora_expand_kernel is other
    assert "expand by vLLM's own kernel, whose arguments lack ['ADD_INPUTS'" in capsys.readouterr().err


TILE = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT_K": 2, "num_warps": 8, "num_stages": 4}
OWN = {"shrink": ("BLOCK_M", "BLOCK_K", "SPLIT_K"), "expand": ("BLOCK_M", "BLOCK_N")}


@pytest.fixture
def vllm_s(gpu_lora, monkeypatch):
    """Puts stand-ins in the place of vLLM's kernels, whose arguments are vLLM's but for what is left out."""

    modules = {op: importlib.import_module(f"vllm.lora.ops.triton_ops.lora_{op}_op") for op in OWN}

    def put(without=()):
        tile = [name for name in TILE if name.isupper() and name not in without]
        for op, module in modules.items():
            own = type("Kernel", (), {"arg_names": [*gpu_lora._NEEDED[op].split(), *tile]})()
            monkeypatch.setattr(module, f"_lora_{op}_kernel", own)
        return lambda op: getattr(modules[op], f"_lora_{op}_kernel")

    return put


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("op", ["shrink", "expand"])
def test_tiles_are_those_handed_over_only_where_they_are_for_these_kernels(gpu_lora, vllm_s, monkeypatch, op, tuned):
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **kwargs: launched.append(kwargs)

    kernel = vllm_s()
    monkeypatch.setattr(gpu_lora.gpu_kernels, op, Kernel())
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", "/of/whom")  # says nothing of whose settings are there
    gpu_lora.install(not tuned)
    gpu_lora.install(tuned)  # the last word counts
    sizes = {"N": 16, "K": 64} if op == "shrink" else {"N": 64, "K": 16}
    given = dict.fromkeys(gpu_lora._NEEDED[op].split(), 0) | {"M": 4, "SLICE_NUM": 1, "SAME_STRIDE": True}
    kernel(op)[1, 1, 13](**given | TILE | sizes | {"lora_ids": torch.zeros(13)})
    rules = gpu_lora.shrink_tiles(4, 16) if op == "shrink" else gpu_lora.expand_tiles(4)
    expected = {name: TILE[name] for name in (*OWN[op], "num_warps", "num_stages")} if tuned else rules
    assert expected.items() <= launched[0].items()


def test_a_tuned_setting_is_read_from_arguments_that_have_to_be_there(gpu_lora, vllm_s, capsys):
    kernel = vllm_s(without=("BLOCK_M", "SPLIT_K"))
    gpu_lora.install(tuned=True)
    assert not any(isinstance(kernel(op), gpu_lora.Launcher) for op in OWN)
    printed = capsys.readouterr().err
    assert "shrink by vLLM's own kernel, whose arguments lack ['BLOCK_M', 'SPLIT_K']" in printed
    assert "expand by vLLM's own kernel, whose arguments lack ['BLOCK_M']" in printed
    gpu_lora.install(tuned=False)  # the rules need none of them
    assert all(isinstance(kernel(op), gpu_lora.Launcher) for op in OWN)


def test_workers_say_whose_settings_they_take(gpu_lora):
    assert (gpu_lora.TiledGPUWorker.tuned, gpu_lora.TunedGPUWorker.tuned) == (False, True)


@pytest.mark.parametrize(("most", "sizes"), [(10, [1, 2, 4, 8, 10]), (8, [1, 2, 4, 8]), (1, [1])])
def test_a_worker_runs_a_batch_of_every_size_before_vllm_warms_up(gpu_lora, most, sizes, monkeypatch):
    ran = []
    monkeypatch.setattr(gpu_lora.Worker, "compile_or_warm_up_model", lambda self: ran.append("vLLM's"))
    worker = object.__new__(gpu_lora.TiledGPUWorker)
    worker.model_runner = SimpleNamespace(
        max_num_tokens=most, _dummy_run=lambda tokens, num_active_loras, **_: ran.append((tokens, num_active_loras))
    )
    worker.lora_config = SimpleNamespace(max_loras=3)
    worker.compile_or_warm_up_model()
    worker.lora_config = None  # an engine without LoRA
    worker.compile_or_warm_up_model()
    assert ran == [*((size, 3) for size in sizes), "vLLM's", "vLLM's"]


def test_a_tuned_tile_computes_the_same(gpu_lora, device):
    slots, loras, inputs = [*range(-1, 5)] * 7, 5, 272
    x, weight = drawn(len(slots), inputs, device=device), drawn(loras, RANK, inputs, device=device) / inputs**0.5
    outs = []
    for tuned in (False, True):
        outs.append(torch.zeros(1, len(slots), RANK, device=device))
        given = batch(slots, loras, device) | {
            "input_ptr": x, "lora_ptr": weight, "out_ptr": outs[-1], "N": RANK, "K": inputs, "scaling": 0.5,
            "input_d0_stride": x.stride(0), "lora_d0_stride": weight.stride(0), "SLICE_NUM": 1,
            "output_d0_stride": outs[-1].stride(0), "output_d1_stride": outs[-1].stride(1),
        }  # fmt: skip
        assert gpu_lora.shrink(loras + 1, given | TILE, tuned)
    assert outs[0].any()
    torch.testing.assert_close(outs[1], outs[0], atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 60, 3000])
@pytest.mark.parametrize("widths", [(4096,), (14336, 14336), (4096, 1024, 1024)], ids=str)
def test_results_are_those_of_vllm_s_kernels(gpu_lora, monkeypatch, tokens, widths):
    from dspy_lora.engine.gpu_shapes import Product
    from dspy_lora.tuning.inputs import Inputs
    from dspy_lora.tuning.problem import Problem

    for product in (Product("expand", widths), Product("shrink", (4096,) * len(widths))):
        module = importlib.import_module(f"vllm.lora.ops.triton_ops.lora_{product.op}_op")
        launch = getattr(gpu_lora, product.op)
        kernel = getattr(module, f"_lora_{product.op}_kernel")
        if isinstance(kernel, gpu_lora.Launcher):
            kernel = kernel.kernel  # vLLM's, whatever a test before has put there
        monkeypatch.setattr(module, f"_lora_{product.op}_kernel", kernel)
        inputs = Inputs(Problem(product, RANK, tokens, 12))
        inputs.call()
        own = inputs._output.clone()
        inputs._output.copy_(inputs._before)
        monkeypatch.setattr(module, f"_lora_{product.op}_kernel", gpu_lora.Launcher(kernel, launch))
        inputs.call()
        torch.testing.assert_close(inputs._output, own, atol=2**-6, rtol=2**-7)
        assert inputs.is_right()
