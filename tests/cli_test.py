"""The `rome` command as a user meets it: help, version, dispatch, exit codes."""

import subprocess
import sys

import pytest

import rome
from rome import cli


def test_help_lists_every_command(capsys):
  with pytest.raises(SystemExit) as exit_info:
    cli.main(["--help"])
  assert exit_info.value.code == 0
  out = capsys.readouterr().out
  assert all(name in out for name in cli.COMMANDS)


def test_version(capsys):
  with pytest.raises(SystemExit):
    cli.main(["--version"])
  assert capsys.readouterr().out == f"rome {rome.__version__}\n"


@pytest.mark.parametrize("argv", [[], ["dance"], ["--dance"]])
def test_wrong_arguments(argv, capsys):
  with pytest.raises(SystemExit) as exit_info:
    cli.main(argv)
  assert exit_info.value.code == 2
  assert capsys.readouterr().err.splitlines()[-1].startswith("rome: error: ")


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_has_help(command, capsys):
  with pytest.raises(SystemExit) as exit_info:
    cli.main([command, "--help"])
  assert exit_info.value.code == 0
  assert capsys.readouterr().out.startswith(f"usage: rome {command}")


def test_exit_code_reaches_the_shell(tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "rome.cli", "report", str(tmp_path)],
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert done.returncode == 1
  assert done.stderr == (
    f"rome report: {tmp_path} has no metrics.jsonl; give the --workdir of a run that has started\n"
  )
