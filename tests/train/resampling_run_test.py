"""Whole runs whose episodes start inside expert trajectories, through the command line."""

import pytest

from rome.ipa import IPAConfig
from rome.rollout import ResamplingConfig, TasksConfig
from rome.train import record, replay
from rome.train.config import ConfigError, ExpertsConfig, RunConfig
from rome.train.start import read_config
from tests.train.groups_config_test import rl
from tests.train.loop_test import environment, kill_and_resume, rows_of, run

__all__ = ["environment"]
FLAGS = [
  *("--config.resampling.mode=anchors", "--config.resampling.anchors=3"),
  *("--config.tasks.train_count=6", "--config.experts.batch=6", "--config.rl.group_size=3"),
]


@pytest.mark.slow
def test_anchors_survive_a_kill_and_are_replayed(environment, tmp_path, capsys):
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  done = run(environment, whole, *FLAGS)
  assert done.returncode == 0, done.stderr
  rows = rows_of(whole, "rl")
  # All six tasks have the expert that was demonstrated; a group starts at three places.
  assert all(row["experts"] == 6 and row["divergent"] == 0 for row in rows)
  updates = record.Updates(whole, read_config(whole))
  for step in updates.steps():
    update = updates.read(step)
    by_task = {}
    for t in update.trajectories:
      by_task.setdefault(t.task_id, []).append(t.start)
    assert all(len(starts) == 3 and starts[0] == 0 < starts[-1] for starts in by_task.values())
    assert len(update.experts[0]) == len(by_task) == 2
  assert replay.main([str(whole), "--step=4"]) == 0
  assert "everything is the same" in capsys.readouterr().out

  kill_and_resume(environment, whole, killed, *FLAGS)
  again = run(environment, whole, *FLAGS, program="evaluate")
  assert again.returncode == 0, again.stderr


@pytest.mark.slow
def test_rollback_beside_training(environment, tmp_path):
  """Rollout goes on meanwhile; every episode starts at its task's last chunk."""
  flags = [flag for flag in FLAGS if "resampling" not in flag]
  flags += ["--config.resampling.mode=rollback", "--config.rl.max_staleness=1"]
  done = run(environment, tmp_path, *flags)
  assert done.returncode == 0, done.stderr
  for row in rows_of(tmp_path, "rl"):
    assert row["start"] > 0 and row["pointer"] > 0 and "success_initial" not in row


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"tasks": TasksConfig()}, "config.tasks.train_count must be at least rl.groups=4 with"),
    (
      {"experts": ExpertsConfig(batch=3)},
      "config.experts.batch must be at least the 4 groups of an update .*'rollback', got 3",
    ),
    (
      {
        "resampling": ResamplingConfig(mode="anchors", anchors=2),
        "ipa": IPAConfig(lambda_il=1.0, centre="group"),
      },
      "config.rl.group_size must be at least 4, two for each of resampling.anchors, .*, got 3",
    ),
    ({"experts": ExpertsConfig(batch=4, capacity=5)}, "config.experts.capacity must be 8192 with"),
    (
      {"resampling": ResamplingConfig(anchors=3)},
      "config.resampling.anchors must be 4 while resampling.mode is 'off'.*, got 3",
    ),
  ],
)
def test_settings(changes, message):
  settings = {
    "resampling": ResamplingConfig(mode="rollback"),
    "tasks": TasksConfig(train_count=6),
    "experts": ExpertsConfig(batch=4),
    "ipa": IPAConfig(lambda_il=1.0),
    "rl": rl(group_size=3),
  }
  RunConfig(**settings)
  with pytest.raises(ConfigError, match=message):
    RunConfig(**(settings | changes))
