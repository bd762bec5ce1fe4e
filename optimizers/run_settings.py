"""What a run's answers depend on beside its rows, as JSON that every process writes alike.

``RunLog`` keeps it and refuses a folder that was written under something else, so it must hold whatever changes an
answer, and nothing that changes by itself: no address of an object, no order of a set, no key that is renewed.
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import dspy
import pydantic
from dspy.adapters.utils import get_annotation_name, translate_field_type
from dspy_lora.optimizers.run_log import ADDRESS, digest, plain

from dspy_lora.lm import LoRALM

# Where an LM is asked and who asks; the answers are the model's.
_PRIVATE = re.compile(r"^api_|^base_url$|key|secret|password|credential|auth|header|(^|_)token$", re.IGNORECASE)


def program_settings(program: dspy.Module) -> dict[str, Any]:
    """The modules of a program, frozen ones included, what its predictors tell an LM, and which LMs of theirs."""
    return {
        "modules": {name: _options(module) for name, module in program.named_sub_modules(dspy.Module)},
        "predictors": {name: _predictor(predictor) for name, predictor in program.named_sub_modules(dspy.Predict)},
    }


def configured_settings() -> dict[str, Any]:
    """What DSPy is configured with: the LM of whatever has none of its own, and the adapter that writes prompts."""
    adapter = dspy.settings.adapter or dspy.ChatAdapter()  # Predict's own default
    return {"lm": lm_settings(dspy.settings.lm), "dspy_adapter": _options(adapter)}


def lm_settings(lm: Any) -> dict[str, Any] | None:
    """The model and how it samples; None where there is no LM."""
    if lm is None:
        return None
    if not isinstance(lm, dspy.BaseLM):
        return {"class": type(lm).__qualname__}
    model = {"model": lm.model}
    if isinstance(lm, LoRALM):  # whose base may come to this disk while the run is going on
        model = {"model": f"{lm.base.name}/{lm.ref}", "base": lm.base.revision}
    return {"class": type(lm).__qualname__, **model, "model_type": lm.model_type, **_public(lm.kwargs)}


def named(part: Any) -> str | None:
    """A part by name: a word as it is, a function or class by its own, an object by its class's."""
    if part is None or isinstance(part, str):
        return part
    return str(getattr(part, "__qualname__", type(part).__qualname__))


def written(function: Callable[..., Any]) -> str | None:
    """A function by its name and its source, where Python finds it."""
    function = inspect.unwrap(function)
    try:
        source = digest(inspect.getsource(function))
    except (TypeError, OSError):  # an object that can be called, or typed in by hand
        return named(function)
    return f"{named(function)} {source}"


def _options(part: Any) -> dict[str, Any]:
    """Class and numbers of a module: how many rounds, passages, tries. Texts may be secrets, or new in every run."""
    numbers = {} if isinstance(part, dspy.Predict) else vars(part)
    return {"class": type(part).__qualname__} | {
        name: value for name, value in numbers.items() if isinstance(value, int | float) and not name.startswith("_")
    }


def _predictor(predictor: dspy.Predict) -> dict[str, Any]:
    signature = predictor.signature
    demos = [dict(demo.items()) for demo in predictor.demos]
    return {
        "instructions": signature.instructions,
        "order": ", ".join(signature.fields),
        "fields": {name: _field(name, field) for name, field in signature.fields.items()},
        "demos": f"{len(demos)}, {digest(_stable(demos))}" if demos else "none",
        "config": _public(predictor.config),
        "lm": lm_settings(predictor.lm),
    }


def _field(name: str, field: pydantic.fields.FieldInfo) -> str:
    """What an LM is told of a field."""
    told = dict(field.json_schema_extra)  # type: ignore[arg-type]  # DSPy's is no function
    try:
        form = translate_field_type(name, field).removeprefix(f"{{{name}}}").strip(" #")
    except pydantic.errors.PydanticUserError:  # a type without a JSON schema
        form = ""
    default = "" if field.is_required() else f"default {field.default!r}"
    parts = (told["desc"], told.get("constraints"), form, default)
    written = "; ".join(str(part) for part in parts if part)
    return str(_stable(f"{told['__dspy_field_type']} {get_annotation_name(field.annotation)}: {written}"))


def _public(settings: Mapping[Any, Any]) -> dict[str, Any]:
    """Settings without addresses and keys, at any depth."""
    return {
        str(name): _public(value) if isinstance(value, Mapping) else _stable(value)
        for name, value in settings.items()
        if value is not None and not _PRIVATE.search(str(name))
    }


def _stable(value: Any) -> Any:
    """A value as JSON that does not tell where an object lies in memory."""
    try:
        written = json.dumps(value, default=plain)
    except (TypeError, ValueError):  # keys that are no text, or a value that holds itself
        written = json.dumps(repr(value))
    return json.loads(ADDRESS.sub("", written))
