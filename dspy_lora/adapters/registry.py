"""Where adapters are published, and found by name.

    root/legal/0123456789ab/    one revision: adapter_config.json, adapter_model.safetensors, revision.json
    root/legal/current          the revision that "legal" means; replaced atomically

A revision never changes, so an engine may keep its weights and its KV cache by that name. A reader takes no lock and
writes nothing. Writers prepare everything in a hidden folder of the root, then move it into place under a lock.
"""

import contextlib
import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dspy_lora.adapters.base import SEEDLING, Base, resolve_base
from dspy_lora.adapters.checks import check_adapter, check_trained_on, read_metadata
from dspy_lora.adapters.disk import lock, staging, sync, write, writing
from dspy_lora.adapters.revision import (
    NAME,
    RECORD_FILE,
    REVISION,
    Revision,
    check_name,
    check_new_name,
    content_hash,
    read_revision,
    split_ref,
    stage_adapter,
    stamps,
    time_after,
)
from dspy_lora.config import LARGEST_RANK, load_config
from dspy_lora.errors import AdapterError, ChangedAdapterError, UnknownAdapterError, near

logger = logging.getLogger(__name__)

PACKAGED_ROOT = Path(__file__).parents[1] / "seedling" / "adapters"
DEFAULT_ROOT = "adapters"
CURRENT_FILE = "current"

# The class has a method called list, which would stand for the type inside it.
Revisions = list[Revision]
Folders = list[Path]


class AdapterRegistry:
    """Adapters in a folder, by name and revision.

    Args:
        root: The folder; it may be missing until something is published. None takes ``registry`` of the
            configuration, else ``adapters`` in the working directory, and lays it over the seedling's own adapters
            (read-only) where the base is the seedling.
        base: Name of the base model; None takes the configuration's.
    """

    def __init__(self, root: str | Path | None = None, *, base: str | None = None) -> None:
        self._base = base
        lower: Folders = []
        if root is None:
            config = load_config()
            root = config.registry or DEFAULT_ROOT
            if (base or config.base_model or SEEDLING) == SEEDLING:
                lower.append(PACKAGED_ROOT)
        self.root = Path(root).expanduser().absolute()
        self._roots = [self.root, *lower]

    # -- reading ---------------------------------------------------------------------------------------------------

    def resolve(self, ref: str) -> Revision:
        """Finds an adapter.

        Args:
            ref: ``"legal"`` for its current revision, ``"legal@0123456789ab"`` for that one.

        Returns:
            The revision, its files there in full (their content is not read: see ``verify``).

        Raises:
            UnknownAdapterError: No such adapter or revision; the message names the near ones.
            AdapterError: Not a name, or the revision is damaged.
        """
        name, revision = split_ref(ref)
        # A second look: while the pointer and the folder were read, the current revision may have been removed.
        for _ in range(2):
            wanted = revision or self._current(name)
            folder = self._folder(name, wanted) if wanted else None
            if folder is None:
                continue
            try:
                return read_revision(folder)
            except AdapterError:
                if folder.is_dir():
                    raise
        if wanted is None or not self._revisions(name):
            known = self._adapters()
            raise UnknownAdapterError(
                f"no adapter {name!r} in {self._places()}. {near(name, known)} "
                f"Publish one: `dspy-lora adapters publish FOLDER {name}`, or train it: `dspy-lora train`."
            )
        known = {folder.name for folder in self._revisions(name)}
        raise UnknownAdapterError(f"adapter {name!r} has no revision {wanted!r} here. {near(wanted, known)}")

    def list(self) -> Revisions:
        """The current revision of every adapter, by name. A damaged one is left out, with a line in the log."""
        found = []
        for name in sorted(self._adapters()):
            try:
                found.append(self.resolve(name))
            except AdapterError as exc:
                logger.warning("%s", exc)
        return found

    def history(self, name: str) -> Revisions:
        """An adapter's revisions in the order in which they were published; damaged ones are left out.

        Raises:
            UnknownAdapterError: No such adapter.
        """
        return self._readable(check_name(name)) or [self.resolve(name)]  # which says what is wrong

    def verify(self, revision: Revision | str) -> Revision:
        """Reads an adapter's files in full and compares them with the revision's name.

        Raises:
            ChangedAdapterError: Their content is not what was published.
            UnknownAdapterError: No such adapter or revision.
        """
        found = self.resolve(revision if isinstance(revision, str) else revision.ref)
        content = content_hash(found.path)
        if content != found.revision:
            raise ChangedAdapterError(
                f"adapter {found.ref!r} has changed on the disk: {found.path} now holds content {content}. "
                "Remove it with `dspy-lora adapters remove` and publish the adapter again."
            )
        return found

    def _places(self) -> str:
        return " and ".join(str(root) for root in self._roots)

    def _adapters(self) -> set[str]:
        """Names that have a current revision."""
        files = [file for root in self._roots for file in root.glob(f"*/{CURRENT_FILE}")]
        return {file.parent.name for file in files if NAME.fullmatch(file.parent.name)}

    def _revisions(self, name: str) -> Folders:
        """Folders of an adapter's revisions, each revision once."""
        folders: dict[str, Path] = {}
        for root in reversed(self._roots):
            folders |= {path.name: path for path in (root / name).glob("*") if REVISION.fullmatch(path.name)}
        return [*folders.values()]

    def _readable(self, name: str) -> Revisions:
        """An adapter's revisions, oldest first, without damaged ones."""
        found = []
        for folder in self._revisions(name):
            try:
                found.append(read_revision(folder))
            except AdapterError as exc:
                logger.warning("%s", exc)
        return sorted(found, key=lambda revision: (revision.published, revision.revision))

    def _folder(self, name: str, revision: str) -> Path | None:
        return next((root / name / revision for root in self._roots if (root / name / revision).is_dir()), None)

    def _current(self, name: str) -> str | None:
        """The revision that a name means: the first pointer found, the writable root's before the packaged one's.

        Raises:
            AdapterError: That pointer cannot be read, or names no revision.
        """
        for file in (root / name / CURRENT_FILE for root in self._roots):
            try:
                pointer = file.read_text(encoding="ascii", errors="replace").strip()
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as exc:
                raise AdapterError(
                    f"{file} cannot be read: {exc}. Let this user read it, or publish {name!r} again."
                ) from exc
            if not REVISION.fullmatch(pointer):
                raise AdapterError(f"{file} names no revision. Publish {name!r} again.")
            return pointer
        return None

    def _known_current(self, name: str) -> str:
        """The revision that a name means; UnknownAdapterError where it means none."""
        return self._current(name) or self.resolve(name).revision  # which says what is wrong

    def _is_current(self, revision: Revision) -> bool:
        """Whether its name means this revision; no, where the pointer is damaged: publishing again mends it."""
        try:
            return self._current(revision.adapter) == revision.revision
        except AdapterError:
            return False

    # -- writing ---------------------------------------------------------------------------------------------------

    def publish(
        self,
        source: str | Path,
        name: str,
        *,
        base: Base | None = None,
        metadata: dict[str, Any] | None = None,
        max_rank: int | None = None,
    ) -> Revision:
        """Checks an adapter and makes it the current revision of a name.

        Publishing the same content again changes nothing, or makes that revision current again. Publishers may run
        side by side, in threads and processes; the last one's revision is current.

        Args:
            source: Folder with adapter_config.json and adapter_model.safetensors. README.md, run.json and
                metadata.json are copied along, nothing else.
            name: The adapter's name, for a domain's adapter the domain.
            base: The base model that it is for; None takes the configuration's.
            metadata: Added to metadata.json's entries. ``base_revision``, where it is there, must be the base's.
            max_rank: Largest rank the engine takes; None takes ``serving.max_lora_rank``, else vLLM's largest.

        Returns:
            The published revision.

        Raises:
            AdapterError: It cannot be served, or the name is no name; the message says what to do.
            PublishError: The disk refused. The registry is as it was before.
        """
        source, config = Path(source), load_config()
        check_new_name(name)
        base = base or resolve_base(self._base or config.base_model)
        before = stamps(source)
        info = check_adapter(source, base, max_rank or config.serving.max_lora_rank or LARGEST_RANK)
        found = _json_object(read_metadata(source) | (metadata or {}))
        check_trained_on(source, found, base)
        with writing(f"publish {name!r}", self.root), staging(self.root) as hidden:
            stage = hidden / "revision"
            sizes = stage_adapter(source, stage, base)
            if stamps(source) != before:
                raise AdapterError(f"{source} changed while it was published. Publish it again when it is complete.")
            revision = content_hash(stage)
            record = Revision(
                adapter=name,
                revision=revision,
                path=self.root / name / revision,
                base=base.revision,
                base_name=base.name,
                rank=info.rank,
                metadata=found,
                sizes=sizes,
            )
            with lock(self.root):
                return self._publish(record, hidden)

    def rollback(self, name: str, revision: str | None = None) -> Revision:
        """Makes an earlier revision current.

        Args:
            name: The adapter.
            revision: Which; None takes the one published before the current one.

        Returns:
            The revision that is current now.

        Raises:
            UnknownAdapterError: No such adapter or revision, or none before the current one.
            PublishError: The disk refused. The registry is as it was before.
        """
        self._known_current(check_name(name))
        with writing(f"roll back {name!r}", self.root), staging(self.root) as hidden, lock(self.root):
            current = self._known_current(name)
            target = self.resolve(f"{name}@{revision}") if revision else self._before(name, current)
            if target is None:
                raise UnknownAdapterError(f"adapter {name!r} has no revision before {name}@{current}.")
            self._point(name, target.revision, hidden)
            return target

    def remove(self, name: str, revision: str | None = None) -> None:
        """Removes a revision, or the adapter with all its revisions.

        Where the current revision is removed, the one published before it becomes current, else the newest other
        one; where none is left, the adapter is gone. The bundled adapters stay: they are not in this folder. Where it
        has no other revision, the name means what is bundled under it, as if nothing had ever been published.

        Args:
            name: The adapter.
            revision: Which; None removes them all.

        Raises:
            UnknownAdapterError: No such adapter or revision in the writable folder.
            PublishError: The disk refused. The registry is as it was before.
        """
        ref = name if revision is None else f"{name}@{revision}"
        split_ref(ref)
        doomed = self.root / name / (revision or "")
        self._check_removable(ref, doomed)
        with writing(f"remove {ref!r}", self.root), staging(self.root) as hidden, lock(self.root):
            self._check_removable(ref, doomed)  # another process may have removed it meanwhile
            if self._own_revisions(name) == {revision}:
                doomed = self.root / name
            elif revision is not None and self._current(name) == revision:
                others = [other for other in self._readable(name) if other.revision != revision]
                if others:
                    self._point(name, (self._before(name, revision) or others[-1]).revision, hidden)
                else:
                    doomed = self.root / name
            doomed.rename(hidden / "removed")

    def _check_removable(self, ref: str, folder: Path) -> None:
        if not folder.is_dir():
            self.resolve(ref)  # which says so where there is no such adapter at all
            raise UnknownAdapterError(f"adapter {ref!r} is not in {self.root}: the bundled adapters cannot be removed.")

    def _own_revisions(self, name: str) -> set[str]:
        """An adapter's revisions in the writable folder."""
        return {path.name for path in (self.root / name).glob("*") if REVISION.fullmatch(path.name)}

    def _before(self, name: str, revision: str) -> Revision | None:
        """The revision published before another one; the newest where that one is damaged and its time not known."""
        history = self._readable(name)
        places = [place for place, other in enumerate(history) if other.revision == revision]
        earlier = history[: places[0]] if places else history
        return earlier[-1] if earlier else None

    def _publish(self, record: Revision, hidden: Path) -> Revision:
        """Puts a staged revision in place under the lock; content that is there already keeps its place."""
        stage = hidden / "revision"
        newest = max((revision.published for revision in self._readable(record.adapter)), default="")
        record = dataclasses.replace(record, published=time_after(newest))
        if self._folder(record.adapter, record.revision) is None:
            write(stage / RECORD_FILE, record.to_json())
            self._move_in(record, hidden)
            return record
        there = self.resolve(record.ref)
        metadata = record.metadata or there.metadata
        new = dataclasses.replace(record, path=there.path, sizes=there.sizes, metadata=metadata)
        unchanged = dataclasses.replace(new, published=there.published) == there
        if unchanged and self._is_current(there):
            return there
        if there.path == record.path:  # not a bundled one: its place in the history and its record are renewed
            write(stage / RECORD_FILE, new.to_json())
            (stage / RECORD_FILE).replace(there.path / RECORD_FILE)
            there = new
        self._point(record.adapter, record.revision, hidden)
        return there

    def _move_in(self, record: Revision, hidden: Path) -> None:
        """Moves a staged revision into place and points at it; undoes the first where the second fails."""
        with contextlib.ExitStack() as undo:
            record.path.parent.mkdir(exist_ok=True)
            undo.callback(_quietly, record.path.parent.rmdir)  # fails, as it should, where other revisions are there
            (hidden / "revision").rename(record.path)
            undo.callback(shutil.rmtree, record.path, ignore_errors=True)
            sync(record.path.parent)
            self._point(record.adapter, record.revision, hidden)
            undo.pop_all()

    def _point(self, name: str, revision: str, hidden: Path) -> None:
        """Makes a revision current; the pointer is replaced in one step."""
        (self.root / name).mkdir(exist_ok=True)
        write(hidden / CURRENT_FILE, f"{revision}\n")
        (hidden / CURRENT_FILE).replace(self.root / name / CURRENT_FILE)


def _json_object(metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata as it will be read back."""
    try:
        value: dict[str, Any] = json.loads(json.dumps(metadata))
    except (TypeError, ValueError) as exc:
        raise AdapterError(
            f"metadata cannot be written as JSON: {exc}. Give text, numbers, lists and mappings."
        ) from exc
    return value


def _quietly(step: Callable[[], None]) -> None:
    with contextlib.suppress(OSError):
        step()
