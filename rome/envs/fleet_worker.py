"""The fleet's part on each host: a manager of its own, driven over Ray.

What crosses is data: the bytes of the connections to rocklets, and the few calls that only the host
of a sandbox can serve. Errors come back as values.

A worker whose fleet is gone goes too, since Ray ends an actor with its driver; should Ray fail to,
the time limits of its own manager still hold.
"""

import dataclasses
import functools
import itertools
import os
import pickle
import threading
from collections.abc import Callable, Mapping
from typing import Any

from rome.envs import records
from rome.envs.admission import Capacity
from rome.envs.common import SandboxError, SandboxLost, SandboxSpec
from rome.envs.manager import Manager
from rome.envs.network.attempts import Attempt
from rome.envs.rocklet import client
from rome.envs.sandbox import Sandbox

PART = 1 << 20  # bytes that cross at once
_MARGIN = 60.0  # seconds by which a worker's time limits are longer than the fleet's
_SEND = 60.0  # seconds that a rocklet may take to read what it is sent


@dataclasses.dataclass(frozen=True)
class Description:
  """What the fleet must know of a sandbox that has started; see `Sandbox`.

  Attributes:
    variables: of the environment of every session.
  """

  id: str
  backend: str
  image: str
  workdir: str
  pid: int
  variables: Mapping[str, str]


def _told(method: Callable[..., Any]) -> Callable[..., Any]:
  """Makes a method return its error instead of raising it, in a form that can cross."""

  @functools.wraps(method)
  def call(*args: Any) -> Any:
    try:
      return method(*args)
    except Exception as error:
      try:
        return pickle.loads(pickle.dumps(error))
      except Exception:  # its class wants other arguments than `args`
        known = isinstance(error, SandboxError)
        return SandboxError(str(error) if known else f"{type(error).__name__}: {error}")

  return call


class Worker:
  """One host's sandboxes, by the names that the fleet gave them. A Ray actor with many threads."""

  def __init__(self, capacity: Capacity | None, warm: Mapping[SandboxSpec, int]):
    self._manager = Manager(capacity, warm=warm)
    self._ids: dict[str, str] = {}  # the fleet's names -> the manager's
    self._connections: dict[tuple[str, int], client.Connection] = {}  # 0: the owning one
    self._numbers = itertools.count(1)
    self._lock = threading.Lock()

  def hello(self) -> tuple[Capacity, int]:
    """What this host has for sandboxes, and this process."""
    return self._manager.capacity, os.getpid()

  @_told
  def create(self, name: str, spec: SandboxSpec, deadline: float) -> Description:
    """Starts a sandbox. Raises as `Manager.create`."""
    longer = dataclasses.replace(spec, ttl=spec.ttl + _MARGIN, idle_ttl=spec.ttl + _MARGIN)
    record = self._manager.create(longer, deadline=deadline)
    box = record.sandbox
    if box is None:
      raise records.CreationFailed(f"sandbox {name} ended at once: {record.error}")
    with self._lock:
      self._ids[name] = record.id
      self._connections[name, 0] = box._connection()
    return Description(
      box.id, box.backend, box.image, box.workdir, box.pid, dict(box._link.variables)
    )

  def poll(self) -> dict[str, str]:
    """Names of sandboxes that ended by themselves, and why. They stay in it until `delete`."""
    with self._lock:
      ids = dict(self._ids)
    ended = {}
    for name, sandbox_id in ids.items():
      try:
        record = self._manager.get(sandbox_id)
      except records.UnknownSandbox:
        ended[name] = "it is forgotten"
        continue
      if record.life.finished:
        ended[name] = record.error or record.history[-1].reason
    return ended

  def delete(self, name: str) -> None:
    """Ends a sandbox and forgets its name. Idempotent."""
    with self._lock:
      sandbox_id = self._ids.pop(name, None)
      own = [self._connections.pop(key) for key in [*self._connections] if key[0] == name]
    for connection in own:
      connection.close()
    if sandbox_id is not None:
      self._manager.delete(sandbox_id)

  @_told
  def connect(self, name: str, timeout: float) -> int:
    """Opens one more connection to a sandbox; returns its number."""
    connection, number = self._sandbox(name)._connect(timeout), next(self._numbers)
    with self._lock:
      if name in self._ids:
        self._connections[name, number] = connection
        return number
    connection.close()
    raise SandboxLost(f"sandbox {name} has ended")

  def exchange(self, name: str, number: int, data: bytes, wait: float | None) -> bytes | None:
    """Sends bytes over a connection, then receives some.

    Args:
      name, number: of the sandbox and its connection.
      data: to send.
      wait: seconds for something to come; None does not receive.

    Returns:
      What came; b"" if the connection has ended, None if nothing came.
    """
    connection = self._connections.get((name, number))
    if connection is None:
      return b""
    try:
      if data:
        connection._socket.settimeout(_SEND)
        connection._socket.sendall(data)
    except OSError:
      return b""
    if wait is None:
      return None
    try:
      connection._socket.settimeout(max(wait, 0.001))  # 0 would mean something else
      return connection._socket.recv(PART)
    except TimeoutError:
      return None
    except OSError:
      return b""

  def hang_up(self, name: str, number: int) -> None:
    """Closes a connection. Idempotent."""
    with self._lock:
      connection = self._connections.pop((name, number), None)
    if connection is not None:
      connection.close()

  @_told
  def fork(self, source: str, target: str, timeout: float) -> None:
    """Makes one sandbox of this host a fork of another. Needs both owning connections at rest."""
    self._sandbox(source).fork(self._sandbox(target), timeout)

  @_told
  def commit(self, name: str, tag: str, timeout: float) -> str:
    """See `Sandbox.commit`. Needs the owning connection at rest."""
    return self._sandbox(name).commit(tag, timeout)

  @_told
  def reset_network(self, name: str) -> None:
    """The network's part of a reset."""
    self._sandbox(name)._link.reset()

  @_told
  def name_servers(self, name: str) -> None:
    """The network's part of a restore."""
    self._sandbox(name)._link.name_servers()

  @_told
  def label(self, name: str, episode: str) -> None:
    """Sets `Sandbox.episode`."""
    self._sandbox(name).episode = episode

  @_told
  def attempts(self, name: str) -> list[Attempt]:
    """See `Sandbox.attempts`."""
    return self._sandbox(name).attempts()

  @_told
  def reason(self, name: str) -> str:
    """Why a sandbox ended, as far as this host knows."""
    sandbox_id = self._ids.get(name)
    if sandbox_id is None:
      return ""
    record = self._manager.get(sandbox_id)
    return record.error or (record.sandbox.lost_reason() if record.sandbox else "")

  def metrics(self) -> dict[str, float]:
    """Of the manager here."""
    return self._manager.metrics()

  def close(self) -> None:
    """Ends all sandboxes here."""
    self._manager.close()

  def _sandbox(self, name: str) -> Sandbox:
    sandbox_id = self._ids.get(name)
    record = self._manager.get(sandbox_id) if sandbox_id else None
    if record is None or record.sandbox is None:
      reason = (record and record.error) or "it has ended"
      raise SandboxLost(f"sandbox {name} is lost: {reason}")
    return record.sandbox
