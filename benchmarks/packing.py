"""How full the rows of training batches are, on real lengths; one JSON line a case.

  python -m benchmarks.packing [--workdir=RUN]

`occupancy` is tokens over places of all rows computed, rows of padding included, over all batches
of a case; `first_fit` is the same for first fit in the order given, `alone` for a row a trajectory,
`rows` without rounding up to whole micro-batches. Cases:

- the two stages of a run: its recorded demonstrations and episodes, in the batches that it trained
  on, experts included. Without --workdir a short run of the quickstart is played first, about two
  minutes on two cores;
- a long tail: the sources of Python's standard library, a byte a token, cut at the length of a row
  as an episode is at its context; 64 to a batch, shuffled by the seed.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import app, flags, logging

from experiments import memory, runner
from experiments.configs import quickstart
from rome import ipa, rollout
from rome.train import config as config_lib
from rome.train import loop, record, start, summary
from rome.train.learner import Learner
from rome.train.play import SFT_STREAM
from rome.trajectory import Trajectory, Valid

_WORKDIR = flags.DEFINE_string("workdir", "", "A run to read; none: play a short one.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the order of the long tail's batches.")
_BATCH, _BATCHES = 64, 10  # of the long tail

Batch = tuple[list[Trajectory], list[Trajectory]]  # reinforced, experts


def play(workdir: pathlib.Path) -> None:
  config = config_lib.from_config_dict(quickstart.get_config())
  config = dataclasses.replace(
    config,
    sft=dataclasses.replace(config.sft, steps=80),
    rl=dataclasses.replace(config.rl, steps=12, cooldown=0),
    eval=dataclasses.replace(config.eval, instances=6, plateau=1),
  )
  runner.prepare(workdir, config_lib.to_config_dict(config))
  run = loop.Run(config, workdir)
  try:
    with contextlib.redirect_stdout(sys.stderr):
      run.train()
  finally:
    run.close()


def supervised(config: config_lib.RunConfig, demos: Sequence[Trajectory]) -> Iterator[Batch]:
  """The batches of the warm start (`Learner.imitate`)."""
  for step in range(config.sft.steps):
    rng = np.random.default_rng((config.seed, SFT_STREAM, step))
    chosen = rng.choice(len(demos), min(config.sft.batch, len(demos)), False)
    yield [], [demos[i] for i in chosen]


def reinforced(
  config: config_lib.RunConfig, demos: Sequence[Trajectory], updates: record.Updates
) -> Iterator[Batch]:
  """The batches of all recorded updates, with their experts; without resampling."""
  learner = Learner(config)
  store = rollout.ExpertStore(config.experts.capacity, config.agent.context)
  store.add(demos)
  for step in updates.steps():
    played = updates.read(step).trajectories
    yield played, learner.choose(store, step - 1, played)
    store.add(played)


def documents(row_length: int) -> Iterator[Batch]:
  """Batches of one-chunk episodes as long as files."""
  paths = sorted(pathlib.Path(sysconfig.get_path("stdlib")).rglob("*.py"))
  sizes = [p.stat().st_size for p in paths if "site-packages" not in p.parts]
  lengths = np.minimum([n for n in sizes if n > 0], row_length)
  np.random.default_rng(_SEED.value).shuffle(lengths)
  for i in range(0, _BATCH * _BATCHES, _BATCH):
    yield [_episode(i + k, int(n)) for k, n in enumerate(lengths[i : i + _BATCH])], []


def _episode(n: int, length: int) -> Trajectory:
  return Trajectory(
    id=f"t{n}#0",
    task_id=f"t{n}",
    family="f",
    instruction="",
    tokens=np.zeros(length, np.int32),
    call_ids=np.zeros(length, np.int32),
    logps=np.zeros(length, np.float32),
    versions=np.zeros(1, np.int32),
    chunk_rewards=np.zeros(1, np.float32),
    reward=Valid(1.0),
    end_reason="submitted",
    turns=(),
  )


def first_fit(trajectories: Sequence[Trajectory], row_length: int, max_chunks: int) -> int:
  """Rows that first fit in order needs."""
  used: list[list[int]] = []
  for t in trajectories:
    size = len(t.tokens), t.num_chunks
    fits = (u for u in used if u[0] + size[0] <= row_length and u[1] + size[1] <= max_chunks)
    row = next(fits, None)
    if row is None:
      used.append(row := [0, 0])
    row[0], row[1] = row[0] + size[0], row[1] + size[1]
  return len(used)


def measure(batches: Iterator[Batch], row_length: int, micro_rows: int) -> dict[str, Any]:
  """Occupancy of all batches together."""
  slots = config_lib.chunk_slots(row_length)
  tokens, rows, places, lengths = 0, 0, {"best": 0, "first": 0, "alone": 0}, []
  for played, experts in batches:
    batch = rollout.pack(
      played, ipa.IPAConfig(), 0, row_length=row_length, max_chunks=slots,
      rows_multiple=micro_rows, pad=0, experts=experts,
    )  # fmt: skip
    both = [*played, *experts]
    tokens += int(np.count_nonzero(batch.segment_ids))
    rows += int(batch.segment_ids.any(axis=1).sum())
    counts = len(batch.tokens), first_fit(both, row_length, slots), len(both)
    for name, count in zip(places, counts, strict=True):
      places[name] += -(-count // micro_rows) * micro_rows
    lengths += [len(t.tokens) for t in both]
  shares = {name: round(tokens / (n * row_length), 4) for name, n in places.items()}
  return {
    "row_length": row_length,
    "micro_rows": micro_rows,
    "trajectories": len(lengths),
    "lengths_p0_50_90_100": np.percentile(lengths, [0, 50, 90, 100]).round(1).tolist(),
    "occupancy": shares["best"],
    "rows": round(tokens / (rows * row_length), 4),
    "first_fit": shares["first"],
    "alone": shares["alone"],
  }


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown argument {argv[1]!r}")
  logging.set_verbosity(logging.WARNING)
  memory.keep_freed_memory()
  about = {"seed": _SEED.value, **summary.provenance(), "load_1min": round(os.getloadavg()[0], 2)}

  def tell(case: str, *what: Any) -> None:
    print(json.dumps({"benchmark": "packing", "case": case} | measure(*what) | about), flush=True)

  with contextlib.ExitStack() as stack:
    workdir = pathlib.Path(_WORKDIR.value)
    if not _WORKDIR.value:
      made = stack.enter_context(tempfile.TemporaryDirectory(prefix="rome-bench-"))
      workdir = pathlib.Path(made)
      play(workdir)
    config = start.read_config(workdir)
    updates = record.Updates(workdir, config)
    demos = updates.read_demonstrations()
    for micro_rows in sorted({2, config.sft.micro_rows}):
      tell("warm start", supervised(config, demos), config.row_length, micro_rows)
    for micro_rows in sorted({2, config.rl.micro_rows}):
      tell("rl", reinforced(config, demos, updates), config.row_length, micro_rows)
  for row_length in (32_768, 131_072):
    tell("long tail", documents(row_length), row_length, 1)


if __name__ == "__main__":
  app.run(main)
