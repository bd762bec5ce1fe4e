"""The base model that adapters are made for and served on."""

import dataclasses
import functools
import hashlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from dspy_lora.errors import ConfigError

logger = logging.getLogger(__name__)

SEEDLING = "seedling"
SEEDLING_FOLDER = Path(__file__).parents[1] / "seedling" / "base"
ABSENT = "main"  # revision of a base that is not on this disk
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)

# Weights files below this size (bytes) count with their whole content, larger ones with their header and blocks evenly
# spaced over the file: reading 16 GB for a fingerprint would take longer than loading the model.
_WHOLE_FILE = 256 * 2**20
_BLOCKS, _BLOCK = 64, 64 * 2**10  # number, bytes
_ONE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FETCHED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")  # no second copy of the weights as pickles
_TOKENIZERS = ("tokenizer*", "*.model", "vocab.*")
_TEMPLATE = (*_TOKENIZERS, "chat_template*", "merges.txt", "added_tokens.json", "special_tokens_map.json")
_SHARD = re.compile(r".*-\d+-of-(\d+)\.safetensors")

# Hugging Face ids that were not on this disk when this process first asked. They stay ids: the engine that downloads
# one goes on under it, and a second name for the same model would start a second engine.
_absent: set[str] = set()


@dataclass(frozen=True)
class Base:
    """A base model.

    Attributes:
        name: As it was asked for: ``"seedling"``, a Hugging Face id or a folder.
        path: Its folder; the id where the model is not on this disk.
        revision: First 12 hex digits of the SHA-256 over its configuration and weights, of a weights file of 256 MiB
            or more over its size, its header and 64 evenly spaced blocks of 64 KiB; ``ABSENT`` where it is not on this
            disk.
        template: The same over its tokenizer and chat template: what becomes of a prompt before the model reads it.
            It is no part of the revision, for an adapter fits whatever the prompt.
    """

    name: str
    path: str
    revision: str
    template: str = ""

    @property
    def folder(self) -> Path | None:
        """Its folder; None where the model is not on this disk."""
        return Path(self.path) if Path(self.path).is_dir() else None

    @property
    def for_engine(self) -> "Base":
        """Under one name however its folder was spelled, so that all spellings share one engine."""
        return dataclasses.replace(self, name=self.path) if Path(self.name).expanduser().is_dir() else self

    def is_recorded(self, name: str, revision: str) -> bool:
        """Whether a base that was written down is this one; by name alone where either was not on its disk."""
        return name == self.name if ABSENT in (revision, self.revision) else revision == self.revision


def resolve_base(model: str | None) -> Base:
    """Finds a base model.

    Args:
        model: A Hugging Face id, a folder, or ``"seedling"`` for the bundled model; None is the seedling too, and says
            so in one log line.

    Returns:
        The base model. Nothing is downloaded: an id that is not in the local cache stays an id, for as long as this
        process lives.

    Raises:
        ConfigError: Neither a model folder nor a Hugging Face id, or a file of the model cannot be read.
    """
    if model is None:
        _announce_seedling()
        model = SEEDLING
    if model == SEEDLING:
        return _from_folder(SEEDLING, SEEDLING_FOLDER)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _from_folder(model, folder)
    if not HUB_ID.fullmatch(model):
        raise ConfigError(
            f"base model {model!r}: there is no such folder, and it is no Hugging Face id (like 'Qwen/Qwen3-8B'). "
            "Give a folder with config.json and safetensors files, an id, or 'seedling' for the bundled model."
        )
    snapshot = None if model in _absent else _cached_snapshot(model)
    if snapshot is None:
        _absent.add(model)
        return Base(model, model, ABSENT)
    return _from_folder(model, snapshot)


def fetch_base(model: str | None) -> Base:
    """Finds a base model, and downloads it where it is not on this disk, so that what is made for it can name it.

    Args:
        model: As for ``resolve_base``.

    Returns:
        The base model; one without safetensors files stays an id.

    Raises:
        ConfigError: Neither a model folder nor a Hugging Face id, or it cannot be downloaded.
    """
    base = resolve_base(model)
    if base.folder is not None:
        return base
    import httpx
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(base.name, allow_patterns=list(_FETCHED)))
        if any(folder.glob("*.safetensors")) and not _has_all_weights(folder):  # offline it returns what there is
            raise OSError(f"{folder} lacks some of its weights")
    except (OSError, httpx.HTTPError) as exc:
        raise ConfigError(
            f"base model {base.name!r} is not on this disk and cannot be downloaded: {exc}. Give its folder, or "
            f"bring it with `hf download {base.name}`."
        ) from exc
    return _from_folder(base.name, folder) if _has_all_weights(folder) else base


@functools.cache
def _announce_seedling() -> None:
    # A warning, so that it is seen where nobody configured logging: answers of a toy model should surprise nobody.
    logger.warning(
        "dspy-lora: no base model is set, so the bundled seedling (19 M parameters) answers. "
        "Set one with base_model in lora_config.yaml, DSPY_LORA_BASE_MODEL or an argument."
    )


def _from_folder(name: str, folder: Path) -> Base:
    folder = folder.resolve()
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"base model {name!r}: {folder} holds no model (config.json and *.safetensors). "
            + ("Reinstall dspy-lora, or name another base model." if name == SEEDLING else "Give a model's folder.")
        )
    try:
        revision = _fingerprint(*_stamped([folder / "config.json", *weights_files(folder)]))
        return Base(name, str(folder), revision, _digest(*_stamped(_template_files(folder))))
    except OSError as exc:
        raise ConfigError(f"base model {name!r} cannot be read: {exc}. Copy or download {folder} again.") from exc


def weights_files(folder: Path) -> list[Path]:
    """A model's weights: what its index names, else ``model.safetensors``, else all safetensors files.

    A folder may hold the same weights in another form too (``consolidated.safetensors`` of Mistral's models), and
    whether it does differs from download to download.

    Raises:
        ConfigError: The index is malformed.
        OSError: It cannot be read.
    """
    if indexed := _indexed(folder):
        return [folder / name for name in sorted(indexed)]
    one = folder / _ONE_FILE
    return [one] if one.is_file() else sorted(folder.glob("*.safetensors"))


def _indexed(folder: Path) -> set[str]:
    """Names of the files that a model's index lists; empty where it has no index."""
    index = folder / _INDEX
    if not index.is_file():
        return set()
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise ConfigError(f"{index} is no index of weights: {exc!r}. Copy or download it again.") from exc


def _template_files(folder: Path) -> list[Path]:
    return sorted({file for pattern in _TEMPLATE for file in folder.glob(pattern) if file.is_file()})


def _stamped(files: list[Path]) -> tuple[tuple[Path, ...], tuple[tuple[int, int], ...]]:
    """Files with their sizes (bytes) and times (ns), which make a changed file miss a cache."""
    return tuple(files), tuple((stat.st_size, stat.st_mtime_ns) for stat in (file.stat() for file in files))


@functools.lru_cache(maxsize=64)
def _digest(files: tuple[Path, ...], stamps: tuple[tuple[int, int], ...]) -> str:
    """Hashes small files by name and content."""
    digest = hashlib.sha256()
    for file, (size, _) in zip(files, stamps, strict=True):
        digest.update(f"\n{file.name} {size}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


@functools.lru_cache(maxsize=64)
def _fingerprint(files: tuple[Path, ...], stamps: tuple[tuple[int, int], ...]) -> str:
    """Hashes configuration and weights."""
    digest = hashlib.sha256(files[0].read_bytes())
    for file, (size, _) in zip(files[1:], stamps[1:], strict=True):
        digest.update(f"\n{file.name} {size}\n".encode())
        with file.open("rb") as opened:
            header = min(8 + int.from_bytes(opened.read(8), "little"), _WHOLE_FILE)
            opened.seek(0)
            digest.update(opened.read(size if size < _WHOLE_FILE else header))
            for start in _block_starts(header, size) if size >= _WHOLE_FILE else ():
                opened.seek(start)
                digest.update(opened.read(_BLOCK))
    return digest.hexdigest()[:12]


def _block_starts(header: int, size: int) -> list[int]:
    """Where the blocks of a large file start (bytes): the first behind its header, the last at its end."""
    room = max(size - _BLOCK - header, 0)
    return [header + room * number // (_BLOCKS - 1) for number in range(_BLOCKS)]


def _cached_snapshot(model: str) -> Path | None:
    """Folder of a Hugging Face model in the local cache; None where it is not (fully) there."""
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(model, "config.json")
    except ValueError as exc:  # its check of ids is stricter than ours
        raise ConfigError(f"base model {model!r} is no Hugging Face id: {exc}") from exc
    folder = Path(config).parent if isinstance(config, str) else None
    return folder if folder and _has_all_weights(folder) and _has_tokenizer(folder) else None


def _has_tokenizer(folder: Path) -> bool:
    """Whether a snapshot has one: who loads a model's weights alone leaves it out, and vLLM fetches it by id."""
    return any(any(folder.glob(pattern)) for pattern in _TOKENIZERS)


def _has_all_weights(folder: Path) -> bool:
    """Whether a snapshot's download has ended: vLLM goes on with one that it is asked for by id, not by folder."""
    there = {file.name for file in folder.glob("*.safetensors") if file.is_file()}  # not a link to nothing
    if indexed := _indexed(folder):
        return there.issuperset(indexed)
    shards = [int(found[1]) for found in map(_SHARD.fullmatch, there) if found]
    return bool(there) and len(shards) == max(shards, default=0)
