"""One immutable revision of an adapter: its name, its folder, its record."""

import dataclasses
import datetime
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from dspy_lora.adapters.base import Base
from dspy_lora.adapters.checks import METADATA_FILE, WEIGHTS_FILE
from dspy_lora.adapters.disk import copy, write
from dspy_lora.adapters.peft_config import CONFIG_FILE, read_json
from dspy_lora.config import TAKEN
from dspy_lora.errors import AdapterError, UnknownAdapterError

RECORD_FILE = "revision.json"
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
REVISION = re.compile(r"[0-9a-f]{12}")
NAME_RULE = "A name has 1 to 64 lower-case letters, digits, '_' and '-', the first a letter or a digit."

# What goes along with an adapter; nothing else in its folder is copied (training state, optimizer pickles).
_COMPANIONS = ("README.md", "run.json", METADATA_FILE)


@dataclasses.dataclass(frozen=True)
class Revision:
    """A published adapter revision.

    Attributes:
        adapter: Its name, for a domain's adapter the domain.
        revision: First 12 hex digits of the SHA-256 over its configuration and weights.
        path: Its folder, with adapter_config.json and adapter_model.safetensors.
        base: Revision of the base model that it is for; ``ABSENT`` where that was not on the publisher's disk.
        base_name: Name of that base model.
        rank: Its largest LoRA rank.
        metadata: What training recorded, and what the publisher added.
        published: When, in UTC (ISO 8601, with microseconds).
        sizes: Bytes of each of its files.
    """

    adapter: str
    revision: str
    path: Path
    base: str
    base_name: str
    rank: int
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    published: str = ""
    sizes: dict[str, int] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def ref(self) -> str:
        """``"legal@0123456789ab"``: names this revision for good."""
        return f"{self.adapter}@{self.revision}"

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(self.sizes.values())

    def is_for(self, base: Base) -> bool:
        """Whether it was made for this base."""
        return base.is_recorded(self.base_name, self.base)

    def check_base(self, base: Base, remedy: str) -> None:
        """Raises AdapterError if it was made for another base than this; ``remedy`` says what to do instead."""
        if not self.is_for(base):
            raise AdapterError(
                f"adapter {self.ref!r} was made for base {self.base_name!r} ({self.base}), not for {base.name!r} "
                f"({base.revision}). {remedy}, or train it on this one."
            )

    def to_json(self) -> str:
        """What ``revision.json`` holds: all but the place."""
        record = dataclasses.asdict(self)
        del record["path"]
        return json.dumps(record, indent=2) + "\n"


# What is read of a record: a later version may have written more.
_RECORDED = {field.name for field in dataclasses.fields(Revision)} - {"path"}


def check_name(name: str) -> str:
    """Returns a name that can be a folder's.

    Raises:
        AdapterError: It cannot: a path, an empty or too long name, other letters.
    """
    if not NAME.fullmatch(name):
        raise AdapterError(f"{name!r} is no adapter name. {NAME_RULE}")
    return name


def check_new_name(name: str) -> str:
    """Returns a name under which an adapter can be published, and then be asked for.

    Raises:
        AdapterError: It cannot: not a name, or a word that stands for something else.
    """
    if name in TAKEN:
        raise AdapterError(f"{name!r} cannot be an adapter's name: it stands for something else. Take another one.")
    return check_name(name)


def split_ref(ref: str) -> tuple[str, str | None]:
    """Splits ``"legal"`` or ``"legal@0123456789ab"`` into name and revision.

    Raises:
        AdapterError: Neither form.
    """
    name, at, revision = ref.partition("@")
    check_name(name)
    if at and not REVISION.fullmatch(revision):
        raise AdapterError(f"{ref!r}: a revision has 12 hexadecimal digits, as in 'legal@0123456789ab'.")
    return name, revision if at else None


def read_revision(folder: Path) -> Revision:
    """Reads a revision's record and checks, without reading the weights, that its files are there in full.

    Raises:
        UnknownAdapterError: There is no such revision.
        AdapterError: It is damaged.
    """
    if not folder.is_dir():
        raise UnknownAdapterError(f"there is no adapter revision {folder}.")
    mend = "Remove it with `dspy-lora adapters remove` and publish the adapter again."
    try:
        record = read_json(folder / RECORD_FILE)
        revision = Revision(**{key: record[key] for key in record if key in _RECORDED}, path=folder)
        sizes = {name: (folder / name).stat().st_size for name in revision.sizes}
    except (AdapterError, OSError, TypeError, AttributeError) as exc:
        raise AdapterError(f"adapter revision {folder} is damaged: {exc} {mend}") from exc
    if (revision.adapter, revision.revision) != (folder.parent.name, folder.name):
        raise AdapterError(f"adapter revision {folder} is damaged: its record is that of {revision.ref!r}. {mend}")
    if sizes != revision.sizes or not {CONFIG_FILE, WEIGHTS_FILE} <= sizes.keys():
        raise AdapterError(f"adapter revision {folder} is damaged: its files have other sizes than recorded. {mend}")
    return revision


def canonical_config(raw: dict[str, Any]) -> str:
    """``adapter_config.json`` in one form: keys sorted, and so are the lists that PEFT keeps as sets."""
    sets = ("target_modules", "exclude_modules")
    lists = {key: sorted(raw[key]) for key in sets if isinstance(raw.get(key), list)}
    return json.dumps(raw | lists, sort_keys=True, indent=2) + "\n"


def content_hash(folder: Path) -> str:
    """First 12 hex digits of the SHA-256 over an adapter's configuration and weights.

    The base's name is left out: it is a hint that differs from machine to machine, and the record holds the base.
    """
    config = read_json(folder / CONFIG_FILE)
    config.pop("base_model_name_or_path", None)
    digest = hashlib.sha256(canonical_config(config).encode())
    with (folder / WEIGHTS_FILE).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:12]


def stamps(source: Path) -> dict[str, tuple[int, int]]:
    """Size and time (ns) of the files that make an adapter."""
    files = [source / CONFIG_FILE, source / WEIGHTS_FILE]
    stats = {file.name: file.stat() for file in files if file.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def stage_adapter(source: Path, stage: Path, base: Base) -> dict[str, int]:
    """Copies an adapter's files, the configuration in its canonical form and naming the base as it is named here.

    Returns:
        Bytes by file name.
    """
    stage.mkdir()
    config = read_json(source / CONFIG_FILE) | {"base_model_name_or_path": base.name}
    write(stage / CONFIG_FILE, canonical_config(config))
    for name in (WEIGHTS_FILE, *(name for name in _COMPANIONS if (source / name).is_file())):
        copy(source / name, stage / name)
    return {file.name: file.stat().st_size for file in sorted(stage.iterdir())}


def time_after(newest: str) -> str:
    """The time in UTC, in any case later than the newest revision's: a clock may be set back."""
    now = datetime.datetime.now(datetime.UTC)
    if newest:
        now = max(now, datetime.datetime.fromisoformat(newest) + datetime.timedelta(microseconds=1))
    return now.isoformat(timespec="microseconds")
