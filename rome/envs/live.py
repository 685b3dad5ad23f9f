"""The sandboxes that this process owns: their end, and the sweep of what dead processes left.

Every sandbox is entered here before it starts, so that `close_all`, also run at the exit of the
process and on SIGTERM, finds it however far it came.
"""

import atexit
import logging
import os
import signal
import threading
from collections.abc import Iterable
from types import FrameType
from typing import TYPE_CHECKING

from rome.envs import owner
from rome.envs.backends import Backend
from rome.envs.backends.bubblewrap import Bubblewrap
from rome.envs.backends.podman import Podman
from rome.envs.backends.process import PlainProcess
from rome.envs.common import SandboxError

if TYPE_CHECKING:
  from rome.envs.sandbox import Sandbox

BACKENDS: dict[str, Backend] = {
  "podman": Podman(),
  "bubblewrap": Bubblewrap(),
  "process": PlainProcess(),
}

# Sandboxes that end at a time. At the end of each, Podman's monitor starts a process to clean up; a
# thousand of these at once keep each other, and the service, waiting for minutes.
_AT_ONCE = 32

log = logging.getLogger(__name__)

_live: set["Sandbox"] = set()
_live_lock = threading.Lock()
_prepared_pid = 0  # the process for which `prepare_process` has run


def enter(sandbox: "Sandbox") -> None:
  """Enters a sandbox that is about to start."""
  with _live_lock:
    _live.add(sandbox)


def close_all(sandboxes: Iterable["Sandbox"]) -> None:
  """Closes several sandboxes at once, cheaper than one by one."""
  with _live_lock:
    mine = [sandbox for sandbox in sandboxes if not sandbox._closed]
    for sandbox in mine:
      sandbox._closed = True
      _live.discard(sandbox)
  for i in range(0, len(mine), _AT_ONCE):
    _close(mine[i : i + _AT_ONCE])


def _close(mine: list["Sandbox"]) -> None:
  for sandbox in mine:
    if sandbox._main is not None:
      sandbox._main.close()
    while sandbox._idle:
      sandbox._idle.pop().close()
  for sandbox in mine:
    sandbox._link.close()
  for backend in BACKENDS.values():
    started = [s._launched for s in mine if s.backend == backend.name and s._launched]
    if started:
      backend.stop_many(started)
  for sandbox in mine:
    owner.remove_dir(sandbox._home)


def sweep() -> list[str]:
  """Removes containers, directories and processes of dead owners. Returns their names."""
  swept = [name for backend in BACKENDS.values() for name in backend.sweep()]
  return sorted({*swept, *owner.sweep_dirs()})


def sweep_at_start() -> list[str]:
  """As `sweep`, for those who start sandboxes: where it fails, the log says so, and they go on."""
  try:
    return sweep()
  except SandboxError as error:
    log.warning("what dead processes left was not removed (try `rome sandbox gc`): %s", error)
    return []


def prepare_process() -> None:
  """At the first sandbox of a process: sweep, and see to it that its end is orderly."""
  global _prepared_pid
  with _live_lock:
    if _prepared_pid == os.getpid():
      return
    _live.clear()  # in a forked child these are the parent's
    _prepared_pid = os.getpid()
  sweep_at_start()
  atexit.register(_close_at_exit, os.getpid())
  if threading.current_thread() is threading.main_thread():
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
      signal.signal(signal.SIGTERM, _exit_on_sigterm)


def _close_at_exit(pid: int) -> None:
  if pid == os.getpid():
    close_all(list(_live))


def _exit_on_sigterm(number: int, frame: FrameType | None) -> None:
  """The default action would skip the exit handlers."""
  raise SystemExit(128 + number)
