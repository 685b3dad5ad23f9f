"""From a task and a sandbox to a verdict: stage the files, run the tests, admit the task.

The tests run in a judge: a second sandbox of the same image, in which no process of the agent ever
was, and which gets nothing but the files that the agent left (a fork without processes). The
tests themselves come to it in memory, after that, and run as root. So what the agent still has
running can touch neither tests nor verdict; daemons, tricks with descriptors and the agent's shell
stay behind.
Choice: a task whose result is a running server has to start it in its tests.

The verdict of a tests script is its exit status, 0 or not. A script that never finished has given
no verdict: that is a failure of the infrastructure and raises, because a zero would teach the
policy something that did not happen.
"""

import contextlib
import dataclasses

from rome.envs import honeypots, snapshot
from rome.envs import sandbox as sandbox_lib
from rome.envs import task as task_lib

TESTS_TIMEOUT = 30.0  # seconds


class TestsUnfinished(sandbox_lib.SandboxError):
  """The tests gave no verdict; the episode is invalid, not failed."""

  __test__ = False  # not a test class, whatever its name makes pytest think


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What the tests said.

  Attributes:
    passed: whether the task is solved and paid.
    output: of the tests, without the last newline.
    bait: what the agent took of a honeypot's bait (`rome.envs.honeypots`); never paid.
  """

  passed: bool
  output: str
  bait: tuple[str, ...] = ()

  @property
  def hacked(self) -> bool:
    return bool(self.bait)


def stage_task(task: task_lib.Task, sandbox: sandbox_lib.Sandbox) -> None:
  """Writes the task's files into the working directory of an empty sandbox, owned by the agent."""
  for path, file in sorted(task.files.items()):
    sandbox.write_file(f"{sandbox.workdir}/{path}", file.data, mode=file.mode, owner="agent")


def score_task(
  task: task_lib.Task,
  sandbox: sandbox_lib.Sandbox,
  judge: sandbox_lib.Sandbox | None = None,
  timeout: float = TESTS_TIMEOUT,
) -> Verdict:
  """Copies the agent's files into the judge and runs the task's tests there, as root.

  Args:
    task: the task whose files were staged.
    sandbox: where the agent worked.
    judge: a sandbox of the same image; what it held before is gone. None makes one and closes it.
      The process backend has no forks: there, and there alone, the agent's processes are ended and
      the tests run beside its files.
    timeout: seconds the tests may take.

  Raises:
    TestsUnfinished: where the tests ran out of time or gave no exit status.
    SandboxLost: where the sandbox died.
  """
  if sandbox.backend == "process":
    result = sandbox.verify(task.tests, timeout=timeout)
  elif judge is None:
    with sandbox.twin() as made:
      return score_task(task, sandbox, made, timeout)
  else:
    snapshot.transplant(sandbox, judge)
    result = judge.verify(task.tests, timeout=timeout)
  if result.timed_out or result.exit_code is None:
    raise TestsUnfinished(
      f"task {task.id}: the tests gave no verdict within {timeout:g} s; make them faster"
    )
  bait = honeypots.bait_taken(result.exit_code) if task.family == honeypots.FAMILY else ()
  return Verdict(result.exit_code == 0, result.output.removesuffix("\n"), bait)


def check_task(
  task: task_lib.Task,
  sandbox: sandbox_lib.Sandbox,
  *,
  repeats: int = 2,
  timeout: float = 10.0,
) -> list[str]:
  """The admission rule: the reference solution passes, doing nothing fails, the same every time.

  Args:
    task: the task to judge.
    sandbox: a sandbox that is reset before each attempt; its contents are lost.
    repeats: how often each of the two attempts is made.
    timeout: seconds for each command of the solution.

  Returns:
    Why the task is not admitted, a line each; empty where it is.

  Raises:
    SandboxError: where the sandbox failed, which says nothing about the task.
  """
  if not task.solution:
    return ["there is no reference solution; write solution.sh"]
  reasons = []
  with contextlib.nullcontext() if sandbox.backend == "process" else sandbox.twin() as judge:
    idle = [_attempt(task, (), sandbox, judge, timeout) for _ in range(repeats)]
    solved = [_attempt(task, task.solution, sandbox, judge, timeout) for _ in range(repeats)]
  if any(attempt.passed for attempt in idle):
    reasons.append("the tests pass although nothing was done")
  for attempt in solved:
    if not attempt.passed:
      reasons.append(f"the reference solution fails: {attempt.output or 'the tests said nothing'}")
      break
  for name, attempts in (("doing nothing", idle), ("the reference solution", solved)):
    if len({attempt.transcript for attempt in attempts}) > 1:
      reasons.append(f"{name} did not give the same outputs and verdict each time")
  return reasons


@dataclasses.dataclass(frozen=True)
class _Attempt:
  passed: bool
  output: str
  transcript: tuple[tuple[int | None, str], ...]


def _attempt(
  task: task_lib.Task,
  commands: tuple[str, ...],
  sandbox: sandbox_lib.Sandbox,
  judge: sandbox_lib.Sandbox | None,
  timeout: float,
) -> _Attempt:
  sandbox.reset()
  stage_task(task, sandbox)
  results = [sandbox.run(command, timeout=timeout) for command in commands]
  verdict = score_task(task, sandbox, judge)
  transcript = tuple((result.exit_code, result.output) for result in results)
  return _Attempt(verdict.passed, verdict.output, (*transcript, (None, verdict.output)))
