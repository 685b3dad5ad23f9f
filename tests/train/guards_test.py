"""Guard rails of whole runs: alarms warn and stop, and a resumed run tells the same."""

import re
import signal

import pytest

from tests.train import loop_test as loop

pytestmark = pytest.mark.slow

environment = loop.environment
# The untrained micro model's gradient norm is about 3.
WATCHED = ["--config.alarms.grad_norm.warn=1", "--config.alarms.grad_norm.updates=3"]


@pytest.fixture(scope="module")
def watched(environment, tmp_path_factory):
  """A whole run during which an alarm warns."""
  workdir = tmp_path_factory.mktemp("runs") / "watched"
  return workdir, loop.run(environment, workdir, *WATCHED)


def test_a_warning_is_told_once_and_written(watched):
  workdir, done = watched
  assert done.returncode == 0, done.stderr
  (row,) = loop.rows_of(workdir, "alarm")
  norm = loop.rows_of(workdir, "rl")[2]["grad_norm"]
  assert {k: v for k, v in row.items() if k != "wall"} == {
    "phase": "alarm", "step": 3, "rule": "grad_norm", "value": norm, "bound": 1, "updates": 3,
    "stop": 0,
  }  # fmt: skip
  said = done.stdout + done.stderr
  assert said.count("update 3: alarm grad_norm: gradient norm is") == said.count("alarm ") == 1
  page = (workdir / "report.html").read_text()
  assert "Alarms: grad_norm warned at update 3." in page


def test_a_run_killed_within_a_streak_warns_at_the_same_update(watched, environment, tmp_path):
  """The checkpoint of update 2 holds two updates of the streak.

  A thread writes it, so that it may be there before the warning or after it; on a slow machine the
  one of update 4, after the warning, may be there as well when the run dies.
  """
  workdir = tmp_path / "killed"
  process = loop.start(environment, workdir, *WATCHED, "--config.rl.checkpoint_every=2")
  saved = workdir / "checkpoints" / str(2 * (loop.STEPS["sft"] + 2))
  loop.wait_until(process, saved.exists, "the checkpoint of update 2")
  process.send_signal(signal.SIGKILL)
  process.communicate()
  again = loop.run(environment, workdir, *WATCHED)
  assert again.returncode == 0 and re.search("update [24]", again.stdout), again
  whole, _ = watched
  assert loop.measured(workdir) == loop.measured(whole)
  assert [row["step"] for row in loop.rows_of(workdir, "alarm")] == [3]


def test_a_stop_comes_after_a_checkpoint_and_other_bounds_go_on(watched, environment, tmp_path):
  workdir = tmp_path / "stopped"
  stopping = [*WATCHED, "--config.alarms.grad_norm.stop=2"]
  for update in (3, 4):  # the same bounds stop it again, one update later
    done = loop.run(environment, workdir, *stopping)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"error: update {update}: alarm grad_norm: gradient norm is" in done.stderr
    assert "--config.alarms.grad_norm.stop" in done.stderr.splitlines()[-1]
    newest = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert newest == 2 * (loop.STEPS["sft"] + update)
  refused = loop.run(environment, workdir, *WATCHED, "--config.seed=1")
  assert "config.seed (0, not 1)" in refused.stderr and refused.returncode == 1
  done = loop.run(environment, workdir, *WATCHED)
  assert done.returncode == 0 and "resuming" in done.stdout, done.stderr
  whole, _ = watched
  assert loop.summary(workdir)["params_sha256"] == loop.summary(whole)["params_sha256"]
  rows = [row for row in loop.measured(workdir) if not row.get("stop")]
  assert rows == loop.measured(whole)


def test_an_unknown_rule_is_one_line(environment, tmp_path):
  done = loop.run(environment, tmp_path / "run", "--config.alarms.grad_nrm.warn=1")
  loop.fails_with_one_line(done, "grad_nrm")
