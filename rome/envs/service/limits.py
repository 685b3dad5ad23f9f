"""How fast and how much: request rates, upload rates, and the calls that work at a time.

All of it runs on the event loop, so nothing here locks. A rate is a token bucket. Blocking work
goes to a bounded pool of threads; a slot is given back when the thread is done, not when the client
stops waiting, so that hanging up does not make room for more work than the host can bear.
"""

import asyncio
import concurrent.futures
import time
from collections.abc import Callable
from typing import TypeVar

from rome.envs.service.auth import Tenant
from rome.envs.service.errors import ApiError

_T = TypeVar("_T")
SLOT_WAIT = 10.0  # seconds that a call waits for a slot


class Bucket:
  """A token bucket: `rate` a second, at most `burst` at once."""

  def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic):
    self._rate, self._burst, self._clock = rate, burst, clock
    self._level, self._filled = burst, clock()

  def take(self, amount: float = 1.0) -> float:
    """Takes an amount where there is enough. Returns 0, or the seconds until there will be."""
    now = self._clock()
    self._level = min(self._burst, self._level + (now - self._filled) * self._rate)
    self._filled = now
    if self._level >= amount:
      self._level -= amount
      return 0.0
    return (amount - self._level) / self._rate

  def owe(self, amount: float) -> float:
    """Takes an amount in any case. Returns the seconds after which the debt is paid."""
    self.take(0.0)
    self._level -= amount
    return max(0.0, -self._level / self._rate)


class Rates:
  """The buckets of every tenant."""

  def __init__(self) -> None:
    self._requests: dict[str, Bucket] = {}
    self._uploads: dict[str, Bucket] = {}

  def request(self, tenant: Tenant) -> None:
    """Counts a request.

    Raises:
      ApiError: 429, there were too many.
    """
    rate = tenant.quotas.requests_per_second
    bucket = self._requests.setdefault(tenant.name, Bucket(rate, max(1.0, 2 * rate)))
    wait = bucket.take()
    if wait:
      raise ApiError(
        429,
        "rate_limited",
        f"tenant {tenant.name} sends more than {rate:g} requests a second",
        "wait as long as Retry-After says; nothing was done",
        retry_after=wait,
      )

  def upload(self, tenant: Tenant, size: int) -> float:
    """Counts uploaded bytes. Returns the seconds to wait before more are read."""
    rate = tenant.quotas.upload_bytes_per_second
    return self._uploads.setdefault(tenant.name, Bucket(rate, rate)).owe(size)


class Workers:
  """Threads for blocking work, shared fairly: each tenant has slots of its own."""

  def __init__(self, threads: int):
    """`threads` bounds the work of all tenants together."""
    self._executor = concurrent.futures.ThreadPoolExecutor(threads, "service")
    self._all = asyncio.Semaphore(threads)
    self._slots: dict[str, asyncio.Semaphore] = {}
    self.working = 0

  def submit(self, work: Callable[[], object]) -> None:
    """Runs work that nobody waits for, as soon as a thread is free."""
    self._executor.submit(work)

  async def run(self, tenant: Tenant, work: Callable[[], _T], timeout: float) -> _T:
    """Runs blocking work in a thread.

    Args:
      tenant: on whose account.
      work: what to do.
      timeout: seconds to wait for it; the thread itself goes on to its own end.

    Raises:
      ApiError: 429 where the tenant's slots stay taken, 503 where all are, 504 after `timeout`.
    """
    slots = self._slots.setdefault(tenant.name, asyncio.Semaphore(tenant.quotas.calls))
    await _take(slots, 429, "too_many_calls", f"{tenant.quotas.calls} calls of {tenant.name}")
    try:
      await _take(self._all, 503, "out_of_capacity", "all calls that the service can do at a time")
    except BaseException:
      slots.release()
      raise
    loop = asyncio.get_running_loop()
    self.working += 1
    future = asyncio.wrap_future(self._executor.submit(self._work, loop, slots, work))
    future.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # it was seen
    done, _ = await asyncio.wait({future}, timeout=timeout)
    if not done:
      raise ApiError(
        504, "too_slow", f"not done within {timeout:g} s", "ask for less, or look again later"
      )
    return future.result()

  def _work(
    self, loop: asyncio.AbstractEventLoop, slots: asyncio.Semaphore, work: Callable[[], _T]
  ) -> _T:
    try:
      return work()
    finally:
      if not loop.is_closed():
        loop.call_soon_threadsafe(self._give_back, slots)

  def _give_back(self, slots: asyncio.Semaphore) -> None:
    self.working -= 1
    slots.release()
    self._all.release()

  def close(self) -> None:
    """Takes no more work. What runs ends with the sandboxes it works on."""
    self._executor.shutdown(wait=False, cancel_futures=True)


async def _take(slots: asyncio.Semaphore, status: int, code: str, what: str) -> None:
  try:
    async with asyncio.timeout(SLOT_WAIT):
      await slots.acquire()
  except TimeoutError as error:
    message = f"{what} are running, and none ended in {SLOT_WAIT:g} s"
    raise ApiError(status, code, message, "try again later; nothing was done", 5) from error
