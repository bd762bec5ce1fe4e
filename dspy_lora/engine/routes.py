"""Model strings that stand for a choice, made anew for every request."""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

from dspy import lm15

Routes: TypeAlias = dict[str, Callable[[lm15.Request], str]]


def choose_model(routes: Routes, request: lm15.Request) -> lm15.Request:
    """The request under the model string that is to answer it."""
    choose = routes.get(request.model)
    return dataclasses.replace(request, model=choose(request)) if choose else request
