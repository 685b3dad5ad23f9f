"""How fast sandboxes are: prints one JSON line for each backend.

  python -m benchmarks.sandbox [--backend=podman,bubblewrap] [--commands=1000] [--starts=20]

Latencies are milliseconds seen by the caller. `podman_exec_p50_ms` is the same `echo hi` through
`podman exec`, interleaved with the sandbox's own commands in the same run and container, so that
both meet the same load. The throughput is that of eight sandboxes, each driven by a thread. A
hand-out is `acquire` of a warm pool; a fork takes a snapshot with 200 changed files, starts a
sandbox and restores it there.

Where scripts/setup_peers.sh has been, the sessions of SWE-ReX and ROCK follow, in the same run.
"""

import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable

from absl import app, flags

from rome.envs.pool import SandboxPool
from rome.envs.sandbox import Sandbox, close_all, make_sandbox

ROOT = pathlib.Path(__file__).resolve().parents[1]

_BACKENDS = flags.DEFINE_list("backend", ["podman", "bubblewrap"], "Backends to measure.")
_COMMANDS = flags.DEFINE_integer("commands", 1000, "Commands for the latency.", lower_bound=10)
_STARTS = flags.DEFINE_integer("starts", 20, "Cold starts, resets, forks.", lower_bound=1)
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


def forks(sandbox: Sandbox, count: int) -> list[float]:
  """Milliseconds of a fork with 200 changed files, a start and a first command included."""
  sandbox.run("for i in $(seq 200); do head -c 1000 /dev/urandom > f$i; done", timeout=60)
  took = []
  for _ in range(count):
    start = time.perf_counter()
    fork = sandbox.fork()
    files = fork.run("ls | wc -l").output
    took.append((time.perf_counter() - start) * 1e3)
    fork.close()
    if files != "200\n":
      raise AssertionError(f"the fork has {files!r} files")
  return took


def hand_outs(make: Callable[[], Sandbox], count: int) -> list[float]:
  """Milliseconds until a warm pool of four has handed a sandbox out; each serves once."""
  took = []
  with SandboxPool(make, 4) as pool:
    for _ in range(count):
      while pool.counters["started"] < pool.counters["acquired"] + 4:
        time.sleep(0.01)  # warm again
      held: list[Sandbox] = []
      took.append(timed(lambda held=held: held.append(pool.acquire())))
      echo(held[0])
      pool.release(held[0])
  return took


def peers() -> dict[str, object]:
  """What benchmarks/peers/sandbox_sessions.py prints of those that are installed here."""
  found = {}
  for name in ("swerex", "rock"):
    python = ROOT / f".peers-{name}" / "bin" / "python"
    if python.exists():
      program = ROOT / "benchmarks" / "peers" / "sandbox_sessions.py"
      with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
          [str(python), str(program), name],
          capture_output=True,
          text=True,
          cwd=scratch,
          env={**os.environ, "ROCK_LOGGING_PATH": scratch},
        )
      printed = [line for line in done.stdout.splitlines() if line.startswith('{"peer"')]
      error = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
      found[name] = json.loads(printed[0]) if printed else {"peer": name, "error": error}
  return found


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
    forked = forks(sandboxes[0], starts) if backend != "process" else []
  finally:
    close_all(sandboxes)
  handed = hand_outs(make, starts)
  return {
    "benchmark": "sandbox",
    "backend": backend,
    **{name: round(value, 4) for name, value in figures.items()},
    f"commands_per_s_over_{_WIDTH}": round(rate),
    "cold_start_and_first_command_p50_ms": round(statistics.median(cold), 2),
    "reset_p50_ms": round(statistics.median(resets), 3),
    **({"fork_200_files_p50_ms": round(statistics.median(forked), 1)} if forked else {}),
    "hand_out_p50_ms": round(statistics.median(handed), 3),
    "close_p50_ms": round(statistics.median(closes), 2),
    **({"peers": peers()} if backend == "podman" else {}),
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
