"""Settings of one source, laid over those of another, each key with the words that say where it stands."""

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dspy_lora.errors import ConfigError

# A setting's place: ("training", "learning_rate").
Key = tuple[str, ...]

# Settings lie at most this deep (domains.legal.r); deeper mappings are no settings and need no line.
_DEEPEST = 3


class Loader(yaml.SafeLoader):
    """PyYAML's, whose errors are all YAMLErrors that name the line."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A node's value."""
        try:
            return super().construct_object(node, deep)
        # In turn: of 2024-13-45 and 0b_, of !!int '' and !!bool x, of !!timestamp x.
        except (ValueError, LookupError, AttributeError) as exc:
            problem = f"{node.value!r} cannot be read: {exc}. Put a text in quotes"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from exc


class Layer(NamedTuple):
    """Settings of one source.

    Attributes:
        values: Nested settings.
        origins: For each key where it was set: ``lora_config.yaml:12`` or the name of an environment variable.
    """

    values: dict[str, Any]
    origins: dict[Key, str]

    def under(self, over: "Layer") -> "Layer":
        """Both layers as one; where both set a key, ``over`` wins."""
        return Layer(_merge(self.values, over.values), self.origins | over.origins)


def read_yaml(path: Path) -> Layer:
    """Reads a YAML file of settings.

    Raises:
        ConfigError: The file cannot be read, is not YAML or not a mapping, or sets a key twice.
    """
    origins: dict[Key, str] = {}
    try:
        loader = Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        _note_lines(node, path, (), origins)
        values = None if node is None else loader.construct_document(node)
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} cannot be read: {exc}. Give the path of a lora_config.yaml.") from exc
    except yaml.YAMLError as exc:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(exc).split())}") from exc
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"{path} holds {values!r}, not `key: value` lines.")
    return Layer(values or {}, origins)


def _note_lines(node: yaml.Node | None, path: Path, above: Key, origins: dict[Key, str]) -> None:
    if not isinstance(node, yaml.MappingNode) or len(above) == _DEEPEST:
        return
    for key_node, value_node in node.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        if key_node.tag != "tag:yaml.org,2002:str":
            raise ConfigError(f"{where}: the key {key_node.value!r} is not a word. Put it in quotes.")
        key = (*above, key_node.value)
        if key in origins:
            raise ConfigError(f"{where}: {'.'.join(key)} is set a second time (first: {origins[key]}). Keep one.")
        origins[key] = where
        _note_lines(value_node, path, key, origins)


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merges key by key; a section that is written but empty changes nothing."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            merged[key] = _merge(below, value)
        elif not (isinstance(below, dict) and value is None):
            merged[key] = value
    return merged
