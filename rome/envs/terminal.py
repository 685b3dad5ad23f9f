"""`rome/Terminal-v0`: a shell task as a gymnasium environment.

The first observation is the task's instruction. An action is one shell command, run in the
sandbox's persistent session; the observation is what it printed. The action "submit" ends the
episode: the tests run and the reward is 1.0 or 0.0. After `max_turns` actions the tests run as well
and the episode is truncated. Every other step is worth 0.0.

A dead sandbox and tests without a verdict raise (`SandboxLost`, `TestsUnfinished`): the caller
marks the episode invalid. After either, `reset` starts the next episode in a sandbox that works,
unless the caller brought the sandbox along. What a command did to itself (time-out, full disk, no
memory) is an ordinary observation.

Left out: rendering, and parsing of the model's words into an action (rome.agent does that).
"""

from collections.abc import Sequence
from typing import Any

import gymnasium

from rome.envs import families, honeypots, scoring
from rome.envs import pool as pool_lib
from rome.envs import sandbox as sandbox_lib
from rome.envs import snapshot as snapshots
from rome.envs import task as task_lib

SUBMIT = "submit"
MIN_OBSERVATION = 32
ACQUIRE_TIMEOUT = 300.0  # seconds to wait for a free sandbox of the pool
_SAMPLE_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 "
_SAMPLE_LENGTH = 32
_BAD_CHARACTER = "[not run: the command holds a NUL or an unpaired surrogate]"
_NOTHING_RUN: dict[str, Any] = {"exit_code": None, "timed_out": False}
_TOO_LONG = f"[not run: the command is longer than {task_lib.MAX_INSTRUCTION} characters]"


class UnicodeText(gymnasium.spaces.Text):
  """Any string of up to `max_length` characters; samples are short, plain and harmless."""

  def __init__(self, max_length: int):
    super().__init__(max_length, min_length=0, charset=_SAMPLE_CHARACTERS)

  def sample(self, mask: Any = None, probability: Any = None) -> str:
    if mask is None and probability is None:
      length = int(self.np_random.integers(1, min(self.max_length, _SAMPLE_LENGTH) + 1))
      mask = (length, None)
    return super().sample(mask=mask, probability=probability)

  def contains(self, x: Any) -> bool:
    return isinstance(x, str) and len(x) <= self.max_length

  def __repr__(self) -> str:
    return f"UnicodeText({self.max_length})"

  def __eq__(self, other: object) -> bool:
    return isinstance(other, UnicodeText) and self.max_length == other.max_length


class TerminalEnv(gymnasium.Env[str, str]):
  """Episodes of shell tasks in a sandbox.

  Args:
    task: the task of every episode: a `Task`, an id like "count/17", or a task directory.
    tasks: several of them; `reset` picks one at random. Give `task`, `tasks`, or neither and then
      `reset(options={"task": ...})`.
    sandbox: a sandbox to use; it stays the caller's, who also closes it.
    pool: a pool to take a sandbox from for each episode. Without either, the environment makes a
      sandbox at the first reset and closes it in `close`.
    judges: a pool of sandboxes in which the tests run (`scoring.score_task`), of the same image. By
      default the environment makes one at the first scoring and closes it in `close`.
    backend: for a sandbox that the environment makes, see `make_sandbox`.
    max_turns: actions an episode may take, the submit included.
    command_timeout: seconds a command may take.
    tests_timeout: seconds the tests may take.
    max_observation: characters of a command's output that are shown; the middle of a longer one is
      cut out.

  Raises:
    TaskError: on a task that does not exist or cannot be used.
    ValueError: on arguments that contradict each other or are out of range.
  """

  metadata: dict[str, Any] = {"render_modes": []}

  def __init__(
    self,
    task: families.TaskLike | None = None,
    tasks: Sequence[families.TaskLike] | None = None,
    sandbox: sandbox_lib.Sandbox | None = None,
    pool: pool_lib.SandboxPool | None = None,
    judges: pool_lib.SandboxPool | None = None,
    backend: str = "auto",
    max_turns: int = 6,
    command_timeout: float = 10.0,
    tests_timeout: float = scoring.TESTS_TIMEOUT,
    max_observation: int = 2000,
  ):
    if task is not None and tasks is not None:
      raise ValueError("TerminalEnv takes task= or tasks=, not both")
    if tasks is not None and not tasks:
      raise ValueError("TerminalEnv: tasks= is empty; give at least one task")
    if sandbox is not None and pool is not None:
      raise ValueError("TerminalEnv takes sandbox= or pool=, not both")
    if max_turns < 1:
      raise ValueError(f"TerminalEnv: max_turns is {max_turns}; it must be at least 1")
    if command_timeout <= 0 or tests_timeout <= 0:
      raise ValueError("TerminalEnv: command_timeout and tests_timeout must be above 0 seconds")
    if not MIN_OBSERVATION <= max_observation <= task_lib.MAX_INSTRUCTION // 2:
      raise ValueError(
        f"TerminalEnv: max_observation is {max_observation}; it must be"
        f" {MIN_OBSERVATION} to {task_lib.MAX_INSTRUCTION // 2} characters"
      )
    named = tasks if tasks is not None else [] if task is None else [task]
    self._tasks = [families.resolve_task(item) for item in named]
    self._given, self._pool, self._backend = sandbox, pool, backend
    self._max_turns = max_turns
    self._command_timeout = command_timeout
    self._tests_timeout = tests_timeout
    self._max_observation = max_observation
    self._judges = judges
    self._judge: sandbox_lib.Sandbox | None = None
    self._sandbox: sandbox_lib.Sandbox | None = None
    self._task: task_lib.Task | None = None  # None between episodes
    self._turn = 0
    self.observation_space = UnicodeText(task_lib.MAX_INSTRUCTION)
    self.action_space = UnicodeText(task_lib.MAX_INSTRUCTION)

  @property
  def sandbox(self) -> sandbox_lib.Sandbox | None:
    """The sandbox of the running episode, None where there is none."""
    return self._sandbox

  def reset(
    self, *, seed: int | None = None, options: dict[str, Any] | None = None
  ) -> tuple[str, dict[str, Any]]:
    """Starts an episode in an empty sandbox.

    Args:
      seed: seeds the choice among `tasks`.
      options: {"task": ...} plays that task instead.

    Returns:
      The instruction, and info with `task_id` and `family`.

    Raises:
      SandboxError: where no sandbox could be had or it broke.
      TimeoutError: where the pool had none to lend in time.
    """
    super().reset(seed=seed)
    task = self._choose(dict(options or {}))
    self._task = None
    sandbox = self._clean_sandbox()
    try:
      scoring.stage_task(task, sandbox)
    except sandbox_lib.SandboxError:
      self._drop(healthy=False)
      raise
    self._task, self._turn = task, 0
    return task.instruction, {"task_id": task.id, "family": task.family}

  def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
    """Runs one command, or ends the episode.

    Args:
      action: a shell command, or "submit" (spaces around it do not matter).

    Returns:
      Observation, reward, terminated, truncated, and info with `exit_code` (None where the command
      was killed or not run), `timed_out`, and after the last step `passed` and `tests_output`;
      of a honeypot also `hacked` and `bait` (what was taken of it).

    Raises:
      SandboxError: the sandbox died or the tests gave no verdict; the episode is over and invalid.
    """
    if not isinstance(action, str):
      raise TypeError(f"an action is a string, not {type(action).__name__}")
    if self._task is None or self._sandbox is None:
      raise gymnasium.error.ResetNeeded("no episode is running: call reset() first")
    task, sandbox = self._task, self._sandbox
    self._turn += 1
    terminated = action.strip() == SUBMIT
    truncated = not terminated and self._turn >= self._max_turns
    try:
      if terminated:
        observation, info = "", dict(_NOTHING_RUN)
      else:
        observation, info = self._run(sandbox, action)
      if not terminated and not truncated:
        return observation, 0.0, False, False, info
      verdict = self._score(task, sandbox)
    except sandbox_lib.SandboxError:
      self._task = None
      self._drop(healthy=False)
      raise
    self._task = None
    if self._pool is not None:
      self._drop(healthy=True)
    info |= {"passed": verdict.passed, "tests_output": verdict.output}
    if task.family == honeypots.FAMILY:
      info |= {"hacked": verdict.hacked, "bait": verdict.bait}
    if terminated:
      observation = "tests passed" if verdict.passed else "tests failed"
    return observation, float(verdict.passed), terminated, truncated, info

  def resume(self, snapshot: snapshots.Snapshot, turns: int) -> None:
    """Puts the episode, just reset, where another one of the same task stood after `turns` actions.

    Args:
      snapshot: of that one's sandbox.
      turns: actions that count as taken.
    Raises:
      SandboxError: the snapshot cannot be restored; the episode is over and invalid.
    """
    if self._task is None or self._sandbox is None:
      raise gymnasium.error.ResetNeeded("no episode is running: call reset() first")
    try:
      self._sandbox.restore(snapshot)
    except sandbox_lib.SandboxError:
      self._task = None
      self._drop(healthy=False)
      raise
    self._turn = turns

  def close(self) -> None:
    """Gives the sandbox back to the pool, or closes it where the environment made it."""
    self._task = None
    self._drop(healthy=True)
    self._drop_judge()
    super().close()

  def _choose(self, options: dict[str, Any]) -> task_lib.Task:
    task = options.pop("task", None)
    if options:
      raise ValueError(f"reset: unknown option {sorted(options)[0]!r}; the only option is 'task'")
    if task is not None:
      return families.resolve_task(task)
    if not self._tasks:
      raise task_lib.TaskError(
        "no task to play: make the environment with task= or tasks=, or reset with"
        ' options={"task": ...}'
      )
    return self._tasks[int(self.np_random.integers(len(self._tasks)))]

  def _clean_sandbox(self) -> sandbox_lib.Sandbox:
    """An empty sandbox for the next episode."""
    if self._pool is not None:
      self._drop(healthy=True)  # of an episode that was left unfinished
      self._sandbox = self._pool.acquire(ACQUIRE_TIMEOUT)
      return self._sandbox
    if self._given is None and self._sandbox is None:
      self._sandbox = sandbox_lib.make_sandbox(backend=self._backend)
      return self._sandbox
    self._sandbox = sandbox = self._given or self._sandbox
    assert sandbox is not None
    try:
      sandbox.reset()
    except sandbox_lib.SandboxError:
      self._drop(healthy=False)
      raise
    return sandbox

  def _drop(self, healthy: bool) -> None:
    """Lets go of the sandbox: back to the pool, closed, or left to the caller who owns it."""
    sandbox, self._sandbox = self._sandbox, None
    if sandbox is None or sandbox is self._given:
      return
    if self._pool is not None:
      self._pool.release(sandbox, healthy=healthy)
    else:
      sandbox.close()

  def _score(self, task: task_lib.Task, sandbox: sandbox_lib.Sandbox) -> scoring.Verdict:
    if sandbox.backend == "process":
      return scoring.score_task(task, sandbox, None, self._tests_timeout)
    if self._judges is not None:
      judge = self._judges.acquire(ACQUIRE_TIMEOUT)
      healthy = False
      try:
        verdict = scoring.score_task(task, sandbox, judge, self._tests_timeout)
        healthy = True
        return verdict
      finally:
        self._judges.release(judge, healthy)
    self._judge = self._judge or sandbox.twin()
    try:
      return scoring.score_task(task, sandbox, self._judge, self._tests_timeout)
    except sandbox_lib.SandboxError:
      self._drop_judge()
      raise

  def _drop_judge(self) -> None:
    if self._judge is not None:
      self._judge.close()
      self._judge = None

  def _run(self, sandbox: sandbox_lib.Sandbox, command: str) -> tuple[str, dict[str, Any]]:
    refusal = _refusal(command)
    if refusal:
      return refusal, dict(_NOTHING_RUN)
    result = sandbox.run(command, timeout=self._command_timeout)
    observation = describe(result, self._command_timeout, self._max_observation)
    return observation, {"exit_code": result.exit_code, "timed_out": result.timed_out}


def _refusal(command: str) -> str | None:
  """Why a command cannot be sent to a shell at all, None where it can."""
  if len(command) > task_lib.MAX_INSTRUCTION:
    return _TOO_LONG
  if "\0" in command or any("\ud800" <= character <= "\udfff" for character in command):
    return _BAD_CHARACTER
  return None


def describe(result: sandbox_lib.CommandResult, timeout: float, max_characters: int) -> str:
  """What the agent sees of a command: its output, shortened, and in words what that cannot say.

  An output that the sandbox itself has cut says so in its text.
  """
  text = result.output.removesuffix("\n")
  if len(text) > max_characters:
    head = max_characters // 2
    tail = max_characters - head
    cut = f"{'more than ' if result.truncated else ''}{len(text) - max_characters}"
    text = f"{text[:head]}\n[{cut} characters cut]\n{text[-tail:]}"
  notes = []
  if result.timed_out:
    notes.append(f"[timed out after {timeout:g} s]")
  elif not text and result.exit_code != 0:
    notes.append("killed" if result.exit_code is None else f"exit {result.exit_code}")
  return "\n".join([text, *notes] if text else notes)
