"""The pieces of work of the soak: each knows its right result and raises `Wrong` on any other.

A sandbox that is lost raises SandboxError, which is a declared loss and no wrong result.
"""

import contextlib
import hashlib
import os
import random
import signal
import time
from collections.abc import Callable

from rome.envs import families
from rome.envs.sandbox import Sandbox
from rome.envs.terminal import TerminalEnv

_TIMEOUT = 60.0  # seconds; load is what a soak is for
_FAMILIES = ("count", "extract", "edit", "move")


class Wrong(AssertionError):
  """A result that is neither right nor a declared loss."""


def _expect(got: object, wanted: object, what: str) -> None:
  if got != wanted:
    raise Wrong(f"{what}: {str(got)[:200]!r}, not {str(wanted)[:200]!r}")


def compute(sandbox: Sandbox, rng: random.Random) -> None:
  """Sorts and hashes lines."""
  lines = [f"{rng.randrange(10**9):09d}" for _ in range(200)]
  sandbox.write_file("lines", "".join(f"{line}\n" for line in lines).encode())
  result = sandbox.run("sort lines | sha256sum | cut -c 1-64", _TIMEOUT)
  text = "".join(f"{line}\n" for line in sorted(lines)).encode()
  _expect(
    (result.exit_code, result.output), (0, hashlib.sha256(text).hexdigest() + "\n"), "compute"
  )


def files(sandbox: Sandbox, rng: random.Random) -> None:
  """Writes and reads a file; the shell counts its bytes."""
  data = rng.randbytes(rng.randrange(1, 1 << 20))
  sandbox.write_file("a/b/data", data, mode=0o640)
  _expect(sandbox.read_file("a/b/data") == data, True, "the file came back")
  _expect(sandbox.run("wc -c < a/b/data", _TIMEOUT).output, f"{len(data)}\n", "its length")


def _episode(sandbox: Sandbox, rng: random.Random, solve: bool) -> None:
  task = families.generate(rng.choice(_FAMILIES), rng.randrange(100_000))
  env = TerminalEnv(task=task, sandbox=sandbox, command_timeout=_TIMEOUT, tests_timeout=_TIMEOUT)
  first, _ = env.reset(seed=0)
  _expect(first, task.instruction, "first observation")
  for command in task.solution if solve else ("ls", "pwd"):
    env.step(command)
  _, reward, terminated, _, info = env.step("submit")
  _expect((reward, terminated), (float(solve), True), f"{task.id}: {info['tests_output']}")


def solved(sandbox: Sandbox, rng: random.Random) -> None:
  """An episode with the reference solution is worth 1."""
  _episode(sandbox, rng, solve=True)


def idle(sandbox: Sandbox, rng: random.Random) -> None:
  """An episode in which nothing is done is worth 0."""
  _episode(sandbox, rng, solve=False)


def shell_killed(sandbox: Sandbox, rng: random.Random) -> None:
  """The shell is killed from outside: the command says so, and the next finds a new shell."""
  token = f"token-{rng.randrange(10**9)}"
  sandbox.write_file("kept", token.encode())
  sandbox.run(f"x={token}", _TIMEOUT)
  pid = _shell(sandbox)
  if pid:
    os.kill(pid, signal.SIGKILL)
  result = sandbox.run("echo [$x]", _TIMEOUT)
  told = f"[{token}]" in result.output if not pid else (
    "the shell ended" in result.output or result.exit_code == 137 or "[]" in result.output
  )  # fmt: skip
  _expect(told, True, f"after the kill: {result.exit_code}, {result.output[:100]!r}")
  _expect(sandbox.run("cat kept", _TIMEOUT).output.endswith(token), True, "the file is kept")


def _shell(sandbox: Sandbox) -> int:
  """The host's pid of a shell of this sandbox; 0 if there is none to be found."""
  if sandbox._launched is None:
    return 0
  with contextlib.suppress(OSError):
    space = os.readlink(f"/proc/{sandbox._launched.pid}/ns/pid")
    for entry in os.listdir("/proc"):
      with contextlib.suppress(OSError):
        if entry.isdigit() and int(entry) != sandbox._launched.pid:
          name = open(f"/proc/{entry}/comm").read().strip()
          if name == "bash" and os.readlink(f"/proc/{entry}/ns/pid") == space:
            return int(entry)
  return 0


def flooded(sandbox: Sandbox, rng: random.Random) -> None:
  """A fork bomb and a flood of output, then work as usual."""
  sandbox.run("b() { b | b & }; b", timeout=0.5)
  sandbox.run("yes | head -c 3000000")
  number = rng.randrange(10**6)
  result = sandbox.verify(f"echo $(({number} + 1)); exit 4", timeout=_TIMEOUT)
  _expect((result.exit_code, result.output), (4, f"{number + 1}\n"), "verify after a bomb")


def late(sandbox: Sandbox, rng: random.Random) -> None:
  """A command beyond its time is stopped, the session's state is kept."""
  token = f"kept{rng.randrange(10**6)}"
  sandbox.run(f"mkdir -p d; cd d; x={token}", _TIMEOUT)
  start = time.monotonic()
  result = sandbox.run("sleep 600", timeout=0.2)
  _expect((result.timed_out, result.exit_code), (True, None), "a late command")
  _expect(time.monotonic() - start < 40, True, "it was stopped in time")
  result = sandbox.run("echo $x; basename $PWD", _TIMEOUT)
  _expect(result.output, f"{token}\nd\n", "state after a late command")


def forked(sandbox: Sandbox, rng: random.Random) -> None:
  """What runs in a fork gives what it gives in the original."""
  number = rng.randrange(10**6)
  sandbox.run(f"x={number}; mkdir -p f; cd f; echo $x > n", _TIMEOUT)
  with sandbox.fork() as copy:
    result = copy.run("echo $((x + 1)); cat n; basename $PWD; echo changed > n", _TIMEOUT)
    _expect(result.output, f"{number + 1}\n{number}\nf\n", "in a fork")
  _expect(sandbox.run("cat n", _TIMEOUT).output, f"{number}\n", "the original after a fork")


WORK: dict[str, Callable[[Sandbox, random.Random], None]] = {
  work.__name__: work for work in (compute, files, solved, idle, shell_killed, flooded, late)
}
if hasattr(Sandbox, "fork"):
  WORK["forked"] = forked
