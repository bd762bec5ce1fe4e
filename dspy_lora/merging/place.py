"""Where a result goes: a folder of the user's or the registry, in full or not at all."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspy_lora.adapters.base import Base
from dspy_lora.adapters.checks import METADATA_FILE, check_adapter
from dspy_lora.adapters.disk import drafting, staging, writing
from dspy_lora.adapters.peft_config import CONFIG_FILE
from dspy_lora.adapters.registry import AdapterRegistry
from dspy_lora.adapters.revision import Revision, check_new_name
from dspy_lora.config import LARGEST_RANK
from dspy_lora.errors import ConfigError
from dspy_lora.merging.source import Source

_OURS = ("config.json", CONFIG_FILE)  # one of them lies in a folder that may be overwritten


@dataclass(frozen=True)
class OutputFolder:
    """A folder that is written.

    Attributes:
        path: The folder.
        overwrite: Whether an existing one is replaced.
    """

    path: Path
    overwrite: bool = False

    def check(self, base: Base, sources: Sequence[Source]) -> None:
        """Refuses what could not be written in the end, before the work begins.

        Raises:
            ConfigError: The folder exists and is not to be replaced, holds something else, or is read from.
        """
        if not self.path.exists():
            return
        if not self.overwrite:
            raise ConfigError(f"output {str(self.path)!r} exists. Give another folder, or --overwrite to replace it.")
        if not any((self.path / name).is_file() for name in _OURS):
            raise ConfigError(f"output {str(self.path)!r} holds neither a model nor an adapter: it is not overwritten.")
        read = [base.folder, *(source.folder for source in sources)]
        if any(folder is not None and folder.resolve().is_relative_to(self.path.resolve()) for folder in read):
            raise ConfigError(f"output {str(self.path)!r} is what is merged, or holds it. Give another folder.")

    def draft(self) -> AbstractContextManager[Path]:
        """A hidden folder beside the output; it becomes the output where the block ends well, else it is removed.

        Raises:
            PublishError: The disk refused; everything is as it was before.
        """
        return drafting(self.path, self.overwrite)

    def accept(self, draft: Path, base: Base) -> tuple[Path, Revision | None]:
        """Checks that an engine can serve the adapter in the draft.

        Returns:
            Where it will lie, and no revision.

        Raises:
            AdapterError: It cannot be served.
        """
        check_adapter(draft, base, LARGEST_RANK)
        return self.path, None


@dataclass(frozen=True)
class Publication:
    """A name in the registry.

    Attributes:
        registry: The registry.
        name: The adapter's name there.
    """

    registry: AdapterRegistry
    name: str

    def check(self, base: Base, sources: Sequence[Source]) -> None:
        """Raises an AdapterError where the name is no adapter's."""
        check_new_name(self.name)

    @contextlib.contextmanager
    def draft(self) -> Iterator[Path]:
        """A hidden folder in the registry, removed at the end; ``accept`` publishes what is in it."""
        with contextlib.ExitStack() as stack:
            with writing("make a folder", self.registry.root):
                draft = stack.enter_context(staging(self.registry.root))
            yield draft

    def accept(self, draft: Path, base: Base) -> tuple[Path, Revision | None]:
        """Publishes the adapter in the draft.

        Returns:
            The revision and its folder.

        Raises:
            AdapterError: It cannot be served.
            PublishError: The disk refused; the registry is as it was before.
        """
        revision = self.registry.publish(draft, self.name, base=base, max_rank=LARGEST_RANK)
        return revision.path, revision


Place = OutputFolder | Publication


def place_of(output: str | Path | None, publish: str | None, registry: AdapterRegistry, overwrite: bool) -> Place:
    """The place that a caller names.

    Raises:
        ConfigError: Neither or both of folder and name.
    """
    if output is not None and publish is None:
        return OutputFolder(_absolute(output), overwrite)
    if publish is not None and output is None:
        return Publication(registry, publish)
    raise ConfigError(f"output = {output!r}, publish = {publish!r}: give exactly one of them.")


def output_folder(output: str | Path, overwrite: bool) -> OutputFolder:
    """The folder that a caller names."""
    return OutputFolder(_absolute(output), overwrite)


def _absolute(path: str | Path) -> Path:
    return Path(path).expanduser().absolute()


@contextlib.contextmanager
def saving(place: Path) -> Iterator[None]:
    """Turns an error of the disk while a result is saved into a PublishError."""
    from safetensors import SafetensorError

    with writing("save the result", place.parent):
        try:
            yield
        except SafetensorError as exc:  # what it raises where the disk is full
            raise OSError(str(exc)) from exc


def write_metadata(folder: Path, metadata: dict[str, Any]) -> None:
    """Writes ``metadata.json``."""
    (folder / METADATA_FILE).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
