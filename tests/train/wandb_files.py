"""Reads the files that wandb writes offline: records of protobuf in the log format of LevelDB."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK, _HEADER = 32768, 7


def history(path: pathlib.Path) -> list[dict[str, Any]]:
  """What was logged, a dict a call."""
  records = [record for record in _records(path) if record.WhichOneof("record_type") == "history"]
  return [
    {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in r.history.item}
    for r in records
  ]


def run(path: pathlib.Path) -> wandb_internal_pb2.RunRecord:
  """How the run was begun."""
  return next(r.run for r in _records(path) if r.WhichOneof("record_type") == "run")


def _records(path: pathlib.Path) -> Iterator[wandb_internal_pb2.Record]:
  data, at, whole = path.read_bytes(), _HEADER, b""
  while at + _HEADER <= len(data):
    if _BLOCK - at % _BLOCK < _HEADER:  # Too little for a header: padding.
      at += _BLOCK - at % _BLOCK
      continue
    size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
    whole += data[at + _HEADER : at + _HEADER + size]
    at += _HEADER + size
    if kind in (1, 4):  # Whole, or the last part.
      yield wandb_internal_pb2.Record.FromString(whole)
      whole = b""
