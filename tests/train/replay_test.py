"""Updates of real runs, made again: the same in every bit, and what was changed is named."""

import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from rome.train import record, replay
from rome.train.checkpoints import tree_sha256
from rome.train.metrics import read_jsonl
from rome.train.start import read_config

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
STEPS = range(1, 6)
TINY = [
  *("--sandbox=bubblewrap", "--config.model=micro", "--config.demonstrations=6"),
  *("--config.transcripts=2", "--config.keep_checkpoints=2", "--config.engine.slots=4"),
  *("--config.eval.instances=2", "--config.eval.plateau=1", "--config.experts.batch=2"),
  *("--config.sft.steps=3", "--config.sft.batch=4", "--config.sft.micro_rows=2"),
  *("--config.rl.steps=5", "--config.rl.batch=6", "--config.rl.micro_rows=2"),
  *("--config.rl.checkpoint_every=2", "--config.ipa.failure_reward=-1.0"),
]
KINDS = {
  "alone": [],
  "groups": ["--config.rl.group_size=2", "--config.rl.filter_groups=True"],
  "exact": [
    *("--config.numerics=exact", "--config.rl.micro_rows=4", "--config.row_length=160"),
    *("--config.rl.steps=3", "--config.rl.group_size=2", "--config.ipa.centre=group"),
  ],
}
CLOCK = {
  *("tokens_per_s_sampled", "tokens_per_s_trained", "env_steps_per_s"),
  *(f"share_{stage}" for stage in ("generate", "env", "train", "other")),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
  cache = tmp_path_factory.mktemp("compiled")
  environment = os.environ | {
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }

  def started(workdir, *extra):
    return subprocess.Popen(
      [sys.executable, "-m", "experiments.train", "--config=experiments/configs/quickstart.py",
       f"--workdir={workdir}", *TINY, *extra],
      cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip

  return started


@pytest.fixture(scope="module")
def finished(start, tmp_path_factory):
  """Work directories of runs that ended, by kind."""
  made = {}

  def run(kind="alone"):
    if kind not in made:
      made[kind] = tmp_path_factory.mktemp("runs") / kind
      process = start(made[kind], *KINDS[kind])
      _, err = process.communicate(timeout=200)
      assert process.returncode == 0, err
    return made[kind]

  return run


@pytest.fixture
def copied(finished, tmp_path):
  """A copy to damage."""
  return pathlib.Path(shutil.copytree(finished(), tmp_path / "run"))


def again(capsys, workdir, step):
  """(exit code, {line of the table: (compared, differing, first difference)}, errors)."""
  capsys.readouterr()
  code = replay.main([str(workdir), f"--step={step}"])
  out, err = capsys.readouterr()
  rows = re.findall(r"^(\w.{0,17}?) +(\d+) +(\d+)  (.*)$", out, re.M)
  return code, {name: (int(n), int(d), first) for name, n, d, first in rows}, err


def change(workdir, step, arrays=None, header=None):
  """Rewrites a record with a hash that is right."""
  path = workdir / "updates" / f"{step:06d}.npz"
  with np.load(path) as loaded:
    found = {name: loaded[name] for name in loaded.files if name != "sha256"}
  if arrays:
    arrays(found)
  if header:
    values = json.loads(found["header"].tobytes())
    header(values)
    found["header"] = np.frombuffer(json.dumps(values).encode(), np.uint8)
  digest = np.frombuffer(bytes.fromhex(tree_sha256(found)), np.uint8)
  np.savez_compressed(path, sha256=digest, **found)


def first_sampled(arrays):
  return int(np.argmax(arrays["call_ids"] >= 0))


def flip(name, bit, place):
  """Flips a bit of one element."""

  def do(arrays):
    arrays[name].view(np.uint32)[place(arrays)] ^= 1 << bit

  return do


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", ["alone", "groups"])
def test_every_step_is_the_same(finished, capsys, kind, step):
  """From the initial state (the first three), a checkpoint, or updates behind one."""
  workdir = finished(kind)
  code, lines, err = again(capsys, workdir, step)
  assert code == 0, (lines, err)
  assert all(differing == 0 for _, differing, _ in lines.values())
  (row,) = [
    r for r in read_jsonl(workdir / "metrics.jsonl") if (r["phase"], r["step"]) == ("rl", step)
  ]
  # Everything that the run wrote but the clock is compared: tokens, log-probs, every metric.
  names = row.keys() - CLOCK - {"phase", "step", "wall"}
  assert lines["metrics.jsonl"][0] == lines["metrics (record)"][0] == len(names) > 40
  assert lines["tokens"][0] == lines["log-probs"][0] == row["tokens"]
  assert lines["experts"][0] == 2
  assert lines["updates before"][0] == (step - 1 if step <= 4 else 0)


def test_exact_numerics(finished, capsys):
  for step in (1, 3):
    code, lines, err = again(capsys, finished("exact"), step)
    assert code == 0, (lines, err)


def test_the_command(finished):
  done = subprocess.run(
    [sys.executable, "-m", "rome.cli", "replay", str(finished()), "--step=5"],
    cwd=ROOT, capture_output=True, text=True, timeout=120,
  )  # fmt: skip
  assert done.returncode == 0 and done.stderr == "", done
  assert "from checkpoint 14 (update 4), 0 recorded updates on" in done.stdout
  assert "everything is the same" in done.stdout
  left_out = re.search("not compared, of the clock: (.*)", done.stdout)[1]
  assert set(left_out.split(", ")) == CLOCK


@pytest.mark.parametrize("bit", [0, 22, 31])
def test_a_bit_of_a_log_prob(copied, capsys, bit):
  change(copied, 5, flip("logps", bit, first_sampled))
  code, lines, _ = again(capsys, copied, 5)
  assert code == 1 and lines["log-probs"][1] == 1 and lines["tokens"][1] == 0
  assert re.match(
    r"\w+/\d+#\d+, call 0, token 0: \S+ was recorded, \S+ comes out", lines["log-probs"][2]
  )


def test_a_bit_of_a_sampled_token(copied, capsys):
  change(copied, 5, flip("tokens", 0, first_sampled))
  code, lines, _ = again(capsys, copied, 5)
  assert code == 1 and lines["tokens"][1] >= 1
  assert re.match(
    r"\w+/\d+#\d+, call 0, token 0: \d+ was recorded, \d+ is drawn", lines["tokens"][2]
  )


def test_a_bit_of_an_observed_token(copied, capsys):
  change(copied, 5, flip("tokens", 0, lambda arrays: 2))
  code, lines, _ = again(capsys, copied, 5)
  assert code == 1 and lines["log-probs"][1] > 0 and lines["metrics.jsonl"][1] > 0


def test_a_token_that_no_engine_knows(copied, capsys):
  change(copied, 5, flip("tokens", 30, lambda arrays: 2))
  code, _, err = again(capsys, copied, 5)
  assert code == 2 and "cannot have been asked: the context has token ids outside" in err


@pytest.mark.parametrize("name", ["loss", "grad_norm", "success", "lr", "cached_share"])
def test_a_metric_of_the_file(copied, capsys, name):
  rows = read_jsonl(copied / "metrics.jsonl")
  for row in rows:
    if (row["phase"], row["step"]) == ("rl", 5):
      row[name] = math.nextafter(row[name], 9)
  (copied / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  code, lines, _ = again(capsys, copied, 5)
  assert code == 1 and lines["metrics.jsonl"][1] == 1 and lines["metrics (record)"][1] == 0
  assert lines["metrics.jsonl"][2].startswith(f"update 5, {name}: ")


def test_what_else_a_record_says(copied, capsys):
  def header(values):
    values["row"]["loss"] = math.nextafter(values["row"]["loss"], 9)
    values["experts"][0][1] = "expert/77"

  def reward(arrays):
    arrays["rewards"][0] += 0.5

  change(copied, 5, reward, header)
  code, lines, _ = again(capsys, copied, 5)
  assert code == 1 and lines["experts"][1] == 1 and lines["tokens"][1] == 0
  assert re.search(r"expert/77 was recorded, expert/\d is chosen", lines["experts"][2])
  assert lines["metrics (record)"][1] > 0 and lines["metrics.jsonl"][1] > 0


def test_a_changed_update_on_the_way(copied, capsys):
  change(copied, 2, flip("tokens", 0, first_sampled))
  code, lines, _ = again(capsys, copied, 3)
  assert code == 1 and lines["updates before"][1] >= 1
  assert lines["updates before"][2].startswith("update 2, ") and lines["metrics.jsonl"][1] > 0


def test_after_kill_9_and_a_resumption(start, finished, tmp_path, capsys):
  workdir = tmp_path / "killed"
  process = start(workdir)
  deadline = time.monotonic() + 120
  while not (workdir / "updates" / "000003.npz").exists():
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.01)
  process.kill()
  process.communicate()
  resumed = start(workdir)
  out, err = resumed.communicate(timeout=200)
  assert resumed.returncode == 0 and "resuming" in out, err
  for step in STEPS:
    assert again(capsys, workdir, step)[0] == 0
    # Apart from what the clock said, the records are those of a run that nothing killed.
    config = read_config(workdir)
    old, new = (record.Updates(d, config).read(step) for d in (finished(), workdir))
    for a, b in zip(old.trajectories, new.trajectories, strict=True):
      assert a.id == b.id and a.tokens.tobytes() == b.tokens.tobytes()
      assert a.logps.tobytes() == b.logps.tobytes()


def fails(capsys, workdir, step, *parts):
  code, lines, err = again(capsys, workdir, step)
  assert code == 2 and lines == {} and len(err.splitlines()) == 1 and err.startswith("error: ")
  for part in parts:
    assert part in err, err


def test_steps_that_there_are_not(copied, capsys):
  for step in (0, 6, -1):
    fails(capsys, copied, step, f"no record of update {step} in", "updates 1 to 5 have one")
  (copied / "updates" / "000002.npz").unlink()
  fails(capsys, copied, 2, "no record of update 2")
  parts = ("update 3 follows from the initial state", "record of update 2 is gone")
  fails(capsys, copied, 3, *parts, "; updates 5 to 5 can be replayed")
  assert again(capsys, copied, 5)[0] == 0
  shutil.rmtree(copied / "updates")
  fails(capsys, copied, 5, "this run has none")


def test_damaged_files(copied, capsys):
  updates = copied / "updates"
  (updates / "demonstrations.npz").write_bytes(b"PK")
  fails(capsys, copied, 1, "demonstrations.npz is damaged; train with the same settings")
  path = updates / "000005.npz"
  path.write_bytes(path.read_bytes()[:-20])
  fails(capsys, copied, 5, "000005.npz is damaged")
  (copied / "metrics.jsonl").write_text("{\n")
  fails(capsys, copied, 5, "000005.npz is damaged")


def test_a_damaged_checkpoint(copied, capsys):
  checkpoint = copied / "checkpoints" / "14"
  for file in checkpoint.rglob("*"):
    if file.is_file():
      file.write_bytes(file.read_bytes()[:100])
  fails(capsys, copied, 5, f"checkpoint {checkpoint} is damaged", f"delete {checkpoint}")
  # What the line says to do works: from the initial state it takes longer.
  shutil.rmtree(checkpoint)
  code, lines, _ = again(capsys, copied, 5)
  assert code == 0 and lines["updates before"][0] == 4


def test_other_settings_or_none(copied, capsys, tmp_path):
  path = copied / "config.json"
  values = json.loads(path.read_text())
  path.write_text(json.dumps(values | {"seed": 1}))
  fails(capsys, copied, 5, "recorded under other settings", "put the config.json back")
  path.write_text(json.dumps(values | {"sead": 1}))
  fails(capsys, copied, 5, "unknown setting config.sead")
  path.write_text("{")
  fails(capsys, copied, 5, "config.json is not JSON")
  fails(capsys, tmp_path / "nothing", 5, "config.json cannot be read", "give a run's --workdir")
