"""Several processes train as one does, stop together when one is killed, and go on as any number.

Real processes on this machine, with real sandboxes; the model is the micro one. Layouts round
otherwise, so weights come to differ in their last bits. On CPUs the engine still draws the same
tokens, but for a draw that falls between; after one nothing is comparable any more. So rows are
compared for as long as tokens agree, that is asked to be long, and learning rates are low: AdamW
makes steps of the whole rate out of gradients that are rounding alone.
"""

import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments import processes
from rome.envs import owner
from tests.train.loop_test import CONFIG, TINY, inner_processes, owned_by, rows_of

ROOT = pathlib.Path(__file__).parents[2]
DEADLINE = 270  # seconds a run may take
STEPS = {"sft": 20, "rl": 20}
FLAGS = [
  *TINY,
  *("--config.sft.steps=20", "--config.sft.micro_rows=4", "--config.sft.checkpoint_every=10"),
  *("--config.sft.learning_rate=1e-4", "--config.rl.learning_rate=1e-4"),
  *("--config.rl.steps=20", "--config.rl.micro_rows=4", "--config.rl.checkpoint_every=5"),
]
# Most of the time goes into compiling, in every process.
XLA_FLAGS = (
  "--xla_force_host_platform_device_count=1",
  "--xla_backend_optimization_level=0",
  "--xla_llvm_disable_expensive_passes=true",
)
GO_ON = "they go on from the last checkpoint"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
  return os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": " ".join(XLA_FLAGS),
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }


def free_port():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


class Job:
  """The processes of one run; whatever they write goes to a log each. A context manager."""

  def __init__(self, environment, workdir, count, *extra):
    self.workdir, self.started = workdir, time.monotonic()
    self.logs = [workdir.with_name(f"{workdir.name}-{count}-{i}.log") for i in range(count)]
    common = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}"]
    self.processes = []
    for index, log in enumerate(self.logs):
      several = [*common, f"--process_id={index}"] if count > 1 else []
      command = [sys.executable, "-m", "experiments.train", CONFIG, f"--workdir={workdir}"]
      with log.open("wb") as out:
        self.processes.append(
          subprocess.Popen(
            [*command, *FLAGS, *extra, *several],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
          )
        )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for process in self.processes:
      process.kill()
      process.wait()

  def log(self, index):
    return self.logs[index].read_text(errors="replace")

  def wait(self):
    """Exit statuses."""
    end = self.started + DEADLINE
    return [p.wait(timeout=max(end - time.monotonic(), 1)) for p in self.processes]

  def ends_well(self):
    assert self.wait() == [0] * len(self.logs), [self.log(i)[-2000:] for i in range(len(self.logs))]

  def wait_for_row(self, phase, number):
    while len(rows_of(self.workdir, phase)) < number:
      ended = [self.log(i)[-2000:] for i, p in enumerate(self.processes) if p.poll() is not None]
      assert not ended, ended
      assert time.monotonic() < self.started + DEADLINE, f"no row {number} of {phase}"
      time.sleep(0.02)

  def kill(self, index):
    """kill -9 of one; the others have to end by themselves, without sandboxes."""
    labels = [owner.label(p.pid) for p in self.processes]
    inner = [inner_processes(owned_by(label)) for label in labels]
    assert all(inner)
    self.processes[index].kill()
    end = time.monotonic() + processes.HEARTBEAT + 30
    for process in self.processes:
      process.wait(timeout=max(end - time.monotonic(), 1))
    for i, process in enumerate(self.processes):
      assert process.returncode != 0, i
      tail = ""
      while GO_ON not in tail and time.monotonic() < end:  # a reaper speaks after the end
        tail = self.log(i)
        time.sleep(0.1)
      last = tail.splitlines()[-1]
      assert last.startswith("error: ") and GO_ON in last, tail[-2000:]
      what = f"process {i} of {len(self.logs)} was ended from outside"
      assert what in last or (i != index and "another process of this run ended" in last)
      assert tail.count("\nerror: ") == 1
    while any(map(owned_by, labels)) and time.monotonic() < end:
      time.sleep(0.1)
    assert not any(map(owned_by, labels))
    assert all(owner.is_dead(process) for part in inner for process in part)


@pytest.fixture(scope="module")
def alone(environment, tmp_path_factory):
  """The run of one process that nothing interrupts."""
  workdir = tmp_path_factory.mktemp("alone") / "run"
  with Job(environment, workdir, 1) as job:
    job.ends_well()
  return workdir


@pytest.fixture(scope="module")
def killed(environment, tmp_path_factory):
  """A run of two processes, the second of which was killed late."""
  workdir = tmp_path_factory.mktemp("killed") / "run"
  with Job(environment, workdir, 2, "--config.mesh.data=-1") as job:
    job.wait_for_row("rl", 12)
    job.kill(1)
  return workdir


def tokens(workdir, update):
  with np.load(workdir / "updates" / f"{update:06d}.npz") as record:
    return record["tokens"]


def compare(workdir, whole, least):
  """Loss and gradient norm of all updates to 1e-5; of reinforcement learning at least `least`."""
  for phase in STEPS:
    rows, wanted = rows_of(workdir, phase), rows_of(whole, phase)
    assert [row["step"] for row in rows] == [row["step"] for row in wanted[: len(rows)]]
    if phase == "rl":
      same = [np.array_equal(tokens(workdir, k), tokens(whole, k)) for k in range(1, len(rows) + 1)]
      rows = rows[: same.index(False)] if False in same else rows
      assert len(rows) >= least
    for row, want in zip(rows, wanted, strict=False):
      for name in ("loss", "grad_norm"):
        assert row[name] == pytest.approx(want[name], rel=1e-5), (phase, row["step"], name)
      for name in row.keys() & {"success", "reply_length", "calls_sh", "invalid", "experts"}:
        assert row[name] == want[name], (phase, row["step"], name)


@pytest.mark.slow
def test_two_processes_train_as_one_does_until_one_is_killed(alone, killed):
  assert len(rows_of(alone, "sft")) == len(rows_of(killed, "sft")) == 20
  compare(killed, alone, least=10)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "axis"), [(1, "data"), (2, "fsdp")])
def test_the_rest_trains_what_was_left(environment, alone, killed, tmp_path, count, axis):
  workdir = tmp_path / "run"
  shutil.copytree(killed, workdir)
  before = len(rows_of(workdir, "rl"))
  with Job(environment, workdir, count, f"--config.mesh.{axis}=-1") as job:
    job.ends_well()
    assert "resuming" in job.log(0) and "update 10" in job.log(0)
  assert before < len(rows_of(workdir, "rl")) == STEPS["rl"]
  compare(workdir, alone, least=15)
  assert (workdir / "summary.json").exists() and (workdir / "report.html").exists()
  names = [row["name"] for row in rows_of(workdir, "eval")]
  assert names == ["plateau_1", "before", "after"]


@pytest.mark.slow
def test_four_processes_on_a_mesh_of_two_axes_and_a_killed_coordinator(
  environment, alone, tmp_path
):
  mesh = ("--config.mesh.fsdp=2", "--config.mesh.expert=-1")
  with Job(environment, tmp_path / "run", 4, *mesh) as job:
    job.wait_for_row("sft", 3)
    job.kill(0)
  compare(tmp_path / "run", alone, least=0)


@pytest.mark.parametrize(
  ("flags", "parts"),
  [
    (("localhost", 2, 0), ["--coordinator must be HOST:PORT or auto, got 'localhost'"]),
    (("localhost:1", None, 0), ["needs --num_processes and --process_id"]),
    (("localhost:1", 2, 2), ["--process_id must be below --num_processes=2, got 2"]),
    ((None, 2, 0), ["need --coordinator=HOST:PORT"]),
    (("auto", 2, 0), ["need --coordinator=HOST:PORT"]),
  ],
)
def test_flags_that_contradict(capsys, flags, parts):
  assert processes.run(lambda: pytest.fail("it ran"), *flags) == 1
  told = capsys.readouterr().err
  assert told.startswith("error: ") and len(told.splitlines()) == 1
  assert all(part in told for part in parts)


def test_one_process_runs_as_it_always_did(capsys):
  assert processes.run(lambda: 7, None, None, None) == 7
  assert capsys.readouterr() == ("", "")
