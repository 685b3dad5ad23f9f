"""Files of a Hugging Face model directory: tensors read by slices, and files replaced as one.

Nothing here knows what a tensor means; `rome.models.hf_names` does.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
REPLACED = ".replaced"
_TEMPORARY = ".saving-"
# Buffers which old files hold and everybody recomputes.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
_OURS = re.compile(
  r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|config\.json"
)


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor on disk, or one expert's part of a fused one.

  Attributes:
    file: the open file.
    name: in the file.
    shape: of the part.
    dtype: safetensors' name of it, such as BF16.
    expert: index along the leading axis of a fused tensor, or None.
    offset: first row of the part in a fused tensor.
  """

  file: Any
  name: str
  shape: tuple[int, ...]
  dtype: str
  expert: int | None = None
  offset: int = 0

  def read(self, index: tuple[slice, ...]) -> np.ndarray:
    """A slice; bytes outside it are not touched."""
    if self.expert is None:
      return self.file.get_slice(self.name)[index]
    rows = slice(index[0].start + self.offset, index[0].stop + self.offset)
    expert = slice(self.expert, self.expert + 1)
    return self.file.get_slice(self.name)[(expert, rows, *index[1:])][0]


def read_json(file: pathlib.Path) -> Any:
  """Parsed content. Raises ValueError that names the file."""
  try:
    return json.loads(file.read_text())
  except OSError as e:
    raise ValueError(f"cannot read {file}: {e.strerror}{_left_behind(file.parent)}") from None
  except (RecursionError, ValueError) as e:
    raise ValueError(f"{file} is no JSON: {e}") from None


def _left_behind(directory: pathlib.Path) -> str:
  if not (directory / REPLACED / CONFIG).exists():
    return ""
  return f" (a save was interrupted; the model from before is whole in {directory / REPLACED})"


def open_tensors(path: pathlib.Path) -> dict[str, Tensor]:
  """Every tensor of a directory by name, fused experts as one entry an expert.

  Raises:
    ValueError: a file is missing or damaged, a tensor is in two of them, or the index of shards
      and the shards differ.
  """
  shards = _shards(path)
  found: dict[str, Tensor] = {}
  where: dict[str, str] = {}
  for shard in sorted(set(shards.values())) if shards else [SINGLE]:
    for name, tensor in _open(path / shard):
      if name in where:
        raise ValueError(f"{path}: {name} is in both {where[name]} and {shard}")
      where[name] = shard
      for part_name, part in _parts(path, name, tensor):
        if part_name in found:
          raise ValueError(f"{path}: {name} holds {part_name}, which is there by itself too")
        found[part_name] = part
  for name, shard in shards.items():
    if where.get(name) != shard:
      raise ValueError(f"{path}: missing tensor {name}: {INDEX} says it is in {shard}")
  for name, shard in where.items():
    if shards and name not in shards:
      raise ValueError(f"{path}: unknown tensor {name} in {shard}: it is not in {INDEX}")
  return {name: t for name, t in found.items() if not _IGNORED.fullmatch(name)}


def _shards(path: pathlib.Path) -> dict[str, str]:
  """Tensor -> shard; empty where there is one file without an index."""
  if not (path / INDEX).exists():
    return {}
  if (path / SINGLE).exists():
    raise ValueError(f"{path} has both {SINGLE} and {INDEX}: remove the one that is out of date")
  index = read_json(path / INDEX)
  shards = index.get("weight_map") if isinstance(index, dict) else None
  if not isinstance(shards, dict) or not shards:
    raise ValueError(f"{path / INDEX} has no weight_map")
  for name, shard in shards.items():
    if not isinstance(shard, str) or pathlib.PurePath(shard).name != shard:
      raise ValueError(f"{path / INDEX}: {name} is in {shard!r}, which is no file name")
  return shards


def _open(file: pathlib.Path) -> Iterator[tuple[str, Tensor]]:
  if not file.is_file():
    raise ValueError(f"missing file {file}{_left_behind(file.parent)}")
  try:
    opened = safe_open(file, framework="np")
    names = list(opened.keys())
    for name in names:
      part = opened.get_slice(name)
      yield name, Tensor(opened, name, tuple(part.get_shape()), part.get_dtype())
  except (OSError, ValueError, SafetensorError) as e:
    raise ValueError(f"{file} is damaged or truncated: {e}") from None


def _parts(path: pathlib.Path, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
  """The tensor itself, or those that transformers 5 holds as one in memory: [experts, out, in]."""
  fused = _FUSED.fullmatch(name)
  if not fused:
    yield name, tensor
    return
  if len(tensor.shape) != 3 or (fused[2] == "gate_up_proj" and tensor.shape[1] % 2):
    raise ValueError(f"{path}: {name} has shape {tensor.shape}, which no fused experts have")
  parts = ("gate_proj", "up_proj") if fused[2] == "gate_up_proj" else ("down_proj",)
  rows = tensor.shape[1] // len(parts)
  for expert in range(tensor.shape[0]):
    for i, part in enumerate(parts):
      shape = (rows, tensor.shape[2])
      yield (
        f"{fused[1]}.{expert}.{part}.weight",
        dataclasses.replace(tensor, shape=shape, expert=expert, offset=i * rows),
      )


class Writer:
  """A context that writes a model beside the one in `path`, and puts it in its place at the end.

  Ended by an exception, it leaves no trace. Killed at any moment it leaves the model from before:
  in `path`, or whole in `path/.replaced` with no `config.json` in `path`, so that nobody reads a
  mixture. Other files in `path` stay.
  """

  def __init__(self, path: pathlib.Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    self.path = path
    self.names: list[str] = []

  def __enter__(self) -> "Writer":
    self._discard()  # what a save that was killed has left
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    if kind is None:
      self._commit()
    else:
      self._discard()

  def _discard(self) -> None:
    for file in self.path.glob(f"{_TEMPORARY}*"):
      file.unlink()

  def _new(self, name: str) -> pathlib.Path:
    self.names.append(name)
    return self.path / f"{_TEMPORARY}{name}"

  def json(self, name: str, content: Any) -> None:
    """Adds a file of JSON."""
    self._new(name).write_text(json.dumps(content, indent=2) + "\n")

  def tensors(self, name: str, tensors: dict[str, np.ndarray]) -> None:
    """Adds a file of tensors."""
    # transformers 4 refuses files that do not say whose tensors they are.
    safetensors.numpy.save_file(tensors, self._new(name), metadata={"format": "pt"})

  def _commit(self) -> None:
    for name in self.names:
      file = self.path / f"{_TEMPORARY}{name}"
      shutil.copymode(self.path / f"{_TEMPORARY}{CONFIG}", file)  # safetensors makes it 0600
      _sync(file)
    old = [f for f in self.path.iterdir() if _OURS.fullmatch(f.name)]
    if (self.path / CONFIG).exists():
      self._keep(old)
      # From here on `path` is no model, until the new config.json, the last to come, is there.
      (self.path / CONFIG).unlink()
    for file in old:
      file.unlink(missing_ok=True)
    for name in sorted(self.names, key=lambda name: name == CONFIG):
      os.replace(self.path / f"{_TEMPORARY}{name}", self.path / name)
    _sync(self.path)
    shutil.rmtree(self.path / REPLACED, ignore_errors=True)

  def _keep(self, files: Iterable[pathlib.Path]) -> None:
    """A second name for each file, or a copy where the file system has none."""
    kept = self.path / REPLACED
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir()
    for file in sorted(files, key=lambda file: file.name == CONFIG):
      try:
        os.link(file, kept / file.name)
      except OSError:
        shutil.copy2(file, kept / file.name)
    _sync(kept)


def _sync(path: pathlib.Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
