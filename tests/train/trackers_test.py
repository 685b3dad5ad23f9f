"""Real clients, offline: what trackers hold is metrics.jsonl; whatever fails, training goes on."""

import dataclasses
import socket
import sqlite3
import sys
import threading
import time

import mlflow
import pytest

from rome.train import launches, trackers
from rome.train.config import TRACKERS, ConfigError, RunConfig
from rome.train.metrics import MetricsWriter, read_jsonl
from tests.train import wandb_files
from tests.train.loop_test import environment, rows_of, start, wait_until

__all__ = ["environment"]
pytestmark = pytest.mark.slow
QUIET = {
  **{"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"},
  **{"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"},
}
SETTINGS = dataclasses.asdict(RunConfig(seed=5))


@pytest.fixture(scope="module")
def database(tmp_path_factory):
  """A store of mlflow; to make its tables takes seconds."""
  path = tmp_path_factory.mktemp("mlflow") / "store.db"
  mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
  return path


@pytest.fixture(autouse=True)
def quiet(monkeypatch, database):
  for name, value in QUIET.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")


def follow(workdir, names=TRACKERS, commit="c0ffee"):
  return trackers.Trackers(names, workdir, SETTINGS, {"commit": commit, "versions": {"jax": "1"}})


def write(writer, steps):
  for step in steps:
    writer.write("rl", step, {"loss": 1 / step, "success": step / 10, "name": "no figure"})


def wandb_rows(workdir):
  """(step of the phase, loss) of every row, over the files of all starts in their order."""
  files = sorted(workdir.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_ctime)
  return [(row["rl/step"], row["rl/loss"]) for file in files for row in wandb_files.history(file)]


def mlflow_rows(database, run_id):
  found = mlflow.MlflowClient(f"sqlite:///{database}").get_metric_history(run_id, "rl/loss")
  return [(metric.step, metric.value) for metric in sorted(found, key=lambda m: m.step)]


def test_a_resumed_run_goes_on_in_the_same_runs(tmp_path, database):
  with MetricsWriter(tmp_path) as writer:
    write(writer, (1, 2))
    checkpoint = writer.position()
    first = follow(tmp_path)
    write(writer, (3, 4))
    first.close(finished=False)
  ids = {name: trackers.read_notes(tmp_path, name)["id"] for name in TRACKERS}
  client = mlflow.MlflowClient(f"sqlite:///{database}")
  assert client.get_run(ids["mlflow"]).info.status == "KILLED"

  with MetricsWriter(tmp_path) as writer:  # Rows 3 and 4 are forgotten and made again.
    writer.restore(checkpoint)
    second = follow(tmp_path, commit="c0ffee2")
    write(writer, (3, 4, 5, 6))
    second.close(finished=True)
  rows = [(row["step"], row["loss"]) for row in read_jsonl(tmp_path / "metrics.jsonl")]
  assert [step for step, _ in rows] == [1, 2, 3, 4, 5, 6]
  assert wandb_rows(tmp_path) == rows and mlflow_rows(database, ids["mlflow"]) == rows
  assert {name: trackers.read_notes(tmp_path, name)["id"] for name in TRACKERS} == ids
  runs = [wandb_files.run(file) for file in tmp_path.glob("wandb/offline-run-*/*.wandb")]
  assert len(runs) == 2 and {run.run_id for run in runs} == {ids["wandb"]}
  assert {run.project for run in runs} == {"rome"}
  found = client.get_run(ids["mlflow"])
  assert found.info.status == "FINISHED" and found.data.params["seed"] == "5"
  assert found.data.params["rl.micro_rows"] == str(RunConfig().rl.micro_rows)
  assert found.data.tags["commit"] == "c0ffee2" and found.data.tags["versions.jax"] == "1"
  assert "rl/name" not in found.data.metrics


def test_a_tracker_that_fails_is_off_and_catches_up_later(tmp_path, database, capsys):
  with MetricsWriter(tmp_path) as writer:
    write(writer, (1, 2))
    broken = follow(tmp_path, ["mlflow"])
    wait_for(lambda: trackers.read_notes(tmp_path, "mlflow").get("rows") == 2)
    with sqlite3.connect(database) as store:
      store.execute("ALTER TABLE metrics RENAME TO gone")
    write(writer, (3,))
    wait_for(lambda: "tracker mlflow" not in [t.name for t in threading.enumerate()])
    write(writer, (4,))
    with sqlite3.connect(database) as store:
      store.execute("ALTER TABLE gone RENAME TO metrics")
    broken.close(finished=True)
    said = capsys.readouterr().out
    assert said.count("\n") == 2 and "tracker mlflow is off until the run is started again" in said
    again = follow(tmp_path, ["mlflow"])
    again.close(finished=True)
  run_id = trackers.read_notes(tmp_path, "mlflow")["id"]
  assert mlflow_rows(database, run_id) == [(k, 1 / k) for k in (1, 2, 3, 4)]


def test_a_server_that_is_not_there(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
  with MetricsWriter(tmp_path) as writer:
    feed = follow(tmp_path, ["mlflow"])
    write(writer, (1, 2))
    feed.close(finished=True)
  said = capsys.readouterr().out
  assert said.count("\n") == 1 and "tracker mlflow is off" in said and "Traceback" not in said
  assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 2


def test_a_server_that_never_answers_delays_only_the_end(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(trackers, "CLOSE_SECONDS", 1.5)
  with socket.create_server(("127.0.0.1", 0)) as silent:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    with MetricsWriter(tmp_path) as writer:
      feed = follow(tmp_path, ["mlflow"])
      write(writer, (1, 2))
      feed.close(finished=True)
  assert "did not take the last rows within 2 s" in capsys.readouterr().out
  assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 2


@pytest.mark.parametrize("name", TRACKERS)
def test_a_package_that_is_missing_is_named_with_its_extra(name, monkeypatch):
  trackers.check([name])
  monkeypatch.setattr(sys, "path", [])
  monkeypatch.delitem(sys.modules, name, raising=False)
  with pytest.raises(ConfigError, match=rf"'{name}', which is not installed: .*'rome\[{name}\]'"):
    trackers.check([name])


@pytest.mark.parametrize("names", [("wandb", "wandb"), ("neptune",), ("wandb", "")])
def test_unknown_names_are_refused(names):
  with pytest.raises(ConfigError, match="config.trackers must be a tuple of 'wandb' and 'mlflow'"):
    RunConfig(trackers=names)


def test_a_run_that_is_killed_and_goes_on(environment, tmp_path):
  """Through the command line: run.json, wandb and what is printed."""
  flags = ["--config.trackers=('wandb',)", "--config.sft.steps=24", "--config.rl.steps=0"]
  environment = environment | QUIET
  environment.pop("WANDB_SERVICE", None)  # Of the client in this process.
  process = start(environment, tmp_path, *flags)
  wait_until(process, lambda: len(rows_of(tmp_path, "sft")) >= 5, "row 5 of sft", timeout=200)
  process.kill()
  process.communicate()
  again = start(environment, tmp_path, *flags)
  out, err = again.communicate(timeout=200)
  assert again.returncode == 0, err
  assert "tracker wandb: " in out and "\r" not in out + err
  assert "warm start 24/24, 00:00 left, loss " in err
  first, second = launches.read_starts(tmp_path / "run.json")
  assert (first["phase"], first["update"]) == ("sft", 0) and second["phase"] == "sft"
  assert second["update"] >= 2 and f"phase sft, update {second['update']}\n" in out
  rows = read_jsonl(tmp_path / "metrics.jsonl")
  files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
  sent = [row for file in files for row in wandb_files.history(file)]
  # The killed client may have kept some rows to itself; then they were sent again.
  assert {row["_step"] for row in sent} == set(range(len(rows)))
  for shown in sent:
    row = rows[shown["_step"]]
    assert shown[f"{row['phase']}/step"] == row["step"]
    figure = "success" if row["phase"] == "eval" else "loss"
    assert shown[f"{row['phase']}/{figure}"] == row[figure]


def wait_for(condition, timeout=60):
  deadline = time.monotonic() + timeout
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.05)
