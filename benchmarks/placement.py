"""Placement of sandboxes on a simulated fleet: utilisation, waiting, losses; prints one JSON line.

  python -m benchmarks.placement --sandboxes=10000 --hosts=200

Seeded discrete events in simulated time: arrivals of several tenants, departures, hosts that fail
(what runs there is lost) and rejoin empty. The queue and the scheduler are those of `rome.envs`;
the checks are not: own sums of what is on every host are compared with its capacity at every
placement, and every sandbox must be placed exactly once, on a host that is up. Broken rules are
counted in `double_allocations` and `over_capacity`. The simulated numbers depend on the seed alone;
`seconds` is what the whole simulation took on this machine.
"""

import datetime
import heapq
import itertools
import json
import os
import random
import statistics
import time
from typing import Any

from absl import app, flags

from rome.envs.admission import Capacity, dominant_share
from rome.envs.placement import Scheduler
from rome.envs.queueing import FairQueue, Ticket

_SANDBOXES = flags.DEFINE_integer("sandboxes", 10_000, "How many arrive.", lower_bound=1)
_HOSTS = flags.DEFINE_integer("hosts", 200, "How many there are.", lower_bound=1)
_STRATEGY = flags.DEFINE_enum("strategy", "pack", ["pack", "spread"], "Which host is taken.")
_SEED = flags.DEFINE_integer("seed", 0, "Of everything.")

_IMAGES = tuple(f"image-{i}" for i in range(12))
_SIZES = ((0.5, 256, 32, 96), (1.0, 512, 64, 128), (2.0, 2048, 256, 256), (4.0, 8192, 1024, 512))
_WEIGHTS = (60, 25, 12, 3)
_HOST_SIZES = ((16.0, 32_768, 32_768, 30_000), (32.0, 65_536, 65_536, 30_000))
_LIFE, _DOWN = 600.0, 300.0  # mean seconds of a sandbox's life and of a host's outage
_LOAD = 4.0  # processors asked for, of those there are, while sandboxes arrive: most must wait


class Simulation:
  """One run; `run` gives its result. Raises AssertionError where the books do not add up."""

  def __init__(self, sandboxes: int, hosts: int, strategy: str, seed: int):
    self.random = random.Random(seed)
    self.count, self.strategy = sandboxes, strategy
    self.scheduler, self.queue = Scheduler(strategy), FairQueue(limit=sandboxes)
    self.capacities = {f"host-{i:04}": Capacity(*_HOST_SIZES[i % 2]) for i in range(hosts)}
    for name, capacity in self.capacities.items():
      self.scheduler.join(name, capacity)
    self.events: list[tuple[float, int, str, str]] = []
    self.order = itertools.count()
    self.now = 0.0
    self.images: dict[str, str] = {}
    # The checks' own books: what is on each host that is up, and where each sandbox is or was.
    self.books: dict[str, dict[str, Capacity]] = {name: {} for name in self.capacities}
    self.ever: dict[str, str] = {}
    self.lost: set[str] = set()
    self.left: set[str] = set()
    self.waits: list[float] = []
    self.peak = self.longest = self.failures = self.local = self.doubles = self.over = 0
    self.area = self.span = 0.0

  def run(self) -> dict[str, Any]:
    """Plays every event."""
    self._plan()
    start = time.perf_counter()
    while self.events:
      when, _, kind, name = heapq.heappop(self.events)
      self._measure(when)
      self.now = when
      getattr(self, f"_{kind}")(name)
      self._admit()
    seconds = time.perf_counter() - start
    assert len(self.queue) == 0 and len(self.ever) == self.count
    assert self.lost | self.left == set(self.ever) and not self.lost & self.left
    assert not any(self.books.values()) and self.scheduler.used() == Capacity(0, 0, 0, 0)
    return {
      "sandboxes": self.count,
      "hosts": len(self.capacities),
      "strategy": self.strategy,
      "peak_running": self.peak,
      "peak_waiting": self.longest,
      "waited": sum(wait > 0 for wait in self.waits),
      "lost": len(self.lost),
      "host_failures": self.failures,
      "double_allocations": self.doubles,
      "over_capacity": self.over,
      "cpu_utilisation": round(self.area / self.span, 3),
      "image_local_share": round(self.local / self.count, 3),
      "wait_p50_s": round(statistics.median(self.waits), 2),
      "wait_p99_s": round(sorted(self.waits)[int(0.99 * len(self.waits))], 2),
      "wait_max_s": round(max(self.waits), 2),
      "seconds": round(seconds, 2),
      "us_per_placement": round(1e6 * seconds / self.count, 1),
    }

  def _plan(self) -> None:
    """Enters all arrivals, and failures of hosts over the same time."""
    cpus = sum(capacity.cpus for capacity in self.capacities.values())
    mean = sum(w * size[0] for w, size in zip(_WEIGHTS, _SIZES, strict=True)) / sum(_WEIGHTS)
    rate = _LOAD * cpus / (mean * _LIFE)
    for i in range(self.count):
      self.now += self.random.expovariate(rate)
      self._push(self.now, "arrive", f"sandbox-{i:06}")
    self.span = self.now
    names = sorted(self.capacities)
    for name in self.random.sample(names, max(1, len(names) // 10)):
      self._push(self.random.uniform(0, self.now), "fail", name)
    self.now = 0.0

  def _push(self, when: float, kind: str, name: str) -> None:
    heapq.heappush(self.events, (when, next(self.order), kind, name))

  def _arrive(self, name: str) -> None:
    amount = Capacity(*self.random.choices(_SIZES, _WEIGHTS)[0])
    tenant = self.random.choices(("a", "b", "c", "d"), (70, 20, 8, 2))[0]
    self.images[name] = self.random.choice(_IMAGES)
    cost = dominant_share(amount, self.scheduler.total())
    self.queue.put(Ticket(name, tenant, amount, cost, self.now, float("inf")))

  def _admit(self) -> None:
    def fits(ticket: Ticket) -> bool:
      return self.scheduler.find(ticket.needs) is not None

    while (ticket := self.queue.pop(self.now, fits)) is not None:
      image = self.images[ticket.key]
      has = {name for name, host in self.scheduler.hosts.items() if image in host.images}
      host = self.scheduler.place(ticket.key, ticket.needs, image)
      assert host is not None, "it fitted a moment ago"
      self.doubles += ticket.key in self.ever
      self.local += host in has
      self.ever[ticket.key] = host
      self.books[host][ticket.key] = ticket.needs  # KeyError: placed on a host that is down
      self._check(host)
      self.waits.append(self.now - ticket.since)
      self._push(self.now + self.random.expovariate(1 / _LIFE), "leave", ticket.key)
    self.peak = max(self.peak, sum(len(book) for book in self.books.values()))
    self.longest = max(self.longest, len(self.queue))

  def _leave(self, name: str) -> None:
    if name in self.lost:
      self.doubles += self.scheduler.release(name)  # its room was freed with its host
      return
    del self.books[self.ever[name]][name]
    self.left.add(name)
    assert self.scheduler.release(name) and not self.scheduler.release(name)

  def _fail(self, host: str) -> None:
    lost = self.scheduler.lose(host)
    book = self.books.pop(host)
    assert sorted(lost) == sorted(book) and not self.scheduler.lose(host)
    self.lost.update(lost)
    self.failures += 1
    self._push(self.now + self.random.expovariate(1 / _DOWN), "rejoin", host)

  def _rejoin(self, host: str) -> None:
    self.scheduler.join(host, self.capacities[host])
    self.books[host] = {}

  def _check(self, host: str) -> None:
    columns = zip(*(amount.units() for amount in self.books[host].values()), strict=True)
    limits = self.capacities[host].units()
    self.over += any(sum(c) > limit for c, limit in zip(columns, limits, strict=True))

  def _measure(self, until: float) -> None:
    """Adds the time since the last event to the mean utilisation, while sandboxes arrive."""
    end = min(until, self.span)
    if end > self.now:
      self.area += (end - self.now) * self.scheduler.used().cpus / self.scheduler.total().cpus


def simulate(sandboxes: int, hosts: int, strategy: str = "pack", seed: int = 0) -> dict[str, Any]:
  """Runs one simulation and returns what it found; see `Simulation`."""
  return Simulation(sandboxes, hosts, strategy, seed).run()


def main(argv: list[str]) -> None:
  del argv
  result = simulate(_SANDBOXES.value, _HOSTS.value, _STRATEGY.value, _SEED.value)
  machine = {"cpus": os.cpu_count(), "date": datetime.date.today().isoformat()}
  print(json.dumps({"benchmark": "placement", "seed": _SEED.value, **result, **machine}))


if __name__ == "__main__":
  app.run(main)
