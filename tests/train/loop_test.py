"""Whole runs through the command line: they finish, resume to the same bits, and clean up.

The model is the micro one, which learns nothing; everything around it is as in a real run. Compiled
programs are kept between the processes, so that each costs seconds.
"""

import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest

from rome.envs import owner, sandbox_cli
from rome.envs.families import FAMILIES
from rome.train.metrics import read_jsonl, repeatable

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = "--config=experiments/configs/quickstart.py"
STEPS = {"sft": 4, "rl": 5}
TINY = [
  *("--sandbox=bubblewrap", "--config.model=micro", "--config.demonstrations=6"),
  *("--config.transcripts=2", "--config.keep_checkpoints=2", "--config.engine.slots=4"),
  *("--config.eval.instances=6", "--config.eval.plateau=2", "--config.experts.batch=2"),
  *("--config.sft.steps=4", "--config.sft.batch=4", "--config.sft.micro_rows=2"),
  *("--config.sft.log_every=1", "--config.sft.checkpoint_every=2"),
  *("--config.rl.steps=5", "--config.rl.batch=6", "--config.rl.micro_rows=2"),
  *("--config.rl.checkpoint_every=2", "--config.rl.cooldown=2"),
  # Without it the failures of an untrained policy would leave its weights as they are.
  "--config.ipa.failure_reward=-1.0",
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
  cache = tmp_path_factory.mktemp("compiled")
  return os.environ | {
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }


def start(environment, workdir, *extra, program="train", config=CONFIG, **kwargs):
  flags = [flag for flag in TINY if program == "train" or not flag.startswith("--sandbox")]
  if program == "evaluate":
    flags.append("--config.sandbox.backend=bubblewrap")
  return subprocess.Popen(
    [sys.executable, "-m", f"experiments.{program}", config, f"--workdir={workdir}", *flags,
     *extra],
    cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs,
  )  # fmt: skip


def run(environment, workdir, *extra, **kwargs):
  process = start(environment, workdir, *extra, **kwargs)
  out, err = process.communicate(timeout=200)
  return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def summary(workdir):
  return json.loads((workdir / "summary.json").read_text())


def measured(workdir):
  """The rows of metrics.jsonl without what the clock says."""
  return repeatable(read_jsonl(workdir / "metrics.jsonl"))


def owned_by(pid_label):
  """Names of what belongs to a process, alive or not: directories and containers."""
  owned = {**sandbox_cli.owned_directories(), **sandbox_cli.owned_containers()}
  return {name for name, label in owned.items() if label == pid_label}


def inner_processes(names):
  """Labels of the first processes of sandboxes."""
  found = [owner.runtime_dir() / name / "process" for name in names]
  return [path.read_text() for path in found if path.exists()]


def wait_until(process, condition, what, timeout=120):
  deadline = time.monotonic() + timeout
  while not condition():
    assert process.poll() is None, f"ended before {what}: {process.stderr.read()}"
    assert time.monotonic() < deadline, f"no {what} within {timeout} s"
    time.sleep(0.01)


def rows_of(workdir, phase):
  path = workdir / "metrics.jsonl"
  return [r for r in read_jsonl(path) if r["phase"] == phase] if path.exists() else []


def kill_and_resume(environment, whole, killed, *flags, then=()):
  """Kills a run after its third row of RL and goes on: it ends as the whole one did.

  `then` are flags of the second start alone.
  """
  process = start(environment, killed, *flags)
  wait_until(process, lambda: len(rows_of(killed, "rl")) >= 3, "row 3 of rl")
  process.kill()
  process.communicate()
  again = run(environment, killed, *flags, *then)
  assert again.returncode == 0 and "resuming" in again.stdout, again.stderr
  assert measured(killed) == measured(whole)
  assert summary(killed)["params_sha256"] == summary(whole)["params_sha256"]


@pytest.fixture(scope="module")
def finished(environment, tmp_path_factory):
  """The run that nothing interrupts, and what it printed."""
  workdir = tmp_path_factory.mktemp("runs") / "deep" / "finished"
  return workdir, run(environment, workdir)


def test_a_run_finishes_and_leaves_its_files(finished):
  workdir, done = finished
  assert done.returncode == 0, done.stderr
  assert {p.name for p in workdir.iterdir()} >= {
    *("checkpoints", "config.json", "metrics.jsonl", "episodes.jsonl", "summary.json"),
    *("report.html", "tensorboard"),
  }
  assert len(list((workdir / "checkpoints").iterdir())) == 2
  made = summary(workdir)
  for name in ("success_before", "success_after", "wall_seconds", "peak_rss_mb", "params_sha256"):
    assert name in made
  assert made["sandbox_backend"] == "bubblewrap" and set(made["families"]) == set(FAMILIES)
  assert pathlib.Path(made["checkpoint"]).is_dir()
  for line in (made["checkpoint"], str(workdir / "summary.json"), str(workdir / "report.html")):
    assert line in done.stdout
  assert "Traceback" not in done.stderr


def test_its_metrics_tell_every_update(finished):
  workdir, _ = finished
  for phase, steps in STEPS.items():
    assert [row["step"] for row in rows_of(workdir, phase)] == list(range(1, steps + 1))
  assert [row["name"] for row in rows_of(workdir, "eval")] == ["plateau_1", "before", "after"]
  for row in rows_of(workdir, "sft"):
    assert row.keys() >= {"loss", "accuracy", "grad_norm", "occupancy", "tokens_per_s_trained"}
  for row in rows_of(workdir, "rl"):
    assert row.keys() >= {
      *("success", "grad_norm", "loss", "reply_length", "mismatch_mean", "mismatch_max"),
      *("masked_share", "truncated_share", "entropy", "invalid", "lr", "tokens_per_s_sampled"),
      *("tokens_per_s_trained", "env_steps_per_s", "share_generate", "share_env", "share_train"),
      *("share_other", *(f"success_{family}" for family in FAMILIES)),
      *("played_success", "filtered", "redundant", "retries", "silent"),
      *("calls_sh", "calls_submit", "calls_malformed", "occupancy"),
    }
    # Engine and trainer score the same tokens, and the weights do move.
    assert row["grad_norm"] > 0 and row["loss_rl"] != 0 and row["mismatch_max"] < 1e-3
    assert row["invalid"] == 0
    shares = [row[f"share_{stage}"] for stage in ("generate", "env", "train", "other")]
    assert sum(shares) == pytest.approx(1, abs=1e-6)
  episodes = read_jsonl(workdir / "episodes.jsonl")
  assert [row["phase"] for row in episodes] == [
    name for name in ("plateau_1", "before", "after") for _ in range(2)
  ]


def test_a_finished_run_says_the_same_again(finished, environment):
  workdir, _ = finished
  first = summary(workdir)
  again = run(environment, workdir)
  assert again.returncode == 0, again.stderr
  assert summary(workdir) == first


def test_evaluate_repeats_the_last_evaluation(finished, environment):
  workdir, _ = finished
  done = run(environment, workdir, program="evaluate")
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout.splitlines()[-1])
  made = summary(workdir)
  assert result["success"] == made["success_after"] and result["n"] == made["instances"] == 6
  assert json.loads((workdir / "evaluation.json").read_text()) == result


@pytest.mark.parametrize("phase", ["sft", "rl"])
def test_a_killed_run_ends_with_the_same_bits(finished, environment, tmp_path, phase):
  """kill -9 at a random place of a phase; the same command again; nothing tells the difference."""
  chance = random.SystemRandom()
  at, pause = chance.randrange(1, STEPS[phase]), chance.random() * 0.2
  workdir = tmp_path / f"{phase}-{at}-{pause:.3f}"  # the place stands in every message
  process = start(environment, workdir)
  label = owner.label(process.pid)
  wait_until(process, lambda: len(rows_of(workdir, phase)) >= at, f"row {at} of {phase}")
  time.sleep(pause)
  assert process.poll() is None
  names = owned_by(label)
  inner = inner_processes(names)
  assert len(names) >= 4 and inner
  process.kill()
  process.communicate()
  again = run(environment, workdir)
  assert again.returncode == 0, again.stderr
  whole, _ = finished
  assert summary(workdir)["params_sha256"] == summary(whole)["params_sha256"]
  assert measured(workdir) == measured(whole)
  assert read_jsonl(workdir / "episodes.jsonl") == read_jsonl(whole / "episodes.jsonl")
  if phase == "rl":
    assert "resuming" in again.stdout
  # The next start removed what the killed process could not.
  assert owned_by(label) == set() and all(owner.is_dead(process) for process in inner)


def test_a_killed_run_goes_on_with_the_instance_where_it_was(environment, tmp_path):
  """Filtered groups move the place among the instances on, by as many as this policy makes.

  And with moments in host memory from then on, which changes no bit.
  """
  flags = ["--config.rl.group_size=2", "--config.rl.filter_groups=True"]
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  done = run(environment, whole, *flags)
  assert done.returncode == 0, done.stderr
  assert all(row["filtered"] > 0 for row in rows_of(whole, "rl"))
  then = ["--config.offload_optimizer=True"]
  kill_and_resume(environment, whole, killed, *flags, then=then)
  assert json.loads((killed / "config.json").read_text())["offload_optimizer"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(environment, tmp_path, number):
  process = start(environment, tmp_path / "run", "--config.rl.steps=400")
  label = owner.label(process.pid)
  wait_until(process, lambda: rows_of(tmp_path / "run", "rl"), "an update of rl")
  names = owned_by(label)
  inner = inner_processes(names)
  assert len(names) >= 4 and inner
  process.send_signal(number)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 130, err
  assert "interrupted; the same command goes on from the last checkpoint" in err.splitlines()[-1]
  assert "Traceback" not in err
  assert owned_by(label) == set() and all(owner.is_dead(process) for process in inner)
  # It waited for the checkpoint that was being written.
  assert all(p.name.isdigit() for p in (tmp_path / "run" / "checkpoints").iterdir())


def fails_with_one_line(done, *parts):
  """A failure as a user should see it."""
  assert done.returncode not in (0, None) and done.returncode > 0, done
  assert len(done.stderr.splitlines()) == 1, done.stderr
  assert done.stderr.startswith("error: ")
  for part in parts:
    assert part in done.stderr


@pytest.mark.parametrize(
  ("flags", "parts"),
  [
    (["--config.rl.stepz=3"], ["unknown setting", "stepz", "steps"]),
    (["--config.rl.steps=three"], ["--config.rl.steps=three", "int"]),
    (["--config.agent.max_observation=3"], ["agent.max_observation must be at least 32, got 3"]),
    (["--config.tasks.families=('cuont',)"], ["tasks.families must be among count", "cuont"]),
    (["--sandbox=jail"], ["--sandbox=jail", "bubblewrap"]),
    (["--sandbox=process"], ["--i_accept_no_isolation"]),
    (["--config.sandbox.image=nowhere/nothing:1"], ["nowhere/nothing:1", "image"]),
    (["--config=nope.py"], ["nope.py", "No such file"]),
  ],
)
def test_a_mistaken_flag_is_one_line(environment, tmp_path, flags, parts):
  fails_with_one_line(run(environment, tmp_path / "run", *flags), *parts)


def test_a_workdir_that_cannot_be_written(environment, tmp_path):
  (tmp_path / "file").write_text("in the way")
  done = run(environment, tmp_path / "file" / "run")
  fails_with_one_line(done, f"cannot write to --workdir {tmp_path}/file/run", "choose another")


def test_a_workdir_of_other_settings(environment, finished):
  workdir, _ = finished
  before = summary(workdir)
  done = run(environment, workdir, "--config.seed=1")
  fails_with_one_line(done, "config.seed (0, not 1)", "choose another --workdir")
  assert summary(workdir) == before


def damage(checkpoint):
  for file in checkpoint.rglob("*"):
    if file.is_file():
      file.write_bytes(file.read_bytes()[:100])


def test_a_corrupt_checkpoint(environment, finished, tmp_path):
  """The one before leads to the same end, with the same rows; where none is left, one line."""
  workdir, whole = tmp_path / "copy", finished[0]
  shutil.copytree(whole, workdir)
  older, newest = sorted((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
  damage(newest)
  done = run(environment, workdir)
  assert done.returncode == 0, done.stderr
  assert "Traceback" not in done.stderr and "Exception" not in done.stderr
  (line,) = [line for line in done.stdout.splitlines() if "damaged" in line]
  assert line.startswith(f"checkpoint {newest} is damaged (")
  assert line.endswith(
    f"now {newest}.damaged; what was done after checkpoint {older.name} is done again"
  )
  assert summary(workdir)["params_sha256"] == summary(whole)["params_sha256"]
  assert measured(workdir) == measured(whole)
  for name in ("episodes.jsonl", "updates"):
    paths = [workdir / name, whole / name]
    a, b = (read_jsonl(p) if p.is_file() else sorted(os.listdir(p)) for p in paths)
    assert a == b
  assert {p.name for p in newest.parent.iterdir()} == {
    *(older.name, newest.name, f"{newest.name}.damaged")
  }
  for checkpoint in (older, newest):
    damage(checkpoint)
  fails_with_one_line(
    run(environment, workdir), f"checkpoint {newest} is damaged", f"delete {newest.parent} to start"
  )


def test_a_checkpoint_of_other_settings(environment, finished, tmp_path):
  """As after a copy into the wrong place: config.json agrees with the command, the state not."""
  workdir = tmp_path / "copy"
  shutil.copytree(finished[0], workdir)
  settings = json.loads((workdir / "config.json").read_text())
  (workdir / "config.json").write_text(json.dumps(settings | {"seed": 1}))
  done = run(environment, workdir, "--config.seed=1")
  fails_with_one_line(done, f"{workdir}/checkpoints/", "made under other settings", "--workdir")


_FULL = """
mount -t tmpfs -o size=64m tmpfs "$1"
run=("${@:3}")
"${run[@]}" >"$2/out" 2>"$2/err" & pid=$!
until grep -q '"rl"' "$1/run/metrics.jsonl" 2>/dev/null; do kill -0 $pid || exit 3; sleep 0.02; done
head -c 1G /dev/zero >"$1/ballast" 2>/dev/null
wait $pid; echo $? >"$2/full"
rm "$1/ballast"
"${run[@]}" >"$2/out_again" 2>"$2/err_again"; echo $? >"$2/again"
cp -r "$1/run" "$2/run"
"""


def test_a_disk_that_fills_up_stops_a_run_that_goes_on_when_there_is_room(
  environment, finished, tmp_path
):
  """A filesystem of the run's own, in a mount namespace, filled during an update."""
  disk, out = tmp_path / "disk", tmp_path / "out"
  disk.mkdir()
  out.mkdir()
  train = ["-m", "experiments.train", CONFIG, f"--workdir={disk / 'run'}", *TINY]
  # In that namespace, whose only user is root, bubblewrap could not map others.
  train += ["--sandbox=process", "--i_accept_no_isolation"]
  done = subprocess.run(
    ["unshare", "-rm", "bash", "-c", _FULL, "bash", disk, out, sys.executable, *train],
    cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250,
  )  # fmt: skip
  assert done.returncode == 0, done
  errors = (out / "err").read_text()
  assert (out / "full").read_text() == "1\n", errors
  line = errors.splitlines()[-1]
  assert line.startswith("error: ") and str(disk / "run") in line, errors
  assert "could not be written (" in line and "No space left on device" in line
  assert "Traceback" not in errors and "Exception" not in errors and errors.count("error") == 1
  assert (out / "again").read_text() == "0\n", (out / "err_again").read_text()
  assert summary(out / "run")["params_sha256"] == summary(finished[0])["params_sha256"]
  assert measured(out / "run") == measured(finished[0])


def own_tasks(path, tests="[ -e done ]\n", words=3):
  for split in ("train", "held_out"):
    task = path / split / "mine"
    (task / "files").mkdir(parents=True)
    (task / "task.toml").write_text(f'instruction = "Make done{"!" * words}"\n')
    (task / "solution.sh").write_text("touch done\n")
    if tests:
      (task / "tests.sh").write_text(tests)
  return [f"--config.tasks.{split}_dir={path / split}" for split in ("train", "held_out")]


@pytest.mark.parametrize(
  ("task", "parts"),
  [
    ({"tests": ""}, ["has no tests.sh"]),
    ({"tests": "exit 1\n"}, ["reference solution of task mine does not pass its tests"]),
    ({"words": 300}, ["task mine", "agent.context"]),
  ],
)
def test_own_tasks_that_cannot_be_used(environment, tmp_path, task, parts):
  done = run(environment, tmp_path / "run", *own_tasks(tmp_path / "tasks", **task))
  fails_with_one_line(done, *parts)


def test_a_full_disk_is_one_line_and_keeps_what_there_is(environment, tmp_path):
  """A limit on the size of files stands in for the disk; it fails the same writes."""

  def small_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

  done = run(environment, tmp_path / "run", preexec_fn=small_files)
  assert done.returncode == 1
  error = done.stderr.splitlines()[-1]
  assert error.startswith("error: checkpoint ") and "could not be written" in error
  assert "Traceback" not in done.stderr and done.stderr.count("error") == 1
  assert rows_of(tmp_path / "run", "sft")
