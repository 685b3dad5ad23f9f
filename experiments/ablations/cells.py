"""Runs that can be interrupted: a JSON line for each finished cell, which is not run again.

A work directory belongs to one set of settings; with others it is refused rather than mixed.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any


class CellsError(Exception):
  """A work directory that cannot be used; the message is one line."""


class Cells:
  """The finished cells of a work directory, `cells.jsonl`."""

  def __init__(self, workdir: pathlib.Path, settings: Mapping[str, Any]):
    """Opens the directory, made if missing.

    Args:
      workdir: the directory.
      settings: everything that a cell's result depends on and that is not in its name, as JSON
        values.

    Raises:
      CellsError: it holds cells of other settings, is damaged, or cannot be written.
    """
    self._file = workdir / "cells.jsonl"
    saved = workdir / "settings.json"
    wanted = json.loads(json.dumps(settings))
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      if not saved.exists():
        _write(saved, json.dumps(wanted, indent=2) + "\n")
      found = json.loads(saved.read_text())
      lines = self._file.read_text().splitlines(True) if self._file.exists() else []
      self._done = dict(_parse(line) for line in lines if line.endswith("\n"))
      if lines and not lines[-1].endswith("\n"):  # cut off while it was written
        _write(self._file, "".join(lines[:-1]))
    except OSError as error:
      raise CellsError(f"cannot use --workdir {workdir}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
      raise CellsError(f"--workdir {workdir} is damaged ({error}); choose another") from None
    changed = sorted(k for k in wanted | found if wanted.get(k) != found.get(k))
    if changed:
      raise CellsError(
        f"--workdir {workdir} holds cells with another {changed[0]}"
        f" ({found.get(changed[0])!r}, not {wanted.get(changed[0])!r}); choose another"
      )

  def get(self, **name: Any) -> dict[str, Any] | None:
    """The result of a finished cell, None where it is not finished."""
    return self._done.get(_key(name))

  def put(self, result: dict[str, Any], **name: Any) -> dict[str, Any]:
    """Records a finished cell at once, and returns its result as it will be read back."""
    line = json.dumps({"cell": name, "result": result}) + "\n"
    with self._file.open("a") as file:
      file.write(line)
      file.flush()
      os.fsync(file.fileno())
    self._done |= [_parse(line)]
    return self._done[_key(name)]


def _key(name: Mapping[str, Any]) -> str:
  return json.dumps(name, sort_keys=True)


def _parse(line: str) -> tuple[str, dict[str, Any]]:
  value = json.loads(line)
  return _key(value["cell"]), value["result"]


def _write(path: pathlib.Path, text: str) -> None:
  part = path.with_name(path.name + ".part")
  part.write_text(text)
  os.replace(part, path)
