"""The pieces of work of the soak: each knows its right result and raises `Wrong` on any other.

A sandbox that is lost raises SandboxError, which is a declared loss and no wrong result.
"""

import contextlib
import hashlib
import os
import pathlib
import random
import signal
import tempfile
import time
from collections.abc import Callable

import gymnasium

import rome.envs
from rome.envs import families
from rome.envs.sandbox import Sandbox, SandboxError, SandboxLost, Session
from rome.envs.snapshot import Snapshot

_TIMEOUT = 60.0  # seconds; load is what a soak is for
_FAMILIES = ("count", "extract", "edit", "move")


class Wrong(AssertionError):
  """A result that is neither right nor a declared loss."""


class Place:
  """Where a piece of work is done.

  Attributes:
    rng: decides what exactly.
    pool: of sandboxes for episodes; None where there is one sandbox only.
    judges: another, for their tests.
  """

  def __init__(
    self,
    rng: random.Random,
    pool: rome.envs.SandboxPool | None = None,
    judges: rome.envs.SandboxPool | None = None,
    sandbox: Sandbox | None = None,
  ):
    self.rng, self.pool, self.judges = rng, pool, judges
    self._sandbox = sandbox

  @property
  def sandbox(self) -> Sandbox:
    """An empty sandbox, taken from the pool when it is first asked for."""
    if self._sandbox is None:
      assert self.pool is not None
      self._sandbox = self.pool.acquire(timeout=120)
    return self._sandbox

  def leave(self, healthy: bool) -> None:
    """Gives the sandbox back to the pool."""
    if self._sandbox is not None and self.pool is not None:
      self.pool.release(self._sandbox, healthy)


def _expect(got: object, wanted: object, what: str) -> None:
  if got != wanted:
    raise Wrong(f"{what}: {str(got)[:200]!r}, not {str(wanted)[:200]!r}")


def compute(place: Place) -> None:
  """Sorts and hashes lines."""
  sandbox, rng = place.sandbox, place.rng
  lines = [f"{rng.randrange(10**9):09d}" for _ in range(200)]
  sandbox.write_file("lines", "".join(f"{line}\n" for line in lines).encode())
  result = sandbox.run("sort lines | sha256sum | cut -c 1-64", _TIMEOUT)
  text = "".join(f"{line}\n" for line in sorted(lines)).encode()
  _expect(
    (result.exit_code, result.output), (0, hashlib.sha256(text).hexdigest() + "\n"), "compute"
  )


def files(place: Place) -> None:
  """Writes and reads a file; the shell counts its bytes."""
  sandbox, rng = place.sandbox, place.rng
  data = rng.randbytes(rng.randrange(1, 1 << 20))
  sandbox.write_file("a/b/data", data, mode=0o640)
  _expect(sandbox.read_file("a/b/data") == data, True, "the file came back")
  _expect(sandbox.run("wc -c < a/b/data", _TIMEOUT).output, f"{len(data)}\n", "its length")


def _episode(place: Place, solve: bool) -> None:
  task = families.generate(place.rng.choice(_FAMILIES), place.rng.randrange(100_000))
  where = {"pool": place.pool, "judges": place.judges} if place.pool else {"sandbox": place.sandbox}
  env = gymnasium.make(
    "rome/Terminal-v0",
    task=task,
    command_timeout=_TIMEOUT,
    tests_timeout=_TIMEOUT,
    **where,
  )
  try:
    first, _ = env.reset(seed=0)
    _expect(first, task.instruction, "first observation")
    for command in task.solution if solve else ("ls", "pwd"):
      env.step(command)
    _, reward, terminated, _, info = env.step("submit")
    _expect((reward, terminated), (float(solve), True), f"{task.id}: {info['tests_output']}")
  finally:
    env.close()


def solved(place: Place) -> None:
  """An episode with the reference solution is worth 1."""
  _episode(place, solve=True)


def idle(place: Place) -> None:
  """An episode in which nothing is done is worth 0."""
  _episode(place, solve=False)


def shell_killed(place: Place) -> None:
  """A session's shell is killed from outside: the command says so, and the next finds a new one."""
  sandbox, rng = place.sandbox, place.rng
  token = f"token-{rng.randrange(10**9)}"
  sandbox.write_file("kept", token.encode())
  user, pty = rng.choice(("agent", "root")), rng.choice((None, (24, 80)))
  session = sandbox.session("killed", user=user, pty=pty)
  session.run(f"x={token}", _TIMEOUT)
  pid = _shell(sandbox, session.run("cut -d' ' -f1 /proc/self/stat; echo $$", _TIMEOUT).output)
  if pid:
    os.kill(pid, signal.SIGKILL)
  result = session.run("echo [$x]", _TIMEOUT)
  told = f"[{token}]" in result.output if not pid else (
    "the shell ended" in result.output or result.exit_code == 137 or "[]" in result.output
  )  # fmt: skip
  _expect(told, True, f"after the kill: {result.exit_code}, {result.output[:100]!r}")
  _expect(session.run("cat kept", _TIMEOUT).output.endswith(token), True, "the file is kept")
  session.close()


def _shell(sandbox: Sandbox, told: str) -> int:
  """The host's pid of the shell whose `$$` is the last word told; 0 if it cannot be found."""
  inside = told.split()[-1]
  with contextlib.suppress(OSError):
    space = os.readlink(f"/proc/{sandbox.pid}/ns/pid")
    for entry in filter(str.isdigit, os.listdir("/proc")):
      with contextlib.suppress(OSError):
        if os.readlink(f"/proc/{entry}/ns/pid") == space:
          status = pathlib.Path(f"/proc/{entry}/status").read_text()
          numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()
          if numbers[-1] == inside:
            return int(entry)
  return 0


def flooded(place: Place) -> None:
  """A fork bomb and a flood of output, then work as usual."""
  sandbox, rng = place.sandbox, place.rng
  sandbox.run("b() { b | b & }; b", timeout=0.5)
  sandbox.run("yes | head -c 3000000")
  number = rng.randrange(10**6)
  result = sandbox.verify(f"echo $(({number} + 1)); exit 4", timeout=_TIMEOUT)
  _expect((result.exit_code, result.output), (4, f"{number + 1}\n"), "verify after a bomb")


def late(place: Place) -> None:
  """A command beyond its time is stopped, the session's state is kept."""
  sandbox, rng = place.sandbox, place.rng
  token = f"kept{rng.randrange(10**6)}"
  sandbox.run(f"mkdir -p d; cd d; x={token}", _TIMEOUT)
  start = time.monotonic()
  result = sandbox.run("sleep 600", timeout=0.2)
  _expect((result.timed_out, result.exit_code), (True, None), "a late command")
  _expect(time.monotonic() - start < 40, True, "it was stopped in time")
  result = sandbox.run("echo $x; basename $PWD", _TIMEOUT)
  _expect(result.output, f"{token}\nd\n", "state after a late command")


def forked(place: Place) -> None:
  """What runs in a fork gives what it gives in the original."""
  sandbox, rng = place.sandbox, place.rng
  number = rng.randrange(10**6)
  sandbox.run(f"x={number}; mkdir -p f; cd f; echo $x > n", _TIMEOUT)
  with sandbox.fork() as copy:
    result = copy.run("echo $((x + 1)); cat n; basename $PWD; echo changed > n", _TIMEOUT)
    _expect(result.output, f"{number + 1}\n{number}\nf\n", "in a fork")
  _expect(sandbox.run("cat n", _TIMEOUT).output, f"{number}\n", "the original after a fork")


def rewound(place: Place) -> None:
  """A snapshot goes to disk and back, and makes a sandbox what it was."""
  sandbox, rng = place.sandbox, place.rng
  number = rng.randrange(10**6)
  sandbox.run(f"x={number}; echo $x > n; ln -s n link; truncate -s 4M sparse", _TIMEOUT)
  snapshot = sandbox.snapshot(_TIMEOUT)
  sandbox.run("rm -f n link; echo other > more; x=0", _TIMEOUT)
  with tempfile.TemporaryDirectory(prefix="rome-soak-") as directory:
    path = pathlib.Path(directory) / "snapshot"
    snapshot.save(path)
    sandbox.restore(Snapshot.load(path), _TIMEOUT)
  result = sandbox.run("echo $x; cat link; stat -c %s sparse; ls | wc -l", _TIMEOUT)
  _expect(result.output, f"{number}\n{number}\n{4 << 20}\n3\n", "after a rewind")


def moved(place: Place) -> None:
  """A tree and a file in parts go in and come back, over a connection that breaks."""
  sandbox, rng = place.sandbox, place.rng
  with tempfile.TemporaryDirectory(prefix="rome-soak-") as directory:
    source, back = pathlib.Path(directory) / "source", pathlib.Path(directory) / "back"
    for i in range(rng.randrange(1, 12)):
      (source / f"d{i % 3}").mkdir(parents=True, exist_ok=True)
      (source / f"d{i % 3}/f{i}").write_bytes(rng.randbytes(rng.randrange(100_000)))
    sandbox.upload(source, "tree")
    sandbox.download("tree", back)
    _expect(_digests(back), _digests(source), "a tree")
  data = rng.randbytes(rng.randrange(1 << 20, 3 << 20))
  upload = sandbox.open_upload("parts")
  try:
    while upload.offset < len(data):
      try:
        upload.write(data[upload.offset : upload.offset + 300_000])
        if upload.offset < len(data) and rng.random() < 0.3:
          upload._channel.close()
      except SandboxLost:
        upload.resume()  # or the sandbox is lost
    upload.finish(hashlib.sha256(data).hexdigest())
  finally:
    upload.drop()
  with sandbox.open_download("parts") as download:
    _expect(b"".join(download.parts()) == data, True, "the file in parts")


def _digests(top: pathlib.Path) -> dict[str, str]:
  return {
    str(path.relative_to(top)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in top.rglob("*")
    if path.is_file()
  }


def rooted(place: Place) -> None:
  """Root inside changes the system, and the agent sees it but cannot do it."""
  sandbox, rng = place.sandbox, place.rng
  number = rng.randrange(10**6)
  session = sandbox.session("root", user="root")
  result = session.run(f"id -u; echo {number} > /etc/number; chmod 600 /etc/number", _TIMEOUT)
  _expect((result.exit_code, result.output), (0, "0\n"), "root")
  result = sandbox.run("cat /etc/number 2>/dev/null || echo no; ls /etc/number", _TIMEOUT)
  _expect(result.output, "no\n/etc/number\n", "the agent beside root")
  _expect(sandbox.verify("cat /etc/number", _TIMEOUT).output, f"{number}\n", "the tests")
  _expect(session.run("echo on", _TIMEOUT).output[-4:], "\non\n", "root after the tests")
  session.close()


def typed(place: Place) -> None:
  """A program on a terminal is typed at, resized and interrupted."""
  sandbox, rng = place.sandbox, place.rng
  word = f"w{rng.randrange(10**6)}"
  session = sandbox.session("terminal", pty=(30, 100), user=rng.choice(("agent", "root")))
  _expect("30 100" in session.run("stty size", _TIMEOUT).output, True, "the terminal's size")
  session.resize(20, 60)
  session.start("stty size; read -r x; echo got-$x", _TIMEOUT)
  session.send(f"{word}\n".encode(), _TIMEOUT)
  text = _follow(session)
  _expect(("20 60" in text, f"got-{word}" in text), (True, True), f"typed at: {text[-100:]!r}")
  session.start("echo begun; sleep 600", _TIMEOUT)
  session.poll(_TIMEOUT)
  start = time.monotonic()
  while time.monotonic() < start + _TIMEOUT:  # pressed until it is heard
    with contextlib.suppress(SandboxError):
      session.send(b"\x03", 5)
    if session.poll(1).result is not None:
      break
  _expect(time.monotonic() - start < _TIMEOUT, True, "Ctrl-C was heard")
  session.close()


def _follow(session: Session) -> str:
  text, end = "", time.monotonic() + _TIMEOUT
  while time.monotonic() < end:
    progress = session.poll(_TIMEOUT)
    text += progress.output
    if progress.result is not None:
      return text
  raise Wrong(f"a command on a terminal did not end: {text[-100:]!r}")


WORK: dict[str, Callable[[Place], None]] = {
  work.__name__: work
  for work in (
    *(compute, files, moved, solved, idle, shell_killed, flooded, late),
    *(forked, rewound, rooted, typed),
  )
}
