"""What a sandbox tried to reach, allowed or refused: records, a bounded log, and a file of them."""

import collections
import dataclasses
import ipaddress
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable

from rome.envs.network.policy import destination, split_rule

KEEP = 10_000  # attempts of a sandbox; of more, the first and the last half are kept
_DIRECT = struct.Struct("<qqI4H16s4x")  # struct attempt of rocklet/watch.c
_CONNECT, _SEND, _SOCKET = 1, 2, 3
_CALLS = {_CONNECT: "connect", _SEND: "send", _SOCKET: "socket"}


@dataclasses.dataclass(frozen=True)
class Attempt:
  """One attempt to reach something.

  Attributes:
    time: when it began, seconds since 1970.
    episode: the label that the sandbox had then.
    kind: "http" (through the proxy), "connect" (CONNECT, or a connection to a forwarder), "dns" (a
      question), or "direct" (a system call that went past all of these).
    destination: "host:port"; the name that was asked for "dns"; for "direct" also a kind of socket.
      What the agent wrote, shortened to 300 characters: data, never instructions.
    allowed: whether the policy allowed it.
    reason: why it was refused or how it ended; '' if there is nothing to say.
    sent, received: bytes, as the sandbox sees it; headers of plain HTTP are not counted.
    count: how often the same was tried, for "direct" only; `time` is the first.
  """

  time: float
  episode: str
  kind: str
  destination: str
  allowed: bool
  reason: str
  sent: int = 0
  received: int = 0
  count: int = 1


class EgressLog:
  """A file of attempts, one JSON object a line, flushed line by line. Thread-safe.

  It grows to `max_bytes` and no further; a last line says so.
  """

  def __init__(self, path: str | os.PathLike[str], max_bytes: int = 256 << 20):
    self._lock = threading.Lock()
    self._file = open(path, "a", encoding="utf-8", newline="\n")
    self._room = max_bytes - self._file.tell()

  def write(self, sandbox: str, attempt: Attempt) -> None:
    """Appends an attempt, with the sandbox's id."""
    line = json.dumps({"sandbox": sandbox, **dataclasses.asdict(attempt)}) + "\n"
    with self._lock:
      if self._room <= 0 or self._file.closed:
        return
      self._room -= len(line)
      if self._room <= 0:
        line = json.dumps({"sandbox": sandbox, "full": True}) + "\n"
      self._file.write(line)
      self._file.flush()

  def close(self) -> None:
    """Closes the file; later attempts are not written."""
    with self._lock:
      self._file.close()


class Entry:
  """An attempt that goes on: the byte counts and the end are still to come."""

  def __init__(self, kind: str, destination: str, allowed: bool, reason: str, episode: str):
    self.time = time.time()
    self.kind, self.destination = kind, _printable(destination)
    self.allowed, self.reason, self.episode = allowed, _printable(reason), episode
    self.sent = self.received = 0

  def attempt(self) -> Attempt:
    return Attempt(
      self.time, self.episode, self.kind, self.destination, self.allowed, self.reason,
      self.sent, self.received,
    )  # fmt: skip


class AttemptLog:
  """The attempts of one sandbox in the current episode. Thread-safe.

  Attributes:
    episode: the label of attempts to come.
    file: where attempts are also written once they have ended, if anywhere.
    lost: how many had no room: neither among the first nor among the last `KEEP` / 2.
  """

  def __init__(self, sandbox: str):
    self._sandbox = sandbox
    self._lock = threading.Lock()
    self.episode = ""
    self.file: EgressLog | None = None
    self.clear()

  def clear(self) -> None:
    """Forgets all; connections that go on are no longer in the log."""
    with self._lock:
      self._first: list[Entry | Attempt] = []
      self._last: collections.deque[Entry | Attempt] = collections.deque(maxlen=KEEP // 2)
      self.lost = 0

  def begin(self, kind: str, destination: str, allowed: bool = False, reason: str = "") -> Entry:
    """Enters an attempt that goes on; `end` it."""
    entry = Entry(kind, destination, allowed, reason, self.episode)
    self._add(entry)
    return entry

  def end(self, entry: Entry) -> None:
    """Writes an attempt to the file, as it will not change any more."""
    if self.file:
      self.file.write(self._sandbox, entry.attempt())

  def add_direct(self, data: bytes, lost: int, describe: Callable[[str, int], str | None]) -> None:
    """Enters what rocklet's watcher noted.

    Args:
      data: the answer to its request.
      lost: how many attempts had no room there.
      describe: what an attempt at a loopback address and port meant; None if it is to be left out.
    """
    for attempt in decode_direct(data, self.episode):
      if attempt.destination.startswith("127."):
        meant = describe(*split_rule(attempt.destination))
        if meant is None:
          continue
        attempt = dataclasses.replace(attempt, destination=meant, reason="not in the allow-list")
      self._add(attempt)
      if self.file:
        self.file.write(self._sandbox, attempt)
    with self._lock:
      self.lost += lost

  def attempts(self) -> list[Attempt]:
    """All attempts in the order of their beginning."""
    with self._lock:
      entries = [*self._first, *self._last]
    found = [entry.attempt() if isinstance(entry, Entry) else entry for entry in entries]
    return sorted(found, key=lambda attempt: attempt.time)

  def _add(self, entry: Entry | Attempt) -> None:
    with self._lock:
      if len(self._first) < KEEP // 2:
        self._first.append(entry)
        return
      self.lost += len(self._last) == KEEP // 2
      self._last.append(entry)


def decode_direct(data: bytes, episode: str) -> list[Attempt]:
  """Reads rocklet's records of direct attempts."""
  found = []
  for first, _, count, call, family, port, kind, raw in _DIRECT.iter_unpack(data):
    if call == _SOCKET:
      target = f"socket(family={_family(family)}, type={_type(kind)}, protocol={port})"
    elif family == socket.AF_INET:
      target = destination(str(ipaddress.IPv4Address(raw[:4])), port)
    elif family == socket.AF_INET6:
      target = destination(str(ipaddress.IPv6Address(raw)), port)
    else:
      target = "unknown"  # the process hid its memory
    reason = f"{_CALLS.get(call, call)}: no route"
    if call == _SOCKET:
      reason = "socket: family or type refused"
    found.append(Attempt(first / 1e9, episode, "direct", target, False, reason, count=count))
  return found


def _family(number: int) -> str:
  try:
    return socket.AddressFamily(number).name
  except ValueError:
    return str(number)


def _type(number: int) -> str:
  try:
    return socket.SocketKind(number).name
  except ValueError:
    return str(number)


def _printable(text: str) -> str:
  """At most 300 printable characters of what an agent wrote; the rest as escapes."""
  return text[:300].encode("unicode_escape").decode() if not text.isprintable() else text[:300]
