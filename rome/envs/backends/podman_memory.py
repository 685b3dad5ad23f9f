"""Remembers which containers ran out of memory shortly before they ended.

Podman removes a sandbox's container as soon as it ends, and with it all that says why. The kernel
tells when a control group is out of memory, through an eventfd (version 1) or the file
`memory.events` (version 2), and a pidfd tells the end. One thread sleeps until either happens and
notes the time. A sandbox costs two descriptors and nothing else.

Left out: which process was killed. A container that is killed for another reason within `SHORTLY`
of a command that ran out of memory counts as out of memory too.
"""

import dataclasses
import os
import pathlib
import select
import threading
import time

SHORTLY = 5.0  # seconds from the lack of memory to the end of the container


@dataclasses.dataclass
class _Group:
  """A container's control group: what is watched, and what happened, on the monotonic clock."""

  file: pathlib.Path  # of version 1 or 2
  fd: int  # an eventfd, or the file
  count: int = 0  # of version 2: events so far
  pidfd: int = -1
  lacked: float | None = None
  ended: float | None = None


class MemoryWatch:
  """Thread-safe; a forked child starts with none."""

  _epoll: select.epoll | None
  _groups: dict[str, _Group]
  _names: dict[int, str]  # of groups, by descriptor

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self._forget()

  def add(self, name: str, pid: int) -> None:
    """Watches the memory of a process's container; does nothing where it has no such group."""
    try:
      group = _open(pid)
      if group is None:
        return
      group.pidfd = os.pidfd_open(pid)
    except OSError:  # it has ended already
      return
    with self._lock:
      if self._owner != os.getpid():
        self._forget()
      if self._epoll is None:
        self._epoll = select.epoll()
        threading.Thread(target=self._follow, args=(self._epoll,), daemon=True).start()
      self._groups[name] = group
      for fd in (group.fd, group.pidfd):
        self._names[fd] = name
      kind = select.EPOLLPRI if group.file.name == "memory.events" else select.EPOLLIN
      self._epoll.register(group.fd, kind)
      self._epoll.register(group.pidfd, select.EPOLLIN)

  def ran_out(self, name: str) -> bool:
    """Whether memory lacked when, or shortly before, the container ended; or lacks now."""
    with self._lock:
      group = self._groups.get(name)
      if group is None or self._owner != os.getpid():
        return False
      self._look(group)
      end = group.ended or time.monotonic()
      return group.lacked is not None and end - group.lacked < SHORTLY

  def discard(self, name: str) -> None:
    """Watches no longer. Idempotent."""
    with self._lock:
      group = self._groups.pop(name, None) if self._owner == os.getpid() else None
      if group is not None:
        self._close(group)

  def _forget(self) -> None:
    self._owner = os.getpid()
    self._epoll, self._groups, self._names = None, {}, {}

  def _follow(self, epoll: select.epoll) -> None:
    while True:
      for fd, _ in epoll.poll():
        with self._lock:
          if fd in self._names:
            self._look(self._groups[self._names[fd]])

  def _look(self, group: _Group) -> None:
    """Notes what has happened since the last look."""
    if group.ended is not None:
      return
    ended, now = _readable(group.pidfd), time.monotonic()
    if _lacks(group):
      group.lacked = now
    if ended:
      group.ended = now
      self._close(group)

  def _close(self, group: _Group) -> None:
    for fd in (group.fd, group.pidfd):
      if self._names.pop(fd, None) is not None:
        os.close(fd)  # which also takes it out of the epoll
    group.fd = group.pidfd = -1


def _lacks(group: _Group) -> bool:
  """Whether there was a lack of memory since the last call."""
  if group.file.name == "memory.events":
    try:
      before, group.count = group.count, _events(os.pread(group.fd, 4096, 0))
    except OSError:  # the group has been removed
      return False
    return group.count > before
  try:
    return os.eventfd_read(group.fd) > (not group.file.exists())  # its removal is a signal, too
  except BlockingIOError:
    return False


def _readable(fd: int) -> bool:
  poll = select.poll()
  poll.register(fd, select.POLLIN)
  return bool(poll.poll(0))


def _open(pid: int) -> _Group | None:
  """The memory group of a process; None where it shares the machine's."""
  for line in pathlib.Path(f"/proc/{pid}/cgroup").read_text().splitlines():
    _, controllers, path = line.split(":", 2)
    if path == "/":
      continue
    if controllers == "memory":
      base = pathlib.Path(f"/sys/fs/cgroup/memory{path}")
      return _listen(base) if (base / "memory.oom_control").exists() else None
    base = pathlib.Path(f"/sys/fs/cgroup{path}")
    if not controllers and (base / "memory.events").exists():
      fd = os.open(base / "memory.events", os.O_RDONLY | os.O_CLOEXEC)
      return _Group(base / "memory.events", fd, _events(os.pread(fd, 4096, 0)))
  return None


def _listen(base: pathlib.Path) -> _Group:
  """Of version 1: an eventfd for the group's lack of memory."""
  fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
  try:
    with open(base / "memory.oom_control") as control:
      (base / "cgroup.event_control").write_text(f"{fd} {control.fileno()}")
  except BaseException:
    os.close(fd)
    raise
  return _Group(base / "memory.oom_control", fd)


def _events(text: bytes) -> int:
  """Of `memory.events`: how often memory lacked, or a process was ended for it."""
  rows = (line.split() for line in text.decode().splitlines())
  return sum(int(count) for name, count in rows if name in ("oom", "oom_kill"))


memory = MemoryWatch()  # of this process
