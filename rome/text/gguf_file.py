"""The container of a GGUF file, read strictly: metadata, and where its tensors lie.

Tokenizers are read from it here and weights in `rome.models.gguf`. Every read is checked against
the end of the file first, so that a damaged file is one named error. The reader of the package gguf
is not used: it makes an array of every token and takes seconds, and reads past the end of a
truncated file.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Left out: writing, version 1 and
big-endian files, nested arrays.
"""

import dataclasses
import mmap
import os
import struct
from typing import Any

# Type of a metadata value -> struct code; 8 is a string, 9 an array.
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a tensor lies.

  Attributes:
    shape: slowest axis first, as numpy has it (the file lists the fastest first).
    kind: number of its type in ggml: 0 is F32, 1 is F16, ...
    offset: first byte, from the start of the file.
  """

  shape: tuple[int, ...]
  kind: int
  offset: int


@dataclasses.dataclass(frozen=True)
class GGUF:
  """A file without its tensors' bytes.

  Attributes:
    path: the file.
    metadata: key -> number, bool, string or list of them.
    tensors: name -> where it lies.
  """

  path: str
  metadata: dict[str, Any]
  tensors: dict[str, Tensor]


class _Reader:
  """Reads values one after the other."""

  def __init__(self, data: mmap.mmap):
    self.data, self.at = data, 0

  def raw(self, size: int) -> bytes:
    if size > len(self.data) - self.at:
      raise ValueError(f"truncated: {size} bytes wanted at {self.at}, it has {len(self.data)}")
    self.at += size
    return self.data[self.at - size : self.at]

  def numbers(self, code: str, count: int = 1) -> tuple:
    # Sizes are checked before anything is allocated: a count is whatever the file says.
    size = struct.calcsize(f"<{code}") * count
    return struct.unpack(f"<{count}{code}", self.raw(size))

  def number(self, code: str) -> Any:
    return self.numbers(code)[0]

  def string(self) -> str:
    return self.raw(self.number("Q")).decode()

  def value(self) -> Any:
    kind = self.number("I")
    if kind == _STRING:
      return self.string()
    if kind in _SCALARS:
      return self.number(_SCALARS[kind])
    if kind != _ARRAY:
      raise ValueError(f"byte {self.at}: unknown metadata type {kind}")
    kind, count = self.number("I"), self.number("Q")
    if kind in _SCALARS:
      return list(self.numbers(_SCALARS[kind], count))
    if kind != _STRING:
      raise ValueError(f"byte {self.at}: arrays of metadata type {kind} are not supported")
    return [self.string() for _ in range(count)]

  def tensor(self) -> tuple[str, Tensor]:
    """A name and a tensor, its offset still from the start of the data."""
    name, rank = self.string(), self.number("I")
    if rank > _MAX_DIMENSIONS:
      raise ValueError(f"tensor {name} has {rank} dimensions, at most {_MAX_DIMENSIONS} can be")
    shape = tuple(reversed(self.numbers("Q", rank)))
    return name, Tensor(shape, self.number("I"), self.number("Q"))


def _add(table: dict, what: str, name: str, value: Any) -> None:
  if name in table:
    raise ValueError(f"duplicate {what} {name}")
  table[name] = value


def _read(data: mmap.mmap, path: str) -> GGUF:
  reader = _Reader(data)
  if reader.raw(4) != b"GGUF":
    raise ValueError("not a GGUF file: it does not begin with GGUF")
  version, num_tensors, num_keys = reader.number("I"), reader.number("Q"), reader.number("Q")
  if version not in (2, 3):
    raise ValueError(f"GGUF version {version} is not supported, 2 and 3 (little-endian) are")
  metadata: dict[str, Any] = {}
  for _ in range(num_keys):
    _add(metadata, "key", reader.string(), reader.value())
  relative: dict[str, Tensor] = {}
  for _ in range(num_tensors):
    _add(relative, "tensor", *reader.tensor())
  alignment = metadata.get("general.alignment", 32)
  if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
    raise ValueError(f"general.alignment must be a power of two, got {alignment!r}")
  start = -(-reader.at // alignment) * alignment
  tensors = {k: dataclasses.replace(t, offset=start + t.offset) for k, t in relative.items()}
  return GGUF(path, metadata, tensors)


def read_gguf(path: str | os.PathLike) -> GGUF:
  """Metadata and tensor table of the GGUF file at `path`.

  Raises:
    ValueError: there is no such file, or it is damaged, truncated or of another format.
  """
  try:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
      return _read(data, str(path))
  except (OSError, ValueError) as e:  # ValueError: also text that is not UTF-8, an empty file
    raise ValueError(f"{path}: no usable GGUF file: {e}") from None
