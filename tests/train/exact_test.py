"""Updates under exact numerics: no gap to the engine, and the gradient of the ordinary update."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

from rome import ipa, models
from rome.rollout import Engine, Request, pack
from rome.train import state as state_lib
from rome.train.metrics import MISMATCH_PARTS, read_jsonl
from rome.train.step import ipa_step
from rome.trajectory import Trajectory, Valid

ROOT = pathlib.Path(__file__).parents[2]
IPA = ipa.IPAConfig(gamma=0.5, failure_reward=-1.0, lambda_il=0.0)
SAMPLING = models.Sampling(temperature=0.9, top_k=200)
SGD = optax.sgd(1.0)  # the parameters' change is minus the gradient


@dataclasses.dataclass(frozen=True)
class Shape:
  """A model, and how many tokens one engine and one update have."""

  model: str = "micro"
  slots: int = 4
  length: int = 48
  episodes: int = 6  # two micro-batches, of which the second is not full
  reply: int = 24
  prompt: int = 20


SMALL = Shape()
# In large shapes more is fused and split over threads: the quickstart's.
LARGE = Shape("tiny", slots=32, length=160, episodes=48, reply=64, prompt=80)


@functools.cache
def start(shape):
  return state_lib.init_state(models.PRESETS[shape.model], SGD, 3)


def trajectory(i, prompt, reply):
  call_ids = np.array([-1] * len(prompt) + [0] * len(reply.tokens), np.int32)
  return Trajectory(
    id=f"t#{i}", task_id=f"t{i}", family="f", instruction="", call_ids=call_ids,
    tokens=np.array([*prompt, *reply.tokens], np.int32),
    logps=np.array([0.0] * len(prompt) + reply.logps, np.float32), versions=np.zeros(1, np.int32),
    chunk_rewards=np.zeros(1, np.float32), reward=Valid(float(i % 2)), end_reason="submitted",
    turns=(),
  )  # fmt: skip


@functools.cache
def played(shape, numerics):
  backend = "auto" if numerics == "exact" else "xla"
  engine = Engine(
    models.PRESETS[shape.model], slots=shape.slots, max_length=shape.length, numerics=numerics,
    backend=backend,
  )  # fmt: skip
  engine.publish(start(shape).params, 0, jax.random.key(1))
  rng = np.random.default_rng(0)
  lengths = rng.integers(shape.prompt // 4, shape.prompt, shape.episodes)
  prompts = [rng.integers(0, 256, length).tolist() for length in lengths]
  ids = [
    engine.submit(Request(tuple(prompt), shape.reply, SAMPLING, key=(i, 0)))
    for i, prompt in enumerate(prompts)
  ]
  replies = {}
  while engine.busy:
    replies |= {update.id: update.reply for update in engine.step() if update.reply}
  return [trajectory(i, prompts[i], replies[id]) for i, id in enumerate(ids)]


def update(shape, trajectories, numerics):
  batch = pack(
    trajectories, IPA, 0, row_length=shape.length, max_chunks=2, rows_multiple=shape.slots,
    pad=256, share_rows=numerics == "fast",
  )  # fmt: skip
  return ipa_step(
    start(shape), batch, config=models.PRESETS[shape.model], sampling=SAMPLING, ipa_config=IPA,
    optimizer=SGD, micro_rows=shape.slots, num_trajectories=len(trajectories), numerics=numerics,
    router_loss=models.RouterLoss(balance=0.01, z=0.001),
  )  # fmt: skip


@pytest.mark.parametrize("shape", [SMALL, pytest.param(LARGE, marks=pytest.mark.slow)])
def test_an_exact_update_sees_no_gap_and_has_the_ordinary_gradient(shape):
  trajectories = played(shape, "exact")
  exact, metrics = update(shape, trajectories, "exact")
  assert metrics["tokens"] == shape.episodes * shape.reply
  assert metrics["mismatch_mean"] == metrics["mismatch_max"] == 0
  parts = {k: v for k, v in metrics.items() if k.startswith("mismatch_part_")}
  assert 1 < len(parts) <= MISMATCH_PARTS and set(parts.values()) == {0}
  fast, fast_metrics = update(shape, trajectories, "fast")
  assert fast_metrics["mismatch_max"] > 0  # the same tokens, scored otherwise
  assert metrics.keys() == fast_metrics.keys()
  for name, value in metrics.items():
    if not name.startswith("mismatch"):
      assert value == pytest.approx(fast_metrics[name], rel=1e-3, abs=1e-4), name
  for a, b in zip(jax.tree.leaves(exact.params), jax.tree.leaves(fast.params), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_a_fast_update_tells_its_gap_by_position():
  _, metrics = update(SMALL, played(SMALL, "fast"), "fast")
  parts = [metrics.get(f"mismatch_part_{p}", 0.0) for p in range(MISMATCH_PARTS)]
  assert 0 < metrics["mismatch_mean"] < metrics["mismatch_max"] < 1e-4
  assert min(p for p in parts if p) <= metrics["mismatch_mean"] <= max(parts)
  # An engine that is off where contexts are long shows there.
  late = [
    dataclasses.replace(t, logps=t.logps - (np.arange(len(t.logps)) >= SMALL.length // 2))
    for t in played(SMALL, "fast")
  ]
  _, metrics = update(SMALL, late, "fast")
  assert metrics["mismatch_part_0"] < 1e-4 and metrics["mismatch_part_2"] == pytest.approx(
    1, abs=1e-3
  )


@pytest.mark.slow
def test_a_run_with_exact_numerics_has_no_gap(tmp_path):
  flags = [
    *("--sandbox=bubblewrap", "--config.model=micro", "--config.demonstrations=6"),
    *("--config.transcripts=2", "--config.engine.slots=4", "--config.eval.instances=6"),
    *("--config.eval.plateau=1", "--config.experts.batch=2", "--config.sft.steps=2"),
    *("--config.sft.batch=4", "--config.sft.micro_rows=2", "--config.rl.steps=2"),
    *("--config.rl.batch=6", "--config.rl.micro_rows=4", "--config.ipa.failure_reward=-1.0"),
    *("--config.numerics=exact", "--config.row_length=160"),
  ]
  command = [sys.executable, "-m", "experiments.train", f"--workdir={tmp_path}"]
  command += ["--config=experiments/configs/quickstart.py", *flags]
  done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  rows = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if row["phase"] == "rl"]
  assert len(rows) == 2 and all(row["tokens"] > 100 for row in rows)
  for row in rows:
    gaps = {k: v for k, v in row.items() if k.startswith("mismatch_")}
    assert {"mismatch_mean", "mismatch_max"} < gaps.keys() and set(gaps.values()) == {0}, gaps
  assert json.loads((tmp_path / "config.json").read_text())["numerics"] == "exact"
