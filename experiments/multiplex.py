"""Devices that turn from rollout to training and back, against static splits: simulated.

  python -m experiments.multiplex --workdir=runs/multiplex [--seeds=5]

A sweep over the part that rollout has in the work, how unequal episodes are, and how old samples
may be, with measured stage times (experiments/multiplexing/measured.json). The best of all static
splits stands against the best of all subsets that may turn to training. Leaves results.json,
report.md and report.png in WORKDIR; about 15 minutes on one core.
"""

import dataclasses
import pathlib
import sys

from absl import app, flags
from tqdm import tqdm

from experiments.ablations import figures
from experiments.multiplexing import report
from experiments.multiplexing.simulator import Policy, simulate
from experiments.multiplexing.workload import Draws, Stages, Workload

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the results.", required=True)
_SEEDS = flags.DEFINE_integer("seeds", 5, "Sets of episodes that each policy plays.", lower_bound=2)
_UPDATES = flags.DEFINE_integer("updates", 16, "Updates that are measured.", lower_bound=1)
_SHARES = flags.DEFINE_list("shares", ["0.5", "0.7", "0.85"], "Rollout's parts in the work.")
_TAILS = flags.DEFINE_list("tails", ["0.25", "0.75", "1.25"], "Sigmas of the number of turns.")

# Each is one change of the middle cell: a share of 0.7, a tail of 0.75, alpha 1.
_VARIANTS = {
  "as in the table above": {},
  "each doubling of trainers is worth 1.9": {"scaling": 0.926},
  "new weights take 10 times as long": {"publish": 5.9},
  "environments as fast as recorded": {"env_share": None},
  "environments are half of an episode": {"env_share": 0.5},
  "64 rows a device": {"slots": 64},
  "4 devices": {"devices": 4},
  "training begins with 1.5 batches": {"threshold": 1.5},
}


def policies(devices: int, alpha: int, drop: bool, threshold: float = 1.0) -> list[Policy]:
  """All splits, all subsets that may turn, and the synchronous loop on all devices."""
  counts = range(1, devices)
  static = [Policy(n, False, alpha, drop, threshold) for n in counts]
  shared = [Policy(n, True, alpha, drop, threshold) for n in counts] if alpha else []
  return [*static, *shared, Policy(devices, True, 0)]


def run_cell(
  workload: Workload, stages: Stages, alpha: int, drop: bool = False, threshold: float = 1.0
) -> report.Cell:
  """Every policy on the same episodes."""
  runs: dict[Policy, list] = {}
  for seed in range(_SEEDS.value):
    draws = Draws(workload, stages, seed)
    for policy in policies(workload.devices, alpha, drop, threshold):
      runs.setdefault(policy, []).append(simulate(draws, policy, updates=_UPDATES.value))
  return report.Cell(workload, alpha, drop, runs)


def _variant(change: dict, stages: Stages) -> report.Cell:
  """One line of `_VARIANTS`: its settings are of the stages, the workload or the policies."""
  stage_names = {f.name for f in dataclasses.fields(Stages)}
  of_stages = {k: v for k, v in change.items() if k in stage_names}
  threshold = change.get("threshold", 1.0)
  of_workload = {k: v for k, v in change.items() if k not in stage_names | {"threshold"}}
  stages = dataclasses.replace(stages, **of_stages)
  return run_cell(Workload(**of_workload), stages, alpha=1, threshold=threshold)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  try:
    shares: list[float | None] = [None, *map(float, _SHARES.value)]
    tails = [float(tail) for tail in _TAILS.value]
  except ValueError as error:
    raise app.UsageError(str(error)) from None
  workdir = pathlib.Path(_WORKDIR.value)
  workdir.mkdir(parents=True, exist_ok=True)
  stages = Stages.measured()
  grid = [Workload(rollout_share=share, tail=tail) for share in shares for tail in tails]
  jobs = [(workload, alpha, False) for workload in grid for alpha in (0, 1, 2)]
  jobs += [(w, alpha, True) for w in grid if w.rollout_share == shares[-2] for alpha in (1, 2)]
  with tqdm(total=len(jobs) + len(_VARIANTS), unit="cell", disable=not sys.stderr.isatty()) as bar:
    cells, variants = [], {}
    for workload, alpha, drop in jobs:
      cells.append(run_cell(workload, stages, alpha, drop))
      bar.update()
    for name, change in _VARIANTS.items():
      variants[name] = _variant(change, stages)
      bar.update()
  text = report.tables(stages, cells, variants)
  (workdir / "report.md").write_text(text)
  value = report.as_json(stages, cells, variants) | figures.provenance()
  figures.write_json(workdir / "results.json", value | {"updates": _UPDATES.value})
  report.draw(
    workdir / "report.png", stages, [cell for cell in cells if cell.alpha and not cell.drop]
  )
  print(text)


if __name__ == "__main__":
  app.run(main)
