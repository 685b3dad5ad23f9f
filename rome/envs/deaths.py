"""Tells at once which processes have ended, at no cost while they live.

A pidfd names one process for ever, and becomes readable when it ends; one epoll watches them all.
That is how a sandbox that dies by itself is noticed: asking each one whether it answers would wait
behind its running command.
"""

import os
import select
import threading


class DeathWatch:
  """Thread-safe. Needs Linux 5.3 or newer."""

  def __init__(self) -> None:
    self._epoll = select.epoll()
    self._lock = threading.Lock()
    self._fds: dict[str, int] = {}
    self._names: dict[int, str] = {}
    self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    self._epoll.register(self._bell, select.EPOLLIN)

  def add(self, name: str, pid: int) -> None:
    """Watches a process.

    Args:
      name: under which its end is told; must be new.
      pid: it.

    Raises:
      ProcessLookupError: it has ended.
    """
    fd = os.pidfd_open(pid)
    with self._lock:
      if name in self._fds:
        os.close(fd)
        raise ValueError(f"{name!r} is watched already")
      self._fds[name], self._names[fd] = fd, name
      self._epoll.register(fd, select.EPOLLIN)

  def has(self, name: str) -> bool:
    """Whether it is watched: its end has not been told."""
    with self._lock:
      return name in self._fds

  def discard(self, name: str) -> None:
    """Watches no longer. Idempotent."""
    with self._lock:
      self._forget(name)

  def wait(self, timeout: float) -> list[str]:
    """Waits until something ended, `wake` was called, or `timeout` seconds are over.

    Returns:
      The names of those that ended; each is told once and then no longer watched.
    """
    try:
      events = self._epoll.poll(timeout)
    except ValueError:  # closed
      return []
    ended = []
    with self._lock:
      for fd, _ in events:
        if fd == self._bell:
          try:
            os.eventfd_read(self._bell)
          except BlockingIOError:
            pass
        elif fd in self._names and _readable(fd):  # its number may be new since the poll
          ended.append(self._names[fd])
          self._forget(ended[-1])
    return ended

  def wake(self) -> None:
    """Ends a `wait` in another thread."""
    os.eventfd_write(self._bell, 1)

  def close(self) -> None:
    """Watches nothing any more. Idempotent; no other thread may be in a long `wait`."""
    with self._lock:
      if self._epoll.closed:
        return
      for name in list(self._fds):
        self._forget(name)
      self._epoll.close()
      os.close(self._bell)

  def _forget(self, name: str) -> None:
    fd = self._fds.pop(name, None)
    if fd is not None:
      del self._names[fd]
      self._epoll.unregister(fd)
      os.close(fd)


def _readable(fd: int) -> bool:
  poll = select.poll()
  poll.register(fd, select.POLLIN)
  return bool(poll.poll(0))
