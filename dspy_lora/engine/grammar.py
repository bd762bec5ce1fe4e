"""JSON schemas as grammars whose whitespace is bounded."""

import functools
import json
from typing import Any

# A weak model may write spaces and newlines for ever where a JSON schema lets it; indented JSON needs no longer run.
_MAX_WHITESPACE = 16


def bounded(structured: dict[str, Any], config: Any) -> dict[str, Any]:
    """Bounds the whitespace of constrained JSON, where xgrammar enforces it."""
    if config.backend not in ("auto", "xgrammar") or config.disable_any_whitespace:
        return structured
    schema = {"type": "object"} if structured.get("json_object") else structured.get("json")
    if not isinstance(schema, dict) or not (grammar := _json_grammar(json.dumps(schema))):
        return structured
    return {key: value for key, value in structured.items() if key not in ("json", "json_object")} | {
        "grammar": grammar
    }


@functools.lru_cache(maxsize=256)
def _json_grammar(schema: str) -> str | None:
    """A JSON schema as a grammar with bounded whitespace; None where xgrammar cannot enforce it, which vLLM handles."""
    import xgrammar
    from vllm.v1.structured_output.backend_xgrammar import has_xgrammar_unsupported_json_features

    if has_xgrammar_unsupported_json_features(json.loads(schema)):
        return None
    try:
        return str(xgrammar.Grammar.from_json_schema(schema, max_whitespace_cnt=_MAX_WHITESPACE))
    except RuntimeError:
        return None
