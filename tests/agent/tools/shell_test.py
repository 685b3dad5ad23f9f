"""The shell: what a command did is told, and no command takes the shell away."""

import time

import pytest


def test_state_lasts_and_the_exit_code_is_told(tools):
  assert tools["shell"](command="cd /tmp; x=5").text == "[no output]"
  result = tools["shell"](command="echo $x; pwd; echo err >&2; (exit 3)")
  assert (result.text, result.outcome) == ("5\n/tmp\nerr\n[exit code 3]", "error")
  assert result.facts["exit_code"] == 3


def test_a_command_that_takes_too_long_is_stopped_and_told(tools):
  tools["shell"](command="x=5")
  result = tools["shell"](command="echo begun; sleep 60", timeout=0.3)
  assert result.outcome == "timeout" and result.facts["exit_code"] is None
  assert result.text.startswith("begun\n[timed out after 0.3 s")
  assert tools["shell"](command="echo $x").text == "5"


def test_what_runs_on_holds_nothing_up(tools):
  began = time.monotonic()
  assert tools["shell"](command="(sleep 0.3; echo late; sleep 60) & echo now").text == "now"
  assert time.monotonic() - began < 30
  time.sleep(0.6)
  # a path asks the shell where it is: what it prints meanwhile is told with the next command
  assert tools["list"]().text == "[the directory is empty]"
  assert tools["shell"](command="echo then").text == "late\nthen"


def test_ten_megabytes_of_output(tools, workspace):
  result = tools["shell"](command="yes 0123456789 | head -c 10000000")
  assert result.facts["truncated"] and len(result.text) < 17_000
  path = result.facts["spilled"]
  assert path in result.text and "bytes left out" in result.text
  assert tools["read"](path=path, limit=2).text.startswith("1\t0123456789\n2\t0123456789\n[lines")
  workspace.shown = 1000
  assert len(tools["shell"](command="seq 2000").text) < 1100


@pytest.mark.parametrize("command", ["exit 3", "kill -9 $$", "exec true", "kill -9 -1"])
def test_a_shell_that_ends_is_followed_by_another(tools, command):
  tools["shell"](command="x=5; echo kept > f")
  ended = "[the shell ended" in tools["shell"](command=command).text
  assert ended == (command in ("kill -9 $$", "exec true"))  # the sandbox outlives the others
  assert tools["shell"](command="echo got $x").text == ("got" if ended else "got 5")
  assert tools["read"](path="/work/f").text == "1\tkept"


def test_killing_everything_is_no_end(tools):
  """Not even of the second shell, whose end may come in the middle of a command."""
  tools["shell"](command="echo kept > f")
  for _ in range(10):
    tools["shell"](command="kill -9 -1")
    assert tools["read"](path="f").text == "1\tkept"


def test_a_current_directory_that_goes_is_told(tools):
  tools["shell"](command="mkdir d; cd d; rmdir ../d")
  result = tools["read"](path="a")
  assert result.outcome == "error" and "current directory is gone" in result.text
  assert tools["glob"](pattern="*", path="/work").text == "[nothing matches]"
  tools["shell"](command="cd /work; echo x > a")
  assert tools["read"](path="a").text == "1\tx"


@pytest.mark.parametrize("command", ["echo \0", "echo \ud800", "#" * (1 << 21)])
def test_what_no_shell_can_be_told_is_refused(tools, command):
  result = tools["shell"](command=command)
  assert result.text.startswith("error: not run") and len(result.text) < 200
  assert tools["shell"](command="echo \udcff | wc -c").text == "2"
