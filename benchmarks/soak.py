"""Sandboxes at saturation for a long time, with random kills: prints one JSON line.

  python -m benchmarks.soak [--minutes=45 --seed=0 --backend=podman]

A manager process keeps a pool of sandboxes busy: sorting and hashing, file round trips, episodes of
rome/Terminal-v0 that must earn 1 or 0, forks, shells killed from outside. A supervisor kills
containers, Podman's service process and the manager itself (kill -9), starts the manager again, and
looks at the end for whatever was left over. A result is right, or a declared loss of the sandbox;
anything else is wrong. Exits with status 1 on a wrong result, a leak, or a manager that grows.
"""

import datetime
import json
import os
import pathlib
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

from absl import app, flags

from benchmarks._soak_work import WORK, Wrong
from rome.envs import owner, sandbox_cli
from rome.envs.pool import PoolClosed, SandboxPool
from rome.envs.sandbox import Limits, SandboxError, make_sandbox, sweep

_MINUTES = flags.DEFINE_float("minutes", 45.0, "How long.", lower_bound=0.1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the work and of the kills.")
_BACKEND = flags.DEFINE_enum("backend", "podman", ["podman", "bubblewrap"], "Of the sandboxes.")
_SANDBOXES = flags.DEFINE_integer("sandboxes", 16, "Alive at once.", lower_bound=2)
_RECORD = flags.DEFINE_string("record", None, "For the manager process: where results go.")
_WIDTH = 8  # episodes at once
_REUSE = 4  # episodes a sandbox serves
_LEVEL = 20.0  # seconds until a manager's memory is taken as its level
_GROWTH = 24.0  # MiB that a manager may grow beyond it
_FDS = 24  # descriptors that it may have more at its end


def manage() -> None:
  """The manager process: works until SIGTERM, a line of JSON for each piece of work."""
  end = threading.Event()
  signal.signal(signal.SIGTERM, lambda *_: end.set())
  record = open(_RECORD.value, "a", buffering=1)
  lock = threading.Lock()
  make = lambda: make_sandbox(backend=_BACKEND.value, limits=Limits(cpus=0.5))  # noqa: E731
  pool = SandboxPool(make, _SANDBOXES.value, reuse=_REUSE)

  def tell(**row: Any) -> None:
    with lock:
      record.write(json.dumps(row) + "\n")

  def drive(index: int) -> None:
    rng = random.Random(f"{_SEED.value}/{os.getpid()}/{index}")
    while not end.is_set():
      kind = rng.choice(sorted(WORK))
      start = time.monotonic()
      sandbox = None
      outcome, text = "right", ""
      try:
        sandbox = pool.acquire(timeout=120)
        WORK[kind](sandbox, rng)
      except Wrong as error:
        outcome, text = "wrong", str(error)
      except (SandboxError, TimeoutError) as error:
        outcome, text = "lost", str(error)
        if isinstance(error, PoolClosed) and not end.is_set():
          outcome = "wrong"
      except Exception as error:
        outcome, text = "wrong", f"undeclared {type(error).__name__}: {error}"
      if sandbox is not None:
        pool.release(sandbox, healthy=outcome == "right")
      tell(kind=kind, outcome=outcome, text=text[:300], seconds=round(time.monotonic() - start, 4))

  threads = [threading.Thread(target=drive, args=(i,), daemon=True) for i in range(_WIDTH)]
  for thread in threads:
    thread.start()
  end.wait()
  for thread in threads:
    thread.join(150)
  pool.close()
  tell(kind="end", outcome="right", counters=pool.counters)


class Manager:
  """The manager process as the supervisor sees it."""

  def __init__(self, record: pathlib.Path):
    command = [sys.executable, "-m", "benchmarks.soak", f"--record={record}"]
    command += [f"--{f}={v}" for f, v in (("seed", _SEED.value), ("backend", _BACKEND.value),
                                          ("sandboxes", _SANDBOXES.value))]  # fmt: skip
    self._errors = open(record.with_name("manager.err"), "ab")
    self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=self._errors)
    self.label = owner.label(self.process.pid)
    self.born = time.monotonic()
    self.memory: list[tuple[float, float]] = []  # seconds of life, MiB
    self.descriptors: list[tuple[float, int]] = []

  def look(self) -> None:
    """Notes its memory and its descriptors."""
    base = f"/proc/{self.process.pid}"
    age = time.monotonic() - self.born
    try:
      with open(f"{base}/statm") as file:
        self.memory.append((age, int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20))
      self.descriptors.append((age, len(os.listdir(f"{base}/fd"))))
    except OSError:
      pass

  def services(self) -> list[int]:
    """Pids of Podman's service processes that it started."""
    return [pid for pid, parent, text in _processes()
            if parent == self.process.pid and "system" in text and "service" in text]  # fmt: skip

  def containers(self) -> list[str]:
    return [name for name, label in sandbox_cli.owned_containers().items() if label == self.label]

  def end(self, timeout: float = 240) -> bool:
    """Ends it in good order; False if it had to be killed."""
    self.process.terminate()
    try:
      self.process.wait(timeout)
    except subprocess.TimeoutExpired:
      self.kill()
      return False
    self._errors.close()
    return self.process.returncode == 0

  def kill(self) -> None:
    self.process.kill()
    self.process.wait()
    self._errors.close()


def _processes() -> list[tuple[int, int, str]]:
  """Pid, parent and command line of every process; zombies have none."""
  found = []
  for entry in os.listdir("/proc"):
    if entry.isdigit():
      try:
        base = pathlib.Path("/proc") / entry
        stat = base.joinpath("stat").read_text(errors="replace").rpartition(")")[2].split()
        text = base.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        found.append((int(entry), int(stat[1]), text if stat[0] != "Z" else "zombie"))
      except (OSError, IndexError):
        pass
  return found


class Supervisor:
  """Kills at random, restarts, and counts what is left at the end."""

  def __init__(self, record: pathlib.Path):
    self._record = record
    self._rng = random.Random(_SEED.value)
    self.kills = dict.fromkeys(("container", "service", "manager"), 0)
    self.seen: set[str] = set()
    self.managers: list[Manager] = []
    self.violations: list[str] = []

  def run(self, seconds: float) -> None:
    start = time.monotonic()
    deaths = sorted(
      self._rng.uniform(0.15, 0.85) * seconds for _ in range(max(1, round(seconds / 120)))
    )
    following = start + 8
    self.managers.append(Manager(self._record))
    while (now := time.monotonic()) < start + seconds:
      manager = self.managers[-1]
      manager.look()
      if manager.process.poll() is not None:
        self.violations.append(f"the manager ended by itself with {manager.process.returncode}")
        self.managers.append(Manager(self._record))
      elif deaths and now - start > deaths[0]:
        deaths.pop(0)
        self.seen |= set(manager.containers())
        manager.kill()
        self.kills["manager"] += 1
        self.managers.append(Manager(self._record))
      elif now > following:
        following = now + self._rng.uniform(1.0, 5.0)
        self._kill(manager)
      time.sleep(0.5)
    if not self.managers[-1].end():
      self.violations.append("the last manager did not end in good order")

  def _kill(self, manager: Manager) -> None:
    names = manager.containers()
    self.seen |= set(names)
    services = manager.services()
    if services and self._rng.random() < 0.15:
      os.kill(self._rng.choice(services), signal.SIGKILL)
      self.kills["service"] += 1
    elif names:
      name = self._rng.choice(sorted(names))
      subprocess.run(["podman", "kill", name], capture_output=True, timeout=60)
      self.kills["container"] += 1

  def leaks(self) -> dict[str, int]:
    """What is left of all managers, by kind."""
    labels = {manager.label for manager in self.managers}
    pids = {manager.process.pid for manager in self.managers}
    mounts = pathlib.Path("/proc/self/mountinfo").read_text()
    left = _processes()
    return {
      "containers": sum(label in labels for label in sandbox_cli.owned_containers().values()),
      "directories": sum(label in labels for label in sandbox_cli.owned_directories().values()),
      "mounts": sum(name in mounts for name in self.seen),
      "processes": sum(
        parent in pids or any(name in text for name in self.seen) for _, parent, text in left
      ),
      "zombies": sum(parent == os.getpid() and text == "zombie" for _, parent, text in left),
    }


def growth(manager: Manager) -> tuple[float, int]:
  """MiB and descriptors that a manager has grown since it reached its level."""
  late = [mib for age, mib in manager.memory if age >= _LEVEL]
  fds = [count for age, count in manager.descriptors if age >= _LEVEL]
  if len(late) < 20:
    return 0.0, 0
  part = max(5, len(late) // 5)
  return (
    statistics.median(late[-part:]) - statistics.median(late[:part]),
    round(statistics.median(fds[-part:]) - statistics.median(fds[:part])),
  )


def soak(seconds: float) -> dict[str, Any]:
  """Runs it all; `violations` of the result is empty where everything held."""
  networks = _networks()
  descriptors = len(os.listdir("/proc/self/fd"))
  with tempfile.TemporaryDirectory(prefix="rome-soak-") as directory:
    record = pathlib.Path(directory) / "record.jsonl"
    supervisor = Supervisor(record)
    try:
      supervisor.run(seconds)
    finally:
      for manager in supervisor.managers:
        if manager.process.poll() is None:
          manager.kill()
    sweep()
    leaks = supervisor.leaks()
    leaks["networks"] = max(0, _networks() - networks)
    leaks["fds"] = max(0, len(os.listdir("/proc/self/fd")) - descriptors)
    text = record.read_text() if record.exists() else ""
    rows = [json.loads(line) for line in text.splitlines() if line.endswith("}")]  # one may be torn
    errors = record.with_name("manager.err").read_text(errors="replace").strip()
  work = [row for row in rows if row["kind"] != "end"]
  wrong = [f"{row['kind']}: {row['text']}" for row in work if row["outcome"] == "wrong"]
  grown = [growth(manager) for manager in supervisor.managers]
  violations = [*supervisor.violations, *(f"wrong result: {text}" for text in wrong[:20])]
  violations += [f"leaked {name}: {count}" for name, count in leaks.items() if count]
  violations += [f"a manager grew by {mib:.1f} MiB" for mib, _ in grown if mib > _GROWTH]
  violations += [f"a manager holds {fds} more descriptors" for _, fds in grown if fds > _FDS]
  if not any(row["outcome"] == "right" for row in work):
    violations.append(f"no work was done: {errors[-300:]}")
  reasons = [row["text"].rpartition(": ")[2][:60] for row in work if row["outcome"] == "lost"]
  return {
    "benchmark": "soak",
    "minutes": round(seconds / 60, 2),
    "seed": _SEED.value,
    "backend": _BACKEND.value,
    "sandboxes": _SANDBOXES.value,
    "right": {kind: _count(work, kind) for kind in sorted(WORK)},
    "wrong": len(wrong),
    "declared_losses": len(reasons),
    "loss_reasons": {text: reasons.count(text) for text in sorted(set(reasons))},
    "kills": {**supervisor.kills, "shell": sum(r["kind"] == "shell_killed" for r in work)},
    "leaks": leaks,
    "manager_growth_mib": round(max(mib for mib, _ in grown), 2),
    "manager_growth_fds": max(fds for _, fds in grown),
    "violations": violations,
    "cpus": os.cpu_count(),
    "kernel": platform.release(),
    "date": datetime.date.today().isoformat(),
  }  # fmt: skip


def _count(work: list[dict[str, Any]], kind: str) -> int:
  return sum(row["kind"] == kind and row["outcome"] == "right" for row in work)


def _networks() -> int:
  done = subprocess.run(["podman", "network", "ls", "--quiet"], capture_output=True, text=True)
  return len(done.stdout.split())


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown argument {argv[1]!r}")
  if _RECORD.value:
    manage()
    return
  figures = soak(_MINUTES.value * 60)
  print(json.dumps(figures), flush=True)
  sys.exit(1 if figures["violations"] else 0)


if __name__ == "__main__":
  app.run(main)
