"""Sandboxes, tasks and gymnasium environments. Nothing here imports jax.

Importing this package registers `rome/Terminal-v0` with gymnasium.
"""

import gymnasium

from rome.envs import honeypots as honeypots  # enters its family
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
from rome.envs.task import Task, TaskError, TaskFile, load_task, save_task
from rome.envs.terminal import TerminalEnv

__all__ = [
  "FAMILIES",
  "Attempt",
  "BackendUnavailable",
  "CommandResult",
  "EgressLog",
  "ImageError",
  "Limits",
  "NetworkPolicy",
  "PolicyError",
  "Sandbox",
  "SandboxError",
  "SandboxLost",
  "SandboxPool",
  "Session",
  "Task",
  "TaskError",
  "TaskFile",
  "TerminalEnv",
  "TestsUnfinished",
  "check_task",
  "generate",
  "load_task",
  "make_sandbox",
  "resolve_task",
  "save_task",
  "split_seed",
  "sweep",
]

gymnasium.register("rome/Terminal-v0", entry_point="rome.envs.terminal:TerminalEnv")
