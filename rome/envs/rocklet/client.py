"""The host's end of a connection to rocklet: fixed little-endian headers, then bytes.

One connection is at most one session, with its own shell once OPEN was sent. Requests on it are
answered in order. A connection that broke, or whose answer did not come in time, is out of step and
is closed for good.
"""

import socket
import struct
import threading
from collections.abc import Callable
from typing import NamedTuple

from rome.envs.common import SandboxError, SandboxLost

RUN, LIST, VERIFY, RESET, INFO = 1, 4, 5, 6, 7
OPEN, STATE, START, SEND, POLL, RESIZE, SNAPSHOT, RESTORE = range(8, 16)
FILE_OPEN, FILE_READ, FILE_WRITE, FILE_FINISH, FILE_DROP, STAT, REMOVE = range(20, 27)
LISTEN, WATCH = 30, 31
TIMED_OUT, TRUNCATED, RUNNING, MORE, MISPLACED = 1, 2, 4, 8, 16
MAX_NAME, MAX_TEXT = 4096, 16 << 20  # rocklet hangs up beyond these

_REQUEST = struct.Struct("<6I")  # op, timeout_ms, mode, as_root, name_len, data_len
_REPLY = struct.Struct("<iiIIQ")  # errno, exit_code, flags, len, total
# Seconds beyond a request's own deadline in which rocklet must answer. A command that resists being
# stopped, on a crowded machine, is what takes longest.
_GRACE = 15.0


class Reply(NamedTuple):
  """The header fields of an answer, and its payload."""

  exit_code: int
  flags: int
  total: int
  data: bytes


class RequestError(SandboxError):
  """Rocklet refused a request; `errno` says why."""

  def __init__(self, errno: int, message: str):
    super().__init__(message)
    self.errno = errno


class Connection:
  """A connection to a rocklet. Thread-safe: requests of several threads wait for each other."""

  def __init__(self, path: str, timeout: float):
    """Connects.

    Args:
      path: of the unix socket.
      timeout: seconds.

    Raises:
      SandboxLost: nobody listens.
    """
    self._lock = threading.Lock()
    self._socket = socket.socket(socket.AF_UNIX)
    self._socket.settimeout(timeout)
    try:
      self._socket.connect(path)
    except OSError as error:
      self._socket.close()
      raise SandboxLost(f"the sandbox does not answer at {path}: {error}") from error

  def call(
    self,
    op: int,
    name: str = "",
    data: bytes = b"",
    *,
    timeout: float = 10.0,
    mode: int = 0,
    as_root: bool = False,
  ) -> Reply:
    """Sends a request and waits for its answer.

    Raises:
      RequestError: rocklet answered with an error.
      SandboxLost: the connection is closed, or no answer came within `timeout` and a grace.
    """
    path = name.encode("utf-8", "surrogateescape")
    if len(path) > MAX_NAME or len(data) > MAX_TEXT:
      raise SandboxError(f"{len(path)} bytes of path or {len(data)} of data are more than allowed")
    header = _REQUEST.pack(op, int(timeout * 1000), mode, as_root, len(path), len(data))
    with self._lock:
      return self._exchange(header + path + data, timeout)

  def listen(self, kind: socket.SocketKind, address: str, port: int) -> socket.socket:
    """Makes a socket on the sandbox's loopback; it stays there while this process holds it.

    Args:
      kind: SOCK_STREAM, which listens, or SOCK_DGRAM.
      address: of 127.0.0.0/8, in the sandbox.
      port: of the sandbox.

    Raises:
      SandboxError: this process has no descriptor left for it.
      RequestError: the address is taken or no loopback address.
      SandboxLost: as for `call`.
    """
    udp = kind == socket.SOCK_DGRAM
    data = struct.pack("<HH4s", udp, port, socket.inet_aton(address))
    header = _REQUEST.pack(LISTEN, 5000, 0, 0, 0, len(data))
    fds: list[int] = []
    with self._lock:
      self._exchange(header + data, 5.0, fds)
    if not fds:  # this process has as many descriptors as it may
      raise SandboxError(f"no descriptor for a socket at {address} port {port}: raise `ulimit -n`")
    return socket.socket(fileno=fds[0])

  def _exchange(self, request: bytes, timeout: float, fds: list[int] | None = None) -> Reply:
    """Sends a request and receives its answer; a descriptor that comes with it goes to `fds`."""
    try:
      self._socket.settimeout(timeout + _GRACE)
      self._socket.sendall(request)
      if fds is not None:
        received, got, _, _ = socket.recv_fds(self._socket, _REPLY.size, 1, socket.MSG_CMSG_CLOEXEC)
        fds += got
      else:
        received = self._more(65536)
      while len(received) < _REPLY.size:
        received += self._more(65536)
      errno, exit_code, flags, length, total = _REPLY.unpack_from(received)
      payload = received[_REPLY.size :]
      if len(payload) < length:
        payload = self._rest(payload, length)
    except (OSError, EOFError) as error:
      raise self._lost(error) from error
    except BaseException:
      self._socket.close()  # Ctrl-C: the answer still to come is not that of the next request
      raise
    if errno:
      raise RequestError(errno, payload.decode(errors="replace"))
    return Reply(exit_code, flags, total, payload)

  def stream(self, op: int, sink: Callable[[bytes], object], *, timeout: float) -> Reply:
    """Sends a request whose answer comes in frames; `sink` gets what all but the last one hold.

    Raises:
      RequestError, SandboxLost: see `call`; the sink may have got a part by then.
    """
    with self._lock:
      try:
        self._socket.settimeout(timeout + _GRACE)
        self._socket.sendall(_REQUEST.pack(op, int(timeout * 1000), 0, 0, 0, 0))
        while True:
          header = self._rest(b"", _REPLY.size)
          errno, exit_code, flags, length, total = _REPLY.unpack(header)
          payload = self._rest(b"", length)
          if not flags & MORE:
            break
          sink(payload)
      except (OSError, EOFError) as error:
        raise self._lost(error) from error
      except BaseException:
        self._socket.close()  # the rest of the answer is still to come
        raise
    if errno:
      raise RequestError(errno, payload.decode(errors="replace"))
    return Reply(exit_code, flags, total, payload)

  def send(self, op: int, data: memoryview, *, timeout: float) -> Reply:
    """Sends a request with data of any length, whose upper half goes where `mode` is else.

    Raises:
      RequestError, SandboxLost: see `call`.
    """
    high, low = divmod(len(data), 1 << 32)
    with self._lock:
      try:
        self._socket.settimeout(timeout + _GRACE)
        self._socket.sendall(_REQUEST.pack(op, int(timeout * 1000), high, 0, 0, low))
        self._socket.sendall(data)
        errno, exit_code, flags, length, total = _REPLY.unpack(self._rest(b"", _REPLY.size))
        payload = self._rest(b"", length)
      except (OSError, EOFError) as error:
        raise self._lost(error) from error
      except BaseException:
        self._socket.close()  # see _exchange
        raise
    if errno:
      raise RequestError(errno, payload.decode(errors="replace"))
    return Reply(exit_code, flags, total, payload)

  def _lost(self, error: Exception) -> SandboxLost:
    self._socket.close()
    reason = "no answer in time" if isinstance(error, TimeoutError) else "it has ended"
    return SandboxLost(f"the sandbox is lost: {reason}")

  def _more(self, size: int) -> bytes:
    got = self._socket.recv(size)
    if not got:
      raise EOFError
    return got

  def _rest(self, payload: bytes, length: int) -> bytes:
    parts, have = [payload], len(payload)
    while have < length:
      parts.append(self._more(min(length - have, 1 << 20)))
      have += len(parts[-1])
    return b"".join(parts)

  def close(self) -> None:
    """Closes the connection; a request that waits on it in another thread fails at once."""
    try:
      self._socket.shutdown(socket.SHUT_RDWR)
    except OSError:
      pass
    self._socket.close()
