"""The agent in a terminal: a line editor, streamed replies, diffs, approvals, commands.

Everything that is not the program's own words goes through `safe` before it is printed. Enter
sends, Alt-Enter makes a new line; Ctrl-C ends the turn, Ctrl-D the program. Colours are off where
NO_COLOR is set.
"""

import contextlib
import json
import os
import pathlib
import re
import sys
import termios
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

import rome
from rome.agent.cli.conversation import Conversation, Interrupted
from rome.agent.cli.safe import line, safe
from rome.agent.loop import Outcome
from rome.agent.model import Call, ModelError, ModelReply
from rome.agent.tools.base import WRITE, Tool, ToolResult
from rome.agent.workflows import expand, read_workflows
from rome.envs.common import SandboxError, SandboxLost

if TYPE_CHECKING:
  from prompt_toolkit import PromptSession
  from prompt_toolkit.completion import CompleteEvent, Completion
  from prompt_toolkit.document import Document

_SHOWN = 10  # lines of a result
_DIFF = 60  # lines of a diff
_FILES = 5000  # names that are looked through for a completion


class Terminal:
  """The view with a person; see `conversation.View`."""

  def __init__(self) -> None:
    self._console = Console(highlight=False, markup=False, emoji=False)
    self._open = False  # whether a line of a reply is not ended
    self._streamed = self._thought = ""  # of the reply that comes
    self._asked = ""  # the diff that somebody has just said yes to

  # --- what is shown ---

  def piece(self, kind: str, text: str) -> None:
    if kind == "text":
      if self._thought and not self._streamed:
        self._end_line()
      self._streamed += text
      self._write(text)
    elif kind == "thinking":
      self._thought += text
      self._write(text, "dim")
    elif kind == "again" and (self._streamed or self._thought):
      self.note("the stream broke; the reply comes once more")
      self._streamed = self._thought = ""

  def reply(self, reply: ModelReply) -> None:
    if not self._streamed:
      self._write(reply.content)
    self._streamed = self._thought = ""
    self._end_line()
    for call in reply.calls:
      self._say(f"● {line(call.name, 64)} ", line(_summary(call), 300), "bold cyan")

  def result(self, call: Call, result: ToolResult) -> None:
    diff = str(result.facts.get("diff", ""))
    if diff and diff != self._asked:
      self._diff(diff)
      return
    lines = result.text.rstrip("\n").split("\n")
    style = "dim" if result.outcome == "ok" else "red"
    for text in lines[:_SHOWN]:
      self._console.print(Text(f"  {line(text, 400)}", style), soft_wrap=True)
    if len(lines) > _SHOWN:
      self._console.print(Text(f"  … {len(lines) - _SHOWN} more lines", "dim"))

  def note(self, text: str) -> None:
    self._end_line()
    self._console.print(Text(safe(text), "yellow"), soft_wrap=True)

  def ask(self, tool: Tool, arguments: dict[str, Any], why: str, diff: str) -> str:
    from prompt_toolkit import prompt

    self._end_line()
    if diff:
      self._diff(diff, whole=True)
    self._asked = diff
    self.note(f"{line(why)}: {_whole(tool, arguments, diff)}")
    with contextlib.suppress(OSError, termios.error):
      termios.tcflush(sys.stdin, termios.TCIFLUSH)  # keys from before are no answer
    while True:
      try:
        answer = prompt("allow? [y]es, [n]o, [a]lways: ").strip().lower()
      except EOFError:
        return "no"
      for word in ("yes", "no", "always"):
        if answer and word.startswith(answer):
          return word

  def confirm(self, text: str) -> bool:
    """A question of the program."""
    from prompt_toolkit import prompt

    self.note(text)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
      return prompt("[y]es, [n]o: ").strip().lower() in ("y", "yes")
    return False

  def _write(self, text: str, style: str = "") -> None:
    """Text as it comes, in the middle of a line perhaps."""
    if text:
      self._console.print(Text(safe(text), style), end="", soft_wrap=True)
      self._open = not text.endswith("\n")

  def _end_line(self) -> None:
    if self._open:
      self._console.print()
      self._open = False

  def _say(self, head: str, rest: str, style: str) -> None:
    self._end_line()
    self._console.print(Text.assemble((head, style), rest), soft_wrap=True)

  def _diff(self, text: str, whole: bool = False) -> None:
    styles = {"+": "green", "-": "red", "@": "cyan"}
    lines = text.split("\n")
    for one in lines if whole else lines[:_DIFF]:
      shown = line(one, len(text) * 10 if whole else 400)  # spelled, a character has up to 10
      self._console.print(Text(f"  {shown}", styles.get(one[:1], "")), soft_wrap=True)
    if len(lines) > _DIFF and not whole:
      self._console.print(Text(f"  … {len(lines) - _DIFF} more lines", "dim"))

  # --- what is typed ---

  def run(self, conversation: Conversation) -> int:
    """Reads and carries out until the end. Returns the exit code."""
    commands = Commands(conversation, self)
    editor = _editor(commands)
    self._say(
      f"rome agent {rome.__version__}, ", f"mode {conversation.agency.permissions.mode}", "bold"
    )
    self._say("in ", f"{line(conversation.sandbox.workdir)}; /help", "")
    while not commands.over:
      try:
        text = editor.prompt("> ").strip()
      except KeyboardInterrupt:
        continue
      except EOFError:
        return 0
      if not text:
        continue
      try:
        if text.startswith("/"):
          commands.run(text)
        else:
          self.ended(conversation.say(text))
      except Interrupted:
        self.note("interrupted")
      except SandboxLost:
        raise
      except (LookupError, ModelError, SandboxError, ValueError) as error:
        self.note(str(error))
    return 0

  def ended(self, outcome: Outcome) -> None:
    """An instruction has come to its end."""
    self._end_line()
    if outcome.reason == "stopped":
      self.note("interrupted; the conversation can go on")
    elif outcome.reason != "answered":
      self.note(f"ended without an answer: {outcome.reason}; type to go on")


class Commands:
  """What begins with a slash.

  Attributes:
    over: whether the program is to end.
    table: by name, what it does and in which words.
  """

  def __init__(self, conversation: Conversation, view: Terminal):
    self._conversation, self._view = conversation, view
    self.over = False
    self._workflows = read_workflows(os.getcwd())
    self.table: dict[str, tuple[Callable[[str], None], str]] = {
      "/help": (self._help, "this list"),
      "/clear": (self._clear, "begin a new conversation"),
      "/compact": (self._compact, "put a summary in the place of the conversation"),
      "/cost": (self._cost, "requests and tokens so far"),
      "/exit": (self._exit, "end; so does Ctrl-D"),
      "/mode": (self._mode, "what runs unasked: plan, ask, auto, full"),
      "/model": (self._model, "the model, or another of the same endpoint"),
      "/resume": (self._resume, "the last conversations here, or go on with one"),
      "/tools": (self._tools, "what the agent has"),
      "/undo": (self._undo, "files as they were before the last instruction"),
    }

  def run(self, text: str) -> None:
    """Carries a command out."""
    name, _, rest = text.partition(" ")
    if name in self.table:
      self.table[name][0](rest.strip())
    elif name[1:] in self._workflows:
      self._view.ended(self._conversation.say(expand(text, self._workflows)))
    else:
      raise ValueError(f"no command or workflow {line(name, 40)}; /help lists them")

  def _help(self, rest: str) -> None:
    for name, (_, words) in self.table.items():
      self._view.note(f"{name:9} {words}")
    for workflow in self._workflows.values():
      self._view.note(f"/{line(workflow.name, 40):8} {line(workflow.description, 80)}")
    self._view.note("Enter sends, Alt-Enter makes a new line, @ completes names of files")

  def _clear(self, rest: str) -> None:
    from rome.agent.sessions import Session

    old = self._conversation.session
    self._conversation.clear(Session.create(self._conversation.settings.model, os.getcwd()))
    old.close()
    self._view.note(f"a new conversation; the old one is {old.id}")

  def _compact(self, rest: str) -> None:
    before = self._conversation.context.tokens()
    self._conversation.compact()
    self._view.note(f"about {before} tokens became {self._conversation.context.tokens()}")

  def _cost(self, rest: str) -> None:
    used, context = self._conversation.usage, self._conversation.context
    self._view.note(
      f"{used.requests} requests, {used.prompt} tokens in, {used.completion} out, "
      f"{used.seconds:.1f} s of waiting"
    )
    self._view.note(f"the context has {context.tokens()} of {context.limit} tokens")

  def _exit(self, rest: str) -> None:
    self.over = True

  def _mode(self, rest: str) -> None:
    from rome.agent.permissions import MODES

    if rest and rest not in MODES:
      raise ValueError(f"no mode {line(rest, 40)}; there are: {', '.join(MODES)}")
    self._conversation.agency.permissions.mode = rest or self._conversation.agency.permissions.mode
    self._view.note(f"mode {self._conversation.agency.permissions.mode}")

  def _model(self, rest: str) -> None:
    if rest:
      self._conversation.use(rest)
    self._view.note(f"model {self._conversation.context.settings.model}")

  def _resume(self, rest: str) -> None:
    from rome.agent import sessions

    if rest:
      old = self._conversation.session
      self._conversation.clear(sessions.Session.resume(sessions.find(rest)))
      old.close()
      self._view.note(f"goes on with {self._conversation.session.id}")
      return
    for name, first in sessions.recent(os.getcwd()):
      self._view.note(f"{name}  {line(first, 60)}")

  def _tools(self, rest: str) -> None:
    for tool in self._conversation.agency.executor.tools.values():
      words = re.split(r"[.:\n]", tool.description)[0]
      self._view.note(f"{line(tool.name, 30):12} {line(words, 60)}")

  def _undo(self, rest: str) -> None:
    for told in self._conversation.undo() or ["no file had changed"]:
      self._view.note(told)


def _whole(tool: Tool, arguments: dict[str, Any], diff: str) -> str:
  """All that a yes is to: nothing is cut, lines stay lines."""
  subject = tool.subject(arguments)
  if not subject or (tool.kind == WRITE and not diff):
    subject = json.dumps(arguments, ensure_ascii=False)
  lines = safe(subject).split("\n")
  return lines[0] if len(lines) == 1 else "\n".join(["", *(f"  | {one}" for one in lines)])


def _summary(call: Call) -> str:
  """What a call is about: its first argument, or all of them."""
  try:
    arguments = json.loads(call.arguments)
    return str(next(iter(arguments.values())))
  except (AttributeError, RecursionError, StopIteration, ValueError):
    return call.arguments


def _editor(commands: Commands) -> "PromptSession[str]":
  from prompt_toolkit import PromptSession
  from prompt_toolkit.completion import Completer, Completion
  from prompt_toolkit.history import FileHistory
  from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

  class Names(Completer):
    """Commands at the beginning of a line, and names of files behind an @."""

    def get_completions(
      self, document: "Document", event: "CompleteEvent"
    ) -> "Iterable[Completion]":
      before = document.text_before_cursor
      if before.startswith("/") and " " not in before:
        for name in commands.table:
          if name.startswith(before):
            yield Completion(name, -len(before))
      elif found := re.search(r"(?:^|\s)@(\S*)$", before):
        for name in files(found[1]):
          yield Completion(name, -len(found[1]), display=line(name, 80))

  keys = KeyBindings()

  @keys.add("escape", "enter")
  def _(event: KeyPressEvent) -> None:
    event.current_buffer.insert_text("\n")

  history = pathlib.Path(os.path.expanduser("~/.rome/history"))
  history.parent.mkdir(mode=0o700, exist_ok=True)
  os.close(os.open(history, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))  # it may hold secrets
  return PromptSession(
    history=FileHistory(str(history)),
    completer=Names(),
    complete_while_typing=False,
    key_bindings=keys,
    enable_open_in_editor=False,
  )


def files(start: str) -> Iterable[str]:
  """Names in the current directory that begin so, directories first walked."""
  seen = 0
  for base, dirs, names in os.walk("."):
    dirs[:] = sorted(d for d in dirs if not d.startswith("."))
    for name in sorted(names):
      seen += 1
      if seen > _FILES:
        return
      path = os.path.normpath(os.path.join(base, name))
      if path.startswith(start) and path.isprintable():
        yield path
