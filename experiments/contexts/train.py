"""Trains a small policy for `experiments.context --scale=small` by imitation (Eq. 1).

  python -m experiments.contexts.train --workdir=runs/context-policy
  python -m experiments.context --scale=small --model=runs/context-policy --workdir=runs/context

A teacher (experiments/contexts/teacher.py) plays tasks that the experiment does not have, with sets
of techniques drawn at random, in sandboxes; episodes that it solves are imitated, row by row. So
the policy has seen each technique, and has had to do without. Before that come drills
(experiments/contexts/drill.py), a fifth of the updates, and tasks with short texts, another one.
Leaves the weights, in the format of Hugging Face, and metrics.jsonl in WORKDIR. Started again, it
begins anew; `--init_from` goes on from the weights of an earlier run, with tasks alone.
"""

import concurrent.futures as cf
import dataclasses
import json
import multiprocessing
import os
import pathlib
import random
import sys
import time
from collections.abc import Sequence

from absl import app, flags
from tqdm import tqdm

from experiments.contexts.families import FAMILIES
from experiments.contexts.play import SMALL, arms
from experiments.contexts.teacher import demonstrate
from rome.trajectory import Trajectory

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the weights.", required=True)
_EPISODES = flags.DEFINE_integer(
  "episodes", 500, "Of the teacher, of either length.", lower_bound=20
)
_STEPS = flags.DEFINE_integer("steps", 750, "Updates.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 16, "Rows an update.", lower_bound=1)
_RATE = flags.DEFINE_float("learning_rate", 3e-3, "Peak.", lower_bound=0.0)
_MODEL = flags.DEFINE_string("model", "tiny", "Preset of rome.models.")
_INIT = flags.DEFINE_string("init_from", None, "Directory of weights to begin with.")
_SEED = flags.DEFINE_integer("seed", 0, "Of weights, tasks and batches.")
_JOBS = flags.DEFINE_integer("jobs", os.cpu_count(), "Processes that play.", lower_bound=1)
_SHORT = 0.03  # share of a text's length, as `Size.share`
_DRILLS = 4000
_FIRST_TASK = 1000  # those of the experiment are below
_MICRO_ROWS = 4
_EVERY = 100  # updates between two lines and two saves


def _play(job: tuple[str, str, int, bool, float]) -> list[Trajectory]:
  family, arm, seed, lossy, share = job
  scale = dataclasses.replace(SMALL, size=dataclasses.replace(SMALL.size, share=share))
  result, rows = demonstrate(family, arm, seed, lossy, scale)
  return rows if result.solved else []


def demonstrations(episodes: int, share: float) -> list[Trajectory]:
  """Rows of the episodes that the teacher solves.

  Args:
    episodes: that it plays.
    share: of the length of texts.
  """
  rng = random.Random(f"{_SEED.value} {share}")
  sets = [name for name, on in arms().items() if "compaction" in on]  # no other can be solved
  jobs = [
    (rng.choice(list(FAMILIES)), rng.choice(sets), _FIRST_TASK + i, rng.random() < 0.5, share)
    for i in range(episodes)
  ]
  spawn = multiprocessing.get_context("spawn")
  with cf.ProcessPoolExecutor(_JOBS.value, spawn) as pool:
    played = pool.map(_play, jobs, chunksize=8)
    shown = tqdm(played, total=len(jobs), unit="episode", disable=not sys.stderr.isatty())
    solved = [rows for rows in shown if rows]
  rows = [row for episode in solved for row in episode]
  print(f"{len(solved)} of {episodes} episodes solved: {len(rows)} rows to imitate")
  if len(rows) < _BATCH.value:
    raise app.UsageError(f"--batch={_BATCH.value}: there are {len(rows)} rows; play more episodes")
  return rows


def train(
  params: dict | None, stages: Sequence[tuple[Sequence[Trajectory], float]], workdir: pathlib.Path
) -> None:
  """Imitates rows in random order, and leaves weights and metrics in `workdir`.

  Args:
    params: what it begins with; None for random weights.
    stages: rows, and the share of the updates after which others come.
    workdir: a directory.
  """
  import numpy as np

  from rome import ipa, models, rollout
  from rome.train import state as state_lib
  from rome.train.config import StageConfig, chunk_slots
  from rome.train.step import sft_step

  size = SMALL.tokenizer().vocab_size
  config = dataclasses.replace(models.PRESETS[_MODEL.value], vocab_size=size)
  steps = _STEPS.value
  stage = StageConfig(steps, _BATCH.value, _RATE.value, warmup=20, cooldown=steps // 2)
  optimizer = state_lib.make_optimizer(stage)
  state = state_lib.init_state(config, optimizer, _SEED.value, params)
  length = SMALL.window
  rng, began = np.random.default_rng(_SEED.value), time.monotonic()
  with open(workdir / "metrics.jsonl", "w", encoding="utf-8", buffering=1) as metrics:
    for step in range(1, steps + 1):
      some = next(rows for rows, end in stages if step <= end * steps or end == 1)
      chosen = [some[i] for i in rng.choice(len(some), stage.batch, False)]
      batch = rollout.pack(
        [],
        ipa.IPAConfig(),
        step,
        row_length=length,
        max_chunks=chunk_slots(length),
        rows_multiple=_MICRO_ROWS,
        pad=SMALL.tokenizer().specials["<|pad|>"],
        experts=chosen,
      )
      state, found = sft_step(
        state, batch, config=config, optimizer=optimizer, micro_rows=_MICRO_ROWS
      )
      seconds = round(time.monotonic() - began, 1)
      metrics.write(json.dumps({"step": step, "seconds": seconds, **found}) + "\n")
      if step % _EVERY == 0 or step == steps:
        models.save(workdir, config, state.params)
        loss, right = found["loss"], found["accuracy"]
        print(f"{step}/{steps}, {seconds:.0f} s: loss {loss:.4f}, {right:.4f} of tokens right")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  from experiments.contexts import drill
  from rome import models

  if _MODEL.value not in models.PRESETS:
    raise app.UsageError(f"--model: no {_MODEL.value!r}; there are: {', '.join(models.PRESETS)}")
  try:
    params = models.load(_INIT.value)[1] if _INIT.value else None
  except ValueError as error:
    raise app.UsageError(f"--init_from={_INIT.value}: {error}") from None
  workdir = pathlib.Path(_WORKDIR.value)
  workdir.mkdir(parents=True, exist_ok=True)
  shares = (_SHORT, SMALL.size.share)
  if _INIT.value:
    stages = [(demonstrations(_EPISODES.value, shares[1]), 1.0)]
  else:
    rows = [[drill.drill(i) for i in range(_DRILLS)]]
    rows += [demonstrations(_EPISODES.value, share) for share in shares]
    stages = list(zip(rows, (0.2, 0.4, 1.0), strict=True))
  train(params, stages, workdir)


if __name__ == "__main__":
  app.run(main)
