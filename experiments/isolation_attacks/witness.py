"""The witness: judges an attack by what the host sees, never by what the attacker says.

It looks at the canaries, at the host (kernel settings, mounts, clock, free resources), and at the
sandbox from above: the server's process and its settings, the mounts, and the privileges,
namespaces and count of every process inside, all read from the host's /proc.

Left out: reading of memory beyond what a canary holds, and side channels of the processor.
"""

import contextlib
import glob
import hashlib
import os
import pathlib
import resource
import threading
import time

from experiments.isolation_attacks.canaries import Canaries
from rome.envs import rocklet
from rome.envs.sandbox import Limits, Sandbox

# Settings of the whole host that attacks aim at. Those that change by themselves are not among them.
_SETTINGS = (
  "kernel/core_pattern kernel/hostname kernel/domainname kernel/modprobe kernel/panic kernel/sysrq "
  "kernel/printk kernel/printk_ratelimit_burst kernel/randomize_va_space kernel/pid_max "
  "kernel/threads-max kernel/kptr_restrict kernel/dmesg_restrict kernel/perf_event_paranoid "
  "kernel/usermodehelper/* kernel/keys/* kernel/yama/* kernel/ctrl-alt-del kernel/cad_pid "
  "kernel/shm* kernel/msg* kernel/unprivileged_* vm/overcommit_* vm/swappiness vm/panic_on_oom "
  "vm/oom_* vm/mmap_min_addr vm/max_map_count fs/file-max fs/nr_open fs/protected_* "
  "fs/suid_dumpable fs/pipe-* fs/inotify/* fs/mqueue/* user/max_* net/ipv4/ip_forward "
  "net/ipv4/ip_local_port_range net/core/somaxconn"
).split()
# CHOWN, DAC_OVERRIDE, FOWNER, KILL, SETGID, SETUID: all that root inside may ever hold.
_ROOT_CAPABILITIES = sum(1 << number for number in (0, 1, 3, 5, 6, 7))
_OUR_MOUNTS = (
  "/var/lib/containers",
  "/run/containers",
  "/run/netns",
  "/run/libpod",
)
_MEMORY_FLOOR = 1 << 30  # bytes the host must have left
SPARE_PROCESSES = 48  # the server, its threads and shells count in the cgroup too
_DISK_SLACK = 1 << 20  # bytes a sandbox may leave on the host's disk


class Witness:
  """Watches one sandbox during one attack; a context manager around it.

  Attributes:
    breaches: what was seen that must not be, filled at the end.
    most_processes: the largest number of processes seen inside.
    peak_memory: bytes, of the sandbox's cgroup; 0 where there is none.
  """

  def __init__(self, sandbox: Sandbox, canaries: Canaries, user: str, limits: Limits):
    """Prepares the watch.

    Args:
      sandbox: what is attacked.
      canaries: what it must not touch.
      user: "agent" or "root", who attacks.
      limits: what the sandbox was given.
    """
    self._canaries, self._user, self._limits = canaries, user, limits
    assert sandbox._launched is not None
    self._pid = sandbox._launched.pid
    self._home = sandbox._home
    self.breaches: list[str] = []
    self.most_processes = 0
    self._end = threading.Event()

  def __enter__(self) -> "Witness":
    self._canaries.noticed()
    self._host = _host()
    self._inside = self._server()
    self._layer = _upper(self._pid)
    self._used = _disk_usage(self._home, self._layer)
    self._offset = _clock_offset()
    self._thread = threading.Thread(target=self._sample, daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._end.set()
    self._thread.join(10)

  def conclude(self) -> list[str]:
    """Looks at everything once more; call it before the sandbox is reset or closed."""
    self.__exit__()
    found = self._canaries.noticed()
    now = _host()
    found += [
      f"the host's {key}: {self._host.get(key)!r} became {now.get(key)!r}"
      for key in {*now, *self._host}
      if now.get(key) != self._host.get(key)
    ]
    restore(self._host)
    if abs(_clock_offset() - self._offset) > 0.5:
      found.append("the host's clock was set")
    if _disk_usage(self._home, self._layer) - self._used > _DISK_SLACK:
      found.append("the sandbox filled the host's disk")
    found += _exhausted()
    if process_alive(self._pid):
      found += self._judge_inside()
    self.breaches = sorted(set(found))
    return self.breaches

  def _judge_inside(self) -> list[str]:
    before, now = self._inside, self._server()
    found = [
      f"the server's {key}: {before[key]!r} became {now[key]!r}"
      for key in before
      if key in now and now[key] != before[key]
    ]
    suspects = self._privileged()
    if suspects:  # a shell that is just being started is still the server: it will have changed
      time.sleep(0.3)
      found += [text for pid, text in self._privileged().items() if suspects.get(pid) == text]
    limits = self._limits
    if self.most_processes > limits.pids + SPARE_PROCESSES:
      found.append(f"{self.most_processes} processes ran, the limit is {limits.pids}")
    if self.peak_memory > (limits.memory_mb << 20) + (1 << 20):
      found.append(f"the sandbox took {self.peak_memory >> 20} MiB of memory")
    return found + self._unbounded(limits.disk_mb)

  def _server(self) -> dict[str, object]:
    """What must not change about rocklet."""
    base = pathlib.Path(f"/proc/{self._pid}")
    try:
      stat = (base / "stat").read_text().rpartition(")")[2].split()
      status = _status(base)
      return {
        "mounts": _mount_points(base / "mountinfo"),
        "stopped": stat[0] in "Tt",
        "tracer": status["TracerPid"],
        "niceness": stat[16],
        "scheduling policy": stat[38],
        "oom_score_adj": (base / "oom_score_adj").read_text(),
        "limits": (base / "limits").read_text(),
        "processors": status["Cpus_allowed_list"],
        "capabilities": status["CapPrm"],
        "user map": (base / "uid_map").read_text(),
        "binary": _digest(base / "exe"),
        "binary on the host": _digest(rocklet.build()),
      }
    except (OSError, KeyError):
      return {}

  def _privileged(self) -> dict[int, str]:
    """Processes inside that have more than they may, by pid."""
    found = {}
    mine = {kind: _namespace(self._pid, kind) for kind in ("pid", "user", "net", "ipc", "uts")}
    root = _owner_of(self._pid)
    for pid in _processes_in(mine["pid"]):
      if pid == self._pid or self._is_holder(pid):
        continue
      try:
        status = _status(pathlib.Path(f"/proc/{pid}"))
      except (OSError, KeyError):
        continue
      if status.get("State", "Z")[0] in "ZX":
        continue
      allowed = _ROOT_CAPABILITIES if self._user == "root" else 0
      held = int(status["CapEff"], 16) | int(status["CapPrm"], 16) | int(status["CapAmb"], 16)
      name = status["Name"]
      if held & ~allowed:
        found[pid] = f"{name} has capabilities {held:x}"
      elif self._user != "root" and root in status["Uid"].split():
        found[pid] = f"{name} runs as root"
      elif status["Seccomp"] != "2" or status["NoNewPrivs"] != "1":
        found[pid] = f"{name} has lost its filter"
      for kind, own in mine.items():
        theirs = _namespace(pid, kind)
        if theirs and theirs != own:
          found[pid] = f"{name} is in another {kind} namespace"
    return found

  def _is_holder(self, pid: int) -> bool:
    """Whether it is the server's own process that holds a terminal: its child, its very program.

    Nobody inside can start the server's program, and one that traced it would be seen here.
    """
    base = pathlib.Path(f"/proc/{pid}")
    try:
      status = _status(base)
      same = os.stat(base / "exe") == os.stat(f"/proc/{self._pid}/exe")
    except (OSError, KeyError):
      return False
    return same and status["PPid"] == str(self._pid) and status["TracerPid"] == "0"

  def _unbounded(self, disk_mb: int) -> list[str]:
    """Writable memory file systems that hold more than the limit."""
    found = []
    root = pathlib.Path(f"/proc/{self._pid}/root")
    for line in self._mounts():
      fields = line.split()
      if (
        " - tmpfs " in line and "rw" in fields[5].split(",") and os.path.isdir(f"{root}{fields[4]}")
      ):
        with contextlib.suppress(OSError):
          info = os.statvfs(f"{root}{fields[4]}")
          used = (info.f_blocks - info.f_bfree) * info.f_frsize
          if used > (disk_mb << 20) + (1 << 20):
            found.append(f"{fields[4]} holds {used >> 20} MiB, the limit is {disk_mb}")
    return found

  def _mounts(self) -> list[str]:
    with contextlib.suppress(OSError):
      return pathlib.Path(f"/proc/{self._pid}/mountinfo").read_text().splitlines()
    return []

  def _sample(self) -> None:
    space = _namespace(self._pid, "pid")
    counter = cgroup_file(self._pid, "pids", "pids.current", "pids.current")
    while not self._end.is_set():
      with contextlib.suppress(OSError, ValueError):
        count = int(counter.read_text()) if counter else len(_processes_in(space))
        self.most_processes = max(self.most_processes, count)
      self._end.wait(0.05)

  @property
  def peak_memory(self) -> int:
    path = cgroup_file(self._pid, "memory", "memory.max_usage_in_bytes", "memory.peak")
    with contextlib.suppress(OSError, ValueError):
      return int(path.read_text()) if path else 0
    return 0


def cgroup_file(pid: int, controller: str, v1: str, v2: str) -> pathlib.Path | None:
  """A file of the cgroup that holds a process; None where it has no such cgroup of its own."""
  try:
    lines = pathlib.Path(f"/proc/{pid}/cgroup").read_text().splitlines()
  except OSError:
    return None
  for line in lines:
    _, controllers, path = line.split(":", 2)
    if path in ("/", "") or "libpod" not in path:
      continue
    if controller in controllers.split(","):
      return pathlib.Path(f"/sys/fs/cgroup/{controller}{path}/{v1}")
    if not controllers and pathlib.Path(f"/sys/fs/cgroup{path}/{v2}").exists():
      return pathlib.Path(f"/sys/fs/cgroup{path}/{v2}")
  return None


def out_of_memory(pid: int) -> int:
  """How often the sandbox's cgroup ended a process for want of memory."""
  path = cgroup_file(pid, "memory", "memory.oom_control", "memory.events")
  with contextlib.suppress(OSError, ValueError):
    for line in path.read_text().splitlines() if path else []:
      if line.startswith("oom_kill "):
        return int(line.split()[1])
  return 0


def process_alive(pid: int) -> bool:
  try:
    state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
  except OSError:
    return False
  return state not in "ZX"


def restore(state: dict[str, str]) -> None:
  """Writes changed kernel settings back, so that one breach does not spoil what comes after."""
  for name, text in state.items():
    path = pathlib.Path("/proc/sys") / name
    with contextlib.suppress(OSError):
      if path.is_file() and path.read_text() != text:
        path.write_text(text)


def _host() -> dict[str, str]:
  state = {}
  for pattern in _SETTINGS:
    for name in glob.glob(f"/proc/sys/{pattern}"):
      with contextlib.suppress(OSError):
        state[name.removeprefix("/proc/sys/")] = pathlib.Path(name).read_text(errors="replace")
  points = [
    line.split()[4] for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines()
  ]
  state["mounts"] = "\n".join(sorted(p for p in points if not p.startswith(_OUR_MOUNTS)))
  return state


def _mount_points(path: pathlib.Path) -> list[str]:
  """Place, options and kind of each mount; a reset mounts the same anew, under other numbers."""
  rows = (line.split() for line in path.read_text().splitlines())
  return sorted(f"{row[4]} {row[5]} {row[row.index('-') + 1]}" for row in rows)


def _clock_offset() -> float:
  return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def _exhausted() -> list[str]:
  """What the host can no longer do."""
  found = []
  with open("/proc/meminfo") as file:
    free = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
  if free < _MEMORY_FLOOR:
    found.append(f"the host has {free >> 20} MiB of memory left")
  try:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    for fd in (*os.openpty(), *os.pipe(), os.memfd_create("probe"), os.eventfd(0)):
      os.close(fd)
  except OSError as error:
    found.append(f"the host is out of something: {error}")
  return found


def _status(base: pathlib.Path) -> dict[str, str]:
  lines = (base / "status").read_text(errors="replace").splitlines()
  return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _namespace(pid: int, kind: str) -> str:
  try:
    return os.readlink(f"/proc/{pid}/ns/{kind}")
  except OSError:
    return ""


def _owner_of(pid: int) -> str:
  """The host's number for root inside, which is what the server runs as."""
  try:
    return _status(pathlib.Path(f"/proc/{pid}"))["Uid"].split()[0]
  except (OSError, KeyError):
    return "-1"


def _processes_in(space: str) -> list[int]:
  pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
  return [pid for pid in pids if space and _namespace(pid, "pid") == space]


def _digest(path: pathlib.Path) -> str:
  try:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
  except OSError as error:
    return f"errno {error.errno}"


def _upper(pid: int) -> str:
  """The directory on the host that takes what a container writes to its root; '' if there is none."""
  with contextlib.suppress(OSError):
    for line in pathlib.Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
      if line.split()[4] == "/" and "upperdir=" in line:
        return line.split("upperdir=")[1].split(",")[0].split()[0]
  return ""


def _disk_usage(*places: os.PathLike[str] | str) -> int:
  total = 0
  for place in places:
    for top, _, names in os.walk(place) if place else ():
      for name in names:
        with contextlib.suppress(OSError):
          total += os.lstat(f"{top}/{name}").st_blocks * 512
  return total


def raise_descriptor_limit() -> None:
  """The suite itself holds many descriptors at once."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8192)), hard))
