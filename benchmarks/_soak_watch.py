"""What the soak's supervisor sees from outside: how processes grow, and what is left over.

Everything is looked up in /proc, /sys and the sandboxes' directories, so that looking costs the
machine little and works while Podman is busy or dead.
"""

import dataclasses
import os
import pathlib
import random
import statistics
import subprocess
import time
from collections.abc import Iterable

from rome.envs import owner, sandbox_cli
from rome.envs.backends import podman_containers, podman_spec

LEVEL = 45.0  # seconds of life until a process's memory is taken as its level
SAMPLES = 60  # fewer say nothing about growth
SPAN = 90.0  # seconds that they must span


@dataclasses.dataclass
class Watched:
  """A process and its samples (seconds of life, MiB of memory, descriptors)."""

  pid: int
  kind: str
  born: float = dataclasses.field(default_factory=time.monotonic)
  samples: list[tuple[float, float, int]] = dataclasses.field(default_factory=list)

  def look(self) -> bool:
    """Takes a sample; False once it is gone."""
    base = f"/proc/{self.pid}"
    try:
      with open(f"{base}/statm") as file:
        mib = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
      self.samples.append((time.monotonic() - self.born, mib, len(os.listdir(f"{base}/fd"))))
    except (OSError, IndexError):
      return False
    return mib > 0


@dataclasses.dataclass(frozen=True)
class Growth:
  """How a process grew after it had reached its level, by the Theil-Sen estimator.

  Attributes:
    seconds, samples: on which it rests.
    mib, fds: grown in that time.
    mib_per_hour: the slope.
  """

  kind: str
  seconds: float
  samples: int
  mib: float
  fds: int
  mib_per_hour: float


def growth(watched: Watched) -> Growth | None:
  """None where there are too few samples to say anything."""
  late = [sample for sample in watched.samples if sample[0] >= LEVEL]
  if len(late) < SAMPLES or late[-1][0] - late[0][0] < SPAN:
    return None
  seconds = late[-1][0] - late[0][0]
  mib, fds = (_slope([(row[0], row[i]) for row in late]) for i in (1, 2))
  return Growth(
    watched.kind, round(seconds), len(late), round(mib * seconds, 2), round(fds * seconds),
    round(mib * 3600, 2),
  )  # fmt: skip


def _slope(points: list[tuple[float, float]]) -> float:
  rng = random.Random(0)
  slopes = []
  for _ in range(min(20_000, len(points) ** 2)):
    (x0, y0), (x1, y1) = rng.sample(points, 2)
    if x1 != x0:
      slopes.append((y1 - y0) / (x1 - x0))
  return statistics.median(slopes)


class Sandboxes:
  """The sandboxes of the soak's managers: all that were ever seen, and those there now."""

  def __init__(self) -> None:
    self.seen: dict[str, str] = {}  # ids of containers by name; "" until one is known
    self._labels: set[str] = set()

  def look(self, label: str) -> list[str]:
    """Notes the sandboxes of an owner; returns the ids of their containers."""
    self._labels.add(label)
    found = []
    for path in owner.runtime_dir().glob("rome-*"):
      try:
        if (path / "owner").read_text() == label:
          self.seen.setdefault(path.name, "")
          self.seen[path.name] = (path / "container").read_text()
          found.append(self.seen[path.name])
      except OSError:
        pass
    return list(filter(None, found))

  def bundles(self) -> int:
    """Small directories of containers that no longer are: Podman's own, which it does not look at
    again where its service was killed at the wrong moment."""
    storage = pathlib.Path("/var/lib/containers/storage/overlay-containers")
    return sum((storage / container).exists() for container in self.seen.values() if container)

  def left(self, supervisors: set[int]) -> dict[str, int]:
    """What is left of them all, by kind; what is about to go has a few seconds to do so."""
    end = time.monotonic() + 15
    while True:
      left = self._left(supervisors)
      if not any(left.values()) or time.monotonic() > end:
        return left
      time.sleep(1)

  def _left(self, supervisors: set[int]) -> dict[str, int]:
    names = {*self.seen, *filter(None, self.seen.values())}
    mounts = pathlib.Path("/proc/self/mountinfo").read_text()
    # Beside them, the services' directories; see owner.py.
    places = [path for path in owner.runtime_dir().iterdir() if path.is_dir()]
    top = pathlib.Path("/sys/fs/cgroup")
    groups = [path.name for path in [*top.glob("*/libpod_parent/*"), *top.glob("libpod_parent/*")]]
    rows = processes()
    return {
      "containers": sum(a in self._labels for a in sandbox_cli.owned_containers().values()),
      "directories": sum(_read(path / "owner") in self._labels for path in places),
      "mounts": sum(name in mounts for name in names),
      "cgroups": sum(any(name in group for name in names) for group in groups),
      "stored": sum(name in self.seen for name, _ in podman_containers.list_stored()),
      "processes": sum(
        parent in supervisors or any(name in text for name in names) for _, parent, text in rows
      ),
      "keys": _keys(self.seen) if not os.geteuid() else 0,
      "zombies": sum(parent == os.getpid() and text == "zombie" for _, parent, text in rows),
    }


def _keys(names: Iterable[str]) -> int:
  """Keys of the kernel that the sandboxes' users hold: Podman gives each users of its own."""
  total = 0
  others = [path.name for path in owner.runtime_dir().glob("rome-*")]  # which may have the same
  firsts = {podman_spec.first_id(name) for name in names}
  firsts -= {podman_spec.first_id(name) for name in others}
  for line in pathlib.Path("/proc/key-users").read_text().splitlines():
    uid, counts = line.split(":")
    if int(uid) - int(uid) % 65536 in firsts:
      total += int(counts.split()[0])
  return total


def _read(path: pathlib.Path) -> str:
  try:
    return path.read_text()
  except OSError:
    return ""


def processes() -> list[tuple[int, int, str]]:
  """Pid, parent and command line of every process; zombies have none."""
  found = []
  for entry in filter(str.isdigit, os.listdir("/proc")):
    try:
      base = pathlib.Path("/proc") / entry
      stat = base.joinpath("stat").read_text(errors="replace").rpartition(")")[2].split()
      text = base.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
      found.append((int(entry), int(stat[1]), text if stat[0] != "Z" else "zombie"))
    except (OSError, IndexError):
      pass
  return found


def monitors() -> dict[str, tuple[int, list[int]]]:
  """Pid of the monitor of each container, and its children's, by the container's id."""
  rows = processes()
  found = {}
  for pid, _, text in rows:
    words = text.split()
    if words and words[0].endswith("conmon") and "-c" in words:
      children = [child for child, parent, _ in rows if parent == pid]
      found[words[words.index("-c") + 1]] = (pid, children)
  return found


def networks() -> int:
  done = subprocess.run(["podman", "network", "ls", "--quiet"], capture_output=True, text=True)
  return len(done.stdout.split())
