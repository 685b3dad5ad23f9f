"""What a session promises, on every backend: state, exit codes, deadlines, recovery, output."""

import concurrent.futures
import contextlib
import os
import pathlib
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time

import hypothesis
import hypothesis.strategies as st
import pytest

from rome.envs.common import SandboxError, SandboxLost


def out(sandbox, command, timeout=10.0):
  result = sandbox.run(command, timeout)
  assert not result.timed_out, result
  return result.output


def eventually_prints(sandbox, text):
  """Whether what runs in the background prints this; it shows in the next command's output."""
  return any(text in out(sandbox, "sleep 0.05") for _ in range(200))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["bubblewrap", "process"])
def test_signals_that_its_starter_ignores_are_not_ignored_inside(backend):
  """As under nohup, and in the background of a shell; the C library keeps signal 32 for itself."""
  number = {"x86_64": 13, "aarch64": 134}[platform.machine()]  # rt_sigaction
  program = (
    "import ctypes, signal\n"
    f"ignore = (ctypes.c_ulong * 4)(1); ctypes.CDLL(None).syscall({number}, 32, ignore, None, 8)\n"
    "for s in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT): signal.signal(s, signal.SIG_IGN)\n"
    "from rome.envs import make_sandbox\n"
    f"with make_sandbox(backend={backend!r}, accept_no_isolation=True) as box:\n"
    "  print(box.run('grep SigIgn /proc/self/status').output.split()[1])\n"
    "  print(repr(box.run('echo before; sleep 60; echo after', timeout=0.5).output))\n"
  )
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
  assert done.stdout.splitlines() == ["0" * 16, repr("before\n")], done.stderr


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
  assert sandbox.run("echo before; sleep 60", timeout=0.5).output == "before\n"


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
  said = sandbox.run("(sleep 0.05; kill -9 $$) &").output
  assert "a new one runs in" in said or eventually_prints(sandbox, "a new one runs in")
  assert sandbox.run("exec true").exit_code == 0
  assert out(sandbox, "echo next") == "next\n"


def test_a_command_can_close_and_move_descriptors(sandbox):
  assert out(sandbox, "exec 3>&1; echo three >&3; exec 3>&-") == "three\n"
  sandbox.run("x=kept; exec 250>&- 253>&- 254>&-")  # what the shell itself lives on
  assert out(sandbox, "echo $x") == "kept\n"
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


def test_a_session_has_a_place_an_environment_and_a_name(sandbox):
  session = sandbox.session("a b", cwd="/tmp", env={"A_B": "x y\n", "TZ": "UTC+3"})
  assert session.run('pwd; echo "$A_B$TZ"; env | grep -c ^TZ=').output == "/tmp\nx y\nUTC+3\n1\n"
  assert sandbox.stats()["session a b"] == 0
  session.run("export A_B=other; kill -9 $$")
  assert session.run('echo "$A_B"').output.endswith("x y\n\n")
  session.close()
  bad = [{"pty": (0, 5)}, {"user": 999}, {"env": {"A=": "1"}}, {"cwd": "\0"}]
  for arguments in [{"name": ""}, {"name": "a\nb"}, *({"name": "x", **each} for each in bad)]:
    with pytest.raises(ValueError):
      sandbox.session(**arguments)


STATE = (
  "mkdir -p 'a b'; cd 'a b'; x='1\n\"2'; export E=5; a=([3]=q [7]='r s'); declare -A m=([k]=v);"
  "f() { echo f$x; }; alias hi='echo hello'; set -f; shopt -s nullglob; umask 027;"
  "trap 'echo usr1' USR1; readonly r=9; declare -i n=4"
)
SHOW = (
  "pwd; declare -p x E a m n; f; hi; echo $-; shopt nullglob; umask; trap -p USR1; echo $r;"
  "kill -USR1 $$; :"
)


def test_state_moves_to_another_session(sandbox):
  session = sandbox.session("from")
  session.run(STATE)
  shown = session.run(SHOW)
  assert shown.exit_code == 0 and shown.output.endswith("9\nusr1\n"), shown
  other = sandbox.session("to", state=session.state())
  assert other.run(SHOW).output == shown.output
  session.restore(other.state())
  assert session.run(SHOW).output == shown.output
  other.restore(b"")
  assert other.run("echo [$x]; umask").output == "[]\n0022\n"
  session.close()
  other.close()


@pytest.mark.parametrize("end", ["exit 3", "sleep 60", "kill -TERM $$"])
def test_state_outlives_the_shell(sandbox, end):
  session = sandbox.session("ended")
  session.run(STATE)
  shown = session.run(SHOW).output
  session.run(end, timeout=0.2)
  assert session.run(SHOW).output == shown
  session.close()


def test_a_hostile_state_harms_nothing(sandbox):
  for state in (
    b"exit 3\n",
    b"readonly __rome\n",
    b"exec 254>&-\n",
    b"(((((",
    b"\0\xff",
    b"kill -9 $$",
  ):
    session = sandbox.session("hostile", state=state)
    assert session.run("echo fine").output.endswith("fine\n"), state
    session.close()


@pytest.mark.slow
def test_a_state_that_never_ends(sandbox):
  session = sandbox.session("loop", state=b"while :; do :; done")
  with pytest.raises(SandboxError):
    session.run("echo fine")
  session.close()
  assert out(sandbox, "echo fine") == "fine\n"


def test_users_of_their_own(isolated):
  with contextlib.ExitStack() as stack:
    users = (("ann", 2001), ("bob", 2002), ("ann again", 2001))
    opened = [isolated.session(name, user=user) for name, user in users]
    for session in opened:
      stack.callback(session.close)
    _check_users(isolated, *opened)


def _check_users(isolated, ann, bob, again):
  assert ann.run("id -u; id -g; pwd; echo $HOME $USER $LOGNAME; stat -c %a:%u ~").output == (
    "2001\n2001\n/home/2001\n/home/2001 2001 2001\n700:2001\n"
  )
  ann.run(
    "echo private > note; sleep 61 & echo $! > /tmp/pid; chmod 644 /tmp/pid; umask 0; :>/tmp/m"
  )
  pids = ann.run("cat /tmp/pid; echo $$").output.split()
  for other in (bob, isolated):
    for command in ("cat /home/2001/note", "ls /home/2001", "echo x > /home/2001/new",
                    f"kill -9 {pids[0]}", f"kill -9 {pids[1]}",
                    f"cat /proc/{pids[1]}/environ", f"echo x > /proc/{pids[1]}/fd/254",
                    f"echo x > /proc/{pids[1]}/fd/1"):  # fmt: skip
      assert other.run(command).exit_code not in (0, None), command
    other.run("kill -9 -1")
  assert ann.run(f"cat note; kill -0 {pids[0]} && echo lives").output == "private\nlives\n"
  assert again.run("cat note").output == "private\n"
  long = ann.run("head -c 100000 /dev/zero | tr '\\0' x").output
  path = long[long.index("/tmp/output-") :].split()[0]
  assert bob.run(f"cat {path}").exit_code != 0


def test_root_session(isolated):
  root = isolated.session("root", user="root", pty=(24, 80))
  assert root.run("id -u; echo $HOME $USER; pwd; type -p chroot").output.startswith(
    "0\n/root root\n/work\n"
  )
  assert root.run("kill -9 1; mount -t tmpfs none /tmp; cat /proc/1/environ").exit_code != 0
  isolated.run("sleep 61 & echo $! > pid")
  assert (
    root.run("echo s3cret > /work/s; chmod 600 /work/s; kill -9 $(cat /work/pid)").exit_code == 0
  )
  assert isolated.run("cat s").exit_code != 0
  root.close()


def test_one_user_only_is_said(sandboxes):
  with pytest.raises(SandboxError, match="'x'.*one user only"):
    sandboxes("process").session("x", user=2001)


def test_forty_sessions_at_once(sandbox):
  with contextlib.ExitStack() as stack:
    _drive_forty(sandbox, stack)
  assert out(sandbox, "echo fine") == "fine\n"


def _drive_forty(sandbox, stack):
  def opened(name):
    session = sandbox.session(name)
    stack.callback(session.close)
    return session

  sessions = [opened(f"s{i}") for i in range(40)]
  answers: dict[int, str] = {}

  def drive(i):
    sessions[i].run(f"x={i}")
    answers[i] = "".join(sessions[i].run("echo $x").output for _ in range(10))

  threads = [threading.Thread(target=drive, args=(i,)) for i in range(40)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert answers == {i: f"{i}\n" * 10 for i in range(40)}
  assert sandbox.stats()["sessions"] == 41
  with pytest.raises(SandboxError, match="64 sessions are open.*close one|does not start"):
    for i in range(40):
      opened(f"t{i}")


def test_sessions_that_come_and_go_at_once_leave_nothing_open(isolated):
  """Descriptors of rocklet are neither leaked nor closed twice, which would hit another's."""

  def descriptors():
    return len(os.listdir(f"/proc/{isolated.pid}/fd"))

  def come_and_go(_):
    for _ in range(20):
      session = isolated.session("passing")
      assert session.run("echo here").output == "here\n"
      session.close()

  isolated.run("true")
  before = descriptors()
  with concurrent.futures.ThreadPoolExecutor(6) as threads:
    list(threads.map(come_and_go, range(6)))
  deadline = time.monotonic() + 60
  while descriptors() > before and time.monotonic() < deadline:
    time.sleep(0.05)
  assert descriptors() <= before


FORGERIES = {
  "in the shell": "for ((i=0;i<256;i++)); do printf '%d 0 /\\0' {0..60} >&$i; done",
  "in a subshell": "(for ((i=0;i<256;i++)); do printf '%d 0 /\\0' {0..60} >&$i; done)",
  "through /proc/self": "for f in /proc/self/fd/*; do printf '\\0%d 0 /\\0' {0..60} > $f; done",
  "through /proc/$$": "for f in /proc/$$/fd/*; do sh -c 'printf \"9 0 /\\0\" > '$f; done",
  "garbage": "(for ((i=0;i<256;i++)); do head -c 3000 /dev/urandom >&$i; done)",
}


@pytest.mark.parametrize("how", FORGERIES)
def test_no_output_forges_an_end(isolated, how):
  """Before, after and, from the background, during other commands."""
  session = isolated.session("forged")
  forge = f"{{ {FORGERIES[how]}; }} 2>/dev/null"
  background = f"(while :; do {forge}; sleep 0.01; done) &"
  for first in (forge, background):
    session.run(first)
    for i in range(5):
      start = time.monotonic()
      result = session.run(f"sleep 0.1; echo end-{i}; (exit {i + 1})", timeout=20)
      assert time.monotonic() - start >= 0.1
      assert result.exit_code == i + 1 and f"end-{i}\n" in result.output, (
        how,
        result.output[-200:],
      )
  session.close()


@pytest.mark.parametrize(
  ("command", "code"),
  [
    ("for ((i=3;i<256;i++)); do eval \"exec $i>&-\"; done; (exit 5)", 5),
    ("exec 0<&- 1>&- 2>&-; (exit 5)", 5),
    ("exec 1>&-; true", 0),
    ("kill -9 $$", 137),
    ("exit 7", 7),
    ("set -e; false", 1),
    ("exec sleep 0.1", 0),
    ("exec sh -c 'exit 6'", 6),
    ("trap '' HUP INT TERM; (exit 4)", 4),
    ("trap 'echo bye' EXIT; exit 4", 4),
    ("trap 'true' DEBUG ERR RETURN; (exit 4)", 4),
    ("set -x; (exit 4)", 4),
    ("set -u; (exit 4)", 4),
    ("set -o posix; (exit 4)", 4),
    ("builtin() { :; }; (exit 5)", 5),
    ("builtin() { return 1; }; (exit 5)", 5),
    ("printf() { :; }; eval() { :; }; mapfile() { :; }; exit() { :; }; sh -c 'exit 5'", 5),
    ("alias builtin=false eval=false printf=false; (exit 5)", 5),
    ("readonly __rome; (exit 5)", 5),
    ("unset __rome; (exit 5)", 5),
    ("__rome=junk; (exit 5)", 5),
    ("unset -f builtin; enable -n printf; (exit 5)", 5),
    ("cd /; PWD=$'a\\nb'; (exit 5)", 5),
    ("IFS=0123456789; (exit 5)", 5),
    ("ulimit -f 0; (exit 5)", 5),
  ],
)  # fmt: skip
def test_commands_that_spoil_their_shell(sandbox, command, code):
  session = sandbox.session("spoilt")
  start = time.monotonic()
  result = session.run(command, timeout=30)
  assert (result.exit_code, result.timed_out) == (code, False), result
  assert time.monotonic() - start < 20
  fine = session.run("/bin/echo fine 2>&1", timeout=30)
  if "1>&-" not in command:  # that shell goes on without an output, as the command asked
    assert "fine\n" in fine.output, fine
  session.close()


@pytest.mark.slow
def test_a_huge_line(isolated):
  result = isolated.run("head -c 67108864 /dev/zero | tr '\\0' x; (exit 3)", timeout=120)
  assert result.exit_code == 3 and result.truncated and len(result.output) < 17000
  assert f"{67108864 - 16384} bytes left out; the beginning is in /tmp/output-" in result.output


def test_a_command_of_a_mebibyte(sandbox):
  text = "# " + "ä" * (1 << 19) + "\necho done"
  assert out(sandbox, text) == "done\n"


@pytest.mark.slow
def test_ten_thousand_commands(sandbox):
  for i in range(10_000):
    result = sandbox.run(f"echo {i}; (exit {i % 256})" if i % 50 == 0 else f"echo {i}")
    assert result.output == f"{i}\n" and result.exit_code == (i % 256 if i % 50 == 0 else 0)


@pytest.mark.slow
def test_a_flood_of_zombies(isolated):
  command = "for i in $(seq 400); do (sh -c ':' &) ; done; echo done"
  assert isolated.run(command, timeout=120).output.endswith("done\n")
  for _ in range(200):
    if isolated.stats()["processes"] == 1:
      break
    time.sleep(0.05)
  assert isolated.run("ps -o stat | grep -c Z").output == "0\n"


WORDS = st.sampled_from(["a", "b c", "$V0", "${V1}x", "'q'", "$?", "$PWD"])
COMMANDS = st.one_of(
  st.builds("V{}={!r}; export V{}".format, st.integers(0, 2), st.text("ab \t*$", max_size=5),
            st.integers(0, 2)),
  st.builds("W{}=\"{}\"".format, st.integers(0, 2), WORDS),
  st.builds("unset V{}".format, st.integers(0, 2)),
  st.builds("mkdir -p d{0}; cd d{0}".format, st.integers(0, 2)),
  st.sampled_from(["mkdir -p e; cd e; cd ..", "cd nowhere", "cd", "true", "false",
                   "(exit 9)", "nosuchcommand",
                   "f() { echo \"f $V0 $1\"; return 3; }", "f 1", "f $(f 2)", "unset -f f",
                   "for i in 1 2 3; do echo $i; done", "[[ $V0 == a* ]]", "echo ${#W0} ${W1:-none}",
                   "shopt -s nullglob; echo no*", "set -f; echo *", "set +f",
                   "x=(1 2 3); echo ${x[1]}", "echo a | tr a b", "! true", "test -d d1",
                   "echo \"$(pwd)\"", "umask 027; umask",
                   "case $V1 in a*) echo A;; *) echo other;; esac", "echo err >&2", "cat <<< $V2"]),
  st.builds("echo {} {}".format, WORDS, WORDS),
)  # fmt: skip


@hypothesis.settings(
  max_examples=8,
  deadline=None,
  derandomize=True,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(commands=st.lists(COMMANDS, min_size=1, max_size=25))
def test_a_session_is_a_bash(sandboxes, tmp_path, commands):
  """The same commands in a session and in a plain bash leave the same output, codes and state."""
  with tempfile.TemporaryDirectory(dir=tmp_path) as home:
    sandbox = sandboxes("bubblewrap")
    root = sandbox.run("rm -rf /tmp/plain; mkdir /tmp/plain; cd /tmp/plain; pwd").output.strip()
    session = sandbox.session("plain", cwd=root, env={"HOME": root, "LC_ALL": "C"})
    show = (
      'pwd; declare -p V0 V1 V2 W0 W1 W2 x 2>/dev/null; declare -f; echo "$-" | tr -d ihBcs; umask'
    )
    got = [session.run(f"{command}\n") for command in commands]
    state = session.run(show).output
    session.close()
    script = "shopt -s expand_aliases\n"
    for i, command in enumerate([*commands, show]):
      pathlib.Path(home, f".{i}").write_text(command + "\n")
      script += f'eval "$(<{home}/.{i})" >{home}/.out{i} 2>&1; echo $? >{home}/.code{i}\n'
    work = pathlib.Path(home, "work")
    work.mkdir()
    environment = {"HOME": str(work), "PATH": os.environ["PATH"], "LC_ALL": "C"}
    subprocess.run(["bash", "--norc", "-c", script], cwd=work, env=environment, timeout=60)

    def plain(name):
      return pathlib.Path(home, name).read_text().replace(str(work), root)

    for i, (command, result) in enumerate(zip(commands, got, strict=True)):
      wanted = plain(f".out{i}")
      assert result.exit_code == int(plain(f".code{i}")), (command, result)
      if "bash: line" not in wanted:  # messages name different lines
        assert result.output == wanted, command
    assert state == plain(f".out{len(commands)}")


def test_an_interrupted_call_never_gives_its_answer_to_the_next(sandbox):
  def interrupt(*_):
    raise KeyboardInterrupt

  session, old = sandbox.session("interrupted"), signal.signal(signal.SIGUSR1, interrupt)
  timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1))
  try:
    timer.start()
    with pytest.raises(KeyboardInterrupt):
      session.run("sleep 1; echo of the first")
  finally:
    timer.join()
    signal.signal(signal.SIGUSR1, old)
  with pytest.raises(SandboxLost):
    session.run("echo of the second")
  assert out(sandbox, "echo lives") == "lives\n"


def test_wait_gives_the_result_of_a_started_command(sandbox):
  session = sandbox.session("waits")
  session.start("echo one; sleep 0.2; echo two; exit 3")
  with pytest.raises(TimeoutError, match="runs on after 0.01 s"):
    session.wait(timeout=0.01)
  result = session.wait(timeout=30)
  assert (result.exit_code, result.output.startswith("one\ntwo\n")) == (3, True)


def test_a_session_that_outlives_a_reset_brings_no_output_of_before(sandbox):
  session = sandbox.session("older")
  session.run("(sleep 0.1; echo of before; : > written) &")
  for _ in range(200):
    if sandbox.run("[ -e written ]").exit_code == 0:
      break
    time.sleep(0.05)
  sandbox.reset()
  assert session.run("echo new").output == "new\n"
