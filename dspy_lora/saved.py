"""``dspy_lora.load``: a saved program comes back, and its file is trusted with no more than that takes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
from dspy.clients.base_lm import LM_CLASS_STATE_KEY

from dspy_lora.config import ServingConfig
from dspy_lora.context.playbook import Playbook
from dspy_lora.context.taught import attach, saved_playbook
from dspy_lora.errors import ConfigError
from dspy_lora.lm import LoRALM

_PLAIN_LM = "dspy.clients.lm.LM"
_SHOWN = 40  # characters of what is no program
_ADDRESSES = ("server", "api_base", "base_url", "model_list")
_SAFE_ENGINE_KEYS = ServingConfig.model_fields.keys() - {"trust_remote_code"}


def load(program: dspy.Module, path: str | Path) -> dspy.Module:
    """Loads a program saved with ``program.save(path)`` whose predictors use LoRALMs.

    DSPy refuses custom LM classes in a file unless the caller trusts the whole file. This trusts LoRALM and ``dspy.LM``
    with the settings that run no code and send nothing anywhere: no other class, no server's address (the caller's key
    would go there), no engine setting outside ``serving`` in ``lora_config.yaml``.

    Args:
        program: A program of the same structure.
        path: The ``.json`` file.

    Returns:
        ``program`` with its state loaded, and as ``program.playbook`` the playbook that was saved with it.

    Raises:
        ConfigError: The file asks for more than that, or is no such file.
        ChangedAdapterError: A base or adapter revision is gone or has changed.
        DataError: The saved playbook cannot be read.
    """
    try:
        state = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError(f"it holds {str(state)[:_SHOWN]}")
    except (OSError, ValueError) as exc:
        raise ConfigError(
            f"{str(path)!r} is no program saved as JSON: {exc}. Save it with program.save('x.json')."
        ) from exc
    for lm in _lm_states(state):
        if wish := _unsafe(lm):
            raise ConfigError(
                f"{str(path)!r} asks for {wish}. If you trust it: program.load(path, allow_unsafe_lm_state=True)"
            )
    playbook = saved_playbook(state)
    program.load(str(path), allow_unsafe_lm_state=True)
    if playbook is not None and not isinstance(vars(program).get("playbook"), Playbook):
        attach(program, playbook)
    return program


def _lm_states(state: Any) -> Iterator[dict[str, Any]]:
    """Every state in a saved program that would become an LM."""
    children = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    if isinstance(state, dict):
        if LM_CLASS_STATE_KEY in state:
            yield state
        elif isinstance(state.get("lm"), dict) and LM_CLASS_STATE_KEY not in state["lm"]:
            yield state["lm"]  # DSPy makes a dspy.LM of a state that names no class
    for child in children:
        yield from _lm_states(child)


def _unsafe(state: dict[str, Any]) -> str | None:
    """What an LM's state asks for that ``load`` does not trust; None for nothing."""
    name = state.get(LM_CLASS_STATE_KEY, _PLAIN_LM)
    if name not in (f"{LoRALM.__module__}.{LoRALM.__qualname__}", _PLAIN_LM):
        return f"class {name!r}"
    for key in _ADDRESSES:
        if state.get(key):
            return f"the server {key}={state[key]!r}"
    engine = state.get("engine") or {}
    if name == _PLAIN_LM and not isinstance(engine, str):
        return f"engine {engine!r}" if engine else None
    unknown = sorted(set(engine) - _SAFE_ENGINE_KEYS)
    return f"engine setting {unknown[0]!r}" if unknown else None
