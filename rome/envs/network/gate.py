"""The gate of one sandbox: judges destinations, connects to them, and meters what passes."""

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from rome.envs.network.attempts import AttemptLog, Entry
from rome.envs.network.policy import NetworkPolicy, PolicyError, canonical_host, destination

CHUNK = 1 << 18  # bytes read at once, and buffered a direction
CONNECT_TIMEOUT = 10.0  # seconds, name resolution included
_MOST_ADDRESSES = 4  # of one name that are tried

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Refused(Exception):
  """The gate let something not pass, or ended it. `status` is HTTP's number for it."""

  def __init__(self, status: int, reason: str):
    super().__init__(reason)
    self.status = status


class Gate:
  """See the module. Lives in the loop thread.

  Attributes:
    policy, log: of the sandbox.
    spent: bytes sent and received in this episode.
    open: connections at the moment.
  """

  def __init__(self, policy: NetworkPolicy, log: AttemptLog):
    self.policy = policy
    self.log = log
    self.spent = 0
    self.open = 0

  def judge(self, host: str, port: int) -> str:
    """Returns the host in its canonical form. Raises Refused where the policy does not allow it."""
    try:
      name = canonical_host(host)
    except PolicyError as error:
      raise Refused(400, str(error)) from error
    if not self.policy.allows(name, port):
      raise Refused(403, "not in the allow-list")
    if self.spent >= self.policy.max_bytes:
      raise Refused(403, "max_bytes of the episode are spent")
    return name

  async def connect(self, host: str, port: int, checked: bool = True) -> Stream:
    """Connects to an allowed host, at an address that was checked.

    Args:
      host: canonical.
      port: of the host.
      checked: whether the addresses must be public or allowed by rule.

    Raises:
      Refused: the addresses are not allowed, or none answers.
    """
    try:
      async with asyncio.timeout(CONNECT_TIMEOUT):
        addresses = await _resolve(host, port)
        if checked:
          addresses = self._reachable(host, port, addresses)
        return await _connect_any(addresses[:_MOST_ADDRESSES], port)
    except TimeoutError as error:
      raise Refused(504, f"no connection in {CONNECT_TIMEOUT:.0f} s") from error
    except OSError as error:
      raise Refused(502, f"no connection: {error.strerror or error}") from error

  def _reachable(self, host: str, port: int, addresses: list[str]) -> list[str]:
    if host in addresses:  # the rule names the very address
      return addresses
    fit = [a for a in addresses if self.policy.reachable(ipaddress.ip_address(a), port)]
    if not fit:
      raise Refused(403, f"the name leads to {addresses[0]}, which is not public")
    return fit


class Meter:
  """Counts the bytes of one connection and ends it when it is idle, too old, or over the budget."""

  def __init__(self, gate: Gate, entry: Entry):
    self._gate = gate
    self._entry = entry
    self._loop = asyncio.get_running_loop()
    self._last = self._loop.time()
    self._end = self._last + gate.policy.total_timeout

  def sent(self, size: int) -> None:
    """Counts bytes from the sandbox. Raises Refused if the budget is spent."""
    self._entry.sent += size
    self._count(size)

  def received(self, size: int) -> None:
    """Counts bytes to the sandbox. Raises Refused if the budget is spent."""
    self._entry.received += size
    self._count(size)

  def _count(self, size: int) -> None:
    self._last = self._loop.time()
    self._gate.spent += size
    if self._gate.spent > self._gate.policy.max_bytes:
      raise Refused(403, "max_bytes of the episode are spent")

  async def watch(self, work: Coroutine[Any, Any, None]) -> None:
    """Runs the work of the connection; cancels it when its time is over.

    Raises:
      Refused: the connection was idle or lasted too long.
    """
    idle = self._gate.policy.idle_timeout
    task = asyncio.create_task(work)
    try:
      while not task.done():
        left = min(self._last + idle, self._end) - self._loop.time()
        if left <= 0:
          too_long = self._loop.time() >= self._end
          raise Refused(504, "total_timeout is over" if too_long else f"idle for {idle:g} s")
        await asyncio.wait([task], timeout=left)
      task.result()
    finally:
      await cancel([task])

  async def splice(self, inside: Stream, outside: Stream, early: bytes = b"") -> None:
    """Passes bytes both ways until both ends have said all; `early` comes first from inside."""
    if early:
      self.sent(len(early))
      outside[1].write(early)
    pumps = [
      asyncio.create_task(_pump(inside[0], outside[1], self.sent)),
      asyncio.create_task(_pump(outside[0], inside[1], self.received)),
    ]
    try:
      await asyncio.gather(*pumps)
    except OSError:
      pass  # either end hung up
    finally:
      await cancel(pumps)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: Any) -> None:
  while data := await reader.read(CHUNK):
    count(len(data))
    writer.write(data)
    await writer.drain()
  if writer.can_write_eof():
    writer.write_eof()  # the other direction may go on


async def cancel(tasks: list[asyncio.Task[Any]]) -> None:
  """Cancels tasks and waits until they have ended."""
  for task in tasks:
    task.cancel()
  await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def closing(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
  """Closes a stream at the end: at once after an error, else when what was written is gone."""
  try:
    yield
    writer.close()
    async with asyncio.timeout(5):
      await writer.wait_closed()
  except (OSError, TimeoutError):
    pass
  finally:
    writer.transport.abort()


async def _resolve(host: str, port: int) -> list[str]:
  try:
    return [str(ipaddress.ip_address(host))]
  except ValueError:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
  return list(dict.fromkeys(str(entry[4][0]) for entry in found))


async def _connect_any(addresses: list[str], port: int) -> Stream:
  problem: OSError = OSError("it has no address")
  for address in addresses:
    try:
      return await asyncio.open_connection(address, port, limit=CHUNK)
    except OSError as error:
      problem = error
  raise problem


def named(host: str, port: int) -> str:
  """A destination for the log, also where the host is nothing that can be meant."""
  try:
    return destination(canonical_host(host), port)
  except PolicyError:
    return f"{host}:{port}"
