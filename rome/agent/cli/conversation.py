"""One conversation of a person with the agent: the loop, its model and sandbox, and its file.

The loop runs in the main thread. Ctrl-C while the model is asked ends the turn; while a tool runs
it stops the command and then the turn; a second one ends the program. Whatever ends a turn early,
the conversation can go on: calls that have no result get one that says so (`rome.agent.sessions`).
"""

import contextlib
import dataclasses
import difflib
import os
import pathlib
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, Protocol

from rome.agent.cli.models import Opened
from rome.agent.cli.undo import Undo
from rome.agent.context import Context
from rome.agent.executor import Executor
from rome.agent.loop import Limits, Loop, Outcome, Skill, reminder
from rome.agent.model import Call, Message, ModelError, ModelReply, ModelRequest, ModelSettings
from rome.agent.permissions import Permissions, Rules
from rome.agent.sessions import INTERRUPTED, UNKNOWN, Known, Session, record, reply_record, take_up
from rome.agent.tools.base import WRITE, Tool, ToolResult
from rome.agent.tools.builtin import builtin_tools
from rome.agent.workspace import Refused, Workspace
from rome.envs.common import SandboxError
from rome.envs.sandbox import Sandbox

SYSTEM = """You are a coding agent in the terminal of a person. You work in one directory, with \
tools. Look before you change, make small changes, check them by running what the project has for \
that, and say in the end in a few sentences what you did and what is left."""
_SUMMARIZE = """Summarise this conversation for yourself, so that the work can go on without it: \
the instruction, what was found and done, files that matter, what is left. Call no tool."""
_MAX_DIFFED = 1 << 20  # bytes of a file


class View(Protocol):
  """Where a conversation is shown."""

  def piece(self, kind: str, text: str) -> None:
    """A piece of a reply, see `openai_model.Shown`."""

  def reply(self, reply: ModelReply) -> None:
    """A reply is complete."""

  def result(self, call: Call, result: ToolResult) -> None:
    """A call has its result; `facts["diff"]` holds what an edit changed."""

  def note(self, text: str) -> None:
    """Words of the program."""

  def ask(self, tool: Tool, arguments: dict[str, Any], why: str, diff: str) -> str:
    """Whether a call may run: "yes", "no" or "always"."""


class Interrupted(KeyboardInterrupt):
  """Ctrl-C while the model is asked."""


@dataclasses.dataclass
class Usage:
  """What a conversation took since the program began."""

  requests: int = 0
  prompt: int = 0
  completion: int = 0
  seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a conversation is to be.

  Attributes:
    settings: of its requests.
    context: tokens that a request and its reply may have together.
    limits: of one instruction.
    mode: of permission.
    tools: names of those to have, () for all.
    system: the system prompt.
    interactive: whether somebody can be asked.
  """

  settings: ModelSettings
  context: int
  limits: Limits
  mode: str
  tools: tuple[str, ...]
  system: str
  interactive: bool


class Conversation:
  """See the module. It owns neither sandbox, model nor session.

  Raises:
    ValueError: there is no such tool or mode.
  """

  def __init__(self, plan: Plan, sandbox: Sandbox, model: Opened, session: Session, view: View):
    self.plan, self.sandbox, self.session, self.view = plan, sandbox, session, view
    self.model, self.usage = model, Usage()
    self.workspace = Workspace(sandbox)
    self._stop = threading.Event()
    sandbox.interrupt_with(self._stop)
    self._asking = False
    rules = Rules(plan.mode)  # type: ignore[arg-type]
    ask = self._ask if plan.interactive else None
    root = sandbox.workdir
    resolve = os.path.realpath if root != "/work" else os.path.normpath
    self.permissions = Permissions(rules, root, ask, resolve)
    self.tools = _chosen(builtin_tools(self.workspace), plan.tools)
    self._before: dict[int, bytes | None] = {}
    self.executor = Executor(self.tools, [self.permissions, self._look], [self._diff])
    self.context = Context(plan.settings, self.executor.schemas(), plan.context)
    if messages := session.messages():
      take_up(self.context, messages)
    self._untold = ""  # what the agent is to hear with the next instruction
    self._undo = Undo(_host_directory(sandbox), session.path.with_suffix(".undo"))

  def close(self) -> None:
    """Removes the copies for /undo."""
    self._undo.close()

  def say(self, instruction: str) -> Outcome:
    """Carries an instruction out.

    Raises:
      ModelError: the model gave no reply; the conversation can go on.
      SandboxError: the sandbox is lost.
      KeyboardInterrupt: the program is to end.
    """
    self._stop.clear()
    self._undo.keep()
    loop = Loop(
      self.context, self.executor, self.plan.limits, [_Shower(self.view)], self.plan.system
    )
    if self._untold:
      instruction, self._untold = f"{reminder(self._untold)}\n{instruction}", ""
    steps = record(loop.run(instruction), self.context, self.session)
    with self._interrupts():
      try:
        request = next(steps)
        while True:
          if self._stop.is_set():
            raise Interrupted
          request = steps.send(self._reply(request))
      except StopIteration as end:
        return end.value
      except Interrupted:
        steps.close()
        self._settle()
        return Outcome("stopped", "", 0, 0)
      except (ModelError, KeyboardInterrupt):
        steps.close()
        self._settle()
        raise

  def compact(self) -> None:
    """Puts a summary by the model in the place of the conversation.

    Raises:
      ModelError: there is none.
    """
    if not self.context.messages:
      return
    self.context.append([{"role": "user", "content": _SUMMARIZE}])
    try:
      with self._interrupts():
        request = dataclasses.replace(self.context.request("summary"), tools=())
        reply = self._reply(request)
    except (ModelError, Interrupted):
      self._settle()
      raise
    self.session.write("reply", **reply_record(request, reply, 0.0))
    system = [m for m in self.context.messages[:1] if m["role"] == "system"]
    words = f"Summary of the conversation so far:\n{reply.content}"
    said: list[Message] = [*system, {"role": "user", "content": words}]
    self.context.rewrite(said)
    self.context.reply(ModelReply("I go on from there."))
    Known(self.context, self.session).sync()

  def undo(self) -> list[str]:
    """See `Undo.undo`."""
    told = self._undo.undo(self.sandbox)
    if told:
      self._untold = "The user took back what was done to files: " + ", ".join(told)
    return told

  def use(self, model: str) -> None:
    """Goes on with another model of the endpoint."""
    self.context.settings = dataclasses.replace(self.context.settings, model=model)
    self.plan = dataclasses.replace(self.plan, settings=self.context.settings)

  def clear(self, session: Session) -> None:
    """Begins anew, in another file."""
    self.session = session
    self.context = Context(self.plan.settings, self.executor.schemas(), self.plan.context)
    if messages := session.messages():
      take_up(self.context, messages)

  def _settle(self) -> None:
    """After a turn that ended early: the context ends in a reply, and is on disk."""
    messages = self.context.messages
    if messages and (messages[-1]["role"] != "assistant" or messages[-1].get("tool_calls")):
      calls = messages[-1].get("tool_calls", ())
      if calls:
        self.context.append(
          [{"role": "tool", "tool_call_id": call["id"], "content": UNKNOWN} for call in calls]
        )
      self.context.reply(ModelReply(INTERRUPTED))
    Known(self.context, self.session).sync()

  def _reply(self, request: ModelRequest) -> ModelReply:
    started = time.monotonic()
    self._asking = True
    try:
      reply = self.model.complete(request)
    finally:
      self._asking = False
    self.usage.requests += 1
    self.usage.prompt += reply.prompt_tokens
    self.usage.completion += reply.completion_tokens
    self.usage.seconds += time.monotonic() - started
    self.view.reply(reply)
    return reply

  @contextlib.contextmanager
  def _interrupts(self) -> Iterator[None]:
    def handle(number: int, frame: FrameType | None) -> None:
      if self._asking:
        self._asking = False
        raise Interrupted
      if self._stop.is_set():
        raise KeyboardInterrupt
      self._stop.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
      yield
    finally:
      signal.signal(signal.SIGINT, before)

  def _ask(self, tool: Tool, arguments: dict[str, Any], why: str) -> str:
    if self._stop.is_set():
      return "no"
    try:
      return self.view.ask(tool, arguments, why, self._preview(tool, arguments))
    except KeyboardInterrupt:
      self._stop.set()
      return "no"

  def _look(self, tool: Tool, arguments: dict[str, Any]) -> ToolResult | None:
    """A gate that keeps what a file was; where a turn was interrupted nothing more runs."""
    if self._stop.is_set():
      return ToolResult("not run: interrupted by the user", "skipped")
    if tool.kind == WRITE:
      self._before[id(arguments)] = self._content(tool.subject(arguments))
    return None

  def _diff(self, tool: Tool, arguments: dict[str, Any], result: ToolResult) -> ToolResult:
    if tool.kind != WRITE:
      return result
    before = self._before.pop(id(arguments), None)
    after = self._content(tool.subject(arguments))
    text = diff(before, after, tool.subject(arguments))
    return dataclasses.replace(result, facts={**result.facts, "diff": text})

  def _preview(self, tool: Tool, arguments: dict[str, Any]) -> str:
    """What a call would change, where that can be told before."""
    before = self._content(tool.subject(arguments)) if tool.kind == WRITE else None
    text = (before or b"").decode("utf-8", "replace")
    edits = arguments.get("edits") or ([arguments] if "old" in arguments else [])
    for edit in edits:
      text = text.replace(edit["old"], edit["new"], -1 if edit.get("all") else 1)
    if tool.kind != WRITE or not (edits or "content" in arguments):
      return ""
    after = str(arguments.get("content", text)).encode("utf-8", "replace")
    return diff(before, after, tool.subject(arguments))

  def _content(self, path: str) -> bytes | None:
    """A file as it is, None where it is none that can be shown."""
    with contextlib.suppress(Refused, SandboxError):
      return self.sandbox.read_file(self.workspace.place(path), _MAX_DIFFED)
    return None


class _Shower(Skill):
  """Shows results."""

  def __init__(self, view: View):
    self._view = view

  def after(
    self, context: Context, calls: Sequence[Call], results: Sequence[ToolResult]
  ) -> Sequence[str]:
    for call, result in zip(calls, results, strict=True):
      self._view.result(call, result)
    return ()


def diff(before: bytes | None, after: bytes | None, path: str) -> str:
  """A unified diff, "" where nothing changed."""
  old, new = ((text or b"").decode("utf-8", "replace").splitlines() for text in (before, after))
  names = (path if before is not None else "/dev/null", path if after is not None else "/dev/null")
  return "\n".join(difflib.unified_diff(old, new, *names, n=2, lineterm=""))


def _chosen(tools: Sequence[Tool], names: Sequence[str]) -> list[Tool]:
  known = {tool.name for tool in tools}
  if unknown := [name for name in names if name not in known]:
    raise ValueError(f"--tools: no tool {unknown[0]!r}; there are: {', '.join(sorted(known))}")
  return [tool for tool in tools if not names or tool.name in names]


def _host_directory(sandbox: Sandbox) -> str:
  return str(pathlib.Path.cwd()) if sandbox.workdir == "/work" else sandbox.workdir
