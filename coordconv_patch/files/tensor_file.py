"""Safetensors files, read and written with a checksum.

The file's metadata holds one text, its header, and a SHA-256 over that text and over the name,
dtype, shape and bytes of each tensor. Reading trusts nothing: the layout and every bound and type
in it are checked before the safetensors library sees the file.

The layout (https://github.com/huggingface/safetensors#format): eight bytes with the length of a
JSON object, that object, and the tensors' bytes without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from coordconv_patch.errors import ArgumentError, WeightsError, excerpt
from coordconv_patch.files.fields import choice, mapping, text, whole, wholes
from coordconv_patch.files.strict_json import parse

__all__ = ["TensorFile", "check_storable", "read_tensor_file", "tensor_file_bytes"]

_METADATA = "__metadata__"
_CHECKSUM_SUFFIX = ".checksum"
_ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8}
"""Bytes of an element, of the dtypes that are stored: weights, and the counters of batch norms."""
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MOST_HEADER_BYTES = 4 * 2**20
"""A thousand convolutions take about half a MiB."""
_MOST_FILE_BYTES = 2**30
_MOST_TENSORS = 50_000
_MOST_AXES = 8


@dataclass(frozen=True)
class TensorFile:
    """The text in a file's metadata, and its tensors by name, of floating dtypes or int64.

    ``is_intact``: whether they have the checksum that is stored with them; ``None`` if none is.
    """

    header: str
    tensors: dict[str, Tensor]
    is_intact: bool | None


def tensor_file_bytes(header: str, tensors: Mapping[str, Tensor], key: str) -> bytes:
    """The bytes of a file, with its checksum.

    The header is a text for its metadata, where ``key`` is its name; the tensors are contiguous
    and on the CPU.

    Raises:
        WeightsError: If they are more than :func:`read_tensor_file` reads.
    """
    metadata = {key: header, key + _CHECKSUM_SUFFIX: _checksum(header, tensors)}
    raw, length = _with_metadata(save(dict(tensors)), metadata)
    if len(raw) > _MOST_FILE_BYTES or length > _MOST_HEADER_BYTES or len(tensors) > _MOST_TENSORS:
        raise WeightsError(
            f"{len(tensors):,} coordinate weights and norm statistics of {len(raw):,} bytes are "
            "more than such a file may hold: save the model's state_dict instead"
        )
    return raw


def _with_metadata(raw: bytes, metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """The bytes of a file with metadata, and how many of them are its header.

    The library would write the metadata in an order that changes from run to run.
    """
    data = 8 + int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:data])
    header = json.dumps({_METADATA: metadata, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the tensors begin at a multiple of eight bytes
    return len(header).to_bytes(8, "little") + header + raw[data:], len(header)


def check_storable(name: str, tensor: Tensor) -> None:
    """Raise a WeightsError if a tensor could not be read again: not finite, or of another dtype."""
    if tensor.dtype is not torch.int64 and tensor.dtype not in _FLOATS:
        raise WeightsError(f"{name} has dtype {tensor.dtype}, not one of floats")
    if not bool(tensor.isfinite().all()):
        raise WeightsError(
            f"{name} holds values that are not finite (NaN or infinite): did the training diverge?"
        )


def read_tensor_file(path: Path, key: str) -> TensorFile:
    """Read a file and check all that can be checked without knowing what it is for.

    ``key`` is the name of the header in the metadata.

    Raises:
        WeightsError: If it is not such a file, truncated, damaged or too large; says why.
    """
    raw, metadata, names = _read(path)
    if key not in metadata:
        raise WeightsError(
            f"{path} is a safetensors file, but not one of coordinate weights; save_coords "
            "writes them (load a whole model's weights with load_state_dict)"
        )
    unknown = set(metadata) - {key, key + _CHECKSUM_SUFFIX}
    if unknown:
        raise WeightsError(f"{path}: its metadata has an unknown entry {excerpt(min(unknown))}")
    try:
        tensors = load(raw)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise _not_safetensors(path, error) from error
    if set(tensors) != names:
        raise _not_safetensors(path, "two of its tensors have one name")
    checksum = metadata.get(key + _CHECKSUM_SUFFIX)
    is_intact = None if checksum is None else checksum == _checksum(metadata[key], tensors)
    return TensorFile(metadata[key], tensors, is_intact)


def _not_safetensors(path: Path, reason: object) -> WeightsError:
    return WeightsError(
        f"{path} is not a safetensors file, or a truncated one ({reason}); save_coords writes them"
    )


def _read(path: Path) -> tuple[bytes, dict[str, str], set[str]]:
    """A file's bytes, its metadata and the names of its tensors, whose bytes lie as they must."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for a writer
            raise ArgumentError("it is not a regular file")
        if status.st_size > _MOST_FILE_BYTES:
            raise ArgumentError(f"it has more than {_MOST_FILE_BYTES:,} bytes")
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if length > min(status.st_size, _MOST_HEADER_BYTES):
                raise ArgumentError(f"its first bytes ask for a header of {length:,} bytes")
            start += file.read(length)
            metadata, names = _checked_layout(start[8:], status.st_size - 8 - length)
            return start + file.read(status.st_size), metadata, names
    except FileNotFoundError as error:
        raise WeightsError(f"there is no file {path}") from error
    except (OSError, MemoryError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    except ValueError as error:  # also a path with a null character
        raise _not_safetensors(path, error) from error


def _checked_layout(header: bytes, size: int) -> tuple[dict[str, str], set[str]]:
    """The metadata and the names of the tensors in a header; they must fill ``size`` bytes."""
    try:
        decoded = header.decode()
    except UnicodeDecodeError as error:
        raise ArgumentError("its header is not text") from error
    entries = parse(decoded, "its header")
    if not isinstance(entries, dict) or len(entries) > _MOST_TENSORS:
        raise ArgumentError(f"its header must be an object of at most {_MOST_TENSORS:,} tensors")
    metadata = entries.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(type(v) is str for v in metadata.values()):
        raise ArgumentError("its metadata must be an object of texts")
    places = sorted(_place(name, entry) for name, entry in entries.items())
    ends = [0, *(end for _, end in places)]
    starts = [*(start for start, _ in places), size]
    if ends != starts:
        raise ArgumentError("its tensors do not fill it without gaps")
    return metadata, set(entries)


def _place(name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor's bytes begin and end, checked against its dtype and shape."""
    text(name, "the name of a tensor")
    what = f"tensor {excerpt(name)}"
    fields = mapping(entry, what, ("dtype", "shape", "data_offsets"))
    dtype = choice(fields["dtype"], f"{what}: dtype", _ITEM_SIZES)
    shape = wholes(fields["shape"], f"{what}: shape", range(_MOST_AXES + 1))
    pair = range(2, 3)
    start, end = wholes(fields["data_offsets"], f"{what}: offsets", pair, high=_MOST_FILE_BYTES)
    whole(end - start, f"{what}: its bytes", *[math.prod(shape) * _ITEM_SIZES[dtype]] * 2)
    return start, end


def _checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the header and over each tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(header.encode(errors="surrogatepass"))
    for name, tensor in sorted(tensors.items(), key=lambda item: item[0]):
        digest.update(f"\n{name!r} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
