"""run.json: every start is told, none is lost, and the report shows them."""

import dataclasses
import importlib.metadata
import json
import re
import shlex
import sys

import jax
import pytest

from rome.train import launches, report
from rome.train.alarms import AlarmsConfig
from rome.train.config import ConfigError, RunConfig
from tests.train import run_files


def test_a_start_says_what_ran_under_what(tmp_path):
  start = launches.record_start(tmp_path, RunConfig(seed=7), "sft", 0)
  assert json.loads((tmp_path / "run.json").read_text()) == {"starts": [start]}
  assert (start["phase"], start["update"], start["seed"]) == ("sft", 0, 7)
  assert shlex.split(start["command"]) == sys.orig_argv
  assert (start["backend"], start["devices"]) == (jax.default_backend(), jax.device_count())
  assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?|unknown", start["commit"])
  assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", start["time"])


def test_versions_are_those_that_are_installed():
  found = launches.versions()
  for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
    assert found[name] == importlib.metadata.version(name)
  assert found["python"] == "{}.{}.{}".format(*sys.version_info)
  assert not {"pytest", "ruff", "seqio"} & found.keys()  # of dev; not installed


def test_a_resumed_run_adds_an_entry(tmp_path):
  first = launches.record_start(tmp_path, RunConfig(), "sft", 0)
  same = RunConfig(alarms=dataclasses.replace(AlarmsConfig()))
  second = launches.record_start(tmp_path, same, "rl", 40)
  other = launches.record_start(tmp_path, RunConfig(seed=1), "rl", 60)
  assert launches.read_starts(tmp_path / "run.json") == [first, second, other]
  assert first["settings_sha256"] == second["settings_sha256"] != other["settings_sha256"]
  assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"starts": [1]}', '{"starts": {}}', "\x89"])
def test_a_damaged_file_is_not_replaced(tmp_path, text):
  (tmp_path / "run.json").write_text(text)
  with pytest.raises(ConfigError, match=r"run\.json is not what a run writes; delete it"):
    launches.record_start(tmp_path, RunConfig(), "sft", 0)
  assert (tmp_path / "run.json").read_text() == text


def test_the_report_shows_every_start(tmp_path):
  run_files.write_run(tmp_path, finished=False, updates=3)
  starts = [launches.record_start(tmp_path, RunConfig(), *at) for at in (("sft", 0), ("rl", 2))]
  page = report.write_report(tmp_path).read_text()
  assert f"started {starts[1]['time']} · {starts[1]['device']}" in page
  assert "<td>sft 0</td>" in page and "<td>rl 2</td>" in page
  assert page.count(f"<td>{starts[0]['commit']}</td>") == 2


def test_the_report_escapes_and_survives_foreign_starts(tmp_path):
  run_files.write_run(tmp_path, updates=3)
  start = {"commit": run_files.HOSTILE, "versions": [run_files.HOSTILE], run_files.HOSTILE: 1}
  (tmp_path / "run.json").write_text(json.dumps({"starts": [start]}))
  page = report.write_report(tmp_path).read_text()
  assert "<script" not in page and "<img" not in page
  (tmp_path / "run.json").write_text('{"starts": [1]}')
  assert report.main([str(tmp_path)]) == 1
