"""Makes this program one process of a run of several, and ends it with the others.

jax watches the processes: one that is silent for `HEARTBEAT` seconds, or whose connection is gone,
ends them all. Where the others notice in Python (a collective of CPUs fails at once), they stop
like after any other failure. Where they wait in a collective for ever, or the coordinator in
process 0 is what died, jax aborts them, which leaves no time to tidy up. So every process has a
reaper, a small program that waits for it to end, says what happened where it could not, and removes
its sandboxes.

  python -m experiments.processes LABEL NAME
"""

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable

from rome.envs import owner, sandbox

HEARTBEAT = 30  # seconds of silence after which a process counts as dead
STARTING = 120  # seconds in which all processes have to be started
ENDING = 120  # seconds that the others may take to end
_DYING = 30.0  # seconds that the kernel may take for a killed process
_BYE = b"bye"


def run(
  work: Callable[[], int], coordinator: str | None, count: int | None, index: int | None
) -> int:
  """Runs `work` in this process, one of several where the flags say so; returns the exit status.

  After a failure it does not return: the process ends at once, so that the others notice.

  Args:
    work: the program; returns its exit status, 0 where all is well.
    coordinator: "HOST:PORT" where process 0 listens, "auto" to ask the scheduler, None for one
      process.
    count: processes.
    index: which one this is.
  """
  wrong = _mistake(coordinator, count, index)
  if wrong:
    print(f"error: {wrong}", file=sys.stderr)
    return 1
  if coordinator is None:
    return work()
  reaper = _start_reaper(f"process {index} of {count}" if count else "this process")
  try:
    code = _work(work, coordinator, count, index)
  except BaseException:  # A bug; it must not wait for the others, which wait for this process.
    traceback.print_exc()
    code = 1
  assert reaper.stdin is not None
  reaper.stdin.write(_BYE)
  reaper.stdin.flush()
  if code:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  return 0


def _mistake(coordinator: str | None, count: int | None, index: int | None) -> str:
  """What is wrong with the flags, "" where nothing is."""
  if coordinator in (None, "auto"):
    if count is not None or index is not None:
      return "--num_processes and --process_id need --coordinator=HOST:PORT"
    return ""
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdecimal():
    return f"--coordinator must be HOST:PORT or auto, got {coordinator!r}"
  if count is None or index is None:
    return "--coordinator=HOST:PORT needs --num_processes and --process_id"
  if index >= count:
    return f"--process_id must be below --num_processes={count}, got {index}"
  return ""


def _work(work: Callable[[], int], coordinator: str, count: int | None, index: int | None) -> int:
  import jax

  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    jax.distributed.initialize(
      None if coordinator == "auto" else coordinator,
      count,
      index,
      initialization_timeout=STARTING,
      heartbeat_timeout_seconds=HEARTBEAT,
      shutdown_timeout_seconds=ENDING,
    )
  except (RuntimeError, ValueError) as error:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    print(f"error: --coordinator={coordinator}: {reason}", file=sys.stderr)
    return 1
  if jax.process_index() > 0:  # Process 0 speaks for all; errors are each one's own.
    sys.stdout = open(os.devnull, "w")
  code = work()
  if not code:
    jax.distributed.shutdown()  # once all are here
  return code


def _start_reaper(name: str) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-m", "experiments.processes", owner.label(), name],
    stdin=subprocess.PIPE,
    stdout=subprocess.DEVNULL,
    start_new_session=True,  # Ctrl-C is not for it
  )


def reap(label: str, name: str) -> None:
  """Waits until the process with this owner label, the writer of standard input, is gone."""
  told = sys.stdin.buffer.read()
  end = time.monotonic() + _DYING
  while not owner.is_dead(label) and time.monotonic() < end:
    time.sleep(0.05)
  sandbox.sweep()
  if told != _BYE:
    print(
      f"\nerror: {name} was ended from outside: killed, or by jax because another process ended, "
      "was silent or never came (see above). Its sandboxes are removed. Start all processes again "
      "with the same flags, or another number of them: they go on from the last checkpoint",
      file=sys.stderr,
    )


if __name__ == "__main__":
  reap(*sys.argv[1:])
