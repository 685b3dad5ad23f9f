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
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, Protocol

from rome.agent.assemble import Agency, Parts, assemble
from rome.agent.cli.models import Opened
from rome.agent.cli.planted import Planted
from rome.agent.cli.undo import Undo
from rome.agent.context import Context
from rome.agent.loop import Outcome, Skill, reminder
from rome.agent.model import Call, ModelError, ModelReply, ModelRequest
from rome.agent.sessions import (
  INTERRUPTED,
  UNKNOWN,
  Known,
  Session,
  closed,
  record,
  reply_record,
  take_up,
)
from rome.agent.settings import AgentSettings
from rome.agent.tools.base import WRITE, Tool, ToolResult
from rome.agent.tools.edits import replace_all
from rome.agent.workspace import Refused, Workspace
from rome.envs.common import SandboxError
from rome.envs.sandbox import Sandbox

_MAX_DIFFED = 1 << 20  # bytes of a file
_MAX_SEARCHED = 2000  # lines in which a diff looks for what is alike
_AROUND = 2  # lines around a change
_ELSEWHERE = "podman"  # the backend in which the directory has another path than here


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


class Conversation:
  """See the module. It owns neither sandbox, model nor session.

  Args:
    settings: of the agent; its model as requests name it.
    sandbox: in the directory.
    model: what is asked.
    session: where it is written; one with messages is gone on with.
    view: where it is shown.
    planted: of the directory; asked after each instruction.
    more: hooks, further tools, sub-agents and memory.
    system: in the place of the settings' system prompt, "" for that.
    interactive: whether somebody can be asked.
  Raises:
    ValueError: the settings are wrong; there is no such tool.
  """

  def __init__(
    self,
    settings: AgentSettings,
    sandbox: Sandbox,
    model: Opened,
    session: Session,
    view: View,
    planted: Planted,
    more: Parts = Parts(),  # noqa: B008 - it cannot be changed
    system: str = "",
    interactive: bool = True,
  ):
    self.settings, self.sandbox, self.session, self.view = settings, sandbox, session, view
    self.model, self.usage = model, Usage()
    self.workspace = Workspace(sandbox)
    self._more, self._system, self._interactive = more, system, interactive
    self._planted = planted
    self._stop = threading.Event()
    sandbox.interrupt_with(self._stop)
    self._asking = False
    self._before: dict[int, bytes | None] = {}
    self._ended = "nothing was asked"
    self._untold = ""  # what the agent is to hear with the next instruction
    self._undo = Undo(_host_directory(sandbox), session.path.with_suffix(".undo"))
    self.agency = self._assembled()

  @property
  def context(self) -> Context:
    """Of the agent."""
    return self.agency.context

  def _assembled(self) -> Agency:
    """An agent that stands where the session does."""
    parts = dataclasses.replace(
      self._more,
      ask=self._ask if self._interactive else None,
      resolve=os.path.normpath if self.sandbox.backend == _ELSEWHERE else os.path.realpath,
      gates=[self._look],
      observers=[self._diff],
      skills=[_Shower(self.view)],
    )
    agency = assemble(self.settings, self.workspace, parts)
    if self._system:
      system = "\n\n".join(filter(None, [self._system, self._more.memory]))
      agency = dataclasses.replace(agency, system=system)
    if messages := self.session.messages():
      take_up(agency.context, messages)
    return agency

  def close(self) -> None:
    """Ends the session: hooks hear how the last instruction ended, and the copies for /undo go."""
    self._fire("SessionEnd", reason=self._ended)
    self._undo.close()

  def say(self, instruction: str) -> Outcome:
    """Carries an instruction out.

    Raises:
      ModelError: the model gave no reply; the conversation can go on.
      SandboxError: the sandbox is lost.
      KeyboardInterrupt: the program is to end.
    """
    self._ended = "error"
    try:
      outcome = self._say(instruction)
    finally:
      self._planted.tell(self.view.note)
    self._ended = outcome.reason
    return outcome

  def _say(self, instruction: str) -> Outcome:
    self._stop.clear()
    if refused := self._fire("UserPromptSubmit", prompt=instruction):
      self.view.note(f"a hook keeps this from the model: {refused}")
      return Outcome("stopped", "", 0, 0)
    self._undo.keep()
    loop = self.agency.loop()
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
    """Makes the conversation shorter now, as the settings' skill `compress` does.

    Raises:
      ModelError: there was no summary.
      ValueError: the skill is off.
    """
    if self.agency.compress is None:
      raise ValueError("the skill compress is off in the settings")
    if not self.context.messages:
      return
    steps = self.agency.compress.compress(self.context)
    try:
      with self._interrupts():
        request = next(steps)
        while True:
          started = time.monotonic()
          reply = self._reply(request)
          seconds = time.monotonic() - started
          self.session.write("reply", **reply_record(request, reply, seconds))
          request = steps.send(reply)
    except StopIteration:
      pass
    except (ModelError, KeyboardInterrupt):
      steps.close()
      self._settle()
      raise
    take_up(self.context, closed(self.context.messages))
    Known(self.context, self.session).sync()

  def undo(self) -> list[str]:
    """See `Undo.undo`."""
    told = self._undo.undo(self.sandbox)
    if told:
      self._untold = "The user took back what was done to files: " + ", ".join(told)
    return told

  def use(self, model: str) -> None:
    """Goes on with another model of the endpoint."""
    self.settings = dataclasses.replace(self.settings, model=model)
    self.context.settings = self.settings.request()

  def clear(self, session: Session) -> None:
    """Goes on in another file, with what is in it."""
    self.session = session
    self.agency = self._assembled()

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
    self._fire("Notification", message=f"{tool.name}: {why}")
    try:
      return self.view.ask(tool, arguments, why, self._preview(tool, arguments))
    except KeyboardInterrupt:
      self._stop.set()
      return "no"

  def _fire(self, event: str, **told: Any) -> str:
    """Runs the hooks of an event; why it is blocked, "" where it is not."""
    hooks = self._more.hooks
    return hooks.fire(event, **told).blocked if hooks else ""

  def _look(self, tool: Tool, arguments: dict[str, Any]) -> ToolResult | None:
    """A gate that keeps what a file was; where a turn was interrupted nothing more runs."""
    if self._stop.is_set():
      return ToolResult("not run: interrupted by the user", "skipped")
    if tool.kind == WRITE:
      self._before[id(arguments)] = self._content(tool.subject(arguments))
    return None

  def _diff(self, tool: Tool, arguments: dict[str, Any], result: ToolResult) -> ToolResult:
    if self._stop.is_set() and result.outcome == "timeout":
      text = re.sub(r"\[timed out after .*\Z", "[interrupted by the user]", result.text)
      return dataclasses.replace(result, text=text)
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
    if tool.kind != WRITE or not (edits or "content" in arguments):
      return ""
    try:
      text = str(arguments["content"]) if "content" in arguments else replace_all(text, edits)[0]
    except Refused:  # by the tool as well, unless the file is too large to be shown
      return ""
    return diff(before, text.encode("utf-8", "replace"), tool.subject(arguments))

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
  """A unified diff, "" where nothing changed.

  Lines alike at both ends are left to no search, and where the rest is long it is one replacement:
  difflib takes hours over some files of a megabyte.
  """
  old, new = ((text or b"").decode("utf-8", "replace").splitlines() for text in (before, after))
  if old == new:
    return ""
  names = (path if before is not None else "/dev/null", path if after is not None else "/dev/null")
  skipped = max(0, _alike(old, new) - _AROUND)
  old, new = old[skipped:], new[skipped:]
  if (more := _alike(old[::-1], new[::-1]) - _AROUND) > 0:
    old, new = old[:-more], new[:-more]
  if max(len(old), len(new)) > _MAX_SEARCHED:
    found = [f"--- {names[0]}", f"+++ {names[1]}", f"@@ -1,{len(old)} +1,{len(new)} @@"]
    found += [*(f"-{one}" for one in old), *(f"+{one}" for one in new)]
  else:
    found = list(difflib.unified_diff(old, new, *names, n=_AROUND, lineterm=""))
  return "\n".join(_moved(one, skipped) if one.startswith("@@ ") else one for one in found)


def _alike(old: Sequence[str], new: Sequence[str]) -> int:
  """Lines at the beginning that are the same."""
  pairs = enumerate(zip(old, new, strict=False))
  return next((i for i, (a, b) in pairs if a != b), min(len(old), len(new)))


def _moved(head: str, by: int) -> str:
  """The head of a hunk, so many lines further down."""
  return re.sub(r"([-+])(\d+)", lambda found: f"{found[1]}{int(found[2]) + by}", head)


def _host_directory(sandbox: Sandbox) -> str:
  return str(pathlib.Path.cwd()) if sandbox.backend == _ELSEWHERE else sandbox.workdir
