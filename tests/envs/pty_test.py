"""Sessions with a terminal, and commands that are followed while they run."""

import shutil
import time

import pytest

from rome.envs.common import SandboxError


def read_until(session, text, timeout=30.0):
  """Polls until `text` was printed or the command ended; returns what came and the result."""
  seen, end = "", time.monotonic() + timeout
  while text not in seen and time.monotonic() < end:
    progress = session.poll(1.0)
    seen += progress.output
    if progress.result:
      return seen, progress.result
  assert text in seen, seen
  return seen, None


def finish(session, timeout=30.0):
  """Polls to the end; returns the result."""
  end = time.monotonic() + timeout
  while time.monotonic() < end:
    progress = session.poll(1.0)
    if progress.result:
      return progress.result
  raise AssertionError("the command does not end")


@pytest.fixture
def terminal(sandbox):
  session = sandbox.session("term", pty=(30, 100))
  yield session
  session.close()


def test_output_is_exact(terminal):
  assert (
    terminal.run("printf 'a\\nb'; printf '\\tc\\r\\n\\377\\000'").output == "a\nb\tc\r\n\ufffd\0"
  )
  assert terminal.run("seq 1 30000 > f; cat f; rm f").truncated
  for i in range(50):
    assert terminal.run(f"echo {i}").output == f"{i}\n"


def test_it_is_a_terminal(terminal):
  result = terminal.run("test -t 0 && test -t 1 && test -t 2 && stty size < /dev/tty; echo $TERM")
  assert result.output == "30 100\nxterm-256color\n"
  assert terminal.run("(exit 7)").exit_code == 7


def test_state_outlives_what_ends_the_shell(terminal):
  terminal.run("cd /tmp; x=1; sleep 61 & echo $! > pid")
  assert terminal.run("exit 4").exit_code == 4
  assert terminal.run("sleep 60", timeout=0.2).timed_out
  assert terminal.run("echo $x; pwd; kill -0 $(cat pid) && rm pid && echo lives").output == (
    "1\n/tmp\nlives\n"
  )
  assert terminal.run("kill -9 $$").exit_code == 137
  assert terminal.run("stty size").output == "30 100\n"


def test_jobs_keep_the_terminal_of_a_dead_shell(terminal):
  terminal.run("(while ! test -e go; do sleep 0.05; done; echo late) &")
  terminal.run("exit 0")
  assert any("late\n" in terminal.run("touch go; sleep 0.05").output for _ in range(200))


def test_read_asks_and_is_answered(terminal):
  terminal.start("read -p 'name? ' x; echo \"got $x\"")
  assert read_until(terminal, "name? ") == ("name? ", None)
  terminal.send(b"bob\n")
  result = finish(terminal)
  assert (result.exit_code, result.output) == (0, "name? got bob\n")


def test_control_c_ends_the_command_alone(terminal):
  terminal.run("x=kept; sh -c 'echo $$ > pid; exec sleep 600' & until test -s pid; do :; done")
  # The child says so itself: while bash forks, it misses one.
  terminal.start("sh -c 'echo begun; exec sleep 60'; echo not reached")
  read_until(terminal, "begun\n")
  terminal.send(b"\x03")
  result = finish(terminal)
  assert (result.exit_code, result.output) == (130, "begun\n")
  assert terminal.run("echo $x; kill -0 $(cat pid); echo $?; rm pid").output == "kept\n0\n"


def test_end_of_input(terminal):
  terminal.start("cat; echo ended")
  terminal.send(b"line\n")
  read_until(terminal, "line\n")
  terminal.send(b"\x04")
  assert finish(terminal).output == "line\nended\n"


def test_what_was_typed_and_not_read_is_dropped(sandbox, terminal):
  terminal.start("echo begun; until [ -e typed ]; do sleep 0.05; done")
  read_until(terminal, "begun\n")
  terminal.send(b"stale\n")
  sandbox.write_file("typed", b"")
  finish(terminal)
  terminal.start("read x; echo [$x]")
  terminal.send(b"fresh\n")
  assert finish(terminal).output == "[fresh]\n"


def test_interactive_bash(terminal):
  terminal.start("PS1='% ' bash --norc -i")
  read_until(terminal, "% ")
  terminal.send(b"echo $((6*7))\n")
  read_until(terminal, "42\n")
  terminal.send(b"sh -c 'echo $((40 + 8)); exec sleep 60'\n")
  read_until(terminal, "48\n")
  terminal.send(b"\x03")
  terminal.send(b"echo $?\n")
  read_until(terminal, "130\n")
  terminal.send(b"kill -9 $$\n")
  assert finish(terminal).exit_code == 137
  terminal.start("read x; echo [$x]")  # the shell has its terminal again
  terminal.send(b"y\n")
  assert finish(terminal).output == "[y]\n"


def test_interactive_python(sandboxes):
  assert shutil.which("python3"), "python3 is needed on the host"
  session = sandboxes("process").session("python", pty=(24, 80))
  session.start("python3 -q -i")
  read_until(session, ">>> ")
  session.send(b"6 * 7\n")
  read_until(session, "42")
  # Naps: a signal between Python's last look and one long sleep would wait for its end.
  session.send(b"import time; print(6 * 9); [time.sleep(0.1) for _ in range(600)]\n")
  read_until(session, "54")
  session.send(b"\x03")
  read_until(session, "KeyboardInterrupt")
  session.send(b"import os; os._exit(5)\n")
  assert finish(session).exit_code == 5
  session.close()


def test_pager(isolated):
  session = isolated.session("pager", pty=(10, 40))
  session.start("seq 1 100 | less")
  seen, _ = read_until(session, "9\n")
  assert "50" not in seen
  session.send(b"G")
  read_until(session, "100")
  session.send(b"q")
  assert finish(session).exit_code == 0
  assert session.run("echo next").output == "next\n"
  session.close()


def test_resize_is_told(terminal):
  terminal.start("trap 'stty size' WINCH; echo set; while :; do sleep 0.05; done")
  read_until(terminal, "set\n")
  terminal.resize(41, 77)
  read_until(terminal, "41 77\n")
  assert terminal.stop().result.timed_out
  assert terminal.run("stty size").output == "41 77\n"


def test_modes_are_mended_after_a_stop(terminal):
  terminal.start("stty raw echo; echo set; sleep 60")
  read_until(terminal, "set")
  terminal.stop()
  terminal.start("read x; echo [$x]")
  terminal.send(b"y\n")
  assert finish(terminal).output == "[y]\n"


def test_a_flood_is_stopped(sandbox):
  for pty in (None, (24, 80)):
    session = sandbox.session("flood", pty=pty)
    session.start("yes")
    seen = 0
    while seen < 50_000:
      seen += len(session.poll().output)
    progress = session.stop()
    assert progress.result.timed_out and progress.result.truncated
    assert session.run("echo next").output == "next\n"
    session.close()


def test_unread_input_does_not_hang(terminal):
  terminal.start("stty raw; echo set; sleep 60")
  read_until(terminal, "set")
  with pytest.raises(SandboxError, match="'term'.*does not read its input"):
    terminal.send(b"x" * (1 << 20), timeout=0.5)
  terminal.stop()


def test_polls_give_each_byte_once(sandbox):
  session = sandbox.session("polled")
  session.start("for i in $(seq 100); do echo $i ä; done; sleep 0.1; printf '\\303'; (exit 9)")
  seen, result = read_until(session, "\ufffd")
  result = result or finish(session)
  assert seen == "".join(f"{i} ä\n" for i in range(1, 101)) + "\ufffd"
  assert (result.exit_code, result.output) == (9, seen)
  session.close()


def test_polls_of_a_long_output_say_what_they_leave_out(isolated):
  session = isolated.session("long")
  session.start("seq 1 200000")
  time.sleep(1.0)
  first = session.poll()
  seen = first.output
  result = first.result or finish(session)
  assert seen.startswith("1\n2\n") and "bytes left out; all of it is in /tmp/output-" in seen
  assert result.truncated and result.output.endswith("200000\n")
  session.close()


def test_one_command_at_a_time(sandbox):
  session = sandbox.session("busy")
  with pytest.raises(SandboxError, match="'busy'.*start one first"):
    session.poll()
  session.start("sleep 60")
  assert sandbox.stats()["session busy"] == 1
  for call in (session.run, session.start):
    with pytest.raises(SandboxError, match="'busy'.*a command runs already"):
      call("true")
  with pytest.raises(SandboxError, match="a command runs already"):
    session.state()
  with pytest.raises(SandboxError, match="stdin is closed.*open the session with pty"):
    session.send(b"x")
  with pytest.raises(SandboxError, match="no terminal"):
    session.resize(1, 1)
  session.stop()
  session.start("true")
  while sandbox.stats()["session busy"]:
    time.sleep(0.01)
  with pytest.raises(SandboxError, match="has not been polled"):
    session.run("true")
  assert finish(session).exit_code == 0
  assert session.run("echo next").output == "next\n"
  session.close()


def test_a_started_command_has_a_deadline(sandbox):
  session = sandbox.session("late")
  session.run("x=1")
  session.start("echo begun; sleep 60", timeout=0.5)
  time.sleep(1.0)  # nobody polls
  result = finish(session)
  assert result.timed_out and result.output == "begun\n"
  assert session.run("echo $x").output == "1\n"
  session.close()


@pytest.mark.slow  # It waits out the seconds that rocklet gives the process that holds a terminal.
def test_a_holder_that_root_halted_for_a_while_answers_in_step_again(isolated):
  terminal = isolated.session("term", user="root", pty=(24, 80))
  helper = isolated.session("helper", user="root")
  terminal.run("echo there")
  find = "for p in /proc/[2-9]* /proc/[1-9][0-9]*; do read -r _ name _ < $p/stat; "
  find += 'case "$name" in *rocklet*) echo ${p#/proc/};; esac; done 2>/dev/null | sort -u'
  holder = helper.run(find).output.split()
  assert len(holder) == 1
  helper.run(f"kill -STOP {holder[0]}")
  assert terminal.run("exit 3", timeout=20).exit_code == 3  # the next shell cannot be forked
  helper.run(f"kill -CONT {holder[0]}")
  for i in range(3):
    result = terminal.run(f"echo {i}; tty", timeout=20)
    assert result.output.endswith(f"{i}\n/dev/pts/0\n") and result.exit_code == 0
  assert isolated.stats()["processes"] == 4  # three shells and the holder
  terminal.close()
  helper.close()
