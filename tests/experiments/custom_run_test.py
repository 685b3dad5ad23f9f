"""The guide to one's own parts, as it stands there, through the command line at tiny size."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from rome.train.metrics import read_jsonl

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guides" / "custom.md"
SMALL = [
  *("--config.model=micro", "--config.rl.steps=3", "--config.rl.batch=8"),
  *("--config.rl.micro_rows=4", "--config.rl.checkpoint_every=1"),
  *("--config.engine.slots=8", "--config.eval.instances=8"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Runs a module where the guide's files lie; gives code, output and errors."""
  here = tmp_path_factory.mktemp("guide")
  blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", GUIDE.read_text(), re.DOTALL)
  assert [name for name, _ in blocks] == ["guess.py", "guess_config.py"]
  for name, text in blocks:
    (here / name).write_text(text)
  environment = os.environ | {
    "PYTHONPATH": os.pathsep.join((str(here), str(ROOT))),
    "JAX_COMPILATION_CACHE_DIR": str(here / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }

  def run(*arguments):
    done = subprocess.run(
      [sys.executable, "-m", *arguments],
      cwd=here, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr

  return run


@pytest.fixture(scope="module")
def train(run):
  def train(workdir, *extra):
    flags = ("--config=guess_config.py", f"--workdir={workdir}", *SMALL, *extra)
    return run("experiments.train", *flags)

  return train


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "guess"
  return workdir, train(workdir)


def rows(workdir, phase):
  return [r for r in read_jsonl(workdir / "metrics.jsonl") if r["phase"] == phase]


def test_a_run_of_ones_own_parts(finished):
  workdir, (code, out, err) = finished
  assert code == 0, err
  assert out.startswith("memory: about ") and "policy gradient" in out
  updates = rows(workdir, "rl")
  assert len(updates) == 3 and all(r["return_max"] > 0 for r in updates)  # the estimator's own
  with np.load(workdir / "updates" / "000001.npz") as update:
    tokens, rewards = update["sizes"][:, 0], update["rewards"]
    ends = np.cumsum(tokens)
    sampled = update["call_ids"] >= 0
    said = [sampled[end - n : end].sum() for n, end in zip(tokens, ends, strict=True)]
  earned = rewards + 0.01 * np.array(said)  # what the environment gave
  assert len(rewards) == 8 and np.isin(earned.round(6), (0.0, 1.0)).all() and (rewards != 0).all()
  episodes = read_jsonl(workdir / "episodes.jsonl")
  words = {turn["observation"] for e in episodes for turn in e["turns"]}
  assert words <= {"higher", "lower", "right"} and len(words) > 1  # whole replies are actions
  assert {e["task_id"].split("/")[0] for e in episodes} == {"numbered"}
  summary = json.loads((workdir / "summary.json").read_text())
  assert summary["sandbox_backend"] == "none" and summary["demonstrations"] == 0


def test_an_update_is_made_again(run, finished):
  workdir, _ = finished
  code, out, err = run("rome.cli", "replay", str(workdir), "--step=3")
  assert code == 0 and "everything is the same" in out, out + err


def test_a_second_run_begins_with_the_weights_of_the_first(train, finished, tmp_path):
  workdir, _ = finished
  flags = (f"--config.init_from={workdir}", "--config.model=auto", "--config.rl.learning_rate=0.0")
  code, _, err = train(tmp_path / "second", *flags, "--config.rl.steps=1")
  assert code == 0, err
  hashes = {
    json.loads((w / "summary.json").read_text())["params_sha256"]
    for w in (workdir, tmp_path / "second")
  }
  assert len(hashes) == 1  # nothing was learnt at a rate of 0


def test_a_dry_run_leaves_nothing(train, tmp_path):
  code, out, err = train(tmp_path / "dry", "--dry_run")
  assert code == 0, err
  assert "estimator: guess:squashed" in out and "sandboxes: none" in out and "memory: about" in out
  assert not (tmp_path / "dry").exists()


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--config.reward=guess:breif", "config.reward='guess:breif' cannot be imported"),
    ("--config.estimator=guess:brief", "config.estimator='guess:brief' does not take"),
    ("--config.agent.factory=guess:brief", "config.agent.factory='guess:brief' does not take"),
    ("--config.tasks.env=guess:Plain", "config.tasks.env='guess:Plain' does not take"),
    ("--config.init_from=nowhere", "config.init_from=nowhere cannot be read"),
  ],
)
def test_a_mistake_is_one_line(train, tmp_path, flag, message):
  code, _, err = train(tmp_path / "wrong", flag, "--dry_run")
  assert code == 1 and err.startswith("error: ") and message in err and err.count("\n") == 1
  assert not (tmp_path / "wrong").exists()
