"""Commands of the user that see what the agent does, and may say no.

    hooks = Hooks({"PreToolUse": [Hook("./check.py", matcher="shell")]}, directory)
    Executor(tools, gates=[hooks.gate, ...], observers=[hooks.observe])
    Loop(context, executor, limits, skills=[hooks, ...])

A hook runs on this host as the user, with /bin/sh, in `directory`. What the model wrote never gets
into its command line: it is a JSON object on standard input, {"event", "session", "directory", and
what `EVENTS` says}.

| exit | means |
|---|---|
| 0 | go on; standard output may be a JSON object with "decision" ("block" or "warn"), "reason", |
|   | "additional_context" (for the model); other output is left alone |
| 2 | block; standard error is the reason |
| other, or it cannot start | a warning to the user; the agent goes on |
| none within its timeout | its process group is killed; a warning, but of PreToolUse a block: a |
|   | check that has not ended has not passed |

Hooks of an event run one after another; the first block ends it.

Left out: hooks that change arguments or results, HTTP hooks, hooks inside the sandbox.
"""

import collections
import dataclasses
import json
import os
import re
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rome.agent.context import Context
from rome.agent.loop import Skill, reminder
from rome.agent.model import Call
from rome.agent.tools.base import Tool, ToolResult

# Event -> what its hooks are told beside the common part, and what a block does.
EVENTS = {
  "PreToolUse": "tool, kind, arguments; a block stands in the place of the result",
  "PostToolUse": "tool, kind, arguments, result, outcome; a block replaces the result",
  "SessionStart": "prompt; additional_context joins the first message",
  "SessionEnd": "reason",
  "UserPromptSubmit": "prompt; a block keeps it from the model",
  "Stop": "answer, stops; a block's reason makes the agent go on",
  "SubagentStop": "agent, answer, stops; the same",
  "SetUpEnvironment": "the environment is about to be made; a block ends the session",
  "Notification": "message; the agent waits for its user",
}
MAX_STOPS = 3  # so often in a row an answer may be refused
_MAX_OUTPUT = 1 << 16  # bytes of each stream that are kept
_MAX_WORDS = 4000  # characters of a reason, or of context


@dataclasses.dataclass(frozen=True)
class Hook:
  """One hook.

  Attributes:
    command: for /bin/sh.
    matcher: regular expression for the whole name of a tool, "" for any; of events without a tool
      it is not looked at.
    timeout: seconds.
  """

  command: str
  matcher: str = ""
  timeout: float = 60.0


@dataclasses.dataclass(frozen=True)
class Ran:
  """What became of one hook.

  Attributes:
    command: of the hook.
    outcome: "ok", "warn", "block", "failed", "timeout".
    reason: why.
    context: for the model.
  """

  command: str
  outcome: str
  reason: str = ""
  context: str = ""


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What the hooks of an event said.

  Attributes:
    ran: in order.
  """

  ran: tuple[Ran, ...] = ()

  @property
  def blocked(self) -> str:
    """Why not, "" to go on."""
    return next((one.reason for one in self.ran if one.outcome == "block"), "")

  @property
  def words(self) -> list[str]:
    """What the model is told: warnings and context."""
    warned = [f"a hook warns: {one.reason}" for one in self.ran if one.outcome == "warn"]
    return warned + [one.context for one in self.ran if one.context]


class Hooks(Skill):
  """The hooks of one agent: calls for all events, a gate, an observer, and a skill.

  Args:
    hooks: by event.
    directory: where they run.
    session: a name that they are told.
    warn: gets a line for the user for each hook that failed or did not end.
    agent: name of a sub-agent, whose Stop is SubagentStop; see `subagent`.
  Raises:
    ValueError: an event or a matcher is wrong.
  """

  def __init__(
    self,
    hooks: Mapping[str, Sequence[Hook]],
    directory: str | os.PathLike[str],
    session: str = "",
    warn: Callable[[str], None] = lambda line: None,
    agent: str = "",
  ):
    for event, some in hooks.items():
      check_event(event)
      for hook in some:
        check_matcher(hook.matcher)
    self._hooks, self._directory, self._session = hooks, os.fspath(directory), session
    self._warn, self._agent = warn, agent
    self._stops = 0
    self._words: collections.deque[str] = collections.deque(maxlen=64)
    self._lock = threading.Lock()

  def subagent(self, name: str) -> "Hooks":
    """The hooks of a sub-agent's loop, which runs while its caller waits.

    Gate and observer are the caller's; what they have to say to the model, the sub-agent hears.
    """
    hooks = Hooks(self._hooks, self._directory, self._session, self._warn, name)
    hooks._words, hooks._lock = self._words, self._lock
    return hooks

  def fire(self, event: str, tool: str = "", **told: Any) -> Verdict:
    """Runs the hooks of an event.

    Args:
      event: one of EVENTS.
      tool: name of the tool it is about, which matchers look at.
      told: what the hooks are told beside.
    """
    check_event(event)
    common = {"event": event, "session": self._session, "directory": self._directory}
    if tool:
      common["tool"] = tool
    data = json.dumps({**common, **told}, default=str).encode()
    ran: list[Ran] = []
    for hook in self._hooks.get(event, ()):
      if tool and hook.matcher and not re.fullmatch(hook.matcher, tool):
        continue
      ran.append(run(hook, data, self._directory))
      if ran[-1].outcome == "timeout" and event == "PreToolUse":
        ran[-1] = dataclasses.replace(ran[-1], outcome="block")
      if ran[-1].outcome in ("failed", "timeout"):
        self._warn(f"hook {hook.command!r} of {event}: {ran[-1].reason}")
      if ran[-1].outcome == "block":
        break
    return Verdict(tuple(ran))

  def gate(self, tool: Tool, arguments: dict[str, Any]) -> ToolResult | None:
    """PreToolUse."""
    verdict = self.fire("PreToolUse", tool.name, kind=tool.kind, arguments=arguments)
    self._keep(verdict)
    if verdict.blocked:
      return ToolResult(f"blocked by a hook: {verdict.blocked}", "blocked")
    return None

  def observe(self, tool: Tool, arguments: dict[str, Any], result: ToolResult) -> ToolResult:
    """PostToolUse."""
    verdict = self.fire(
      "PostToolUse",
      tool.name,
      kind=tool.kind,
      arguments=arguments,
      result=result.text,
      outcome=result.outcome,
    )
    self._keep(verdict)
    if verdict.blocked:
      text = f"it ran, but a hook withholds the result: {verdict.blocked}"
      return ToolResult(text, "blocked", result.facts)
    return result

  def begin(self, context: Context) -> None:
    """SessionStart; not of a sub-agent."""
    if self._agent:
      return
    first = context.messages[-1]
    verdict = self.fire("SessionStart", prompt=first["content"])
    if verdict.words:
      content = "\n\n".join([first["content"], *map(reminder, verdict.words)])
      context.begin([*context.messages[:-1], {**first, "content": content}])

  def after(
    self, context: Context, calls: Sequence[Call], results: Sequence[ToolResult]
  ) -> Sequence[str]:
    """What hooks of tools had to say to the model."""
    self._stops = 0
    with self._lock:
      words = list(self._words)
      self._words.clear()
    return words

  def final(self, context: Context, text: str) -> str:
    """Stop, or SubagentStop."""
    if self._agent:
      verdict = self.fire("SubagentStop", agent=self._agent, answer=text, stops=self._stops)
    else:
      verdict = self.fire("Stop", answer=text, stops=self._stops)
    if not verdict.blocked:
      return ""
    if self._stops == MAX_STOPS:
      self._warn(f"a hook refused {MAX_STOPS} answers in a row; the next one counts")
      self._stops = 0
      return ""
    self._stops += 1
    return f"a hook does not let you stop yet: {verdict.blocked}"

  def _keep(self, verdict: Verdict) -> None:
    with self._lock:
      self._words += verdict.words


def check_event(event: str) -> None:
  """Raises ValueError where there is no such event."""
  if event not in EVENTS:
    raise ValueError(f"no event {event!r}; there are: {', '.join(EVENTS)}")


def check_matcher(matcher: str) -> None:
  """Raises ValueError where it is no regular expression."""
  try:
    re.compile(matcher)
  except re.error as error:
    raise ValueError(f"matcher {matcher!r} is no regular expression: {error}") from None


def run(hook: Hook, data: bytes, directory: str) -> Ran:
  """Runs one hook to its end or its time-out; nothing of its process group is left."""
  try:
    process = subprocess.Popen(
      ["/bin/sh", "-c", hook.command],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      cwd=directory,
      start_new_session=True,
    )
  except OSError as error:
    return Ran(hook.command, "failed", f"it cannot start: {error}")
  try:
    out, err = _talk(process, data, time.monotonic() + hook.timeout)
  finally:
    _end(process)
  if out is None:
    why = f"it did not end within {hook.timeout:g} s and was killed"
    return Ran(hook.command, "timeout", f"the hook {hook.command!r}: {why}")
  return _read(hook, process.returncode, _text(out), _text(err).strip()[:_MAX_WORDS])


def _read(hook: Hook, code: int, out: str, err: str) -> Ran:
  """What an exit means."""
  if code == 2:
    return Ran(hook.command, "block", err or "it gave no reason")
  if code:
    return Ran(hook.command, "failed", f"exit {code}: {err}")
  if not out.lstrip().startswith("{"):
    return Ran(hook.command, "ok")
  try:
    said = json.loads(out)
    decision, reason, context = (
      said.get(key) or "" for key in ("decision", "reason", "additional_context")
    )
  except ValueError as error:
    return Ran(hook.command, "failed", f"its output is no JSON: {error}")
  if decision not in ("", "block", "warn") or not isinstance(context, str):
    return Ran(hook.command, "failed", f"no decision {decision!r}; there are: block, warn")
  reason = str(reason)[:_MAX_WORDS] or decision
  return Ran(hook.command, decision or "ok", reason, context[:_MAX_WORDS])


def _text(data: bytes) -> str:
  return data.decode("utf-8", errors="replace")


def _talk(
  process: subprocess.Popen[bytes], data: bytes, deadline: float
) -> tuple[bytes | None, bytes]:
  """Feeds it and reads it until it has exited; (None, b"") past the deadline."""
  assert process.stdin and process.stdout and process.stderr
  kept: dict[Any, bytearray] = {process.stdout: bytearray(), process.stderr: bytearray()}
  rest = memoryview(data)
  with selectors.DefaultSelector() as ready:
    for stream in kept:
      ready.register(stream, selectors.EVENT_READ)
    os.set_blocking(process.stdin.fileno(), False)
    ready.register(process.stdin, selectors.EVENT_WRITE)
    exited = False
    while ready.get_map() and (left := deadline - time.monotonic()) > 0:
      events = ready.select(0 if exited else min(left, 0.05))
      if exited and not events:
        break  # what is still open is in the hands of a process that it left behind
      for key, _ in events:
        stream = key.fileobj
        if stream is process.stdin:
          rest = _feed(process, rest)
          done = not rest
        else:
          piece = os.read(key.fd, 1 << 16)
          kept[stream] += piece[: _MAX_OUTPUT - len(kept[stream])]
          done = not piece
        if done:
          ready.unregister(stream)
          stream.close()
      exited = process.poll() is not None
  try:
    process.wait(max(0.0, deadline - time.monotonic()))
  except subprocess.TimeoutExpired:
    return None, b""
  return bytes(kept[process.stdout]), bytes(kept[process.stderr])


def _feed(process: subprocess.Popen[bytes], rest: memoryview) -> memoryview:
  """Writes what goes; b"" where nobody reads any more."""
  assert process.stdin
  try:
    return rest[os.write(process.stdin.fileno(), rest[: 1 << 16]) :]
  except BlockingIOError:
    return rest
  except BrokenPipeError:
    return rest[:0]


def _end(process: subprocess.Popen[bytes]) -> None:
  """Kills what is left of its process group and closes the pipes."""
  try:
    os.killpg(process.pid, signal.SIGKILL)
  except ProcessLookupError:
    pass
  process.wait()
  for stream in (process.stdin, process.stdout, process.stderr):
    if stream:
      stream.close()
