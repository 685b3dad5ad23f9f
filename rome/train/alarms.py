"""Alarms: rules over the metric rows of reinforcement learning. Pure: rows in, alarms out.

A rule reads one figure of every update. Beyond its warning bound for some updates in a row it
warns, once a streak; beyond its stop bound for as many in a row it stops the run. Its state is JSON
values, so that a run which was killed and goes on warns at the same updates.

Choice: defaults are far from what a healthy run shows (the quickstart from its first update to its
last), because an alarm that is usually false is not read; only a mismatch under which no ratio
means anything stops a run unasked. An update that lacks the figure ends the streak.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

LENGTH_REFERENCE = 5  # updates whose mean length is what growth is measured against
SOLVED = 0.8  # success from which a policy may be as sure of itself as it likes

Row = Mapping[str, Any]


class AlarmStop(RuntimeError):
  """A rule's stop bound was passed; the message names rule, figure and what to do."""


@dataclasses.dataclass(frozen=True)
class Bounds:
  """When a rule speaks.

  Attributes:
    warn: beyond it the rule warns.
    stop: beyond it the run ends, after a checkpoint; None never stops.
    updates: for how many in a row; 0 switches the rule off.
  """

  warn: float
  stop: float | None = None
  updates: int = 3

  def __post_init__(self) -> None:
    if self.updates < 0:
      raise ValueError(f"updates must be at least 0 (0 switches the rule off), got {self.updates}")
    for name, value in (("warn", self.warn), ("stop", self.stop)):
      if value is not None and math.isnan(value):
        raise ValueError(f"{name} must be a number, got {value}")


@dataclasses.dataclass(frozen=True)
class AlarmsConfig:
  """Bounds of each rule.

  Attributes:
    grad_norm: above; the global gradient norm before it is clipped.
    entropy: below; nats a token, of updates that solve less than 0.8 of what they play.
    length: above; sampled tokens a reply of failures, as a multiple of their mean over the first
      five updates that had any.
    mismatch: above; mean |log-prob of the engine - log-prob of the trainer|, nats a token.
    filtered: above; groups replaced because their members earned the same, of all groups played.
    masked: above; chunks that the mismatch mask leaves out, of those reinforced.
    invalid: above; episodes lost to infrastructure, of all that ended.
  """

  grad_norm: Bounds = Bounds(10.0)
  entropy: Bounds = Bounds(0.005)
  length: Bounds = Bounds(2.0)
  mismatch: Bounds = Bounds(0.05, stop=1.0)
  filtered: Bounds = Bounds(0.6, updates=5)
  masked: Bounds = Bounds(0.25)
  invalid: Bounds = Bounds(0.1)


@dataclasses.dataclass(frozen=True)
class Rule:
  """What a rule reads.

  Attributes:
    name: also the name of its setting.
    figure: what the value is, in words.
    bounds: its bounds.
    read: the value, from a row and the rule's own memory (JSON values); None where there is none.
    below: whether it is values below the bounds that are out of them.
  """

  name: str
  figure: str
  bounds: Bounds
  read: Callable[[Row, dict[str, Any]], float | None]
  below: bool = False

  def beyond(self, value: float | None, bound: float | None) -> bool:
    if value is None or bound is None:
      return False
    return value < bound if self.below else value > bound


@dataclasses.dataclass(frozen=True)
class Alarm:
  """A bound was passed for as many updates in a row as the rule asks.

  Attributes:
    rule: its name.
    value: of the newest update.
    bound: the one that was passed.
    updates: in a row so far.
    stop: whether the run ends.
    text: one line.
  """

  rule: str
  value: float
  bound: float
  updates: int
  stop: bool
  text: str

  def row(self) -> dict[str, Any]:
    """As a row of metrics.jsonl has it."""
    names = ("rule", "value", "bound", "updates", "stop")
    return {name: getattr(self, name) for name in names}


def rules(config: AlarmsConfig) -> tuple[Rule, ...]:
  """The rules that are switched on."""
  every = (
    Rule("grad_norm", "gradient norm", config.grad_norm, _figure("grad_norm")),
    Rule("entropy", "entropy while unsolved", config.entropy, _entropy, below=True),
    Rule("length", "growth of failures' length", config.length, _growth),
    Rule("mismatch", "mean |log-ratio|", config.mismatch, _figure("mismatch_mean")),
    Rule("filtered", "share of filtered groups", config.filtered, _figure("filtered_share")),
    Rule("masked", "share of masked chunks", config.masked, _figure("masked_share")),
    Rule("invalid", "share of invalid episodes", config.invalid, _figure("invalid_share")),
  )
  return tuple(rule for rule in every if rule.bounds.updates)


def check(config: AlarmsConfig, row: Row, state: dict[str, Any]) -> list[Alarm]:
  """What the rules say of one update.

  Args:
    config: the bounds.
    row: the update's metrics.
    state: by rule, what it remembers of earlier updates; empty at first. It is changed in place.
  Returns:
    Warnings that begin with this update, and stops.
  """
  alarms = []
  for rule in rules(config):
    own = state.setdefault(rule.name, {"warn": 0, "stop": 0})
    value = rule.read(row, own)
    for kind, bound in (("warn", rule.bounds.warn), ("stop", rule.bounds.stop)):
      own[kind] = own[kind] + 1 if rule.beyond(value, bound) else 0
      # A stop holds for as long as the streak does: with the same bounds it stops again at once.
      reached = own[kind] == rule.bounds.updates or (kind == "stop" and own[kind])
      if reached and own[kind] >= rule.bounds.updates:
        assert value is not None and bound is not None
        alarms.append(_alarm(rule, value, bound, own[kind], kind == "stop"))
  return alarms


def _alarm(rule: Rule, value: float, bound: float, updates: int, stop: bool) -> Alarm:
  side, kind = "below" if rule.below else "above", "stop" if stop else "warn"
  text = (
    f"alarm {rule.name}: {rule.figure} is {value:.3g}, {side} alarms.{rule.name}.{kind}={bound:g} "
    f"for {updates} updates in a row"
  )
  return Alarm(rule.name, value, bound, updates, stop, text)


def _figure(name: str) -> Callable[[Row, dict[str, Any]], float | None]:
  return lambda row, _: row.get(name)


def _entropy(row: Row, _: dict[str, Any]) -> float | None:
  """Certainty is a collapse where it is not earned."""
  success = row.get("success")
  return row.get("entropy") if success is not None and success < SOLVED else None


def _growth(row: Row, own: dict[str, Any]) -> float | None:
  length, seen = row.get("reply_length_negative"), own.setdefault("reference", [])
  if length is None:
    return None
  if len(seen) < LENGTH_REFERENCE:
    seen.append(length)
    return None
  return length / max(sum(seen) / len(seen), 1e-9)
