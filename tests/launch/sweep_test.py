"""Sweeps: points, names, real processes, failures, resumption, and that nothing outlives a stop."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from launch import sweep

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = ROOT / "tests" / "launch" / "program_config.py"


def command(workdir: pathlib.Path, points: str, *more: str) -> list[str]:
  return [
    *(sys.executable, "-m", "launch.sweep", f"--config={CONFIG}", f"--workdir={workdir}"),
    *("--module=tests.launch.program", f"--sweep={points}", *more),
  ]


def run(*args: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    command(*args), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
  )


def rows(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
  return [line.split() for line in done.stdout.splitlines()]


def is_running(pid: int) -> bool:
  try:
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except FileNotFoundError:
    return False
  return stat.rpartition(")")[2].split()[0] not in "ZX"


def wait_for(holds, seconds: float = 20.0) -> None:
  deadline = time.monotonic() + seconds
  while not holds():
    assert time.monotonic() < deadline, "timed out"
    time.sleep(0.02)


def test_product_in_order():
  assert sweep.parse_sweep("seed=0,1; rl.lr=1e-3,3e-4;") == [
    {"seed": "0", "rl.lr": "1e-3"},
    {"seed": "0", "rl.lr": "3e-4"},
    {"seed": "1", "rl.lr": "1e-3"},
    {"seed": "1", "rl.lr": "3e-4"},
  ]


@pytest.mark.parametrize("text", ["", ";", "seed", "seed=", "=1", "seed=1,,2", "a=1;a=2", "a=1,1"])
def test_unreadable_sweeps_name_the_axis(text):
  with pytest.raises(sweep.SweepError, match="--sweep"):
    sweep.parse_sweep(text)


def test_names_are_safe_and_distinct(tmp_path):
  program = sweep.Executable("python", "m")
  points = [{"a": "../../etc"}, {"a": "x y"}]
  jobs = sweep.make_experiment(points, program, tmp_path).jobs
  assert [job.workdir.parent for job in jobs] == [tmp_path, tmp_path]
  assert jobs[0].name == "a=.._.._etc"
  with pytest.raises(sweep.SweepError, match="two points"):
    sweep.make_experiment([{"a": "x y"}, {"a": "x/y"}], program, tmp_path)


def test_every_point_runs_with_its_settings(tmp_path):
  points = "seed=0,1;rl.lr=0.25,0.5"
  done = run(tmp_path / "s", points, "--max_parallel=4", "--", "--note=a 'b' $HOME;")
  assert done.returncode == 0, done.stderr
  assert [row[:2] for row in rows(done)[1:]] == [
    ["seed=0,rl.lr=0.25", "done"],
    ["seed=0,rl.lr=0.5", "done"],
    ["seed=1,rl.lr=0.25", "done"],
    ["seed=1,rl.lr=0.5", "done"],
  ]
  assert rows(done)[4][3:] == ["0.500", "0.100"]
  job = tmp_path / "s" / "seed=1,rl.lr=0.5"
  assert json.loads((job / "summary.json").read_text())["note"] == "a 'b' $HOME;"
  assert "running with seed 1" in (job / "log.txt").read_text()


def test_failures_are_told_and_only_they_run_again(tmp_path):
  done = run(tmp_path, "status=0,3")
  assert done.returncode == 1
  assert [" ".join(row[:5]) for row in rows(done)[2:]] == ["status=3 failed: exit code 3"]
  (tmp_path / "status=0" / "pids").unlink()
  again = run(tmp_path, "status=0,3")
  assert "status=0  done before" in again.stdout
  assert not (tmp_path / "status=0" / "pids").exists()


def test_points_from_a_file(tmp_path):
  path = tmp_path / "points.py"
  path.write_text("def points():\n  for seed in range(2):\n    yield {'seed': seed}\n")
  done = run(tmp_path / "s", str(path))
  assert done.returncode == 0 and [row[0] for row in rows(done)[1:]] == ["seed=0", "seed=1"]


@pytest.mark.parametrize(
  "text, message",
  [
    (None, "there is no file"),
    ("x = 1", "defines no function points"),
    ("def points(): return []", "must yield dictionaries"),
    ("def points(): return [3]", "must yield dictionaries"),
  ],
)
def test_unusable_files_are_named(tmp_path, text, message):
  path = tmp_path / "points.py"
  if text is not None:
    path.write_text(text)
  with pytest.raises(sweep.SweepError, match=message):
    sweep.load_points(str(path))


@pytest.mark.parametrize("number, ends", [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_a_stop_leaves_no_process(tmp_path, number, ends):
  # A shell without job control starts background processes with SIGINT ignored.
  default_int = ["env", "--default-signal=INT"]
  process = subprocess.Popen(
    default_int + command(tmp_path, "sleep=60;seed=0,1,2", "--max_parallel=2"),
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
  )
  try:
    files = [tmp_path / f"sleep=60,seed={i}" / "pids" for i in (0, 1)]
    wait_for(lambda: all(file.exists() and len(file.read_text().split()) == 2 for file in files))
    pids = [int(pid) for file in files for pid in file.read_text().split()]
    assert all(map(is_running, pids))
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
  finally:
    process.kill()
  assert process.returncode == ends
  assert [line.split()[1] for line in out.splitlines()[1:]] == ["stopped"] * 3
  wait_for(lambda: not any(map(is_running, pids)))


def test_jobs_end_when_the_launcher_is_killed(tmp_path):
  process = subprocess.Popen(
    command(tmp_path, "sleep=60"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  child = None
  try:
    file = tmp_path / "sleep=60" / "pids"
    wait_for(lambda: file.exists() and len(file.read_text().split()) == 2)
    job, child = map(int, file.read_text().split())
    process.kill()
    process.wait()
    wait_for(lambda: not is_running(job))
  finally:
    process.kill()
    if child is not None:
      os.kill(child, signal.SIGKILL)  # The killed program had no chance to end its own child.


def test_xmanager_missing_is_one_line(tmp_path):
  done = run(tmp_path, "seed=0", "--launcher=xm_local")
  assert done.returncode == 2
  assert done.stderr.startswith("launch.sweep: --launcher=xm_local needs xmanager")
  assert done.stderr.count("\n") == 1


def test_no_setting_is_silently_ignored(tmp_path):
  done = run(tmp_path, "seed=0", "--launcher=xm_local", "--max_parallel=2")
  assert done.returncode == 2 and "--max_parallel" in done.stderr
