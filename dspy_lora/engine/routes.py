"""What model strings stand for: an adapter, the base model alone, or a choice, made anew for every request."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeAlias

from dspy import lm15

from dspy_lora.engine.protocol import Adapter

Routes: TypeAlias = dict[str, Callable[[lm15.Request], str]]


def choose_model(routes: Routes, request: lm15.Request) -> lm15.Request:
    """The request under the model string that is to answer it."""
    choose = routes.get(request.model)
    return dataclasses.replace(request, model=choose(request)) if choose else request


def adapter_of(adapters: Mapping[str, Adapter | None], model: str) -> Adapter | None:
    """The adapter that answers under a model string; None for the base model alone.

    Args:
        adapters: What LMs have said of their model strings.
        model: The model string.

    Raises:
        lm15.ConfigurationError: None has said anything of this one, and the base model must not answer for an adapter.
    """
    if model not in adapters:
        raise lm15.ConfigurationError(
            f"no LoRALM of this process has said what answers as {model!r}. Make one of that adapter, or that base "
            "model, and ask by its own `model`."
        )
    return adapters[model]
