"""Reading safetensors files piece by piece, with every number in their header checked.

Why not the safetensors package: it maps the file, and pages that were read stay in the
process's resident memory until the file is closed, so a model in one file would be there twice.
Format: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from pie_async.errors import WeightsError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
_MOST_HEADER_BYTES = 100 * 2**20
_CHUNK_BYTES = 8 * 2**20


class StoredTensor(msgspec.Struct, frozen=True):
    """Where a tensor lies and what it is."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    first_byte: int
    num_bytes: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a file, by name.

    Raises:
        WeightsError: the file is damaged, cut short or not safetensors.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(_MOST_HEADER_BYTES, size - 8):
                raise WeightsError(f"{path} is damaged or not safetensors: no header")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = {name: _entry(path, entry, 8 + length) for name, entry in header.items()}
        _check_places(tensors, 8 + length, size)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path} is damaged: {error}") from error
    return tensors


def _entry(path: Path, entry: dict[str, Any], data: int) -> StoredTensor:
    first, last = (_count(number) for number in entry["data_offsets"])
    shape = tuple(_count(number) for number in entry["shape"])
    dtype = str(entry["dtype"])
    if dtype in _DTYPES and math.prod(shape) * _DTYPES[dtype].itemsize != last - first:
        raise ValueError(f"{last - first} bytes cannot hold {dtype} of shape {list(shape)}")
    return StoredTensor(path, dtype, shape, data + first, last - first)


def _count(number: object) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ValueError(f"{number!r} is not a count")
    return number


def _check_places(tensors: dict[str, StoredTensor], data: int, size: int) -> None:
    end = data
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].first_byte):
        if tensor.first_byte < end or tensor.num_bytes < 0:
            raise ValueError(f"tensor {name} overlaps another one")
        end = tensor.first_byte + tensor.num_bytes
    if end > size:
        raise ValueError(
            f"it ends at byte {size}, its tensors at {end}; the download is incomplete"
        )


class TensorReader:
    """Copies stored tensors into memory that exists already, converting on the way.

    Memory: one buffer of a few MiB, whatever the tensors' size.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(_CHUNK_BYTES, dtype=torch.uint8)

    def copy(self, stored: StoredTensor, target: Tensor, advance: Callable[[int], None]) -> None:
        """Fill `target`, contiguous and of the stored shape.

        Args:
            advance: called with the number of bytes read, piece by piece.

        Raises:
            WeightsError: the file cannot be read, or holds a dtype that is not plain floats.
        """
        dtype = _DTYPES.get(stored.dtype)
        if dtype is None:
            raise WeightsError(
                f"{stored.file} holds {stored.dtype} tensors; only {', '.join(_DTYPES)} are "
                "supported (not other quantised weights)"
            )
        if dtype != target.dtype and torch.float8_e4m3fn in (dtype, target.dtype):
            wanted = str(target.dtype).removeprefix("torch.")
            raise WeightsError(
                f"{stored.file} holds {stored.dtype} where {wanted} belongs, which its config.json "
                "does not explain"
            )
        flat, done = target.view(-1), 0
        try:
            with stored.file.open("rb", buffering=0) as file:
                file.seek(stored.first_byte)
                while done < stored.num_bytes:
                    piece = self._buffer[: min(_CHUNK_BYTES, stored.num_bytes - done)]
                    _read_fully(file, piece)
                    numbers = piece.view(dtype)
                    first = done // dtype.itemsize
                    flat[first : first + len(numbers)].copy_(numbers)
                    done += len(piece)
                    advance(len(piece))
        except OSError as error:
            raise WeightsError(f"{stored.file} cannot be read: {error.strerror}") from error


def _read_fully(file: Any, piece: Tensor) -> None:
    rest = memoryview(piece.numpy().data)
    while rest:
        count = file.readinto(rest)
        if not count:
            raise OSError(0, "it ended while it was read")
        rest = rest[count:]
