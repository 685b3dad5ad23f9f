"""Who owns a sandbox, and the sweep of what dead owners left behind.

Every container, and the directory that every sandbox keeps on the host, carries an owner: boot id,
pid namespace, pid and kernel start time of the process that made it. A pid alone could have been
given out anew; with its start time it names one process for ever. The sweep removes what belongs to
owners that are dead. It leaves alone what belongs to another pid namespace of the same boot, which
it cannot judge.

An owner that lives but hangs, or that cannot be judged, keeps its sandboxes for ever, unless they
are under a lease that it does not renew: see `lease.py`.

Processes need no sweep as a rule: a rocklet ends when its owner's connection closes. The
directories stay behind, and whatever a killed container engine left half done.
"""

import functools
import os
import pathlib
import shutil
import signal
import tempfile
import time

from rome.envs import lease

_YOUNG = 60.0  # seconds in which a directory without an owner file may still be in the making


def start_time(pid: int) -> int | None:
  """Kernel start time of a process in clock ticks since boot; None if there is no such process."""
  try:
    text = pathlib.Path(f"/proc/{pid}/stat").read_text(errors="replace")
  except OSError:
    return None
  fields = text.rpartition(")")[2].split()  # the name before it may hold anything
  return None if fields[0] in "ZX" else int(fields[19])


@functools.cache
def _here() -> str:
  boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
  return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"


def label(pid: int | None = None) -> str:
  """The owner label `boot:pidns:pid:start` of a process, by default this one."""
  pid = os.getpid() if pid is None else pid
  return f"{_here()}:{pid}:{start_time(pid)}"


def is_dead(owner: str) -> bool:
  """Whether the process of this label is certainly gone. A label nobody can read is not dead."""
  try:
    boot, namespace, pid, start = owner.split(":")
    number, ticks = int(pid), int(start)
  except ValueError:
    return False
  here_boot, here_namespace = _here().split(":")
  if boot != here_boot:
    return True  # the machine has been restarted since
  return namespace == here_namespace and start_time(number) != ticks


def runtime_dir() -> pathlib.Path:
  """The directory of this user's sandboxes, private and short enough for a socket's path.

  Raises:
    PermissionError: it exists and belongs to somebody else.
  """
  base = os.environ.get("XDG_RUNTIME_DIR")
  if not base or len(base) > 48 or not os.access(base, os.W_OK):
    base = "/tmp" if len(tempfile.gettempdir()) > 48 else tempfile.gettempdir()
  path = pathlib.Path(base) / f"rome-{os.getuid()}"
  path.mkdir(mode=0o700, exist_ok=True)
  info = path.lstat()
  if info.st_uid != os.getuid() or info.st_mode & 0o077 or path.is_symlink():
    raise PermissionError(f"{path} must be a directory of this user with mode 0700: remove it")
  return path


def new_dir(name: str) -> pathlib.Path:
  """Makes the directory of one sandbox, marked with its owner."""
  path = runtime_dir() / name
  path.mkdir(mode=0o700)
  (path / "owner").write_text(label())
  return path


def remove_dir(path: pathlib.Path) -> None:
  """Removes a sandbox's directory; an agent's files (process backend) may lack permissions."""

  def allow(function, name, _):  # type: ignore[no-untyped-def]
    os.chmod(os.path.dirname(name), 0o700)
    if not os.path.islink(name):
      os.chmod(name, 0o700)
    function(name)

  try:
    shutil.rmtree(path, onerror=allow)
  except OSError:
    shutil.rmtree(path, ignore_errors=True)


def take_lease(seconds: float) -> lease.Lease:
  """Takes a lease of this process, good for `seconds`."""
  return lease.Lease(runtime_dir(), label(), seconds)


def is_abandoned(name: str, owner: str) -> bool:
  """Whether a sandbox's owner is dead, or the lease that it is under ran out.

  Args:
    name: the sandbox's id.
    owner: its owner label.
  """
  return is_dead(owner) or lease.lapsed(runtime_dir() / name, is_dead)


def sweep_dirs(prefix: str = "rome-") -> list[str]:
  """Removes abandoned directories and ends the processes they name. Returns their names."""
  swept = []
  for path in sorted(runtime_dir().iterdir()):
    if not path.name.startswith(prefix):
      continue
    if is_abandoned_dir(path) and end_process(path / "process"):
      remove_dir(path)
      swept.append(path.name)
  lease.sweep(runtime_dir(), is_dead)
  return swept


def is_abandoned_dir(path: pathlib.Path) -> bool:
  """Whether a sandbox's directory is nobody's; one that is gone by now is left alone."""
  try:
    return is_abandoned(path.name, (path / "owner").read_text())
  except OSError:
    pass
  try:
    return time.time() - path.lstat().st_mtime > _YOUNG
  except FileNotFoundError:
    return False


def end_process(record: pathlib.Path) -> bool:
  """Ends the launcher recorded as a label, if the very same process still runs.

  Returns:
    False if it may run on, because only another pid namespace can end it.
  """
  try:
    owner = record.read_text()
    if is_dead(owner):
      return True
    if not owner.startswith(_here() + ":"):
      return False
    os.kill(int(owner.split(":")[2]), signal.SIGKILL)
  except (OSError, ValueError):
    pass
  return True
