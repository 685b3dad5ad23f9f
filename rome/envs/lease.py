"""Leases: the right of a live process to its sandboxes, as long as it renews it.

The death of an owner is seen by its label (see `owner.py`). A lease is for owners that hang, or
that live in a pid namespace into which the others cannot look. A manager takes one, names it in the
directories of its sandboxes, and renews it from the thread that does its work. A sweep takes what
is under a lease that ran out.

The sweep marks the lease as revoked first, under the same file lock as every renewal. So an owner
that renews in time can never lose a sandbox, and one that comes too late is told so and never uses
what was taken from it. Time is the kernel's monotonic clock: all processes of a boot share it,
nobody sets it, and it stands still while the machine sleeps. Both sides must see the same
directory.
"""

import fcntl
import os
import pathlib
import secrets
import time
from collections.abc import Callable

from rome.envs.common import SandboxError

_HELD, _REVOKED = "held...", "revoked"  # of one length, so that writing needs no room on the disk


class LeaseLost(SandboxError):
  """A lease ran out before it was renewed, and its sandboxes have been taken."""


class Lease:
  """The right of a live process to its sandboxes, as long as it renews it.

  Attributes:
    name: of its file.
    seconds: it runs out that long after the last renewal.
  """

  def __init__(self, directory: pathlib.Path, label: str, seconds: float):
    """Takes a new lease.

    Args:
      directory: where the sandboxes' directories are.
      label: of the owner.
      seconds: how long it is good.
    """
    if not seconds > 0:
      raise ValueError(f"a lease must be good for more than 0 s, not {seconds!r}")
    self.seconds = seconds
    self.name = f"lease-{secrets.token_hex(8)}"
    self._path = directory / self.name
    self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    self._label = label
    self._write(_HELD)

  def cover(self, sandbox_id: str) -> None:
    """Puts a sandbox of this process under the lease."""
    (self._path.parent / sandbox_id / "lease").write_text(self.name)

  def renew(self) -> None:
    """Makes it good for `seconds` from now, also if it ran out but nobody has taken it.

    Raises:
      LeaseLost: it was revoked. What it covered must not be used any more.
    """
    for _ in range(100):  # a sweep looks at it for some microseconds
      if _locked(self._fd):
        break
      time.sleep(0.01)
    else:
      return  # something hangs with the lock in hand; until it lets go, nobody can revoke either
    try:
      if _read(self._fd)[2] == _REVOKED:
        raise LeaseLost(
          f"{self.name} was not renewed for {self.seconds:.0f} s and its sandboxes were reclaimed"
        )
      self._write(_HELD)
    finally:
      fcntl.flock(self._fd, fcntl.LOCK_UN)

  def release(self) -> None:
    """Ends the lease, once what it covered is gone. Idempotent."""
    if self._fd >= 0:
      self._path.unlink(missing_ok=True)
      os.close(self._fd)
      self._fd = -1

  def _write(self, state: str) -> None:
    end = time.monotonic_ns() + int(self.seconds * 1e9)
    os.pwrite(self._fd, _line(self._label, end, state), 0)


def lapsed(path: pathlib.Path, is_dead: Callable[[str], bool]) -> bool:
  """Whether a sandbox's directory names a lease that has been revoked, or now is, having run out.

  A directory without a lease, or whose lease cannot be read, has not lapsed.

  Args:
    path: the directory.
    is_dead: whether the owner of a label is certainly gone.
  """
  try:
    name = (path / "lease").read_text()
    if not name.startswith("lease-") or "/" in name:
      return False
    fd = os.open(path.parent / name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
  except OSError:
    return False
  try:
    if not _locked(fd):
      return False
    label, end, state = _read(fd)
    if state == _HELD and (is_dead(label) or time.monotonic_ns() > end):
      os.pwrite(fd, _line(label, end, _REVOKED), 0)
      return True
    return state == _REVOKED
  except ValueError:
    return False  # it is being made
  finally:
    os.close(fd)  # and with it the lock


def sweep(directory: pathlib.Path, is_dead: Callable[[str], bool]) -> None:
  """Removes leases that cover nothing any more: of dead owners, and revoked ones."""
  named = set()
  for path in directory.glob("rome-*/lease"):
    try:
      named.add(path.read_text())
    except OSError:
      pass
  for path in directory.glob("lease-*"):
    try:
      fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
      continue
    try:
      label, _, state = _read(fd)
      if path.name not in named and (state == _REVOKED or is_dead(label)):
        path.unlink(missing_ok=True)
    except ValueError:
      pass
    finally:
      os.close(fd)


def _locked(fd: int) -> bool:
  try:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  return True


def _line(label: str, end: int, state: str) -> bytes:
  return f"{label} {end:020} {state}".encode()


def _read(fd: int) -> tuple[str, int, str]:
  """Owner label, end in nanoseconds and state of a lease. Raises ValueError where it has none."""
  label, end, state = os.pread(fd, 4096, 0).decode().split()
  return label, int(end), state
