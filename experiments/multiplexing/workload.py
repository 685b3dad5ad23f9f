"""What is simulated: stage times that were measured, and episodes drawn from distributions.

Measured (measured.json says where): how fast a device generates at so many rows, computes contexts
and trains, how long new weights take, how long environments of a recorded run took. Assumed: how
long episodes are (`Workload`), and that training speeds up with devices as `scaling` says, since no
figure of it is at hand.

  python -m experiments.multiplexing.workload RUN/timeline.json

prints the latencies of a recorded run, as measured.json holds them.
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any

import numpy as np

MEASURED = pathlib.Path(__file__).parent / "measured.json"
_KINDS = ("reset", "step", "tests")  # spans of environments on a timeline


@dataclasses.dataclass(frozen=True)
class Stages:
  """How fast things are; times in seconds.

  Attributes:
    rows, rates: a device with so many rows samples so many tokens a second, all rows together;
      linear in between, flat beyond.
    prefill_rate: context tokens a second.
    train_rate: tokens a second that one device trains on.
    scaling: n devices train n**scaling as fast as one.
    publish: until new weights are in use.
    latencies: what environments take for "reset", "step" and "tests": quantiles in equal distances.
  """

  rows: tuple[float, ...]
  rates: tuple[float, ...]
  prefill_rate: float
  train_rate: float
  publish: float
  latencies: dict[str, tuple[float, ...]]
  scaling: float = 1.0

  @classmethod
  def measured(cls) -> "Stages":
    m = json.loads(MEASURED.read_text())
    return cls(
      rows=tuple(m["decode"]["rows"]),
      rates=tuple(m["decode"]["tokens_per_s"]),
      prefill_rate=m["prefill"]["tokens_per_s"],
      train_rate=m["train"]["tokens_per_s"],
      publish=m["publish"]["seconds"],
      latencies={kind: tuple(m["environments"]["quantiles"][kind]) for kind in _KINDS},
    )

  def rate(self, rows: int) -> float:
    """Tokens a second of a device with `rows` rows."""
    return float(np.interp(rows, (0, *self.rows), (0.0, *self.rates)))


@dataclasses.dataclass(frozen=True)
class Workload:
  """Episodes and batches.

  Attributes:
    devices: N.
    slots: rows of a device.
    batch: samples an update.
    turns: replies of an episode, in the mean.
    tail: sigma of their log-normal distribution; 0 is all alike.
    reply, reply_sigma: tokens of a reply, log-normal: mean and sigma.
    prompt, observation: context tokens in front of the first reply, and of each later one.
    rollout_share: of the device time that an update needs, generation's part, with full rows and
      nothing wasted; training is made faster or slower to have it. None: as measured.
    env_share: of an episode's time with full rows, the environment's part; recorded latencies are
      stretched to have it. None: as recorded.
  """

  devices: int = 8
  slots: int = 16
  batch: int = 64
  turns: float = 8.0
  tail: float = 0.75
  reply: float = 96.0
  reply_sigma: float = 0.5
  prompt: int = 200
  observation: int = 50
  rollout_share: float | None = 0.7
  env_share: float | None = 0.15


@dataclasses.dataclass(frozen=True)
class Plan:
  """One episode before it is played: tokens of its replies, seconds of its environment."""

  replies: tuple[int, ...]
  reset: float
  steps: tuple[float, ...]  # behind each reply; the last one are the tests

  def tokens(self, workload: Workload) -> int:
    """What is trained on."""
    return workload.prompt + sum(self.replies) + workload.observation * (len(self.replies) - 1)


class Draws:
  """The episodes of a seed: number i is the same whatever the policy and the timing."""

  def __init__(self, workload: Workload, stages: Stages, seed: int):
    self.workload, self.stages, self.seed = workload, stages, seed
    self._plans: dict[int, Plan] = {}
    self._latencies = {kind: np.array(stages.latencies[kind]) for kind in _KINDS}
    self._grid = np.linspace(0, 1, len(stages.latencies["step"]))
    self._stretch = 1.0
    if workload.env_share is not None:
      # A row's time of an episode, against what environments take as recorded.
      seconds = workload.turns * workload.reply * workload.slots / stages.rate(workload.slots)
      recorded = sum(self._mean(kind) for kind in ("reset", "tests"))
      recorded += (workload.turns - 1) * self._mean("step")
      self._stretch = seconds * workload.env_share / (1 - workload.env_share) / recorded

  def _mean(self, kind: str) -> float:
    return float(self._latencies[kind].mean())

  def plan(self, number: int) -> Plan:
    if number not in self._plans:
      self._plans[number] = self._draw(number)
    return self._plans[number]

  def _draw(self, number: int) -> Plan:
    w, rng = self.workload, np.random.default_rng((self.seed, number))
    turns = max(1, round(_log_normal(rng, w.turns, w.tail, 1)[0]))
    replies = np.maximum(1, _log_normal(rng, w.reply, w.reply_sigma, turns).round()).astype(int)
    kinds = ["reset", *["step"] * (turns - 1), "tests"]
    places = rng.random(len(kinds))
    reset, *steps = (
      self._stretch * float(np.interp(place, self._grid, self._latencies[kind]))
      for kind, place in zip(kinds, places, strict=True)
    )
    return Plan(tuple(replies.tolist()), reset, tuple(steps))


def _log_normal(rng: np.random.Generator, mean: float, sigma: float, count: int) -> np.ndarray:
  return rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)


def _work(workload: Workload, stages: Stages) -> tuple[float, float]:
  """Device seconds of a mean sample: to generate with full rows, and to train as measured."""
  w = workload
  contexts = w.prompt + w.observation * (w.turns - 1)
  generation = w.turns * w.reply / stages.rate(w.slots) + contexts / stages.prefill_rate
  return generation, (contexts + w.turns * w.reply) / stages.train_rate


def measured_share(workload: Workload, stages: Stages) -> float:
  """Generation's part of the work, as measured."""
  generation, training = _work(workload, stages)
  return generation / (generation + training)


def training_speed(workload: Workload, stages: Stages) -> float:
  """By how much training is sped up to have the workload's `rollout_share`."""
  share = workload.rollout_share
  if share is None:
    return 1.0
  generation, training = _work(workload, stages)
  return training / (generation * (1 - share) / share)


def latencies_of(timeline: pathlib.Path) -> dict[str, Any]:
  """Quantiles 0, 0.01, … 1 of what environments took in a recorded run, by kind, in seconds."""
  text = timeline.read_text().rstrip().rstrip(",").removesuffix("]")
  spans: dict[str, list[float]] = {kind: [] for kind in _KINDS}
  for event in json.loads(text + "]"):
    if event["ph"] == "X" and event["name"] in _KINDS and event["tid"] >= 2:
      spans[event["name"]].append(event["dur"] / 1e6)
  grid = np.linspace(0, 1, 101)
  return {
    "spans": {kind: len(found) for kind, found in spans.items()},
    "quantiles": {kind: np.quantile(s, grid).round(5).tolist() for kind, s in spans.items()},
  }


if __name__ == "__main__":
  print(json.dumps(latencies_of(pathlib.Path(sys.argv[1]))))
