"""What a host can hold, and the ledger of who holds how much of it.

A reservation is whole or not made at all; nothing is ever reserved twice or beyond the total.
Amounts are kept as integers (thousandths of a processor), so sums are exact.

What counts: `Limits` are upper bounds, and the ledger reserves them in full. Every writable place
of a sandbox is a tmpfs, so its disk is memory too: Podman's cgroup counts it inside `memory_mb`,
bubblewrap does not, and the sum is right for the worse of the two. Processors are shared and
agents mostly wait for their model, so they may be overcommitted, by a factor that is said
explicitly; memory, disk and pids never are.

No lock here: the manager's guards it.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping

from rome.envs.common import Limits, SandboxError

CPU_OVERCOMMIT = 8.0  # Choice: an agent's sandbox computes less than an eighth of the time.
_WRITABLE_PLACES = 2  # the root layer and /dev/shm, each of Limits.disk_mb
_SPARE_PIDS = 32  # of one sandbox, beside the agent's: rocklet, its shells, the container's monitor
_RESERVE_MB, _RESERVE_SHARE = 1024, 0.1  # of memory, for this process and the rest of the host
_RESERVE_PIDS = 2048
_ROOT = pathlib.Path("/")  # where the kernel's files are read


class CapacityExceeded(SandboxError):
  """More was asked for than there will ever be; waiting would not help."""


@dataclasses.dataclass(frozen=True)
class Capacity:
  """An amount of every resource; what a host has, or what a sandbox needs.

  Attributes:
    cpus: processors, to a thousandth.
    memory_mb: MiB of memory, tmpfs included.
    disk_mb: MiB in writable places.
    pids: processes and threads.
  """

  cpus: float
  memory_mb: int
  disk_mb: int
  pids: int

  def __post_init__(self) -> None:
    for name, value in zip(NAMES, dataclasses.astuple(self), strict=True):
      kind = int | float if name == "cpus" else int
      if isinstance(value, bool) or not isinstance(value, kind) or not value >= 0:
        what = "a number" if name == "cpus" else "an integer"
        raise ValueError(f"Capacity.{name} must be {what} of at least 0, not {value!r}")

  def units(self) -> tuple[int, int, int, int]:
    """Whole units: thousandths of a processor, MiB, MiB, processes."""
    return round(self.cpus * 1000), self.memory_mb, self.disk_mb, self.pids


NAMES = tuple(field.name for field in dataclasses.fields(Capacity))


def needs(limits: Limits) -> Capacity:
  """What a sandbox of these limits can use at most."""
  disk = _WRITABLE_PLACES * limits.disk_mb
  return Capacity(limits.cpus, limits.memory_mb + disk, disk, limits.pids + _SPARE_PIDS)


def dominant_share(amount: Capacity, total: Capacity) -> float:
  """The largest share of any one resource that `amount` is of `total`; inf where there is none."""
  pairs = zip(amount.units(), total.units(), strict=True)
  return max((a / t if t else float("inf")) if a else 0.0 for a, t in pairs)


class Ledger:
  """Who holds how much of a total.

  Attributes:
    total: what there is.
    free_units: what is not reserved, as `Capacity.units`.
  """

  def __init__(self, total: Capacity):
    self.total = total
    self._total = total.units()
    self.free_units = total.units()
    self._held: dict[str, tuple[int, int, int, int]] = {}

  def __contains__(self, key: str) -> bool:
    return key in self._held

  def __len__(self) -> int:
    return len(self._held)

  def fits(self, amount: Capacity) -> bool:
    """Whether it could be reserved now."""
    return all(a <= f for a, f in zip(amount.units(), self.free_units, strict=True))

  def reserve(self, key: str, amount: Capacity) -> bool:
    """Reserves all of `amount` under a name, or nothing.

    Returns:
      Whether there was room.

    Raises:
      ValueError: something is reserved under this name.
    """
    if key in self._held:
      raise ValueError(f"{key!r} holds a reservation already")
    units = amount.units()
    if not self.fits(amount):
      return False
    self._held[key] = units
    self.free_units = _minus(self.free_units, units)
    return True

  def release(self, key: str) -> bool:
    """Gives back what is reserved under a name. Idempotent; returns whether anything was."""
    units = self._held.pop(key, None)
    if units is None:
      return False
    self.free_units = _minus(self.free_units, (-units[0], -units[1], -units[2], -units[3]))
    return True

  def rename(self, old: str, new: str) -> None:
    """Hands a reservation on. Raises KeyError (none to hand on), ValueError (there is one)."""
    if new in self._held:
      raise ValueError(f"{new!r} holds a reservation already")
    self._held[new] = self._held.pop(old)

  def held(self, key: str) -> Capacity:
    """What is reserved under a name. Raises KeyError."""
    return _capacity(self._held[key])

  def used(self) -> Capacity:
    """The sum of all reservations."""
    return _capacity(_minus(self._total, self.free_units))

  def free(self) -> Capacity:
    """What is not reserved."""
    return _capacity(self.free_units)

  def shortage(self, amount: Capacity) -> str:
    """What keeps `amount` from fitting, for the reader; '' if nothing does."""
    return _shortage(amount, self.free_units, "free of", self.total)

  def check(self, amount: Capacity) -> None:
    """Raises CapacityExceeded where `amount` would not fit even if nothing were reserved."""
    short = _shortage(amount, self._total, "in all of", self.total)
    if short:
      raise CapacityExceeded(f"this sandbox can never start here: {short}; ask for lower limits")


def _minus(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
  return a[0] - b[0], a[1] - b[1], a[2] - b[2], a[3] - b[3]


def _capacity(units: tuple[int, int, int, int]) -> Capacity:
  return Capacity(units[0] / 1000, *units[1:])


def _shortage(amount: Capacity, left: tuple[int, ...], what: str, total: Capacity) -> str:
  rows = zip(NAMES, amount.units(), left, total.units(), (1000, 1, 1, 1), strict=True)
  return ", ".join(
    f"{name}: {need / unit:g} needed, {have / unit:g} {what} {every / unit:g}"
    for name, need, have, every, unit in rows
    if need > have
  )


def host_capacity(cpu_overcommit: float = CPU_OVERCOMMIT) -> Capacity:
  """What sandboxes may use of this host.

  Processors are those that this process may run on, times the factor. Memory is the host's or that
  of this process's cgroup, less a reserve of 1 GiB or a tenth; disk is the same memory. Processes
  are bounded by the kernel's limits on pids and threads and the cgroup's.

  Args:
    cpu_overcommit: processors promised for each one there is.
  """
  if not cpu_overcommit > 0:
    raise ValueError(f"cpu_overcommit must be more than 0, not {cpu_overcommit!r}")
  cpus = len(os.sched_getaffinity(0)) * cpu_overcommit
  memory = min([_mem_total(), *_cgroup_limits("memory.max", "memory", "memory.limit_in_bytes")])
  memory_mb = memory >> 20
  memory_mb = max(0, memory_mb - max(_RESERVE_MB, int(memory_mb * _RESERVE_SHARE)))
  kernel = (_number(_ROOT / "proc/sys/kernel" / name) for name in ("pid_max", "threads-max"))
  pids = [value for value in kernel if value] + _cgroup_limits("pids.max", "pids", "pids.max")
  return Capacity(cpus, memory_mb, memory_mb, max(0, min(pids) - _RESERVE_PIDS))


def _mem_total() -> int:
  for line in (_ROOT / "proc/meminfo").read_text().splitlines():
    if line.startswith("MemTotal:"):
      return int(line.split()[1]) << 10
  raise SandboxError("/proc/meminfo has no line MemTotal: give the manager a Capacity")


def _cgroup_limits(v2_file: str, controller: str, v1_file: str) -> list[int]:
  """Limits of this process's cgroup and all above it, in either version; none where unlimited."""
  found = []
  for group, version_2 in _cgroups(controller).items():
    name = v2_file if version_2 else v1_file
    base = _ROOT / "sys/fs/cgroup" / ("" if version_2 else controller)
    here = base / group.strip("/")
    for directory in (here, *here.parents):
      if directory == base.parent:
        break
      value = _number(directory / name)
      if value:
        found.append(value)
  return found


def _cgroups(controller: str) -> Mapping[str, bool]:
  """Paths of this process's cgroups for a controller -> whether they are of version 2."""
  found = {}
  for line in (_ROOT / "proc/self/cgroup").read_text().splitlines():
    _, controllers, path = line.split(":", 2)
    if not controllers or controller in controllers.split(","):
      found[path] = not controllers
  return found


def _number(path: pathlib.Path) -> int | None:
  """The number in a file; None where there is no file or it holds no number ("max")."""
  try:
    return int(path.read_text())
  except (OSError, ValueError):
    return None
