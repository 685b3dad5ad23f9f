"""Sandboxes that do real work while others are attacked; every result is checked.

A job is deterministic: files are written and read through the host's calls, a shell sorts, hashes
and counts them with background processes and pipes, and all of it is compared with what Python
computes. Anything but the right result is wrong; so is a job that takes longer than its bound.
"""

import hashlib
import random
import statistics
import threading
import time

from rome.envs.sandbox import Limits, Sandbox, SandboxError, make_sandbox

JOB_BOUND = 20.0  # seconds; a quiet job takes some hundredths
_PAUSE = 0.15  # seconds between jobs: work, not saturation


class Neighbours:
  """`count` sandboxes at work; a context manager.

  Attributes:
    sandboxes: them.
    errors: wrong results, losses and late jobs, in words.
    seconds: how long each job took.
  """

  def __init__(self, count: int, backend: str, image: str | None = None):
    self.sandboxes: list[Sandbox] = []
    self.errors: list[str] = []
    self.seconds: list[float] = []
    self._count, self._backend, self._image = count, backend, image
    self._end = threading.Event()
    self._threads: list[threading.Thread] = []

  def __enter__(self) -> "Neighbours":
    try:
      for _ in range(self._count):
        self.sandboxes.append(
          make_sandbox(self._image, self._backend, limits=Limits(pids=32, cpus=0.5))
        )
    except BaseException:
      self.__exit__()
      raise
    for index, sandbox in enumerate(self.sandboxes):
      thread = threading.Thread(target=self._work, args=(index, sandbox), daemon=True)
      thread.start()
      self._threads.append(thread)
    return self

  def __exit__(self, *_: object) -> None:
    self._end.set()
    for thread in self._threads:
      thread.join(JOB_BOUND + 30)
    for sandbox in self.sandboxes:
      sandbox.close()

  def summary(self) -> dict[str, float]:
    """Jobs done, and the median and largest seconds of one."""
    taken = self.seconds or [0.0]
    return {
      "jobs": len(self.seconds),
      "job_p50_s": round(statistics.median(taken), 4),
      "job_max_s": round(max(taken), 4),
    }

  def _work(self, index: int, sandbox: Sandbox) -> None:
    number = 0
    while not self._end.is_set():
      number += 1
      start = time.monotonic()
      try:
        wrong = job(sandbox, random.Random(f"{index}/{number}"))
      except SandboxError as error:
        self.errors.append(f"neighbour {index} failed at job {number}: {error}")
        return
      took = time.monotonic() - start
      self.seconds.append(took)
      if wrong:
        self.errors.append(f"neighbour {index}, job {number}: {wrong}")
      if took > JOB_BOUND:
        self.errors.append(f"neighbour {index}, job {number} took {took:.1f} s")
      self._end.wait(_PAUSE)


def job(sandbox: Sandbox, rng: random.Random) -> str:
  """Does one job. Returns what was wrong, '' if nothing was."""
  lines = [f"{rng.randrange(10**9):09d}" for _ in range(300)]
  data = "".join(f"{line}\n" for line in lines).encode()
  sandbox.write_file("numbers", data)
  command = (
    "x=$((x + 1)); sort numbers > sorted & sort -r numbers > reverse & wait; "
    "cat sorted reverse | sha256sum | cut -c 1-64; wc -l < sorted; "
    "mkdir -p d && cp numbers d/copy && cmp numbers d/copy && ls d && rm -r d; echo end"
  )
  result = sandbox.run(command, timeout=JOB_BOUND)
  ordered = sorted(lines)
  both = "".join(f"{line}\n" for line in [*ordered, *reversed(ordered)]).encode()
  wanted = f"{hashlib.sha256(both).hexdigest()}\n{len(lines)}\ncopy\nend\n"
  if result.output != wanted or result.exit_code != 0:
    return f"exit status {result.exit_code}, output {result.output[-300:]!r}"
  back = sandbox.read_file("sorted")
  if back != "".join(f"{line}\n" for line in ordered).encode():
    return f"a file came back with {len(back)} other bytes"
  return ""
