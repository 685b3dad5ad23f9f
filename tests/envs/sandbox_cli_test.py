"""`rome sandbox` as a user runs it."""

import subprocess
import sys

import pytest

from rome.envs import owner, sandbox, sandbox_cli


def test_run_passes_output_and_exit_code_on(capsys):
  assert sandbox_cli.main(["run", "--sandbox=bubblewrap", "echo out; echo err >&2; exit 3"]) == 3
  assert capsys.readouterr().out == "out\nerr\n"


def test_run_reports_a_time_out(capsys):
  assert sandbox_cli.main(["run", "--sandbox=bubblewrap", "--timeout=0.2", "sleep 30"]) == 124
  assert "stopped after 0.2 s" in capsys.readouterr().err


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["run", "--sandbox=process", "true"], "isolates nothing"),
    (["run", "--sandbox=bubblewrap", "--timeout=-1", "true"], "timeout must be between"),
  ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
  assert sandbox_cli.main(arguments) == 2
  error = capsys.readouterr().err
  assert error.startswith("rome sandbox: ") and message in error and error.count("\n") == 1


def test_ps_and_gc_tell_live_from_dead(own_runtime_dir, capsys):
  orphan = "rome-0rphan000000"
  program = (
    "import os, time; from rome.envs import owner; "
    f"owner.new_dir({orphan!r}); os.kill(os.getpid(), 9)"
  )
  subprocess.run([sys.executable, "-c", program], timeout=60, check=False)
  with sandbox.Sandbox(sandbox.BACKENDS["bubblewrap"], None, sandbox.Limits()) as alive:
    assert sandbox_cli.main(["ps"]) == 0
    states = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "in use" in states[alive.id] and f"pid {owner.label().split(':')[2]}" in states[alive.id]
    assert "left over" in states[orphan]
    assert sandbox_cli.main(["gc"]) == 0
    swept = capsys.readouterr().out.splitlines()
    assert orphan in swept and alive.id not in swept
    assert alive.run("echo still here").output == "still here\n"
  assert orphan not in sandbox_cli.owned_directories()


@pytest.mark.slow
def test_ps_lists_containers(capsys):
  with sandbox.make_sandbox(backend="podman") as alive:
    sandbox_cli.main(["ps"])
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith(alive.id))
    assert line.split()[1] == "yes"
