"""Whole runs whose rollout goes on while updates are computed, through the command line."""

import json

import pytest

from rome.envs import owner
from rome.train import record, replay
from rome.train.metrics import read_jsonl
from rome.train.start import read_config
from tests.train.loop_test import (
  TINY,
  environment,
  fails_with_one_line,
  inner_processes,
  owned_by,
  rows_of,
  run,
  start,
  summary,
  wait_until,
)

__all__ = ["environment"]
pytestmark = pytest.mark.slow
UPDATES, BATCH = 8, 6
FLAGS = ["--config.rl.max_staleness=1", f"--config.rl.steps={UPDATES}"]


def check_ledger(workdir):
  """Every update trained on a whole batch, nothing twice, nothing too old."""
  updates = record.Updates(workdir, read_config(workdir))
  assert updates.steps() == list(range(1, UPDATES + 1))
  ids, dropped = [], 0
  for step in updates.steps():
    update = updates.read(step)
    assert len(update.trajectories) == BATCH
    assert all(step - 1 - t.versions.min() in (0, 1) for t in update.trajectories)
    ids += [t.id for t in update.trajectories]
    dropped += update.stats.dropped
  assert len(set(ids)) == len(ids)
  # Numbers are given out in order; what is missing was dropped, by this run or one before it.
  numbers = {int(id.rpartition("#")[2]) for id in ids}
  first = int(TINY[2].rpartition("=")[2])
  gaps = set(range(first, max(numbers))) - numbers
  return dropped, gaps


def test_a_run_overlaps_and_tells_how_old_its_samples_were(environment, tmp_path, capsys):
  done = run(environment, tmp_path, *FLAGS)
  assert done.returncode == 0, done.stderr
  assert "rl.max_staleness=1: batches depend on timing" in done.stdout
  dropped, gaps = check_ledger(tmp_path)
  assert len(gaps) == dropped
  rows = rows_of(tmp_path, "rl")
  assert [row["step"] for row in rows] == list(range(1, UPDATES + 1))
  assert rows[0]["staleness_max"] == 0 and all(row["staleness_max"] <= 1 for row in rows)
  assert any(row["staleness"] > 0 for row in rows)
  for row in rows:
    shares = [v for k, v in row.items() if k.startswith("share_")]
    assert sum(shares) == pytest.approx(1, abs=1e-6)
  assert summary(tmp_path)["speeds"]["tokens_per_s_sampled"] > 0
  # While an update was computed, the engine or an environment worked.
  events = [json.loads(line[1:]) for line in (tmp_path / "timeline.json").read_text().split("\n")
            if line.startswith(',{"ph":"X"')]  # fmt: skip
  updates = [e for e in events if e["name"] == "update" and e["tid"] == 0]
  steps = [e for e in events if e["name"] == "step" and e["tid"] > 0]
  assert any(
    u["ts"] < s["ts"] + s["dur"] and s["ts"] < u["ts"] + u["dur"] for u in updates for s in steps
  )
  assert replay.main([str(tmp_path), "--step=2"]) == 2
  assert "rl.max_staleness=1: one reply of a batch may be of other" in capsys.readouterr().err
  fails_with_one_line(
    run(environment, tmp_path, *FLAGS, "--config.rl.max_staleness=0"), "max_staleness", "workdir"
  )


def test_a_killed_run_loses_and_doubles_nothing(environment, tmp_path):
  process = start(environment, tmp_path, *FLAGS)
  label = owner.label(process.pid)
  wait_until(process, lambda: len(rows_of(tmp_path, "rl")) >= 3, "row 3 of rl")
  inner = inner_processes(owned_by(label))
  process.kill()
  process.communicate()
  again = run(environment, tmp_path, *FLAGS)
  assert again.returncode == 0 and "resuming" in again.stdout, again.stderr
  dropped, gaps = check_ledger(tmp_path)
  assert len(gaps) == dropped
  assert [row["step"] for row in rows_of(tmp_path, "rl")] == list(range(1, UPDATES + 1))
  assert owned_by(label) == set() and all(owner.is_dead(one) for one in inner)
  assert read_jsonl(tmp_path / "metrics.jsonl")[-1]["name"] == "after"
