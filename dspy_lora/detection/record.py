"""What a saved classifier says of itself, and its two files: the record names the weights that belong to it."""

import contextlib
import dataclasses
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspy_lora.adapters.disk import staging, writing

RECORD_FILE = "classifier.json"
WEIGHTS_FILE = "classifier.npz"  # where the record names none
UNCALIBRATED_MARGIN = 0.1

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Record:
    """What classifier.json says; the defaults are those before calibration."""

    domains: list[str]
    bits: int  # 0: vectors of an embedder
    width: int
    background: bool
    trained_on: dict[str, str]
    temperature: float = 1.0
    margin: float = UNCALIBRATED_MARGIN
    calibrated: bool = False


def write(folder: Path, record: Record, arrays: dict[str, Any]) -> None:
    """Writes both files, or neither: the weights under a name of their own, then the record, which names them.

    Raises:
        PublishError: The disk refused.
    """
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    said = {"format": _FORMAT, **dataclasses.asdict(record)}
    said["sha256"] = hashlib.sha256(content.getvalue()).hexdigest()
    said["weights"] = f"classifier-{said['sha256'][:12]}.npz"
    before = _weights_there(folder)
    with writing("save the classifier", folder), staging(folder) as hidden, contextlib.ExitStack() as undo:
        (hidden / "weights").write_bytes(content.getvalue())
        (hidden / RECORD_FILE).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        if not (folder / said["weights"]).exists():
            undo.callback((folder / said["weights"]).unlink, missing_ok=True)
        (hidden / "weights").replace(folder / said["weights"])
        (hidden / RECORD_FILE).replace(folder / RECORD_FILE)
        undo.pop_all()
    if before not in (None, said["weights"]):
        with contextlib.suppress(OSError):
            (folder / str(before)).unlink()


def _weights_there(folder: Path) -> str | None:
    """Name of the weights that a record in a folder names; None where there is none that can be read."""
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        return Path(record.get("weights", WEIGHTS_FILE)).name
    except (OSError, ValueError, AttributeError):
        return None


def read(folder: Path) -> tuple[Record, dict[str, NDArray[Any]]]:
    """The record and the arrays, checked against each other."""
    try:
        record, content = _files(folder)
    except FileNotFoundError:  # replaced since the record was read
        record, content = _files(folder)
    if hashlib.sha256(content).hexdigest() != record.pop("sha256"):
        raise ValueError(f"the weights are not the ones that {RECORD_FILE} was written with")
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        arrays = dict(file)
    found = Record(**record)
    shape = (found.width, len(found.domains) + found.background)
    if arrays["weights"].shape != shape or arrays["bias"].shape != shape[1:]:
        raise ValueError(f"weights of shape {arrays['weights'].shape} where {shape} is needed")
    return found, arrays


def _files(folder: Path) -> tuple[dict[str, Any], bytes]:
    record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    if record.pop("format") != _FORMAT:
        raise ValueError(f"{RECORD_FILE} is of another format than {_FORMAT}")
    return record, (folder / Path(record.pop("weights", WEIGHTS_FILE)).name).read_bytes()
