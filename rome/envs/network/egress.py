"""The host's side of the sandboxes' networks: one loop thread that serves them all.

A sandbox has its loopback and no route. Rocklet makes listening sockets there and hands them over;
what accepts on them runs here, outside. For a sandbox with a policy these are, on its 127.0.0.1,
the HTTP proxy and a DNS server, the forwarded ports, and for each allowed name a forwarder at a
loopback address of its own (127.77.0.0/16), which the DNS server answers: so programs that know no
proxy work, too. Names below a "*." rule get their forwarders when they are first asked for.

The thread starts with the first policy and ends with the last sandbox that has one.
"""

import asyncio
import concurrent.futures
import contextlib
import os
import resource
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar, cast

from rome.envs.network import dns, proxy
from rome.envs.network.attempts import AttemptLog
from rome.envs.network.gate import CHUNK, Gate, Meter, Refused, Stream, cancel, closing
from rome.envs.network.policy import (
  DNS_PORT,
  PROXY_PORT,
  NetworkPolicy,
  canonical_host,
  destination,
  parse_address,
  split_rule,
)

MAX_NAMES = 512  # of a sandbox that have forwarders
RESOLV_CONF = b"nameserver 127.0.0.1\noptions timeout:2 attempts:1\n"
_PROXY = f"http://127.0.0.1:{PROXY_PORT}"
_LOCAL = "localhost,127.0.0.1,127.0.0.0/8"
ENVIRONMENT = {
  **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), _PROXY),
  **dict.fromkeys(("no_proxy", "NO_PROXY"), _LOCAL),
}
_TIMEOUT = 30.0  # seconds for the loop thread to do what it is asked
_DNS_STREAM_TIMEOUT = 15.0

Listen = Callable[[socket.SocketKind, str, int], socket.socket]
T = TypeVar("T")


class _LoopThread:
  """The thread; it runs while somebody holds it."""

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self._holders = 0
    self._pid = 0
    self.connections = 0  # of all sandboxes

  def acquire(self) -> None:
    with self._lock:
      if self._pid != os.getpid():  # also in a forked child, which has no such thread
        self._holders = self.connections = 0
        self._pid = os.getpid()
      if not self._holders:
        self._loop = asyncio.new_event_loop()
        self._pool = concurrent.futures.ThreadPoolExecutor(8, "egress-names")
        self._loop.set_default_executor(self._pool)
        self._thread = threading.Thread(target=self._loop.run_forever, name="egress", daemon=True)
        self._thread.start()
      self._holders += 1

  def release(self) -> None:
    with self._lock:
      self._holders -= 1
      if self._holders:
        return
      with contextlib.suppress(TimeoutError):
        self.run(_end_others())
      self._loop.call_soon_threadsafe(self._loop.stop)
      self._thread.join(_TIMEOUT)
      self._pool.shutdown(wait=False, cancel_futures=True)
      if not self._thread.is_alive():
        self._loop.close()

  def run(self, work: Coroutine[Any, Any, T]) -> T:
    """Runs work in the thread and waits for it."""
    return asyncio.run_coroutine_threadsafe(work, self._loop).result(_TIMEOUT)


async def _end_others() -> None:
  """Ends what still runs in the loop: a connection accepted at the very end, for one."""
  await asyncio.sleep(0)
  await cancel(list(asyncio.all_tasks() - {asyncio.current_task()}))
  await asyncio.sleep(0)


_thread = _LoopThread()


class Egress:
  """The network of one sandbox with a policy."""

  def __init__(self, policy: NetworkPolicy, log: AttemptLog, listen: Listen):
    """Starts to serve.

    Args:
      policy: what may pass.
      log: where attempts are noted.
      listen: makes a socket in the sandbox; see `Connection.listen`. Called from several threads.

    Raises:
      SandboxError: a socket cannot be made.
    """
    self._gate = Gate(policy, log)
    self._listen = listen
    self._names: dict[str, str] = {}  # of hosts to their loopback addresses
    self._forwarders: set[tuple[str, int]] = set()
    self._servers: list[asyncio.Server | asyncio.DatagramTransport] = []
    self._tasks: set[asyncio.Task[Any]] = set()
    self._growing = asyncio.Lock()
    self._closed = False
    _thread.acquire()
    try:
      _thread.run(self._start())
    except BaseException:
      self.close()
      raise

  def reset(self) -> None:
    """Ends all connections and gives the whole budget anew, for another episode."""
    _thread.run(self._hang_up())

  def describe(self, address: str, port: int) -> str | None:
    """What an attempt at a loopback address meant, "host:port"; None if a forwarder took it."""
    if (address, port) in self._forwarders:
      return None
    host = next((name for name, at in list(self._names.items()) if at == address), address)
    return destination(host, port)

  def close(self) -> None:
    """Ends all connections and gives the sandbox's sockets up. Idempotent."""
    if self._closed:
      return
    self._closed = True
    try:
      _thread.run(self._stop())
    except TimeoutError:  # a thread that hangs must not keep the sandbox itself from its end
      pass
    finally:
      _thread.release()

  async def _start(self) -> None:
    gate = self._gate
    await self._serve("127.0.0.1", PROXY_PORT, lambda stream: proxy.serve(gate, stream), "proxy")
    await self._serve("127.0.0.1", DNS_PORT, self._dns_stream, "dns")
    await self._serve_datagrams()
    for port, (host, target) in gate.policy.forwards:
      await self._forward("127.0.0.1", port, host, target, False)
    for rule in gate.policy.allow:
      host, port = split_rule(rule)
      if host.startswith("127.") and parse_address(host) is not None:
        if host != "127.0.0.1" or port not in (PROXY_PORT, DNS_PORT):
          await self._forward(host, port, host, port, True)
      elif parse_address(host) is None and not host.startswith("*."):
        await self._loopback_of(host)

  async def _socket(self, kind: socket.SocketKind, address: str, port: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    made = await loop.run_in_executor(None, self._listen, kind, address, port)
    made.setblocking(False)
    return made

  async def _serve(
    self, address: str, port: int, handle: Callable[[Stream], Awaitable[None]], what: str
  ) -> None:
    """Listens in the sandbox; each connection is handled in a task of its own."""

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
      async with self._connection(writer, what) as admitted:
        if admitted:
          await handle((reader, writer))

    made = await self._socket(socket.SOCK_STREAM, address, port)
    self._servers.append(await asyncio.start_server(accepted, sock=made, limit=CHUNK))

  @contextlib.asynccontextmanager
  async def _connection(self, writer: asyncio.StreamWriter, what: str) -> AsyncIterator[bool]:
    """Counts a connection while it lasts, and keeps its troubles to itself."""
    gate, task = self._gate, asyncio.current_task()
    assert task is not None
    room = gate.open < gate.policy.max_connections and _thread.connections < _most()
    admitted = room and not self._closed
    if not room:
      gate.log.end(gate.log.begin("connect", what, False, "too many connections"))
    self._tasks.add(task)
    gate.open += 1
    _thread.connections += 1
    try:
      if admitted:
        async with closing(writer):
          yield True
      else:
        yield False
    except (OSError, EOFError, asyncio.CancelledError):
      pass  # either end hung up, or the episode ended
    finally:
      writer.transport.abort()
      gate.open -= 1
      _thread.connections -= 1
      self._tasks.discard(task)

  async def _forward(self, address: str, port: int, host: str, target: int, checked: bool) -> None:
    """Makes a forwarder from the sandbox's loopback to a host outside."""
    gate = self._gate

    async def handle(stream: Stream) -> None:
      entry = gate.log.begin("connect", destination(host, target), True)
      try:
        if checked:
          gate.judge(host, target)
        meter = Meter(gate, entry)
        outside = await gate.connect(host, target, checked)
        async with closing(outside[1]):
          await meter.watch(meter.splice(stream, outside))
      except Refused as refusal:
        entry.allowed, entry.reason = refusal.status >= 500, str(refusal)
      finally:
        gate.log.end(entry)

    await self._serve(address, port, handle, destination(host, target))
    self._forwarders.add((address, port))

  async def _loopback_of(self, host: str) -> str | None:
    """The loopback address of an allowed name, whose forwarders are made if need be."""
    async with self._growing:
      if host not in self._names and len(self._names) < MAX_NAMES:
        number = len(self._names) + 1
        address = self._names[host] = f"127.77.{number >> 8}.{number & 255}"
        for port in self._gate.policy.ports(host):
          await self._forward(address, port, host, port, True)
      return self._names.get(host)

  async def _answer(self, message: bytes) -> bytes | None:
    """The answer to a DNS message; None for what deserves none."""
    try:
      question = dns.Question(message)
    except ValueError:
      return None
    log = self._gate.log
    if question.code != dns.NO_ERROR:
      log.end(log.begin("dns", question.name or "?", False, "a question that cannot be answered"))
      return question.answer(question.code)
    reason, address = "not in the allow-list", None
    try:
      host = canonical_host(question.name)
      if self._gate.policy.ports(host):
        address = await self._loopback_of(host)
        reason = "" if address else f"more than {MAX_NAMES} names"
    except ValueError:
      reason = "no name of a host"
    except Exception:  # the sandbox has ended, or its loopback address is taken
      reason = "no forwarder can be made"
    log.end(log.begin("dns", question.name, address is not None, reason))
    return question.answer(dns.NO_ERROR if address else dns.NO_NAME, address)

  async def _serve_datagrams(self) -> None:
    made = await self._socket(socket.SOCK_DGRAM, "127.0.0.1", DNS_PORT)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(lambda: _Datagrams(self), sock=made)
    self._servers.append(transport)

  async def _dns_stream(self, stream: Stream) -> None:
    while True:
      async with asyncio.timeout(_DNS_STREAM_TIMEOUT):
        size = int.from_bytes(await stream[0].readexactly(2), "big")
        message = await stream[0].readexactly(size)
        answer = await self._answer(message[: dns.MAX_MESSAGE])
        if answer is None:
          return
        stream[1].write(len(answer).to_bytes(2, "big") + answer)
        await stream[1].drain()

  async def _hang_up(self) -> None:
    await cancel(list(self._tasks))
    self._gate.spent = 0

  async def _stop(self) -> None:
    for server in self._servers:
      server.close()
    await cancel(list(self._tasks))
    await asyncio.sleep(0)  # the transports close their sockets in the next round


class _Datagrams(asyncio.DatagramProtocol):
  """The DNS server's UDP side: at most a few questions wait for an answer at a time."""

  def __init__(self, egress: Egress):
    self._egress = egress
    self._waiting: set[asyncio.Task[Any]] = set()

  def connection_made(self, transport: asyncio.BaseTransport) -> None:
    self._transport = cast(asyncio.DatagramTransport, transport)

  def datagram_received(self, data: bytes, sender: Any) -> None:
    if len(self._waiting) >= 64:
      return
    task = asyncio.get_running_loop().create_task(self._reply(data[: dns.MAX_MESSAGE], sender))
    for held in (self._waiting, self._egress._tasks):
      held.add(task)
      task.add_done_callback(held.discard)

  async def _reply(self, data: bytes, sender: Any) -> None:
    answer = await self._egress._answer(data)
    if answer is not None and not self._transport.is_closing():
      self._transport.sendto(answer, sender)


def _most() -> int:
  """Connections of all sandboxes together: each takes two descriptors of this process."""
  return resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4
