"""Sandboxes at saturation for a long time, with random kills: prints one JSON line.

  python -m benchmarks.soak [--minutes=45 --seed=0 --backend=podman]

A manager process keeps a pool of sandboxes busy: sorting and hashing, file transfers, episodes of
rome/Terminal-v0 that must earn 1 or 0 from a pool of judges, forks and snapshots, sessions of root
and on terminals, shells killed from outside. A supervisor kills containers (at Podman's hands, and
behind its back), their monitors, Podman's service process and the manager itself (kill -9), starts
the manager again, and looks at the end for whatever was left over. A result is right, or a declared
loss of the sandbox; anything else is wrong.

In the first half of the time all of that is killed; in the second the manager and Podman's service
are left alone, so that their growth can be seen. Where there are too few samples it is null, and
from ten minutes on that is a failure too. Exits with status 1 on a wrong result, a leak, or growth.
"""

import dataclasses
import datetime
import json
import os
import pathlib
import platform
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

from absl import app, flags

from benchmarks import _soak_watch as watch
from benchmarks._soak_work import WORK, Place, Wrong
from rome.envs import owner
from rome.envs.backends import podman_service
from rome.envs.pool import PoolClosed, SandboxPool
from rome.envs.sandbox import Limits, SandboxError, make_sandbox, sweep

_MINUTES = flags.DEFINE_float("minutes", 45.0, "How long.", lower_bound=0.1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the work and of the kills.")
_BACKEND = flags.DEFINE_enum("backend", "podman", ["podman", "bubblewrap"], "Of the sandboxes.")
_SANDBOXES = flags.DEFINE_integer("sandboxes", 16, "Alive at once.", lower_bound=2)
_RECORD = flags.DEFINE_string("record", None, "For the manager process: where results go.")
_WIDTH = 8  # pieces of work at once
_JUDGES = 3
_REUSE = 4  # episodes a sandbox serves
_GROWTH = {"manager": (24.0, 24), "service": (32.0, 24)}  # MiB and descriptors they may grow
_LONG = 10  # minutes from which on growth must have been seen


def manage() -> None:
  """The manager process: works until SIGTERM, a line of JSON for each piece of work."""
  end = threading.Event()
  signal.signal(signal.SIGTERM, lambda *_: end.set())
  record = open(_RECORD.value, "a", buffering=1)
  lock = threading.Lock()
  make = lambda: make_sandbox(backend=_BACKEND.value, limits=Limits(cpus=0.5))  # noqa: E731
  pool = SandboxPool(make, _SANDBOXES.value, reuse=_REUSE)
  judges = SandboxPool(make, _JUDGES, reuse=4 * _REUSE)

  def tell(**row: Any) -> None:
    with lock:
      record.write(json.dumps(row) + "\n")

  def drive(index: int) -> None:
    rng = random.Random(f"{_SEED.value}/{os.getpid()}/{index}")
    while not end.is_set():
      kind = rng.choice(sorted(WORK))
      start = time.monotonic()
      place = Place(rng, pool, judges)
      outcome, text = "right", ""
      try:
        WORK[kind](place)
      except Wrong as error:
        outcome, text = "wrong", str(error)
      except (SandboxError, TimeoutError) as error:
        outcome, text = "lost", str(error)
        if isinstance(error, PoolClosed) and not end.is_set():
          outcome = "wrong"
      except Exception as error:
        outcome, text = "wrong", f"undeclared {type(error).__name__}: {error}"
      place.leave(healthy=outcome == "right")
      tell(kind=kind, outcome=outcome, text=text[:300], seconds=round(time.monotonic() - start, 4))

  threads = [threading.Thread(target=drive, args=(i,), daemon=True) for i in range(_WIDTH)]
  for thread in threads:
    thread.start()
  end.wait()
  for thread in threads:
    thread.join(150)
  pool.close()
  judges.close()
  tell(kind="end", outcome="right", counters=pool.counters, judges=judges.counters)


class Manager:
  """The manager process as the supervisor sees it."""

  def __init__(self, record: pathlib.Path):
    command = [sys.executable, "-m", "benchmarks.soak", f"--record={record}"]
    command += [f"--{f}={v}" for f, v in (("seed", _SEED.value), ("backend", _BACKEND.value),
                                          ("sandboxes", _SANDBOXES.value))]  # fmt: skip
    self._errors = open(record.with_name("manager.err"), "ab")
    self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=self._errors)
    self.label = owner.label(self.process.pid)
    self.watched = [watch.Watched(self.process.pid, "manager")]

  def look(self) -> None:
    """Notes how it, and the Podman service that it started, grow."""
    known = {one.pid for one in self.watched}
    self.watched += [watch.Watched(pid, "service") for pid in self.services() if pid not in known]
    for one in self.watched:
      one.look()

  def services(self) -> list[int]:
    """Pids of Podman's service processes that it started."""
    return [pid for pid, parent, text in watch.processes()
            if parent == self.process.pid and "system" in text and "service" in text]  # fmt: skip

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


class Supervisor:
  """Kills at random, restarts, and counts what is left at the end."""

  def __init__(self, record: pathlib.Path):
    self._record = record
    self._rng = random.Random(_SEED.value)
    kinds = ("container", "container by its process", "monitor", "service", "manager")
    self.kills = dict.fromkeys(kinds, 0)
    self.managers: list[Manager] = []
    self.sandboxes = watch.Sandboxes()
    self.violations: list[str] = []

  def run(self, seconds: float) -> None:
    start = time.monotonic()
    count = max(1, round(seconds / 180))
    deaths = sorted(self._rng.uniform(0.1, 0.5) * seconds for _ in range(count))
    following = start + 8
    self.managers.append(Manager(self._record))
    while (now := time.monotonic()) < start + seconds:
      manager = self.managers[-1]
      manager.look()
      containers = self.sandboxes.look(manager.label)
      if manager.process.poll() is not None:
        self.violations.append(f"the manager ended by itself with {manager.process.returncode}")
        self.managers.append(Manager(self._record))
      elif deaths and now - start > deaths[0]:
        deaths.pop(0)
        manager.kill()
        self.kills["manager"] += 1
        self.managers.append(Manager(self._record))
      elif now > following:
        following = now + self._rng.uniform(1.0, 5.0)
        self._kill(manager, containers, service=now - start < seconds / 2)
      time.sleep(0.5)
    self.sandboxes.look(self.managers[-1].label)
    if not self.managers[-1].end():
      self.violations.append("the last manager did not end in good order")

  def _kill(self, manager: Manager, containers: list[str], service: bool) -> None:
    services = manager.services()
    running = watch.monitors()
    victim = self._rng.choice(sorted(containers) or [""])
    chance = self._rng.random()
    if services and service and chance < 0.15:
      self._end("service", self._rng.choice(services))
    elif victim not in running:
      return
    elif chance < 0.25:
      self._end("monitor", running[victim][0])
    elif chance < 0.6:
      for child in running[victim][1]:
        self._end("container by its process", child)
    else:
      command = ["podman", "kill", victim]
      try:
        done = subprocess.run(command, capture_output=True, timeout=30)
      except subprocess.TimeoutExpired:
        return
      self.kills["container"] += done.returncode == 0

  def _end(self, kind: str, pid: int) -> None:
    try:
      os.kill(pid, signal.SIGKILL)
      self.kills[kind] += 1
    except ProcessLookupError:
      pass


def soak(seconds: float) -> dict[str, Any]:
  """Runs it all; `violations` of the result is empty where everything held."""
  networks = watch.networks()
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
    leaks = supervisor.sandboxes.left({manager.process.pid for manager in supervisor.managers})
    leaks["networks"] = max(0, watch.networks() - networks)
    podman_service.service.stop()  # with the connections of this process to its own
    leaks["fds"] = max(0, len(os.listdir("/proc/self/fd")) - descriptors)
    text = record.read_text() if record.exists() else ""
    rows = [json.loads(line) for line in text.splitlines() if line.endswith("}")]  # one may be torn
    errors = record.with_name("manager.err").read_text(errors="replace").strip()
  work = [row for row in rows if row["kind"] != "end"]
  wrong = [f"{row['kind']}: {row['text']}" for row in work if row["outcome"] == "wrong"]
  grown = [g for m in supervisor.managers for one in m.watched if (g := watch.growth(one))]
  violations = [*supervisor.violations, *(f"wrong result: {text}" for text in wrong[:20])]
  # The kernel collects keys of ended users minutes later (kernel.keys.gc_delay): told, not judged.
  violations += [
    f"leaked {name}: {count}" for name, count in leaks.items() if count and name != "keys"
  ]
  violations += _too_much(grown, seconds)
  for kind in WORK:
    if seconds >= 120 and not _count(work, kind):
      violations.append(f"never done: {kind}: {errors[-300:]}")
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
    "kills": {**supervisor.kills, "shell": _count(work, "shell_killed")},
    "sandboxes_seen": len(supervisor.sandboxes.seen),
    "leaks": leaks,
    "podman_bundles": supervisor.sandboxes.bundles(),
    "growth": {kind: _longest(grown, kind) for kind in _GROWTH},
    "violations": violations,
    "cpus": os.cpu_count(),
    "kernel": platform.release(),
    "date": datetime.date.today().isoformat(),
  }  # fmt: skip


def _too_much(grown: list[watch.Growth], seconds: float) -> list[str]:
  found = []
  for one in grown:
    mib, fds = _GROWTH[one.kind]
    if one.mib > mib:
      found.append(f"a {one.kind} grew by {one.mib} MiB in {one.seconds:.0f} s")
    if one.fds > fds:
      found.append(f"a {one.kind} holds {one.fds} more descriptors after {one.seconds:.0f} s")
  for kind in _GROWTH if seconds >= _LONG * 60 and _BACKEND.value == "podman" else ():
    if not any(one.kind == kind for one in grown):
      found.append(f"too few samples to tell whether the {kind} grows")
  return found


def _longest(grown: list[watch.Growth], kind: str) -> dict[str, Any] | None:
  """The growth that rests on the longest time; None where nothing can be said."""
  fit = [one for one in grown if one.kind == kind]
  return dataclasses.asdict(max(fit, key=lambda one: one.seconds)) if fit else None


def _count(work: list[dict[str, Any]], kind: str) -> int:
  return sum(row["kind"] == kind and row["outcome"] == "right" for row in work)


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
