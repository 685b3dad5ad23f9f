"""A discrete-event simulation of devices that generate, train, or turn from one to the other.

Rows of a device share its speed, which depends on how many there are: a reply ends when the work
that the device has done for each of its rows passes what the reply needs. Since every arrival and
departure changes when all others end, events of a device are made anew and old ones recognised by a
number; a library of processes (simpy) would have to interrupt every row instead.

Rules: an update fetches a batch of finished samples; weights are published between updates, and
replies under way begin anew under them, their prefixes void; a sample may be consumed while the
version is at most `alpha` above the one that it began under; no more samples are begun than can be
consumed in time, and no more are open than there are rows. A device that turns to training hands
its requests to the rest, where they begin anew without their prefix, and requests go where
`rome.rollout.engine.pool` would send them.
"""

import collections
import dataclasses
import heapq
import itertools
from typing import Any

from experiments.multiplexing.workload import Draws, Plan, training_speed


@dataclasses.dataclass(frozen=True)
class Policy:
  """How devices are used.

  Attributes:
    trainers: devices that train.
    shared: whether these generate as well while they do not train.
    alpha: by how many versions a sample may be old.
    drop: samples that grow too old are dropped, under way or finished. Else updates wait for
      samples that could not be consumed any more otherwise: every one that is begun is consumed,
      and all policies consume the same ones.
    threshold: finished samples, in batches, at which training begins.
  """

  trainers: int
  shared: bool
  alpha: int
  drop: bool = False
  threshold: float = 1.0


def policies(devices: int, alpha: int, drop: bool, threshold: float = 1.0) -> list[Policy]:
  """All splits, all subsets that may turn, and the synchronous loop on all devices."""
  counts = range(1, devices)
  static = [Policy(n, False, alpha, drop, threshold) for n in counts]
  shared = [Policy(n, True, alpha, drop, threshold) for n in counts] if alpha else []
  return [*static, *shared, Policy(devices, True, 0)]


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What the updates behind the first `warmup` took.

  Attributes:
    seconds: an update.
    idle: share of the devices' time in which they neither train nor have a row.
    dropped: samples that became too old, by those begun.
    redone: share of the generated work that was thrown away and done again.
    trained: tokens trained on, a second.
  """

  seconds: float
  idle: float
  dropped: float
  redone: float
  trained: float


class Sample:
  """An episode under way; `context` are its tokens so far, `home` where they are known."""

  def __init__(self, plan: Plan, version: int, prompt: int):
    self.plan, self.version, self.context = plan, version, prompt
    self.turn, self.gone = 0, False
    self.home: tuple[int, int] | None = None  # device and its epoch
    self.known = 0


class Device:
  """Rows that share one speed."""

  def __init__(self, number: int):
    self.number, self.epoch, self.stamp = number, 0, 0
    self.rows: dict[Sample, tuple[float, float]] = {}  # begun and done at which `served`
    self.ends: list[tuple[float, int, Sample]] = []
    self.served = self.since = self.busy = 0.0
    self.training = False


class Simulation:
  """One run of one policy; see `simulate`."""

  def __init__(self, draws: Draws, policy: Policy):
    workload, stages = draws.workload, draws.stages
    self.workload, self.stages, self.policy, self.draws = workload, stages, policy, draws
    self.now, self.version = 0.0, 0
    self._events: list[tuple[float, int, str, Any]] = []
    self._unique = itertools.count()
    self._rates = [stages.rate(n) / max(n, 1) for n in range(workload.slots + 1)]
    self._prefill = stages.rate(workload.slots) / stages.prefill_rate  # work of a context token
    self._speed = training_speed(workload, stages) * stages.train_rate
    self._speed *= policy.trainers**stages.scaling
    self.devices = [Device(n) for n in range(workload.devices)]
    self._trainers = self.devices[workload.devices - policy.trainers :]
    self._serving = self.devices[: workload.devices - policy.trainers]
    if policy.shared:
      self._serving = list(self.devices)
    self._rows = len(self._serving) * workload.slots
    self._queue: collections.deque[Sample] = collections.deque()
    self._open: dict[Sample, None] = {}  # an ordered set
    self._buffer: list[Sample] = []
    self._trained: list[Sample] = []
    self.ended: list[float] = []  # when each update ended
    self.begun = self.dropped = 0
    self.work = self.redone = self.tokens = 0.0

  # --- rows ------------------------------------------------------------------------------------

  def _settle(self, device: Device) -> None:
    """Brings a device to the present."""
    passed, rows = self.now - device.since, len(device.rows)
    device.since = self.now
    if rows or device.training:
      device.busy += passed
    if rows:
      device.served += passed * self._rates[rows]
      self.work += passed * self._rates[rows] * rows

  def _plan(self, device: Device) -> None:
    """Says anew when the next reply of a device ends."""
    device.stamp += 1
    if device.ends:
      left = max(device.ends[0][0] - device.served, 0.0) / self._rates[len(device.rows)]
      self._at(left, "reply", (device, device.stamp))

  def _at(self, delay: float, kind: str, what: Any) -> None:
    heapq.heappush(self._events, (self.now + delay, next(self._unique), kind, what))

  def _unknown(self, device: Device, sample: Sample) -> int:
    known = sample.home == (device.number, device.epoch)
    return sample.context - (sample.known if known else 0)

  def _need(self, device: Device, sample: Sample) -> float:
    return sample.plan.replies[sample.turn] + self._prefill * self._unknown(device, sample)

  def _cost(self, device: Device, sample: Sample) -> float:
    """As `EnginePool` has it; nobody knows yet how long the reply will be."""
    return (self._unknown(device, sample) + self.workload.reply) * (len(device.rows) + 1)

  def _place(self) -> None:
    """Gives waiting requests to free rows."""
    touched = {}
    while self._queue:
      free = [d for d in self._serving if len(d.rows) < self.workload.slots]
      if not free:
        break
      sample = self._queue.popleft()
      if sample.gone:
        continue
      costs = {d: self._cost(d, sample) for d in free}
      device = min(free, key=costs.__getitem__)
      if device.number not in touched:
        self._settle(device)
        touched[device.number] = device
      self._begin(device, sample)
    for device in touched.values():
      self._plan(device)

  def _begin(self, device: Device, sample: Sample) -> None:
    end = device.served + self._need(device, sample)
    device.rows[sample] = device.served, end
    heapq.heappush(device.ends, (end, next(self._unique), sample))
    sample.home, sample.known = (device.number, device.epoch), sample.context

  def _clear(self, device: Device) -> list[Sample]:
    """Takes all rows off a device, whose prefixes are void then."""
    self._settle(device)
    samples = list(device.rows)
    self.redone += sum(device.served - begun for begun, _ in device.rows.values())
    device.rows, device.ends = {}, []
    device.epoch += 1
    device.stamp += 1
    return [sample for sample in samples if not sample.gone]

  # --- samples ---------------------------------------------------------------------------------

  def _fill(self) -> None:
    """Begins as many samples as have a row and can be consumed in time; trains if it may."""
    most = (1 + self.policy.alpha) * self.workload.batch
    while (
      len(self._open) < self._rows
      and len(self._open) + len(self._buffer) + len(self._trained) < most
    ):
      sample = Sample(self.draws.plan(self.begun), self.version, self.workload.prompt)
      self.begun += 1
      self._open[sample] = None
      self._at(sample.plan.reset, "ask", sample)
    if not self._trained and self._enough():
      self._train()

  def _enough(self) -> bool:
    """Whether an update may begin; without drops, only if later ones can consume all that is left.

    The j-th update from now on is the last one for what began `alpha - j` versions ago.
    """
    batch, alpha = self.workload.batch, self.policy.alpha
    if len(self._buffer) < self.policy.threshold * batch or self.policy.drop:
      return len(self._buffer) >= self.policy.threshold * batch
    self._buffer.sort(key=lambda sample: sample.version)
    ages = [self.version - s.version for s in [*self._open, *self._buffer[batch:]]]
    return all(sum(age >= alpha - j for age in ages) <= j * batch for j in range(alpha))

  def _train(self) -> None:
    batch = self.workload.batch
    self._trained, self._buffer = self._buffer[:batch], self._buffer[batch:]
    if self.policy.shared:
      self._serving = [d for d in self.devices if d not in self._trainers]
      moved = [sample for device in self._trainers for sample in self._clear(device)]
      self._queue.extendleft(reversed(moved))
    for device in self._trainers:
      self._settle(device)
      device.training = True
    tokens = sum(sample.plan.tokens(self.workload) for sample in self._trained)
    self._at(tokens / self._speed + self.stages.publish, "trained", tokens)

  def _update(self, tokens: int) -> None:
    """An update has ended: its devices come back, the new weights begin everything anew."""
    for device in self._trainers:
      self._settle(device)
      device.training = False
    if self.policy.shared:
      self._serving = list(self.devices)
    self._trained = []
    self.tokens += tokens
    self.version += 1
    self.ended.append(self.now)
    old = [s for s in [*self._open, *self._buffer] if self.version - s.version > self.policy.alpha]
    for sample in old:
      sample.gone = True
      self._open.pop(sample, None)
    self.dropped += len(old)
    self._buffer = [sample for sample in self._buffer if not sample.gone]
    for device in self._serving:
      for sample in self._clear(device):
        self._begin(device, sample)
      self._plan(device)

  # --- events ----------------------------------------------------------------------------------

  def _reply(self, device: Device, stamp: int) -> None:
    if stamp != device.stamp:
      return  # rows have come or gone meanwhile
    self._settle(device)
    end, _, sample = heapq.heappop(device.ends)
    device.served = end  # but for rounding it is there
    del device.rows[sample]
    self._plan(device)
    plan, turn = sample.plan, sample.turn
    sample.context += plan.replies[turn]
    sample.known = sample.context
    sample.turn += 1
    last = sample.turn == len(plan.replies)
    self._at(plan.steps[turn], "finish" if last else "ask", sample)

  def _ask(self, sample: Sample) -> None:
    if sample.gone:
      return
    if sample.turn:
      sample.context += self.workload.observation
    self._queue.append(sample)

  def _finish(self, sample: Sample) -> None:
    if not sample.gone:
      del self._open[sample]
      self._buffer.append(sample)

  def run(self, updates: int) -> None:
    """Goes on until so many updates have ended."""
    self._fill()
    while len(self.ended) < updates:
      self._place()
      self.now, _, kind, what = heapq.heappop(self._events)
      if kind == "reply":
        self._reply(*what)
      elif kind == "ask":
        self._ask(what)
      else:
        self._finish(what) if kind == "finish" else self._update(what)
        self._fill()
    for device in self.devices:
      self._settle(device)

  @property
  def busy(self) -> float:
    """Device seconds in use so far."""
    return sum(device.busy for device in self.devices)


def simulate(draws: Draws, policy: Policy, *, warmup: int = 4, updates: int = 16) -> Outcome:
  """Plays `draws` for `warmup + updates` updates and measures the last ones.

  Raises:
    ValueError: the policy leaves no device to generate or to train, or can never train.
  """
  n = draws.workload.devices
  if not 1 <= policy.trainers <= n - (not policy.shared):
    raise ValueError(
      f"trainers={policy.trainers} of {n} devices leave none to generate or to train"
    )
  if policy.shared and policy.trainers == n and policy.alpha:
    raise ValueError("with alpha > 0 requests are under way when training begins: keep a device")
  if not 1 <= policy.threshold <= 1 + policy.alpha:
    raise ValueError(f"threshold={policy.threshold} is not in 1..{1 + policy.alpha}")
  run = Simulation(draws, policy)
  run.run(warmup)
  start, busy, dropped, begun = run.now, run.busy, run.dropped, run.begun
  work, redone, tokens = run.work, run.redone, run.tokens
  run.run(warmup + updates)
  wall = run.now - start
  return Outcome(
    seconds=wall / updates,
    idle=max(1 - (run.busy - busy) / (n * wall), 0.0),  # below it by rounding
    dropped=(run.dropped - dropped) / max(run.begun - begun, 1),
    redone=(run.redone - redone) / (run.work - work),
    trained=(run.tokens - tokens) / wall,
  )
