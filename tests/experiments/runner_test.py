"""What a run refuses before it begins, the same in a dry run: one line, and no file is left."""

import json
import sys

import jax
import pytest

from experiments import runner
from experiments.configs import quickstart
from rome.train import lock
from rome.train.config import ConfigError

pytestmark = pytest.mark.slow


@pytest.fixture
def values():
  values = quickstart.get_config()
  values.model, values.sandbox.backend = "micro", "process"
  values.sandbox.accept_no_isolation = True
  return values


def refused(values, workdir, dry_run, capsys):
  assert runner.train(values, workdir, dry_run) == 1
  error = capsys.readouterr().err
  assert error.startswith("error: ") and error.count("\n") == 1
  return error


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_mesh_larger_than_the_machine(values, dry_run, tmp_path, capsys):
  values.mesh.fsdp = 4 * jax.device_count()
  error = refused(values, tmp_path / "run", dry_run, capsys)
  assert f"config.mesh wants {4 * jax.device_count()} devices (fsdp=" in error and "lower" in error
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_tracker_that_is_not_installed(values, dry_run, tmp_path, capsys, monkeypatch):
  values.trackers = ("wandb",)
  monkeypatch.setitem(sys.modules, "wandb", None)  # so the import system says it is not there
  error = refused(values, tmp_path / "run", dry_run, capsys)
  assert "'wandb', which is not installed: pip install 'rome[wandb]'" in error
  assert not (tmp_path / "run").exists()


def test_a_work_directory_in_use(values, tmp_path, capsys):
  with lock.hold(tmp_path):
    assert "in use by another run (process " in refused(values, tmp_path, False, capsys)
  assert [p.name for p in tmp_path.iterdir()] == [lock.NAME]


def test_a_work_directory_of_another_rome(values, tmp_path):
  """Settings came and went since it was begun."""
  runner.prepare(tmp_path, values)
  saved = tmp_path / "config.json"
  now = json.loads(saved.read_text())
  engine = dict(now["engine"])
  del engine["devices"]
  for old, says in (
    (now | {"engine": engine}, "no config.engine.devices, as the rome that began it had none"),
    (now | {"gone": 1}, "a config.gone, as the rome that began it had one"),
    (now | {"seed": 5}, "another config.seed (5, not 0)"),
  ):
    saved.write_text(json.dumps(old))
    with pytest.raises(ConfigError) as refused:
      runner.prepare(tmp_path, values)
    assert f"{tmp_path} holds a run with {says}" in str(refused.value)
