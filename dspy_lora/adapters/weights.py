"""A safetensors file, read without torch: its header, and whether a tensor holds zeros or values that are not finite.

The format (https://huggingface.co/docs/safetensors): 8 bytes of little-endian header length, a JSON header, the data.
numpy has no bfloat16, so values are looked at as bit patterns.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Bits of the exponent: all of them set means infinity or NaN (IEEE 754, and bfloat16 as the upper half of float32).
_EXPONENT: dict[str, np.unsignedinteger[Any]] = {
    "F64": np.uint64(0x7FF0_0000_0000_0000),
    "F32": np.uint32(0x7F80_0000),
    "F16": np.uint16(0x7C00),
    "BF16": np.uint16(0x7F80),
}
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library


@dataclass(frozen=True)
class Tensor:
    """One entry of the header.

    Attributes:
        dtype: ``"F32"``, ``"BF16"``, ...
        shape: Sizes of its dimensions.
        start: Offset of its first byte in the file.
        size: Bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def parameters(self) -> int:
        """Number of its values."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, Tensor]:
    """Reads the names and shapes of a file's tensors.

    Args:
        path: A safetensors file.

    Returns:
        Tensor by name.

    Raises:
        ValueError: The file is not safetensors, or shorter or longer than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ValueError("it is not a safetensors file, or it is truncated inside its header")
        raw = file.read(length)
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        tensors = {name: _tensor(entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise ValueError("its safetensors header is corrupt") from exc
    _check_extent(tensors, 8 + length, size)
    return tensors


def _tensor(entry: dict[str, Any], data: int) -> Tensor:
    start, end = entry["data_offsets"]
    shape = tuple(int(n) for n in entry["shape"])
    return Tensor(str(entry["dtype"]), shape, data + int(start), int(end) - int(start))


def _check_extent(tensors: dict[str, Tensor], data: int, size: int) -> None:
    """Checks that the tensors lie one behind the other and end with the file."""
    end = data
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].size)):
        exponent = _EXPONENT.get(tensor.dtype)
        if exponent is not None and tensor.size != tensor.parameters * exponent.itemsize:
            raise ValueError(f"its safetensors header is corrupt: the size of {name!r} does not fit its shape")
        if tensor.start != end or tensor.size < 0:
            raise ValueError(f"its safetensors header is corrupt: {name!r} does not start where the last tensor ends")
        end += tensor.size
    if end != size:
        what = "it is truncated" if end > size else "bytes follow its last tensor"
        raise ValueError(f"{what}: the header says {end:,} bytes, the file has {size:,}")


def look(path: Path, tensor: Tensor) -> tuple[bool, bool]:
    """Looks at a tensor's values.

    Args:
        path: The file.
        tensor: One of its tensors, of a floating-point type.

    Returns:
        Whether all values are finite, and whether any is not zero.

    Raises:
        ValueError: The tensor is not of a floating-point type.
    """
    exponent = _EXPONENT.get(tensor.dtype)
    if exponent is None:
        raise ValueError(f"type {tensor.dtype} is none of {', '.join(_EXPONENT)}")
    bits: np.ndarray = np.fromfile(path, dtype=exponent.dtype, count=tensor.parameters, offset=tensor.start)
    finite = not bool(((bits & exponent) == exponent).any())
    return finite, bool((bits << bits.dtype.type(1)).any())  # the shift drops the sign: -0.0 is zero too
