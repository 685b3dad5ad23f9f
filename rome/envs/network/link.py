"""What a sandbox has of the network: its policy's egress, and the log of what was tried.

Both go over a connection of their own, so that they never wait for a command.
"""

import errno
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rome.envs.common import SandboxError, SandboxLost
from rome.envs.network.attempts import AttemptLog
from rome.envs.network.policy import NetworkPolicy
from rome.envs.rocklet import client

if TYPE_CHECKING:
  from rome.envs.network.egress import Egress
  from rome.envs.sandbox import Sandbox

_RESOLV_CONF = "/etc/resolv.conf"


class Link:
  """The network of one sandbox.

  Attributes:
    log: what was tried.
    variables: of every session, by which programs find the proxy; empty without a policy.
  """

  def __init__(self, sandbox: "Sandbox"):
    self._sandbox = sandbox
    self._egress: Egress | None = None
    self._connection: client.Connection | None = None
    self.log = AttemptLog(sandbox.id)
    self.variables: Mapping[str, str] = {}

  def open(self, policy: NetworkPolicy) -> None:
    """Serves a policy from now on.

    Raises:
      SandboxError: its addresses cannot be had in the sandbox.
      SandboxLost: the sandbox died.
    """
    from rome.envs.network import egress

    self.serve(policy)
    self.variables = egress.ENVIRONMENT
    self.name_servers()

  def serve(self, policy: NetworkPolicy) -> None:
    """The listeners alone; raises as `open` does."""
    from rome.envs.network import egress

    try:
      self._egress = egress.Egress(policy, self.log, self._control().listen)
    except client.RequestError as error:
      name = self._sandbox.id
      raise SandboxError(f"sandbox {name}: its network cannot be served: {error}") from error

  def name_servers(self) -> None:
    """Points the resolver at the policy's DNS server, where there is a policy."""
    from rome.envs.network import egress

    if self._egress is None:
      return
    sandbox = self._sandbox
    try:
      sandbox.write_file(_RESOLV_CONF, egress.RESOLV_CONF, owner="root")
    except client.RequestError as error:
      if error.errno != errno.EROFS:
        raise
      text = sandbox.read_file(_RESOLV_CONF)
      if b"nameserver" in text.replace(b"nameserver 127.0.0.1", b""):
        raise SandboxError(
          f"{_RESOLV_CONF} of image {sandbox.image!r} names servers: empty it"
        ) from error

  def collect_direct(self) -> None:
    """Brings what rocklet saw of attempts past the proxy into the log; of a lost one nothing."""

    def describe(address: str, port: int) -> str | None:
      return self._egress.describe(address, port) if self._egress else None

    try:
      reply = self._control().call(client.WATCH)
      self.log.add_direct(reply.data, reply.total, describe)
    except SandboxLost:
      pass

  def reset(self) -> None:
    """After the sandbox's own reset: nothing was tried yet."""
    if self._egress is not None:
      self._egress.reset()
      self.name_servers()
    self.collect_direct()
    self.log.clear()

  def close(self) -> None:
    """Ends all connections through it. Idempotent."""
    if self._egress is not None:
      self._egress.close()
    if self._connection is not None:
      self._connection.close()

  def _control(self) -> client.Connection:
    if self._connection is None:
      self._connection = self._sandbox._connect(5.0)
    return self._connection
