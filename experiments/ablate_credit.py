"""Chunk-level against token- and sequence-level credit on chained tasks of growing horizon.

  python -m experiments.ablate_credit --workdir=runs/credit [--seeds=5 --horizons=2,4,8,16]

Learning rates are chosen first, for each estimator from the same list, on seeds that the comparison
does not use. Every finished run is a line of WORKDIR/cells.jsonl, and the same command goes on
behind the last one. Leaves WORKDIR/results.json, report.md and report.png.
"""

import dataclasses
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags
from tqdm import tqdm

from experiments.ablations import chain, container, figures, learn
from experiments.ablations.cells import Cells, CellsError
from experiments.ablations.estimators import ESTIMATORS
from rome import envs
from rome.evals import metrics

_DEFAULTS = learn.Settings()
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the results.", required=True)
_SEEDS = flags.DEFINE_integer("seeds", 5, "Runs of each cell.", lower_bound=1)
_HORIZONS = flags.DEFINE_list("horizons", ["2", "4", "8", "16"], "Dependent steps of the tasks.")
_ESTIMATORS = flags.DEFINE_list("estimators", list(ESTIMATORS), "Which to compare.")
_ITERATIONS = flags.DEFINE_integer("iterations", _DEFAULTS.iterations, "Batches a run.")
_RATES = flags.DEFINE_list("rates", ["1e-3", "3e-3", "1e-2"], "Learning rates to choose from.")
_SELECT_HORIZON = flags.DEFINE_integer("select_horizon", 8, "Horizon on which rates are chosen.")
_SELECT_SEEDS = flags.DEFINE_integer("select_seeds", 2, "Runs of each rate.", lower_bound=1)
_WARM_UPDATES = flags.DEFINE_integer("warm_updates", _DEFAULTS.warm_updates, "Supervised updates.")
_EPISODES = flags.DEFINE_integer(
  "container_episodes", 60, "Real episodes of each kind; 0 leaves that cell out.", lower_bound=0
)
_SANDBOX = flags.DEFINE_enum(
  "sandbox", "auto", ["auto", "podman", "bubblewrap", "process"], "Backend of the real episodes."
)
_ACCEPT = flags.DEFINE_bool("i_accept_no_isolation", False, "Allows --sandbox=process.")
_SELECTION_SEED = 1000  # the first seed of the choice of rates; the comparison counts from 0


_VECTORISED = 2048  # episodes against which those of the container are held


class Runs:
  """Runs a cell or reads it; warm starts are shared by all estimators."""

  def __init__(self, settings: learn.Settings, cells: Cells, num_cells: int):
    self._settings, self._cells = settings, cells
    self._warm: dict[tuple[int, int], Any] = {}
    self._progress = tqdm(total=num_cells, unit="run", disable=not sys.stderr.isatty())

  def warm(self, horizon: int, seed: int) -> Any:
    if (horizon, seed) not in self._warm:
      self._warm[horizon, seed] = learn.warm_start(self._settings, horizon, seed)
    return self._warm[horizon, seed]

  def run(self, estimator: str, horizon: int, seed: int, rate: float) -> dict[str, Any]:
    name = {"estimator": estimator, "horizon": horizon, "seed": seed, "rate": rate}
    found = self._cells.get(**name)
    if found is None:
      warm = self.warm(horizon, seed)
      start = time.perf_counter()
      _, curves = learn.reinforce(self._settings, ESTIMATORS[estimator], horizon, warm, seed, rate)
      result = {k: np.asarray(v, float).round(6).tolist() for k, v in curves.items()}
      result["seconds"] = round(time.perf_counter() - start, 2)
      found = self._cells.put(result, **name)
    self._progress.update()
    return found


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  try:
    settings = learn.Settings(iterations=_ITERATIONS.value, warm_updates=_WARM_UPDATES.value)
    horizons = [int(h) for h in _HORIZONS.value]
    rates = [float(r) for r in _RATES.value]
  except ValueError as error:
    raise app.UsageError(str(error)) from None
  unknown = [name for name in _ESTIMATORS.value if name not in ESTIMATORS]
  if unknown or min(*horizons, _SELECT_HORIZON.value) < 2:
    raise app.UsageError(f"estimators are {', '.join(ESTIMATORS)}; horizons are at least 2")
  workdir = pathlib.Path(_WORKDIR.value)
  try:
    _ablate(workdir, settings, horizons, rates)
  except (CellsError, envs.SandboxError) as error:
    sys.exit(f"error: {error}")


def _ablate(
  workdir: pathlib.Path, settings: learn.Settings, horizons: list[int], rates: list[float]
) -> None:
  # What an estimator is belongs to the settings too: its name alone says not which H or gamma.
  arms = {name: repr(estimator) for name, estimator in ESTIMATORS.items()}
  cells = Cells(workdir, dataclasses.asdict(settings) | arms)
  names, seeds = _ESTIMATORS.value, range(_SEEDS.value)
  choosing = len(rates) * _SELECT_SEEDS.value if len(rates) > 1 else 0
  runs = Runs(settings, cells, len(names) * (len(horizons) * len(seeds) + choosing))
  chosen = {name: _choose_rate(runs, name, rates) for name in names}
  results = {
    name: {h: [runs.run(name, h, seed, chosen[name][0]) for seed in seeds] for h in horizons}
    for name in names
  }
  real = None
  if _EPISODES.value:
    real = _real_cell(cells, runs, settings, names[0], 4, chosen[names[0]][0])
  _report(workdir, settings, chosen, results, real)


def _choose_rate(runs: Runs, name: str, rates: list[float]) -> tuple[float, dict[str, float]]:
  """The rate with the highest test success averaged over training and selection seeds."""
  if len(rates) == 1:
    return rates[0], {}
  scores = {}
  for rate in rates:
    seeds = range(_SELECTION_SEED, _SELECTION_SEED + _SELECT_SEEDS.value)
    curves = [runs.run(name, _SELECT_HORIZON.value, seed, rate)["test_success"] for seed in seeds]
    scores[f"{rate:g}"] = round(float(np.mean(curves)), 4)
  best = max(rates, key=lambda rate: scores[f"{rate:g}"])
  return best, scores


def _real_cell(
  cells: Cells, runs: Runs, settings: learn.Settings, estimator: str, horizon: int, rate: float
) -> dict[str, Any]:
  """The cross-check: the warm and the trained policy, and random words, in a real sandbox."""
  name = {"real": estimator, "horizon": horizon, "rate": rate, "episodes": _EPISODES.value}
  found = cells.get(**name)
  if found is not None:
    return found
  warm = runs.warm(horizon, 0)
  trained, _ = learn.reinforce(settings, ESTIMATORS[estimator], horizon, warm, 0, rate)
  key = jax.random.key(3)
  n = _EPISODES.value
  symbols = chain.draw_instances(key, n, horizon, held_out=True)
  instances = np.asarray(symbols)
  actors: dict[str, tuple[Any, container.Actor]] = {}
  actors["random"] = (None, container.random_actor(0, instances))
  for label, params in (("warm", warm), ("trained", trained)):
    actors[label] = (params, container.policy_actor(params, settings.engine, horizon, key))
  result: dict[str, Any] = {}
  with envs.make_sandbox(backend=_SANDBOX.value, accept_no_isolation=_ACCEPT.value) as sandbox:
    for label, (params, actor) in actors.items():
      played = container.play(sandbox, instances, actor)
      successes = int(played.rewards.sum())
      result[label] = {
        "episodes": n,
        "steps": int(played.lengths.sum()),
        "disagreements": container.disagreements(instances, played),
        "success_real": successes / n,
        "interval_real": metrics.wilson_interval(successes, n),
      }
      if params is not None:
        many = dataclasses.replace(settings, eval_episodes=_VECTORISED)
        rate_many = learn.test_success(many, horizon, params, key)
        result[label]["success_vectorised"] = round(float(rate_many), 4)
    result["backend"] = sandbox.backend
  return cells.put(result, **name)


def _report(
  workdir: pathlib.Path,
  settings: learn.Settings,
  chosen: dict[str, tuple[float, dict[str, float]]],
  results: dict[str, dict[int, list[dict[str, Any]]]],
  real: dict[str, Any] | None,
) -> None:
  stride = settings.eval_every * settings.batch
  horizons = list(next(iter(results.values())))
  rows = []
  panels: dict[str, dict[str, dict[str, Any]]] = {}
  for h in horizons:
    for name, by_horizon in results.items():
      runs = by_horizon[h]
      tests = np.array([run["test_success"] for run in runs])
      norms = np.array([run["grad_norm"] for run in runs])
      rows.append([
        str(h), ESTIMATORS[name].label, f"{chosen[name][0]:g}",
        figures.show_samples([figures.samples_to(curve, stride) for curve in tests]),
        figures.show(tests.mean(axis=1), 0, 1), figures.show(tests[:, -1], 0, 1),
        figures.show(norms.mean(axis=1), 0),
        figures.show([np.mean(run["masked_share"]) for run in runs], 0, 1),
      ])  # fmt: skip
      for title, key in (
        ("gradient norm", "grad_norm"), ("train success", "train_success"),
        ("test success", "test_success"),
      ):  # fmt: skip
        values = np.array([run[key] for run in runs])
        if key != "test_success":  # one point a stretch, as the evaluations have
          values = values.reshape(len(runs), -1, settings.eval_every).mean(axis=2)
        xs = stride * np.arange(values.shape[1])
        if key == "grad_norm":
          values = np.maximum(values, 1e-6)
        panels.setdefault(title, {}).setdefault(f"{h} steps", {})[ESTIMATORS[name].label] = (
          xs, values,
        )  # fmt: skip
  columns = (
    "horizon", "estimator", "rate", f"episodes to {figures.THRESHOLD} [range] (seeds)",
    "test success, mean of training", "test success, end", "gradient norm", "masked share",
  )  # fmt: skip
  table = figures.markdown(columns, rows)
  if real:
    table += "\n" + _real_table(real)
  (workdir / "report.md").write_text(table)
  figures.write_json(
    workdir / "results.json",
    {
      "settings": dataclasses.asdict(settings),
      "estimators": {name: repr(ESTIMATORS[name]) for name in results},
      "rates": {name: {"chosen": c[0], "scores": c[1]} for name, c in chosen.items()},
      "cells": results,
      "real": real,
      **figures.provenance(),
    },
  )
  figures.draw(workdir / "report.png", panels, log_rows=("gradient norm",))
  print(table)


def _real_table(real: dict[str, Any]) -> str:
  rows = []
  for label in ("random", "warm", "trained"):
    cell = real[label]
    low, high = cell["interval_real"]
    rows.append([
      label, str(cell["episodes"]), str(cell["steps"]), str(cell["disagreements"]),
      f"{cell['success_real']:.3f} [{low:.3f}, {high:.3f}]",
      str(cell.get("success_vectorised", "")),
    ])  # fmt: skip
  columns = ("words", "episodes", "steps", "disagreements", "success, container",
             f"success, vectorised ({_VECTORISED})")  # fmt: skip
  return figures.markdown(columns, rows)


if __name__ == "__main__":
  app.run(main)
