"""How fast sandboxes are: prints one JSON line for each backend.

  python -m benchmarks.sandbox [--backend=podman,bubblewrap] [--commands=1000] [--starts=5]

Latencies are milliseconds seen by the caller. `podman_exec_p50_ms` is the same `echo hi` through
`podman exec`, interleaved with the sandbox's own commands in the same run and container, so that
both meet the same load. The throughput is that of eight sandboxes, each driven by a thread.
"""

import datetime
import json
import os
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable

from absl import app, flags

from rome.envs.sandbox import Sandbox, close_all, make_sandbox

_BACKENDS = flags.DEFINE_list("backend", ["podman", "bubblewrap"], "Backends to measure.")
_COMMANDS = flags.DEFINE_integer("commands", 1000, "Commands for the latency.", lower_bound=10)
_STARTS = flags.DEFINE_integer("starts", 5, "Cold starts and resets.", lower_bound=1)
_WIDTH = 8  # sandboxes driven at once


def timed(call: Callable[[], object]) -> float:
  """Milliseconds that a call takes."""
  start = time.perf_counter()
  call()
  return (time.perf_counter() - start) * 1e3


def echo(sandbox: Sandbox) -> None:
  if sandbox.run("echo hi").output != "hi\n":
    raise AssertionError("wrong output")


def podman_exec(sandbox: Sandbox) -> None:
  command = ["podman", "exec", sandbox.id, "bash", "-c", "echo hi"]
  if subprocess.run(command, capture_output=True, check=True).stdout != b"hi\n":
    raise AssertionError("wrong output")


def latency(sandbox: Sandbox, commands: int) -> dict[str, float]:
  """p50 and p99 of `echo hi`, and p50 of `podman exec` where there is a container."""
  ours, theirs = [], []
  for i in range(commands):
    ours.append(timed(lambda: echo(sandbox)))
    if sandbox.backend == "podman" and i % (commands // 10) == 0:
      theirs.append(timed(lambda: podman_exec(sandbox)))
  result = {
    "echo_p50_ms": statistics.median(ours),
    "echo_p99_ms": statistics.quantiles(ours, n=100)[98],
  }
  if theirs:
    result["podman_exec_p50_ms"] = statistics.median(theirs)
    result["times_faster_than_podman_exec"] = statistics.median(theirs) / statistics.median(ours)
  return result


def throughput(sandboxes: list[Sandbox], seconds: float = 2.0) -> float:
  """Commands a second over all sandboxes."""
  counts = [0] * len(sandboxes)
  end = time.perf_counter() + seconds

  def drive(i: int) -> None:
    while time.perf_counter() < end:
      echo(sandboxes[i])
      counts[i] += 1

  threads = [threading.Thread(target=drive, args=(i,)) for i in range(len(sandboxes))]
  start = time.perf_counter()
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return sum(counts) / (time.perf_counter() - start)


def measure(backend: str, commands: int, starts: int) -> dict[str, object]:
  """All figures of one backend."""

  def make() -> Sandbox:
    return make_sandbox(backend=backend, accept_no_isolation=backend == "process")

  make().close()  # builds the image and finds the runtime
  cold, resets, closes = [], [], []
  for _ in range(starts):
    start = time.perf_counter()
    sandbox = make()
    echo(sandbox)
    cold.append((time.perf_counter() - start) * 1e3)
    resets.append(timed(sandbox.reset))
    closes.append(timed(sandbox.close))
  sandboxes = [make() for _ in range(_WIDTH)]
  try:
    figures = latency(sandboxes[0], commands)
    rate = throughput(sandboxes)
  finally:
    close_all(sandboxes)
  return {
    "benchmark": "sandbox",
    "backend": backend,
    **{name: round(value, 4) for name, value in figures.items()},
    f"commands_per_s_over_{_WIDTH}": round(rate),
    "cold_start_and_first_command_p50_ms": round(statistics.median(cold), 2),
    "reset_p50_ms": round(statistics.median(resets), 3),
    "close_p50_ms": round(statistics.median(closes), 2),
    "cpus": os.cpu_count(),
    "load_1min": round(os.getloadavg()[0], 2),
    "kernel": platform.release(),
    "date": datetime.date.today().isoformat(),
  }


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown argument {argv[1]!r}")
  for backend in _BACKENDS.value:
    print(json.dumps(measure(backend, _COMMANDS.value, _STARTS.value)), flush=True)


if __name__ == "__main__":
  app.run(main)
