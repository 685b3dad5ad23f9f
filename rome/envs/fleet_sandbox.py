"""A sandbox on another host: the class `Sandbox` itself, over connections that lead through Ray.

Commands, sessions, files, trees and snapshots speak to the rocklet in the very same words; only
their bytes take another way (`fleet_link.Tunnel`). What needs the host itself (forks on it, images,
the network's log) its worker does.

Left out: `log_attempts`, since attempts are seen by the host.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from rome.envs.common import SandboxError, SandboxLost, SandboxSpec
from rome.envs.fleet_link import ANSWER, Connection, Host
from rome.envs.fleet_worker import Description
from rome.envs.network.attempts import Attempt
from rome.envs.network.link import Link
from rome.envs.network.policy import NetworkPolicy
from rome.envs.rocklet import client
from rome.envs.sandbox import Sandbox
from rome.envs.session import Session

if TYPE_CHECKING:
  from rome.envs.fleet import Fleet


class _Link:
  """Stands in for the `Link` that the worker has."""

  def __init__(self, sandbox: "FleetSandbox", variables: Mapping[str, str]):
    self._sandbox, self.variables = sandbox, variables

  def reset(self) -> None:
    self._sandbox.ask("reset_network")

  def name_servers(self) -> None:
    self._sandbox.ask("name_servers")


class FleetSandbox(Sandbox):
  """A sandbox of a fleet; see `Sandbox`. It ends with its record there.

  Attributes:
    name: the id of its record.
    host: where it runs.
  """

  def __init__(
    self,
    fleet: "Fleet",
    host: Host,
    name: str,
    spec: SandboxSpec,
    what: Description,
  ):
    self.name, self.host = name, host
    self.id, self.backend, self.image, self.workdir = (
      what.id,
      what.backend,
      what.image,
      what.workdir,
    )
    self.limits, self._network, self._pid = spec.limits, spec.network, what.pid
    self._fleet, self._spec, self._episode = fleet, spec, what.id
    self._closed, self._why, self._directory = False, "", None
    self._idle: list[client.Connection] = []
    self._main = main = Connection(host, name, 0)
    self._link = cast(Link, _Link(self, what.variables))
    self._session = Session(self, main, "main", env=what.variables)

  def ask(self, method: str, *args: Any, timeout: float = ANSWER) -> Any:
    """Calls a method of the worker for this sandbox; raises as `Host.ask`."""
    return self.host.ask(method, self.name, *args, timeout=timeout)

  def fork(self, into: Sandbox | None = None, timeout: float = 60.0) -> Sandbox:
    """See `Sandbox.fork`. On one host the files do not leave it."""
    if into is None:
      return cast(Sandbox, self._fleet.fork(self.name).sandbox)
    if not (isinstance(into, FleetSandbox) and into.host is self.host and into is not self):
      return super().fork(into, timeout)
    first, second = sorted(
      (self, into), key=lambda box: box.id
    )  # or two forks could wait crosswise
    with first._connection()._lock, second._connection()._lock:
      self.ask("fork", into.name, timeout, timeout=2 * timeout + ANSWER)
    return into

  def twin(self, network: NetworkPolicy | None = None) -> Sandbox:
    """See `Sandbox.twin`; it has a record of its own, on any host."""
    return cast(Sandbox, self._fleet.twin(self.name, network).sandbox)

  def commit(self, tag: str, timeout: float = 60.0) -> str:
    """See `Sandbox.commit`; the image is on this sandbox's host."""
    with self._connection()._lock:
      return cast(str, self.ask("commit", tag, timeout, timeout=2 * timeout + ANSWER))

  @property
  def pid(self) -> int:
    """See `Sandbox.pid`; of its own host."""
    return self._pid

  @property
  def episode(self) -> str:
    """See `Sandbox.episode`."""
    return self._episode

  @episode.setter
  def episode(self, label: str) -> None:
    self.ask("label", label)
    self._episode = label

  def attempts(self) -> list[Attempt]:
    """See `Sandbox.attempts`; raises SandboxLost where it is lost."""
    return cast(list[Attempt], self.ask("attempts"))

  def log_attempts(self, log: Any) -> None:
    """Cannot be had here: raises SandboxError."""
    raise SandboxError(f"sandbox {self.id} is on host {self.host.name}: ask for its attempts()")

  def close(self) -> None:
    """Ends it and its record, as the fleet's `stop` does. Idempotent."""
    self._fleet.stop(self.name, "closed")

  def ended(self, why: str) -> None:
    """The fleet knows why it ended."""
    self._why = why

  def retired(self) -> None:
    """The fleet ends it, or notes that it has ended."""
    self._closed = not self._why

  def lost_reason(self) -> str:
    """See `Sandbox.lost_reason`."""
    if self._why:
      return self._why
    try:
      return self.ask("reason") or "it ended by itself"
    except SandboxError as error:
      return str(error)

  def _variables(self) -> dict[str, str]:
    return dict(self._link.variables)

  def _connect(self, timeout: float) -> client.Connection:
    try:
      number = self.ask("connect", timeout, timeout=timeout + ANSWER)
    except SandboxLost as error:
      raise self._is_lost() from error
    return Connection(self.host, self.name, number)

  def _is_lost(self) -> SandboxLost:
    if self._closed:
      return SandboxLost(f"sandbox {self.id} is closed")
    return SandboxLost(f"sandbox {self.id} ({self.backend}) is lost: {self.lost_reason()}")
