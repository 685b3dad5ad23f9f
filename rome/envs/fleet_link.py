"""The way from a fleet to the worker of one host: calls, and connections to rocklets, over Ray."""

import contextlib
import threading
import time
from typing import Any, cast

from rome.envs import fleet_worker
from rome.envs.common import SandboxError, SandboxLost
from rome.envs.rocklet import client

ANSWER = 60.0  # seconds that a worker may take beyond what it was asked to wait
_STEP = 1.0  # seconds after which a call looks whether its worker is lost
_TURN = 1.0  # seconds that a wait holds a thread of the worker; then others have their turn
_GROUPS = {  # which threads of the worker serve what must not wait behind commands
  **dict.fromkeys(("poll", "delete", "hang_up"), "control"),
  **dict.fromkeys(("create", "fork", "commit"), "start"),
}


def import_ray() -> Any:
  """Returns the module.

  Raises:
    SandboxError: it is not installed.
  """
  try:
    import ray
  except ImportError as error:
    raise SandboxError("a fleet needs Ray: pip install 'rome[fleet]'") from error
  return ray


class Host:
  """A host of the fleet and the actor on it.

  Attributes:
    name: unique.
    node: Ray's id of it.
    actor: a `fleet_worker.Worker`.
    lost: why it is lost; empty while it is not.
    question: the `poll` under way, asked at `asked`.
  """

  def __init__(self, name: str, node: str, actor: Any):
    self.name, self.node, self.actor = name, node, actor
    self.lost = ""
    self.question: Any = None
    self.asked = time.monotonic()

  def send(self, method: str, *args: Any) -> Any:
    """Calls the actor; returns Ray's reference to the result."""
    call, group = getattr(self.actor, method), _GROUPS.get(method)
    return (call.options(concurrency_group=group) if group else call).remote(*args)

  def ask(self, method: str, *args: Any, timeout: float = ANSWER) -> Any:
    """Calls the actor and waits for its answer.

    Raises:
      SandboxLost: the host is lost, or did not answer within `timeout` seconds.
      Exception: what the method raised.
    """
    ray = import_ray()
    try:
      question, end = self.send(method, *args), time.monotonic() + timeout
      while not ray.wait([question], timeout=_STEP)[0]:
        if self.lost:
          raise SandboxLost(f"host {self.name} is lost: {self.lost}")
        if time.monotonic() > end:
          raise SandboxLost(f"host {self.name} did not answer for {timeout:g} s")
      answer = ray.get(question)
    except ray.exceptions.RayActorError as error:
      raise SandboxLost(f"host {self.name} is lost: its worker ended") from error
    except ray.exceptions.RayError as error:
      raise SandboxError(f"host {self.name}: {error}") from error
    if isinstance(answer, Exception):
      raise answer
    return answer


class Tunnel:
  """As much of a socket as `client.Connection` needs, over a connection that a worker holds.

  What is sent waits for the next `recv`, so that a request and its answer cross once.
  """

  def __init__(self, host: Host, name: str, number: int):
    self._host, self._name, self._number = host, name, number
    self._timeout = 10.0
    self._out, self._in = bytearray(), b""
    self._closed = False

  def settimeout(self, seconds: float) -> None:
    self._timeout = seconds

  def sendall(self, data: bytes | memoryview) -> None:
    view = memoryview(data)
    for at in range(0, len(view), fleet_worker.PART):
      self._out += view[at : at + fleet_worker.PART]
      if len(self._out) >= fleet_worker.PART and self._exchange(None) == b"":
        raise BrokenPipeError

  def recv(self, size: int) -> bytes:
    end = time.monotonic() + self._timeout
    while not self._in:
      left = end - time.monotonic()
      got = self._exchange(max(0.0, min(_TURN, left)))
      if got == b"":
        return b""
      if got is None and left <= 0:
        raise TimeoutError
      self._in = got or b""
    part, self._in = self._in[:size], self._in[size:]
    return part

  def shutdown(self, how: int) -> None:
    del how
    self.close()

  def close(self) -> None:
    if not self._closed:
      self._closed = True
      if not self._host.lost:
        with contextlib.suppress(Exception):  # Ray may be gone; the worker closes them all then
          self._host.send("hang_up", self._name, self._number)

  def _exchange(self, wait: float | None) -> bytes | None:
    if self._closed:
      return b""
    data, self._out = bytes(self._out), bytearray()
    return cast(bytes | None, self._host.ask("exchange", self._name, self._number, data, wait))


class Connection(client.Connection):
  """A connection through a tunnel."""

  def __init__(self, host: Host, name: str, number: int):
    self._lock = threading.Lock()
    self._socket = cast(Any, Tunnel(host, name, number))
