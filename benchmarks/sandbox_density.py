"""Many live sandboxes at once: prints one JSON line.

  python -m benchmarks.sandbox_density [--count=1000] [--backend=podman] [--threads=4]

Starts them, asks each for a result that depends on it, asks all again while all live, and closes
them. Memory is what `MemAvailable` loses while they live, so that the kernel's share and that of
Podman's monitors are counted too.
"""

import concurrent.futures
import datetime
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable

from absl import app, flags

from rome.envs.common import Limits
from rome.envs.live import close_all
from rome.envs.sandbox import Sandbox, make_sandbox

_COUNT = flags.DEFINE_integer("count", 1000, "Sandboxes alive at once.", lower_bound=1)
_BACKEND = flags.DEFINE_string("backend", "podman", "Backend.")
_THREADS = flags.DEFINE_integer("threads", 4, "Starts at a time.", lower_bound=1)
_LIMITS = Limits(memory_mb=32, cpus=0.5, pids=16, disk_mb=4)


def available_mb() -> float:
  """Memory that could still be had, in MiB."""
  text = pathlib.Path("/proc/meminfo").read_text()
  return next(int(line.split()[1]) for line in text.splitlines() if "MemAvailable" in line) / 1024


def timed(call: Callable[[], object]) -> float:
  start = time.perf_counter()
  call()
  return time.perf_counter() - start


def ask(sandbox: Sandbox, number: int) -> float:
  """Milliseconds of a command whose output depends on what this sandbox was told before."""
  start = time.perf_counter()
  result = sandbox.run(f"n=${{n:-{number}}}; echo $((n * n))", timeout=60)
  if result.output != f"{number * number}\n":
    raise AssertionError(f"sandbox {number} answered {result.output!r}")
  return (time.perf_counter() - start) * 1e3


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown argument {argv[1]!r}")

  def make(_: int) -> Sandbox:
    return make_sandbox(backend=_BACKEND.value, limits=_LIMITS)

  make(0).close()  # builds the image and finds the runtime
  before = available_mb()
  sandboxes: list[Sandbox] = []
  with concurrent.futures.ThreadPoolExecutor(_THREADS.value) as pool:
    try:
      begin = time.perf_counter()
      for sandbox in pool.map(make, range(_COUNT.value)):
        sandboxes.append(sandbox)
      started = time.perf_counter() - begin
      first = list(pool.map(ask, sandboxes, range(_COUNT.value)))
      again = list(pool.map(ask, sandboxes, range(_COUNT.value)))
      used = before - available_mb()
    finally:
      closing = timed(lambda: close_all(sandboxes))
  figures = {
    "benchmark": "sandbox_density",
    "backend": _BACKEND.value,
    "alive_at_once": len(sandboxes),
    "start_all_s": round(started, 1),
    "first_answer_p50_ms": round(statistics.median(first), 3),
    "answer_p50_ms": round(statistics.median(again), 3),
    "answer_max_ms": round(max(again), 2),
    "memory_mb": round(used),
    "memory_mb_each": round(used / len(sandboxes), 2),
    "close_all_s": round(closing, 1),
    "cpus": os.cpu_count(),
    "kernel": platform.release(),
    "date": datetime.date.today().isoformat(),
  }
  print(json.dumps(figures), flush=True)


if __name__ == "__main__":
  app.run(main)
