"""The private Podman service of this process, through which podman-py drives Podman.

One `podman system service` a process, started at the first call, on a socket in a directory of mode
0700 below `owner.runtime_dir()`. The directory carries the same records as a sandbox's, so the next
sweep ends the service of a process that was killed; failing that it ends by itself after `IDLE`
seconds without a call. The directory is also where container monitors, which inherit it, leave
their notes.

A service that died, or that does not even answer a ping any more, is replaced by the next caller;
callers that wait meanwhile get the same new one. Calls that can be repeated are repeated on it.
Containers do not notice: their monitors are no children of the service.

A connection to the user's own service (podman.socket) is never used: its life and its settings are
not ours. Left out: services on other machines (ssh://, tcp://).
"""

import atexit
import os
import pathlib
import secrets
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from rome.envs import owner
from rome.envs.backends import install_hint
from rome.envs.common import BackendUnavailable, SandboxError, SandboxLost

if TYPE_CHECKING:
  import podman

PACKAGES = "podman runc uidmap slirp4netns fuse-overlayfs"
PREFIX = "podman-"  # of the directories
IDLE = 600  # seconds
_START_TIMEOUT = 20.0  # seconds until a new service answers
_TRIES = 4  # of one call, each on a new service
_CONNECTIONS = 16  # kept open; more threads than these open their own

T = TypeVar("T")


class Interrupted(SandboxLost):
  """The service ended during a call; whether the call was done is unknown."""


class PodmanService:
  """See the module. Thread-safe; a forked child starts its own.

  Attributes:
    runtime: the OCI runtime that new containers get; None for Podman's own default.
    starts: how often a service has been started.
    pid: the process that answers on the socket; 0 while there is none.
  """

  def __init__(self, call_timeout: float = 30.0, ping_timeout: float = 10.0) -> None:
    """Starts nothing yet.

    Args:
      call_timeout: seconds of one call, unless it names its own.
      ping_timeout: seconds without an answer to a ping after which a service counts as hung.
    """
    self.runtime: str | None = None
    self.starts = 0
    self.pid = 0
    self._call_timeout, self._ping_timeout = call_timeout, ping_timeout
    self._lock = threading.Lock()
    self._owner = os.getpid()
    self._process: subprocess.Popen[bytes] | None = None
    self._client: podman.PodmanClient | None = None
    self._home = pathlib.Path()
    self._started = 0.0
    self._quick_deaths = 0
    self._ended = False
    # Exit handlers run last in, first out: registered when the module is imported, this one runs
    # after the one that closes the sandboxes.
    atexit.register(self._at_exit)

  def use_runtime(self, runtime: str | None) -> None:
    """Sets the OCI runtime, None for Podman's own default; another one means a new service."""
    with self._lock:
      if runtime != self.runtime:
        self.runtime = runtime
        self._stop()

  def call(self, action: "Callable[[podman.PodmanClient], T]", repeat: bool = True) -> T:
    """Runs `action(client)`, on a new service if the present one fails.

    Args:
      action: calls of podman-py; its own errors (`podman.errors.APIError`) pass through.
      repeat: it may be run again after an interruption.

    Raises:
      Interrupted: the service ended during the call, again and again, or `repeat` is False.
      SandboxError: the call took too long, though the service answers otherwise.
      BackendUnavailable: no service starts.
    """
    for attempt in range(_TRIES):
      client = self._ready()
      try:
        return action(client)
      except OSError as error:  # podman-py's APIError is one, too
        if getattr(error, "response", None) is not None:
          raise
        reason = _root_cause(error)
        if self._answers(client):
          if "timed out" in reason.lower():
            raise SandboxError(f"podman did not answer in time: {reason}") from error
        else:
          self._discard(client)
        if not repeat or attempt == _TRIES - 1:
          raise Interrupted(f"the podman service ended during a call: {reason}") from error
    raise AssertionError("not reached")

  def stop(self) -> None:
    """Ends the service; the next call starts another. Idempotent."""
    with self._lock:
      self._forget_parents()
      self._stop()

  def _ready(self) -> "podman.PodmanClient":
    with self._lock:
      self._forget_parents()
      if self._ended:
        raise SandboxLost("this process is ending: podman can no longer be called")
      if self._process is not None and self._process.poll() is not None:
        self._stop()
      if self._client is None:
        # All that wait here get the one new service.
        time.sleep(min(2.0, 0.05 * (2**self._quick_deaths - 1)))
        self._start()
      assert self._client is not None
      return self._client

  def _answers(self, client: "podman.PodmanClient") -> bool:
    try:
      return bool(client.api.get("/_ping", timeout=self._ping_timeout).ok)
    except OSError:
      return False

  def _discard(self, client: "podman.PodmanClient") -> None:
    """Ends a service that failed, unless another caller has done so already."""
    with self._lock:
      if self._client is client:
        quick = time.monotonic() - self._started < 10
        self._quick_deaths = min(self._quick_deaths + 1, 6) if quick else 0
        self._stop(grace=0.2)

  def _start(self) -> None:
    if not shutil.which("podman"):
      raise install_hint(PACKAGES, "podman is not installed")
    try:
      import podman
    except ImportError as error:
      raise BackendUnavailable("podman-py is not installed: pip install podman") from error
    self._home = owner.new_dir(f"{PREFIX}{secrets.token_hex(6)}")
    address = self._home / "sock"
    runtime = ["--runtime", self.runtime] if self.runtime else []
    command = ["podman", *runtime, "--log-level", "error", "system", "service"]
    with open(self._home / "log", "wb") as log:
      self._process = subprocess.Popen(
        [*command, "--time", str(IDLE), f"unix://{address}"],
        cwd=self._home,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=log,
        start_new_session=True,
      )
    (self._home / "process").write_text(owner.label(self._process.pid))
    self.starts += 1
    self._started = time.monotonic()
    pid = self._await(address)
    if not pid:
      lines = (self._home / "log").read_text(errors="replace").strip().splitlines() or ["no reason"]
      self._stop()
      raise BackendUnavailable(f"`podman system service` does not start: {lines[-1][:300]}")
    # Rootless, it is a child of what was started that serves, and must be ended.
    (self._home / "process").write_text(owner.label(pid))
    self.pid = pid
    self._client = podman.PodmanClient(
      base_url=f"unix://{address}", timeout=self._call_timeout, max_pool_size=_CONNECTIONS
    )

  def _await(self, address: pathlib.Path) -> int:
    """Waits until somebody listens. Returns its pid, 0 if nobody does in time."""
    assert self._process is not None
    deadline = time.monotonic() + _START_TIMEOUT
    while time.monotonic() < deadline and self._process.poll() is None:
      with socket.socket(socket.AF_UNIX) as probe:
        try:
          probe.connect(str(address))
          peer = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
          return int(struct.unpack("3i", peer)[0])
        except OSError:
          time.sleep(0.002)
    return 0

  def _stop(self, grace: float = 3.0) -> None:
    """Ends the service, after `grace` seconds by force."""
    if self._client is not None:
      self._client.close()
      self._client = None
    if self._process is not None:
      self._process.terminate()
      try:
        self._process.wait(timeout=grace)
      except subprocess.TimeoutExpired:
        owner.end_process(self._home / "process")
        self._process.kill()
        self._process.wait(timeout=10)
      self._process = None
      owner.remove_dir(self._home)
    self.pid = 0

  def _forget_parents(self) -> None:
    """In a forked child the service belongs to the parent."""
    if self._owner != os.getpid():
      self._owner, self._process, self._client, self.pid = os.getpid(), None, None, 0

  def _at_exit(self) -> None:
    if self._owner == os.getpid():
      with self._lock:
        self._ended = True
        self._stop()


service = PodmanService()  # of this process


def sweep() -> list[str]:
  """Ends the services of dead processes. Returns the names of their directories."""
  return owner.sweep_dirs(PREFIX)


def message(error: Exception) -> str:
  """What Podman says of an error of podman-py, on one line."""
  text: Any = getattr(error, "explanation", None) or str(error)
  return " ".join(str(text).split())[:400]


def _root_cause(error: BaseException) -> str:
  while error.__cause__ or error.__context__:
    error = error.__cause__ or error.__context__  # type: ignore[assignment]
  return str(error) or type(error).__name__
