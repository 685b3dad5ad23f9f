"""Whole runs of an agent that rewrites its context: they train, resume to the same bits, replay."""

import subprocess
import sys

import numpy as np
import pytest

from rome.train import record
from rome.train.start import read_config
from tests.train.loop_test import ROOT, environment, kill_and_resume, rows_of, run

__all__ = ["environment"]
pytestmark = pytest.mark.slow
FLAGS = [
  *("--config.agent.factory=tests.agents:Forgetful", "--config.agent.context=192"),
  *("--config.agent.max_reply=24", "--config.rl.micro_rows=4"),
]


def trajectories(workdir):
  updates = record.Updates(workdir, read_config(workdir))
  return [updates.read(step).trajectories for step in updates.steps()]


@pytest.mark.timeout(600)
def test_rows_survive_a_kill_and_are_replayed(environment, tmp_path):
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  done = run(environment, whole, *FLAGS)
  assert done.returncode == 0, done.stderr
  metrics, played = rows_of(whole, "rl"), trajectories(whole)
  assert len(metrics) == len(played) == 5
  for row, batch in zip(metrics, played, strict=True):
    assert row["rows_per_episode"] == np.mean([len(t.rows) for t in batch]) > 1.5
    assert row["tokens"] == sum((t.call_ids >= 0).sum() for t in batch)
    assert row["grad_norm"] > 0
  again = subprocess.run(
    [sys.executable, "-m", "rome.cli", "replay", str(whole), "--step=4"],
    cwd=ROOT, env=environment, capture_output=True, text=True,
  )  # fmt: skip
  assert again.returncode == 0 and "everything is the same" in again.stdout, again

  kill_and_resume(environment, whole, killed, *FLAGS)


def test_exact_numerics_have_no_gap_in_any_row(environment, tmp_path):
  exact = ["--config.numerics=exact", "--config.row_length=192", "--config.rl.steps=2"]
  done = run(environment, tmp_path, *FLAGS, *exact, "--config.sft.steps=1")
  assert done.returncode == 0, done.stderr
  rows = rows_of(tmp_path, "rl")
  assert len(rows) == 2 and all(row["rows_per_episode"] > 1.5 for row in rows)
  assert all(row["mismatch_max"] == 0 and row["tokens"] > 100 for row in rows)
