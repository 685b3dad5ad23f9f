"""Cells of the sweep as tables, JSON and a picture."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.ablations import figures
from experiments.multiplexing.simulator import Outcome, Policy
from experiments.multiplexing.workload import Stages, Workload, measured_share


@dataclasses.dataclass(frozen=True)
class Cell:
  """What every policy made of the same episodes.

  Attributes:
    workload, alpha, drop: of the cell.
    runs: outcomes of a policy, one a seed.
  """

  workload: Workload
  alpha: int
  drop: bool
  runs: Mapping[Policy, Sequence[Outcome]]

  def best(self, shared: bool) -> Policy:
    """The policy of a kind that trains most tokens a second, over all seeds.

    Without alpha, devices that turn are the synchronous loop on all devices.
    """
    found = [p for p in self.runs if p.shared == shared and p.alpha == self.alpha]
    return max(found, key=lambda p: self.mean(p, "trained"))

  @property
  def synchronous(self) -> Policy:
    return next(p for p in self.runs if p.trainers == self.workload.devices)

  def values(self, policy: Policy, name: str) -> np.ndarray:
    return np.array([getattr(outcome, name) for outcome in self.runs[policy]])

  def mean(self, policy: Policy, name: str) -> float:
    return float(self.values(policy, name).mean())

  def gain(self, over: Policy) -> np.ndarray:
    """How many times as fast as `over` the best subset trains, by seeds [S]."""
    return self.values(self.best(True), "trained") / self.values(over, "trained")


def _share(stages: Stages, workload: Workload) -> str:
  share = workload.rollout_share
  return f"{measured_share(workload, stages):.2f} (measured)" if share is None else f"{share:g}"


def _common(cell: Cell) -> list[str]:
  static, shared = cell.best(False), cell.best(True)
  n = cell.workload.devices
  return [
    f"{cell.mean(cell.synchronous, 'seconds'):.1f}",
    f"{cell.mean(static, 'seconds'):.1f} ({n - static.trainers}+{static.trainers})",
    f"{cell.mean(shared, 'seconds'):.1f} ({shared.trainers})",
    f"{cell.mean(static, 'idle'):.2f}, {cell.mean(shared, 'idle'):.2f}",
    figures.show(cell.gain(static), 0),
  ]


_COLUMNS = (
  "synchronous, s an update",
  "best split, s (generate + train)",
  "best subset that turns, s (its size)",
  "idle: split, subset",
  "subset to split",
)


def tables(stages: Stages, cells: Sequence[Cell], variants: Mapping[str, Cell]) -> str:
  """Markdown: samples are waited for; samples are dropped; variants of the middle cell."""
  waiting = [
    [_share(stages, c.workload), f"{c.workload.tail:g}", str(c.alpha), *_common(c),
     figures.show(c.gain(c.synchronous), 0) if c.alpha else "the same"]
    for c in cells if not c.drop
  ]  # fmt: skip
  columns = ("rollout's share", "tail", "α", *_COLUMNS, "subset to synchronous")
  text = "Nothing dropped:\n\n" + figures.markdown(columns, waiting)
  dropping = [
    [f"{c.workload.tail:g}", str(c.alpha), *_common(c),
     ", ".join(f"{c.mean(c.best(shared), 'dropped'):.2f}" for shared in (False, True))]
    for c in cells if c.drop
  ]  # fmt: skip
  if dropping:
    share = next(c for c in cells if c.drop).workload.rollout_share
    columns = ("tail", "α", *_COLUMNS, "dropped: split, subset")
    text += f"\nDropped where too old, share {share:g}:\n\n" + figures.markdown(columns, dropping)
  changed = [
    [name, *_common(c), *(f"{c.mean(c.best(shared), 'redone'):.2f}" for shared in (False, True))]
    for name, c in variants.items()
  ]
  columns = ("one change", *_COLUMNS, "redone, split", "redone, subset")
  return text + "\nThe middle cell changed:\n\n" + figures.markdown(columns, changed)


def as_json(stages: Stages, cells: Sequence[Cell], variants: Mapping[str, Cell]) -> dict[str, Any]:
  def of(cell: Cell) -> dict[str, Any]:
    runs = [
      {"policy": dataclasses.asdict(p), "outcomes": [_rounded(o) for o in outcomes]}
      for p, outcomes in cell.runs.items()
    ]
    return {"workload": dataclasses.asdict(cell.workload), "alpha": cell.alpha,
            "drop": cell.drop, "runs": runs}  # fmt: skip

  return {
    "stages": {k: v for k, v in dataclasses.asdict(stages).items() if k != "latencies"},
    "cells": [of(cell) for cell in cells],
    "variants": {name: of(cell) for name, cell in variants.items()},
  }


def _rounded(outcome: Outcome) -> dict[str, float]:
  return {k: float(f"{v:.4g}") for k, v in dataclasses.asdict(outcome).items()}


def draw(path: pathlib.Path, stages: Stages, cells: Sequence[Cell]) -> None:
  """Gains over the best split and idle shares, by rollout's share; a column an alpha."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  alphas = sorted({cell.alpha for cell in cells})
  tails = sorted({cell.workload.tail for cell in cells})
  figure, axes = pyplot.subplots(2, len(alphas), squeeze=False, sharey="row", figsize=(9.5, 6.4))
  for column, alpha in enumerate(alphas):
    top, bottom = axes[0][column], axes[1][column]
    for i, tail in enumerate(tails):
      some = [c for c in cells if (c.alpha, c.workload.tail) == (alpha, tail)]
      xs = [c.workload.rollout_share or measured_share(c.workload, stages) for c in some]
      gains = np.array([cell.gain(cell.best(False)) for cell in some]).T
      _band(top, xs, gains, f"tail {tail:g}", f"C{i}", "-")
      kinds: tuple[tuple[bool, str], ...] = ((False, "--"), (True, "-"))
      for shared, style in kinds:
        idle = np.array([c.values(c.best(shared), "idle") for c in some]).T
        name = "subset that turns" if shared else "static split"
        _band(bottom, xs, idle, f"{name}, tail {tail:g}", f"C{i}", style)
    top.axhline(1.0, color="grey", linewidth=0.8)
    top.set_title(f"α = {alpha}", fontsize=10)
    bottom.set_xlabel("rollout's share of the work", fontsize=9)
    bottom.set_ylim(0, 0.9)  # room for the legend
  axes[0][0].set_ylabel("speed, best subset to best split", fontsize=9)
  axes[1][0].set_ylabel("idle share of the devices", fontsize=9)
  axes[0][0].legend(fontsize=8)
  axes[1][0].legend(fontsize=7, ncol=2, loc="upper left")
  figure.tight_layout()
  figure.savefig(path, dpi=110, metadata={"Software": None})
  pyplot.close(figure)


def _band(
  axis: Any, xs: Sequence[float], values: np.ndarray, label: str, color: str, style: str
) -> None:
  mean, low, high = figures.mean_interval(values)
  axis.plot(xs, mean, style, label=label, color=color, linewidth=1.3, marker="o", markersize=3)
  axis.fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0)
