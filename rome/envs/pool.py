"""A pool of warm sandboxes, handed out one episode at a time.

Sandboxes start ahead of demand in a few threads. A released one is reset in the background and
serves again until it has served `reuse` episodes; then, or when it is unhealthy, it is closed and
replaced. A sandbox is asked whether it lives before it is handed out.
"""

import queue
import threading
import time
from collections.abc import Callable

from rome.envs.common import SandboxError
from rome.envs.sandbox import Sandbox, close_all

_WORKERS = 4  # starts and resets at a time
_RETRIES = 3  # starts that may fail in a row before the pool gives up


class PoolClosed(SandboxError):
  """The pool is closed, or gave up because no sandbox starts any more."""


class SandboxPool:
  """Thread-safe; use as a context manager, or call `close`.

  Attributes:
    counters: what happened so far: "started", "acquired", "reset", "replaced" (worn out or
      unhealthy), "dead" (found dead before hand-out or at reset), "start_failures".
  """

  def __init__(self, make: Callable[[], Sandbox], size: int, reuse: int = 1):
    """Starts the sandboxes; returns at once.

    Args:
      make: starts one sandbox.
      size: how many to hold.
      reuse: episodes that one sandbox serves; 1 means a fresh one for each.
    """
    if size < 1 or reuse < 1:
      raise ValueError(f"size and reuse must be at least 1, not {size} and {reuse}")
    self._make, self._reuse, self._size = make, reuse, size
    self._served: dict[Sandbox, int] = {}  # every sandbox of the pool -> episodes served
    self._held: set[Sandbox] = set()
    self._ready: queue.SimpleQueue[Sandbox | None] = queue.SimpleQueue()
    self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
    self._lock = threading.Lock()
    self._error: Exception | None = None
    self._closed = False
    self.counters = dict.fromkeys(
      ("started", "acquired", "reset", "replaced", "dead", "start_failures"), 0
    )
    self._threads = [
      threading.Thread(target=self._work, name=f"sandbox-pool-{i}", daemon=True)
      for i in range(min(_WORKERS, size))
    ]
    for thread in self._threads:
      thread.start()
    for _ in range(size):
      self._jobs.put(self._start)

  def acquire(self, timeout: float = 60.0) -> Sandbox:
    """Takes a sandbox, empty and alive.

    Args:
      timeout: seconds to wait for one.

    Raises:
      PoolClosed: the pool is closed or gave up; its cause is the last failure.
      TimeoutError: none became free in time.
    """
    deadline = time.monotonic() + timeout
    while True:
      self._check()
      try:
        sandbox = self._ready.get(timeout=max(0.0, deadline - time.monotonic()))
      except queue.Empty:
        raise TimeoutError(
          f"no sandbox became free in {timeout:.0f} s ({len(self._held)} of {self._size} in use)"
        ) from None
      if sandbox is None:  # wakes every waiter in turn when the pool closes
        self._ready.put(None)
        continue
      if sandbox.alive():
        with self._lock:
          if not self._closed:
            self._held.add(sandbox)
            self.counters["acquired"] += 1
            return sandbox
      else:
        self._replace(sandbox, "dead")

  def release(self, sandbox: Sandbox, healthy: bool = True) -> None:
    """Gives a sandbox back; returns at once. Releasing it twice is an error.

    Args:
      sandbox: from `acquire`.
      healthy: False if it must not be used again.

    Raises:
      ValueError: the pool did not hand it out.
    """
    with self._lock:
      if self._closed:
        return
      if sandbox not in self._held:
        raise ValueError(f"sandbox {sandbox.id} was not handed out by this pool")
      self._held.remove(sandbox)
      self._served[sandbox] += 1
      worn = self._served[sandbox] >= self._reuse
    if worn or not healthy:
      self._replace(sandbox, "replaced")
    else:
      self._jobs.put(lambda: self._reset(sandbox))

  def close(self) -> None:
    """Closes every sandbox, those in use too. Idempotent."""
    with self._lock:
      if self._closed:
        return
      self._closed = True
    self._ready.put(None)
    for _ in self._threads:
      self._jobs.put(None)
    with self._lock:
      sandboxes = list(self._served)
    close_all(sandboxes)
    for thread in self._threads:
      thread.join(timeout=60)

  def __enter__(self) -> "SandboxPool":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _check(self) -> None:
    if self._error is not None:
      raise PoolClosed(f"no sandbox starts any more: {self._error}") from self._error
    if self._closed:
      raise PoolClosed("the pool is closed")

  def _work(self) -> None:
    while (job := self._jobs.get()) is not None:
      if not self._closed:
        job()

  def _count(self, name: str) -> None:
    with self._lock:
      self.counters[name] += 1

  def _start(self) -> None:
    for attempt in range(_RETRIES):
      try:
        sandbox = self._make()
        break
      except Exception as error:
        self._count("start_failures")
        if attempt == _RETRIES - 1 or self._closed or not isinstance(error, SandboxError):
          self._error = error
          self._ready.put(None)
          return
        time.sleep(0.2 * 2**attempt)
    with self._lock:
      closed = self._closed
      if not closed:
        self._served[sandbox] = 0
        self.counters["started"] += 1
    if closed:
      sandbox.close()
    else:
      self._ready.put(sandbox)

  def _reset(self, sandbox: Sandbox) -> None:
    try:
      sandbox.reset()
    except SandboxError:
      self._replace(sandbox, "dead")
      return
    self._count("reset")
    self._ready.put(sandbox)

  def _replace(self, sandbox: Sandbox, why: str) -> None:
    """Starts another and closes this one, both in the background: starting comes first."""
    with self._lock:
      self.counters[why] += 1
    self._jobs.put(self._start)
    self._jobs.put(lambda: self._retire(sandbox))

  def _retire(self, sandbox: Sandbox) -> None:
    sandbox.close()
    with self._lock:
      self._served.pop(sandbox, None)  # until here `close` would have found it
