"""Sandboxes, tasks and gymnasium environments. Nothing here imports jax.

Importing this package registers `rome/Terminal-v0` with gymnasium. The names in `_LATER` are loaded
at their first use: what manages many sandboxes, and what needs further libraries (httpx, ray).
"""

import importlib
from typing import TYPE_CHECKING, Any

import gymnasium

from rome.envs import honeypots as honeypots  # enters its family
from rome.envs.common import HostDirectory, SandboxSpec
from rome.envs.families import FAMILIES, generate, resolve_task, split_seed
from rome.envs.network import Attempt, EgressLog, NetworkPolicy, PolicyError
from rome.envs.pool import SandboxPool
from rome.envs.sandbox import (
  BackendUnavailable,
  CommandResult,
  ImageError,
  Limits,
  Sandbox,
  SandboxError,
  SandboxLost,
  Session,
  make_sandbox,
  sweep,
)
from rome.envs.scoring import TestsUnfinished, check_task
from rome.envs.session import Progress
from rome.envs.snapshot import Snapshot, SnapshotError
from rome.envs.task import Task, TaskError, TaskFile, load_task, save_task
from rome.envs.terminal import TerminalEnv

if TYPE_CHECKING:
  from rome.envs.admission import Capacity
  from rome.envs.archives import ArchiveError, download_archive, upload_archive
  from rome.envs.fleet import Fleet
  from rome.envs.hub import EnvHub
  from rome.envs.manager import Manager
  from rome.envs.records import Record
  from rome.envs.remote import Client
  from rome.envs.remote_env import RemoteEnv

__all__ = [
  "FAMILIES",
  "ArchiveError",
  "Attempt",
  "BackendUnavailable",
  "Capacity",
  "Client",
  "CommandResult",
  "EgressLog",
  "EnvHub",
  "Fleet",
  "HostDirectory",
  "ImageError",
  "Limits",
  "Manager",
  "NetworkPolicy",
  "PolicyError",
  "Progress",
  "Record",
  "RemoteEnv",
  "Sandbox",
  "SandboxError",
  "SandboxLost",
  "SandboxPool",
  "SandboxSpec",
  "Session",
  "Snapshot",
  "SnapshotError",
  "Task",
  "TaskError",
  "TaskFile",
  "TerminalEnv",
  "TestsUnfinished",
  "check_task",
  "download_archive",
  "generate",
  "load_task",
  "make_sandbox",
  "resolve_task",
  "save_task",
  "split_seed",
  "sweep",
  "upload_archive",
]

_LATER = {
  "ArchiveError": "archives",
  "Capacity": "admission",
  "Client": "remote",
  "EnvHub": "hub",
  "Fleet": "fleet",
  "Manager": "manager",
  "Record": "records",
  "RemoteEnv": "remote_env",
  "download_archive": "archives",
  "upload_archive": "archives",
}


def __getattr__(name: str) -> Any:
  if name not in _LATER:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *_LATER})


gymnasium.register("rome/Terminal-v0", entry_point="rome.envs.terminal:TerminalEnv")
