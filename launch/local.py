"""Runs jobs as processes of this machine: so many at a time, none of them outliving this one."""

import ctypes
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Protocol

DONE, SKIPPED, STOPPED = "done", "done before", "stopped"
GRACE = 30.0  # Seconds that a stopped job has to remove its sandboxes.
POLL = 0.05

_PR_SET_PDEATHSIG = 1


class Job(Protocol):
  """What is needed of a job; `launch.sweep.Job` is one."""

  @property
  def name(self) -> str: ...
  @property
  def command(self) -> list[str]: ...
  @property
  def workdir(self) -> Path: ...
  @property
  def done(self) -> bool: ...


@dataclasses.dataclass(frozen=True)
class Result:
  """How a job ended: DONE, SKIPPED, STOPPED or "failed: exit code N"; seconds where it ran."""

  job: Job
  state: str
  seconds: float | None


@dataclasses.dataclass
class _Running:
  job: Job
  process: subprocess.Popen[bytes]
  start: float


def launch(jobs: Sequence[Job], max_parallel: int) -> list[Result]:
  """Runs the jobs that are not done yet, and returns how each of them ended, in order.

  The output of a job goes to WORKDIR/log.txt. On Ctrl-C or SIGTERM every running job is asked to
  end (SIGTERM) and killed if it has not after `GRACE` seconds; jobs that never started count as
  stopped too. Call it from the main thread.
  """
  ends: dict[str, Result] = {job.name: Result(job, SKIPPED, None) for job in jobs if job.done}
  queue = [job for job in jobs if job.name not in ends]
  running: list[_Running] = []
  before = signal.signal(signal.SIGTERM, _interrupt)
  try:
    while queue or running:
      while queue and len(running) < max_parallel:
        running.append(_start(queue.pop(0)))
      time.sleep(POLL)
      for one in [one for one in running if one.process.poll() is not None]:
        running.remove(one)
        ends[one.job.name] = _ended(one)
  except KeyboardInterrupt:
    print("launch: stopping", len(running), "jobs", file=sys.stderr)
  finally:
    # From here on a second Ctrl-C must not leave children behind.
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    _stop(running)
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, before)
  for one in running:
    ends[one.job.name] = Result(one.job, STOPPED, time.monotonic() - one.start)
  return [ends.get(job.name, Result(job, STOPPED, None)) for job in jobs]


def _start(job: Job) -> _Running:
  job.workdir.mkdir(parents=True, exist_ok=True)
  print(f"launch: {job.name}, log in {job.workdir / 'log.txt'}", file=sys.stderr)
  with open(job.workdir / "log.txt", "ab") as log:
    process = subprocess.Popen(
      job.command,
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      start_new_session=True,  # The terminal's Ctrl-C comes to us alone; we pass it on once.
      preexec_fn=_end_with_parent,
    )
  return _Running(job, process, time.monotonic())


def _ended(one: _Running) -> Result:
  code = one.process.returncode
  state = DONE if code == 0 else f"failed: exit code {code}"
  if code == 0 and not one.job.done:
    state = "failed: no summary.json"
  return Result(one.job, state, time.monotonic() - one.start)


def _stop(running: Sequence[_Running]) -> None:
  for one in running:
    _signal_group(one.process, signal.SIGTERM)
  deadline = time.monotonic() + GRACE
  for one in running:
    try:
      one.process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
      pass
    _signal_group(one.process, signal.SIGKILL)  # Whatever the job started and left.
    one.process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
  try:
    os.killpg(process.pid, number)
  except ProcessLookupError:
    pass


def _interrupt(number: int, frame: FrameType | None) -> None:
  del number, frame
  raise KeyboardInterrupt


def _end_with_parent() -> None:
  """In the child: the kernel sends SIGTERM should the parent die without stopping its jobs."""
  ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
