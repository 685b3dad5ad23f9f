"""Where episodes start: initial state, sequential rollback, parallel initialisation (3.2.4.4).

  python -m experiments.ablate_resampling --workdir=runs/resampling [--seeds=5]

The warm policy gets each step right once in seven times, so that from the initial state a task of
eight steps is practically never solved. Every finished run is a line of WORKDIR/cells.jsonl, and
the same command goes on behind the last one. Leaves WORKDIR/results.json, report.md and report.png.
"""

import dataclasses
import pathlib
import sys
import time
from typing import Any

import numpy as np
from absl import app, flags
from tqdm import tqdm

from experiments.ablations import figures, learn, resample
from experiments.ablations.cells import Cells, CellsError
from rome import ipa

_DEFAULTS = learn.Settings(groups=8, iterations=60, rightness=(0.15,) * 8)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the results.", required=True)
_SEEDS = flags.DEFINE_integer("seeds", 5, "Runs of each arm.", lower_bound=1)
_ARMS = flags.DEFINE_list("arms", list(resample.ARMS), "Which to compare.")
_HORIZON = flags.DEFINE_integer("horizon", 8, "Dependent steps of the tasks.", lower_bound=2)
_ITERATIONS = flags.DEFINE_integer("iterations", _DEFAULTS.iterations, "Batches a run.")
_WARM_UPDATES = flags.DEFINE_integer("warm_updates", _DEFAULTS.warm_updates, "Supervised updates.")
_RATE = flags.DEFINE_float("rate", 3e-3, "Learning rate of all arms.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  try:
    settings = dataclasses.replace(
      _DEFAULTS, iterations=_ITERATIONS.value, warm_updates=_WARM_UPDATES.value
    )
  except ValueError as error:
    raise app.UsageError(str(error)) from None
  unknown = [name for name in _ARMS.value if name not in resample.ARMS]
  if unknown:
    raise app.UsageError(f"unknown arm {unknown[0]!r}; arms are {', '.join(resample.ARMS)}")
  try:
    _ablate(pathlib.Path(_WORKDIR.value), settings, ipa.ResamplingConfig())
  except CellsError as error:
    sys.exit(f"error: {error}")


def _ablate(workdir: pathlib.Path, settings: learn.Settings, config: ipa.ResamplingConfig) -> None:
  shared = dataclasses.asdict(settings) | dataclasses.asdict(config)
  shared |= {"rate": _RATE.value, "horizon": _HORIZON.value}
  cells = Cells(workdir, shared)
  warm: dict[int, Any] = {}
  results: dict[str, list[dict[str, Any]]] = {}
  total = len(_ARMS.value) * _SEEDS.value
  with tqdm(total=total, unit="run", disable=not sys.stderr.isatty()) as progress:
    for name in _ARMS.value:
      results[name] = []
      for seed in range(_SEEDS.value):
        found = cells.get(arm=name, seed=seed)
        if found is None:
          if seed not in warm:
            warm[seed] = learn.warm_start(settings, _HORIZON.value, seed)
          found = cells.put(_run(settings, config, name, seed, warm[seed]), arm=name, seed=seed)
        results[name].append(found)
        progress.update()
  _report(workdir, settings, shared, results)


def _run(
  settings: learn.Settings,
  config: ipa.ResamplingConfig,
  name: str,
  seed: int,
  params: Any,
) -> dict[str, Any]:
  start = time.perf_counter()
  _, curves = resample.reinforce(
    settings, config, resample.ARMS[name], _HORIZON.value, params, seed, _RATE.value
  )
  result = {k: np.asarray(v, float).round(6).tolist() for k, v in curves.items()}
  return result | {"seconds": round(time.perf_counter() - start, 2)}


def _report(
  workdir: pathlib.Path,
  settings: learn.Settings,
  shared: dict[str, Any],
  results: dict[str, list[dict[str, Any]]],
) -> None:
  stride = settings.eval_every * settings.batch
  rows = []
  panels: dict[str, dict[str, dict[str, Any]]] = {"success": {}}
  titles = {
    "task_success": "training tasks, initial state",
    "min_task_success": "worst training task, initial state",
    "test_success": "held-out instances, initial state",
  }
  for name, runs in results.items():
    label = resample.ARMS[name].label
    for key, title in titles.items():
      values = np.array([run[key] for run in runs])
      panels["success"].setdefault(title, {})[label] = (
        stride * np.arange(values.shape[1]), values,
      )  # fmt: skip
    reached = [figures.samples_to(run["task_success"], stride) for run in runs]
    ends = [figures.show([run[key][-1] for run in runs], 0, 1) for key in titles]
    crucial = figures.show([run["crucial"][-1] for run in runs], 0)
    solved = sum(round(sum(run["train_success"]) * settings.batch) for run in runs)
    rows.append([label, figures.show_samples(reached), *ends, str(solved), crucial])
  columns = (
    "arm", f"episodes to {figures.THRESHOLD} from the initial state [range] (seeds)",
    "tasks, end", "worst task, end", "held out, end", "episodes solved in training, all seeds",
    "crucial chunks",
  )  # fmt: skip
  table = figures.markdown(columns, rows)
  (workdir / "report.md").write_text(table)
  figures.write_json(
    workdir / "results.json",
    {
      "settings": shared,
      "arms": {name: dataclasses.asdict(resample.ARMS[name]) for name in results},
      "cells": results,
      **figures.provenance(),
    },
  )
  figures.draw(workdir / "report.png", panels)
  print(table)


if __name__ == "__main__":
  app.run(main)
