"""Adapters come into a vLLM worker beside the requests that run, instead of in their way.

vLLM's worker reads an adapter in the loop that also runs the requests, so that all of them wait for the disk; and it
writes an adapter into its slot matrix by matrix, after zeros, some 900 kernels for Llama 3 8B. Here a thread reads it,
up to where vLLM's own cache in CPU memory takes it, and the matrices that fill their places go there in one call.

The workers of ``cpu_lora.py`` and ``gpu_lora.py`` inherit from ``LoadsAside``; the host calls ``bring_adapter``.
"""

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest


class LoadsAside:
    """Mixin of a vLLM worker."""

    model_runner: Any
    lora_config: Any
    _reader: ThreadPoolExecutor
    _reads: "dict[int, Future[LoRAModel]]"

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Loads the model, and with it the LoRA layers that adapters are written into."""
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        if self.lora_config is None:
            return
        self._reader, self._reads = ThreadPoolExecutor(1, "adapter-reader"), {}
        Writes().take_over(self.model_runner.lora_manager._adapter_manager)

    def bring_adapter(self, name: str, id: int, path: str) -> bool:
        """Brings an adapter into CPU memory; to be called until it is there.

        Args:
            name: As in ``LoRARequest``.
            id: As in ``LoRARequest``.
            path: The adapter's folder.

        Returns:
            Whether vLLM's cache in CPU memory holds it. If not, a thread is reading it.

        Raises:
            Exception: What vLLM raises for an adapter that it cannot load; the next call reads it again.
        """
        manager = self.model_runner.lora_manager
        cache = manager._adapter_manager
        if id in cache.list_adapters():
            return True
        if id not in self._reads:
            self._reads[id] = self._reader.submit(_read, manager, LoRARequest(name, id, path))
        if not self._reads[id].done():
            return False
        lora = self._reads.pop(id).result()
        if len(cache) >= cache.capacity:
            cache.remove_oldest_adapter()
        cache.add_adapter(lora)
        return True


def _read(manager: Any, request: LoRARequest) -> LoRAModel:
    """Reads an adapter and puts its slices together, which vLLM does not do again to one that is."""
    lora: LoRAModel = manager._load_adapter(request)
    manager._adapter_manager._create_merged_loras_inplace(lora)
    return lora


class Writes:
    """Collects the matrices of an adapter that goes into a slot, and copies them at once."""

    def __init__(self) -> None:
        self._places: list[torch.Tensor] = []
        self._matrices: list[torch.Tensor] = []

    def take_over(self, manager: Any) -> None:
        """Puts itself between vLLM's adapter manager and its LoRA layers."""
        for module in manager.modules.values():
            if getattr(module, "tp_size", 0) == 1 and hasattr(module, "n_slices"):
                module.set_lora = functools.partial(self._collect, module, module.set_lora)
        manager.activate_adapter = functools.partial(self._activate, manager.activate_adapter)

    def _activate(self, activate: Callable[[int], bool], id: int) -> bool:
        try:
            done = activate(id)
            if self._places:
                torch._foreach_copy_(self._places, self._matrices, non_blocking=True)
        finally:
            self._places, self._matrices = [], []
        return done

    def _collect(self, module: Any, set_lora: Callable[..., None], index: int, lora_a: Any, lora_b: Any) -> None:
        """Takes the matrices of a layer if they fill their places; else vLLM writes them, and zeros around them."""
        matrices = [*_listed(lora_a), *_listed(lora_b)]
        places = [stacked[index, 0] for stacked in (*module.lora_a_stacked, *module.lora_b_stacked)]
        if [getattr(matrix, "shape", None) for matrix in matrices] == [place.shape for place in places]:
            self._places += places
            self._matrices += matrices
        else:
            set_lora(index, lora_a, lora_b)


def _listed(matrices: Any) -> list[Any]:
    return matrices if isinstance(matrices, list) else [matrices]
