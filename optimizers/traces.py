"""What a program's trace says of each of its predictors."""

from typing import Any

import dspy
from dspy.utils.exceptions import AdapterParseError

Call = tuple[dspy.Predict, dict[str, Any], Any]  # predictor, inputs, outputs
Trace = list[Call]


def by_predictor(program: dspy.Module, trace: Trace) -> dict[str, list[Call]]:
    """The calls of each predictor by its name, in the order of their first call.

    Modules such as ``dspy.BestOfN`` run copies of their predictors: a call of an object that the program does not hold
    belongs to the only predictor with an equal signature. Where there is none or several it is left out.
    """
    names = {id(predictor): name for name, predictor in program.named_predictors()}
    calls: dict[str, list[Call]] = {}
    for call in trace:
        if (name := names.get(id(call[0])) or _only_equal(program, call[0].signature)) is not None:
            calls.setdefault(name, []).append(call)
    return calls


def unparsed_by(program: dspy.Module, trace: Trace, failed: AdapterParseError) -> str | None:
    """The predictor whose answer did not parse: of those with its signature the first that has not answered yet."""
    equal = _equal(program, failed.signature)
    answered = by_predictor(program, trace)
    return next((name for name in equal if name not in answered), equal[0] if equal else None)


def shown(values: Any) -> dict[str, str]:
    """Inputs or outputs as text."""
    return {key: shown_value(value) for key, value in values.items()}


def shown_value(value: Any) -> str:
    """A field's value as text."""
    return value if isinstance(value, str) else str(value)


def _equal(program: dspy.Module, signature: type[dspy.Signature]) -> list[str]:
    return [name for name, predictor in program.named_predictors() if predictor.signature.equals(signature)]


def _only_equal(program: dspy.Module, signature: type[dspy.Signature]) -> str | None:
    equal = _equal(program, signature)
    return equal[0] if len(equal) == 1 else None
