"""What a session promises, on every backend: state, exit codes, deadlines, recovery, output."""

import time

import pytest


def out(sandbox, command, timeout=10.0):
  result = sandbox.run(command, timeout)
  assert not result.timed_out, result
  return result.output


def eventually_prints(sandbox, text):
  """Whether what runs in the background prints this; it shows in the next command's output."""
  return any(text in out(sandbox, "sleep 0.05") for _ in range(200))


def test_state_persists(sandbox):
  sandbox.run("mkdir d; cd d; x=1; export Y=2; f() { echo f$x; }; alias hi='echo hello'; set -f")
  assert out(sandbox, "basename $PWD; f; sh -c 'echo $Y'; hi; echo *") == "d\nf1\n2\nhello\n*\n"


@pytest.mark.parametrize(
  ("command", "code"),
  [("true", 0), ("false", 1), ("(exit 7)", 7), ("nosuchcommand", 127), ("sh -c 'kill -9 $$'", 137),
   ("", 0), ("# nothing", 0), ("echo 'open", 2), ("if", 2), ("break", 0),
   ("continue 2", 0), ("return 4", 2)],
)  # fmt: skip
def test_exit_codes(sandbox, command, code):
  assert sandbox.run(command).exit_code == code
  assert out(sandbox, "echo next") == "next\n"


@pytest.mark.slow
@pytest.mark.parametrize(
  "command",
  ["sleep 60; echo after", "while :; do :; done", "while :; do sleep 0.01; done",
   "yes > /dev/null", "trap '' INT HUP; while :; do sleep 1; done", "sleep 60 | cat",
   "(sleep 60)", "wait $$; sleep 60", "setsid sleep 60",
   "sh -c \"trap '' INT TERM HUP; sleep 60; sleep 60\"", "cat <(sleep 60)"],
)  # fmt: skip
def test_timeout_keeps_the_session(sandbox, command):
  sandbox.run("mkdir -p d; cd d; x=kept; f() { echo $x; }")
  start = time.monotonic()
  result = sandbox.run(command, timeout=0.2)
  assert time.monotonic() - start < 6
  assert result.timed_out and result.exit_code is None and "after" not in result.output
  assert out(sandbox, "f; basename $PWD") == "kept\nd\n"
  for _ in range(100):
    if sandbox.stats()["processes"] == 1:
      break
    time.sleep(0.02)
  assert sandbox.stats()["processes"] == 1  # the shell alone


def test_timeout_spares_older_jobs(sandbox):
  sandbox.run("sleep 61 & echo $! > pid")
  assert sandbox.run("sleep 60", timeout=0.1).timed_out
  assert out(sandbox, "kill -0 $(cat pid) && echo lives") == "lives\n"


@pytest.mark.slow
def test_a_shell_that_resists_is_replaced(sandbox):
  sandbox.run("mkdir e; cd e; x=1")
  result = sandbox.run("trap '' HUP INT TERM; while :; do :; done", timeout=0.1)
  assert result.timed_out and "a new one runs in" in result.output
  assert out(sandbox, "basename $PWD; echo [$x]") == "e\n[]\n"


def test_timed_out_output_is_kept(sandbox):
  assert sandbox.run("echo before; sleep 60", timeout=0.2).output == "before\n"


@pytest.mark.parametrize("command", ["read x; echo $?", "cat; echo $?", "cat /dev/stdin; echo 1"])
def test_prompts_find_the_end_of_input(sandbox, command):
  assert out(sandbox, command, 5.0).endswith(("1\n", "0\n"))


def test_unterminated_here_document(sandbox):
  assert out(sandbox, "cat <<END\nhello").endswith("hello\n")
  assert "unexpected EOF" in out(sandbox, 'echo "open\necho more')
  assert out(sandbox, "echo next") == "next\n"


@pytest.mark.slow
def test_background_jobs_do_not_hold_a_command(sandbox):
  assert sandbox.run("(sleep 1; echo late) &").duration < 0.9
  assert eventually_prints(sandbox, "late\n")


@pytest.mark.parametrize(
  "command", ["exit 3", "set -e; (exit 3); echo not reached", "f() { exit 3; }; f"]
)
def test_exit_ends_the_command_not_the_session(sandbox, command):
  sandbox.run('mkdir d; cd d; v=\'a b\n"c\'; g() { echo "$v"; }; export Z=1')
  result = sandbox.run(command)
  assert (result.exit_code, result.output) == (3, "")
  assert out(sandbox, "set +e; g; basename $PWD; sh -c 'echo $Z'") == 'a b\n"c\nd\n1\n'


def test_a_killed_shell_is_replaced(sandbox):
  sandbox.run("mkdir d; cd d")
  result = sandbox.run("kill -9 $$")
  assert result.exit_code == 137 and "a new one runs in" in result.output
  assert out(sandbox, "basename $PWD") == "d\n"
  sandbox.run("(sleep 0.05; kill -9 $$) &")
  assert eventually_prints(sandbox, "a new one runs in")
  assert sandbox.run("exec true").exit_code == 0
  assert out(sandbox, "echo next") == "next\n"


def test_a_command_can_close_and_move_descriptors(sandbox):
  assert out(sandbox, "exec 3>&1; echo three >&3; exec 3>&-") == "three\n"
  sandbox.run("exec 250>&- 253>&- 254>&-")
  assert "a new one runs in" in out(sandbox, "echo")
  sandbox.run("readonly __rome")
  assert "a new one runs in" in out(sandbox, "echo")
  assert out(sandbox, "echo next") == "next\n"


def test_stdout_and_stderr_in_order(sandbox):
  result = sandbox.run("echo 1; echo 2 >&2; echo 3 > /dev/stdout; echo 4 > /dev/stderr")
  assert result.output == "1\n2\n3\n4\n"


def test_long_output_keeps_head_and_tail(isolated):
  result = isolated.run("echo first; yes 123456789 | head -c 10000000; echo last", timeout=30)
  assert result.truncated and result.exit_code == 0
  assert result.output.startswith("first\n123456789\n") and result.output.endswith("last\n")
  assert len(result.output) < 16384 + 200 and "10000011" not in result.output
  assert f"{10_000_011 - 16384} bytes left out; all of it is in /tmp/output-1.txt" in result.output
  assert out(isolated, "wc -c < /tmp/output-1.txt; rm /tmp/output-1.txt") == "10000011\n"


def test_output_of_exactly_the_cap_is_whole(sandbox):
  whole = sandbox.run("head -c 16384 /dev/zero | tr '\\0' x")
  assert whole.output == "x" * 16384 and not whole.truncated
  assert sandbox.run("head -c 16385 /dev/zero | tr '\\0' x").truncated


def test_output_beyond_the_disk_is_cut_and_said(isolated):
  result = isolated.run("head -c 40000000 /dev/zero | tr '\\0' x", timeout=30)
  assert result.exit_code == 0 and "the beginning is in /tmp/output-1.txt" in result.output


def test_binary_and_unicode_output(sandbox):
  assert out(sandbox, "printf '\\377\\000\\303\\244\\n'") == "\ufffd\0\u00e4\n"
  assert out(sandbox, "echo 'ä € 😀'") == "ä € 😀\n"


def test_long_command_text(sandbox):
  text = "x" * 300_000
  assert out(sandbox, f"v={text}; echo ${{#v}}") == "300000\n"


def test_sessions_are_independent(sandbox):
  other = sandbox.session("other")
  sandbox.run("x=1; mkdir d; cd d")
  assert other.run("echo [$x]; ls").output == "[]\nd\n"
  other.run("sleep 62 &")
  assert sandbox.stats()["sessions"] == 2
  other.close()
  assert out(sandbox, "echo $x") == "1\n"
  for _ in range(100):
    if sandbox.stats()["processes"] == 1:
      break
    time.sleep(0.02)
  stats = sandbox.stats()
  assert (stats["processes"], stats["sessions"]) == (1, 1)


def test_bad_arguments_are_refused(sandbox):
  with pytest.raises(ValueError, match="NUL"):
    sandbox.run("a\0b")
  with pytest.raises(ValueError, match="timeout"):
    sandbox.run("true", timeout=0)


def test_errors_name_bash_not_internals(sandbox):
  assert out(sandbox, "nosuch").startswith("bash: line 1: nosuch: command not found")
