"""The adapters of a running vLLM: how they come into it, and out.

vLLM keeps ``max_cpu_loras`` of them in CPU memory, and ``max_loras`` of those in slots beside the base model, where a
batch finds them. What comes in takes the place of what was used the longest ago.
"""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dspy_lora.adapters.peft_config import PeftConfig, read_peft_config
from dspy_lora.config import Rank
from dspy_lora.engine.protocol import Adapter
from dspy_lora.errors import AdapterError

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

_READ_POLL_S = 0.01
_PATTERNS = ("rank_pattern", "alpha_pattern")  # vLLM 0.26 does not read them, 0.32 does


class Residents:
    """Loads adapters into one ``AsyncLLM`` and takes them out.

    Args:
        engine: The running engine.
        info: What the engine says of itself; see ``Ready`` in protocol.py.
    """

    def __init__(self, engine: "AsyncLLM", info: dict[str, Any]) -> None:
        self._engine = engine
        self._max_loras: int = info["max_loras"]
        self._max_rank: int = info["max_lora_rank"]
        self._loads_aside: bool = info["loads_aside"]
        self._loras: dict[str, LoRARequest] = {}
        self._ids: dict[str, int] = {}
        self._loading: dict[str, asyncio.Task[LoRARequest]] = {}
        self._one_ahead = asyncio.Lock()

    async def lora(self, adapter: Adapter) -> "LoRARequest":
        """The engine's handle on an adapter, loaded at the first use.

        Loading goes through ``add_lora`` first because a load that fails inside a batch would end vLLM's core.
        """
        if not await asyncio.to_thread(Path(adapter.path, "adapter_model.safetensors").exists):
            raise AdapterError(
                f"adapter {adapter.name!r} is gone from {adapter.path!r}. Publish it again, or name another revision."
            )
        if lora := self._loras.get(adapter.name):
            return lora
        if adapter.name not in self._loading:
            self._loading[adapter.name] = task = asyncio.create_task(self._first_load(adapter))
            task.add_done_callback(lambda _: self._loading.pop(adapter.name))
        return await asyncio.shield(self._loading[adapter.name])

    async def swap_in(self, lora: "LoRARequest") -> None:
        """Puts an adapter that may have lost its slot into one, between two steps of the others instead of inside one.

        Where every adapter that was loaded has a slot, and this one was not unloaded while its request waited, there is
        nothing to do.
        """
        if len(self._loras) > self._max_loras or lora.lora_name not in self._loras:
            await self._add(lora)

    async def load(self, adapter: Adapter) -> None:
        """Puts an adapter into a slot; again, if it was swapped out."""
        await self._add(await self.lora(adapter))

    async def ahead(self, adapter: Adapter) -> None:
        """Brings an adapter into CPU memory before it is used."""
        async with self._one_ahead:  # one waits behind a single read, not behind them all
            await self._bring(await self._request(adapter))

    async def unload(self, adapter: Adapter) -> bool:
        """Takes an adapter, used or brought in ahead, out of the engine; says whether it was there.

        To be called while no request of it runs.
        """
        self._loras.pop(adapter.name, None)
        id = self._ids.get(adapter.name)
        return id is not None and await self._engine.remove_lora(id)

    async def figures(self) -> dict[str, Any]:
        """What ``engine_stats()`` shows of adapters: the used ones that are still there, and how many there are."""
        resident = await self._engine.list_loras() if self._max_loras else ()
        names = {lora.lora_int_id: name for name, lora in self._loras.items()}
        return {
            "adapters": sorted(names[id] for id in resident if id in names),
            "adapters_in_memory": len(resident),
        }

    async def _first_load(self, adapter: Adapter) -> "LoRARequest":
        lora = await self._request(adapter)
        await self._add(lora)
        return lora

    async def _add(self, lora: "LoRARequest") -> None:
        """Puts an adapter into a slot; reads it before, if it is not in CPU memory."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await self._bring(lora)
            await self._engine.add_lora(lora)
        except EngineDeadError:
            raise
        except Exception as exc:
            raise AdapterError(f"vLLM cannot load adapter {lora.lora_name!r} from {lora.lora_path!r}: {exc}") from exc
        self._loras[lora.lora_name] = lora

    async def _bring(self, lora: "LoRARequest") -> None:
        """Waits until an adapter is in the workers' CPU memory; the running requests do not."""
        place = (lora.lora_name, lora.lora_int_id, lora.lora_path)
        while self._loads_aside and not all(await self._engine.collective_rpc("bring_adapter", args=place)):
            await asyncio.sleep(_READ_POLL_S)

    async def _request(self, adapter: Adapter) -> "LoRARequest":
        """vLLM's request for an adapter, under the same integer id whenever it is loaded.

        vLLM takes requests of one name for one adapter, and finds its slot by the id: while calls still run under an
        adapter that was unloaded, a second id for its name would end vLLM's core.
        """
        from vllm.lora.request import LoRARequest

        await asyncio.to_thread(self._check, adapter)
        return LoRARequest(adapter.name, self._ids.setdefault(adapter.name, len(self._ids) + 1), adapter.path)

    def _check(self, adapter: Adapter) -> None:
        """Refuses an adapter that needs more room than the engine was started with, or a later vLLM."""
        if not self._max_loras:
            raise AdapterError(
                f"adapter {adapter.name!r} needs LoRA; this engine was started without it and takes the base alone. "
                "Leave 'enable_lora' out of LoRALM(engine=...), or ask without a domain."
            )
        config = read_peft_config(Path(adapter.path))
        rank = config.largest_rank
        if rank > self._max_rank:
            enough = next((allowed for allowed in get_args(Rank) if allowed >= rank), rank)
            raise AdapterError(
                f"adapter {adapter.name!r} has rank {rank}; this engine takes ranks up to {self._max_rank}. Give "
                f"LoRALM(engine={{'max_lora_rank': {enough}}}) or serving.max_lora_rank in lora_config.yaml."
            )
        check_patterns(adapter.name, config)


def check_patterns(name: str, config: PeftConfig) -> None:
    """Refuses an adapter with ranks or alphas for single modules where this vLLM would scale every module alike.

    Args:
        name: The adapter's.
        config: Its configuration.

    Raises:
        AdapterError: It has some, and this vLLM does not read them.
    """
    from vllm.lora.peft_helper import PEFTHelper

    for key in _PATTERNS:
        if getattr(config, key) and key not in PEFTHelper.__dataclass_fields__:
            raise AdapterError(
                f"adapter {name!r} has its own {key}, which this vLLM does not read and would answer without. "
                "Install a later vLLM (0.32 reads it), or make a plain LoRA of the adapter with `dspy-lora merge`."
            )
