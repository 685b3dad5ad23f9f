"""run.json: what a run was started with, one entry for each start.

A run that was killed and started again has several; an entry says where it took the run up, so that
a reader of metrics.jsonl sees which rows came of which commit, machine and packages.

Left out: the environment's variables, which may hold secrets.
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import jax

import rome
from rome import files, rollout
from rome.train.config import ConfigError, RunConfig
from rome.train.record import origin
from rome.train.summary import provenance


def record_start(
  workdir: pathlib.Path, config: RunConfig, phase: str, update: int
) -> dict[str, Any]:
  """Adds an entry to WORKDIR/run.json, replacing the file in one step, and returns it.

  Args:
    workdir: an existing directory.
    config: of the run.
    phase: in which this start goes on.
    update: updates of that phase that are done.

  Raises:
    ConfigError: the file is not what this function writes.
    WriteError: it cannot be written.
  """
  path = workdir / "run.json"
  start = {"phase": phase, "update": update, **_facts(config)}
  files.write_atomic(path, json.dumps({"starts": [*read_starts(path), start]}, indent=2) + "\n")
  return start


def read_starts(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The entries of a run.json, oldest first; none where there is no such file.

  Raises:
    ConfigError: the file is not what `record_start` writes.
    OSError: it cannot be read.
  """
  try:
    starts = json.loads(pathlib.Path(path).read_bytes())["starts"]
  except FileNotFoundError:
    return []
  except (ValueError, TypeError, KeyError):
    starts = None
  if not (isinstance(starts, list) and all(isinstance(start, dict) for start in starts)):
    raise ConfigError(f"{path} is not what a run writes; delete it, or choose another --workdir")
  return starts


def versions() -> dict[str, str]:
  """Versions of rome, Python, and of rome's requirements that are installed, those of dev apart."""
  found = {"rome": rome.__version__, "python": platform.python_version()}
  try:
    required = importlib.metadata.requires("rome") or []
  except importlib.metadata.PackageNotFoundError:  # a checkout that nobody installed
    required = []
  names = {
    match.group()
    for text in ("jax", "jaxlib", *required)
    if 'extra == "dev"' not in text and (match := re.match(r"[\w.-]+", text))
  }
  for name in sorted(names):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue  # of an extra
  return found


def _facts(config: RunConfig) -> Mapping[str, Any]:
  return {
    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "command": shlex.join(sys.orig_argv),
    "directory": os.getcwd(),
    "settings_sha256": origin(config)["settings"],
    "scaffold_sha256": rollout.scaffold_digest(config.agent),
    "seed": config.seed,
    "commit": provenance()["commit"],
    "device": provenance()["device"],
    "backend": jax.default_backend(),
    "devices": jax.device_count(),
    "processes": jax.process_count(),
    "platform": platform.platform(),
    "versions": versions(),
  }
