"""Which calls may run: a gate of the tool layer, by mode and rules.

    gate = Permissions(Rules("auto", allow=("shell(git status *)",)), root="/home/me/project")
    Executor(tools, gates=[gate])

| mode | without asking                                                     | the rest is |
|---|---|---|
| plan | reads in the workspace, notes, sub-agents (whose tools pass here)   | denied      |
| ask  | the same                                                            | asked       |
| auto | and edits in the workspace, but for what is in .git and .rome       | asked       |
| full | everything                                                          |             |

Rules are `tool` or `tool(pattern)`; `tool` is a name, a pattern of names (`time__*`) or a kind of
tools (read, write, execute, network, note). The first that holds counts: deny, ask, allow, mode.
Allow rules do not widen plan.

A pattern for commands matches each simple command of a call, words joined by one space; `*` stands
for anything, and "git status *" also matches "git status". An allow rule has to match all of them,
a deny or ask rule one, be it behind `env`, `xargs` or `sh -c`. A command that cannot be read for
sure (`rome.agent.commands`) is asked wherever a rule with a pattern would have to read it.
A pattern for paths is relative to the workspace, or absolute; `*` stays in a directory, `**` does
not, and a pattern without "/" matches a name in any directory.

Who is asked: `ask(tool, arguments, why)`, which says "yes", "no", or "always": for the same
command, the same file, or, of a tool without either, the same arguments. Without a person the call
is denied. A deny rule is help against accidents: a program that is allowed may do what its rule
does not say, so what must not happen is up to the sandbox.
"""

import dataclasses
import fnmatch
import json
import os
import posixpath
import re
import threading
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from rome.agent.commands import Unclear, reachable, spell, split
from rome.agent.tools.base import EXECUTE, MODEL, NOTE, READ, WRITE, Tool, ToolResult
from rome.envs.sandbox import SandboxError

Mode = Literal["plan", "ask", "auto", "full"]
MODES: tuple[str, ...] = typing.get_args(Mode)
Ask = Callable[[Tool, dict[str, Any], str], str]
_TELLING = frozenset({".git", ".rome"})
_RULE = re.compile(r"([\w*?-]+)(?:\((.*)\))?", re.DOTALL | re.ASCII)


@dataclasses.dataclass(frozen=True)
class Rules:
  """What may run.

  Attributes:
    mode: one of MODES.
    allow, ask, deny: rules as texts.
  """

  mode: Mode = "ask"
  allow: tuple[str, ...] = ()
  ask: tuple[str, ...] = ()
  deny: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Rule:
  """A rule that was read.

  Attributes:
    tool: name, pattern of names, or kind.
    pattern: of the subject, "" for any.
    text: as it was written.
  """

  tool: str
  pattern: str
  text: str

  def names(self, tool: Tool) -> bool:
    """Whether it is about this tool."""
    return self.tool == tool.kind or fnmatch.fnmatchcase(tool.name, self.tool)


@dataclasses.dataclass(frozen=True)
class Decision:
  """What becomes of a call: "allow", "ask" or "deny", and why."""

  verdict: str
  why: str = ""


def parse_rule(text: str) -> Rule:
  """Reads a rule.

  Raises:
    ValueError: it is none.
  """
  found = _RULE.fullmatch(text.strip())
  if not found:
    raise ValueError(
      f"{text!r} is no rule; write a tool, or tool(pattern) as in shell(git status *)"
    )
  pattern = (found[2] or "").strip()
  return Rule(found[1], "" if pattern in ("*", "**") else pattern, text)


class Permissions:
  """The gate.

  Args:
    rules: see there.
    root: absolute path of the workspace.
    ask: a person, or None.
    resolve: makes an absolute path free of links and "..": os.path.realpath where the workspace is
      a directory of this host; posixpath.normpath does for a sandbox, which holds its links in.
    place: makes a path as tools take it absolute; `Workspace.place` where relative paths begin at
      the shell's current directory, None where they begin at `root`. Where it raises anything
      but SandboxError the path is not known, and counts as outside.
  Attributes:
    mode: may be set at any time.
  Raises:
    ValueError: a rule or the mode is wrong.
  """

  def __init__(
    self,
    rules: Rules,
    root: str | os.PathLike[str],
    ask: Ask | None = None,
    resolve: Callable[[str], str] = os.path.realpath,
    place: Callable[[str], str] | None = None,
  ):
    if rules.mode not in MODES:
      raise ValueError(f"no permission mode {rules.mode!r}; there are: {', '.join(MODES)}")
    self.mode: str = rules.mode
    self._allow, self._ask, self._deny = (
      [parse_rule(text) for text in texts] for texts in (rules.allow, rules.ask, rules.deny)
    )
    self._person, self._resolve = ask, resolve
    self._root = root = resolve(os.fspath(root))
    self._place = place or (lambda path: posixpath.join(root, path))
    self._always: set[tuple[str, str]] = set()
    self._lock = threading.Lock()  # one question at a time

  def __call__(self, tool: Tool, arguments: dict[str, Any]) -> ToolResult | None:
    """None to go on, or the refusal that the model reads."""
    decision = self.decide(tool, arguments)
    if decision.verdict == "allow":
      return None
    if decision.verdict == "deny":
      return ToolResult(f"denied: {decision.why}", "denied")
    return self._asked(tool, arguments, decision.why)

  def decide(self, tool: Tool, arguments: Mapping[str, Any]) -> Decision:
    """By rules and mode alone."""
    subject = tool.subject(arguments)
    if tool.kind in (READ, WRITE):
      found = self._decide_path(tool, subject)
    elif tool.kind == EXECUTE and subject:
      found = self._decide_command(tool, subject)
    else:
      found = self._decide(tool, _matching([subject]))
    if self.mode == "plan" and found.verdict != "deny" and tool.kind not in (READ, NOTE, MODEL):
      return Decision("deny", f"mode plan only reads; {self._cure(tool)} may run {tool.name}")
    return found

  def _asked(self, tool: Tool, arguments: dict[str, Any], why: str) -> ToolResult | None:
    with self._lock:
      key = (tool.name, tool.subject(arguments) or json.dumps(arguments, sort_keys=True))
      if key in self._always:
        return None
      if self._person is None:
        text = f"denied: {why}, and nobody is there to ask; {self._cure(tool)} would allow it"
        return ToolResult(text, "denied")
      answer = self._person(tool, arguments, why)
      if answer == "always":
        self._always.add(key)
      if answer in ("yes", "always"):
        return None
    return ToolResult(f"denied: the user does not want this call of {tool.name}", "denied")

  def _cure(self, tool: Tool) -> str:
    edits = tool.kind == WRITE and self.mode in ("plan", "ask")
    return (
      "mode auto (in the workspace) or an allow rule" if edits else "mode full or an allow rule"
    )

  def _decide(
    self,
    tool: Tool,
    matches: Callable[[Rule], bool],
    allowed: bool | None = None,
    outside: str = "",
  ) -> Decision:
    """By rules, then by mode.

    Args:
      matches: whether a rule's pattern holds.
      allowed: whether allow rules hold, if that is another question.
      outside: the path, if it is not in the workspace, or as good as not.
    """
    if rule := _first(self._deny, tool, matches):
      return Decision("deny", f"the rule {rule.text} forbids it; no mode allows it")
    if rule := _first(self._ask, tool, matches):
      return Decision("ask", f"the rule {rule.text} wants a yes")
    if allowed is None:
      allowed = _first(self._allow, tool, matches) is not None
    free = {READ, NOTE, MODEL} | ({WRITE} if self.mode == "auto" else set())
    if allowed or self.mode == "full" or (tool.kind in free and not outside):
      return Decision("allow")
    why = (
      f"would leave the workspace ({outside})" if outside else f"wants a yes in mode {self.mode}"
    )
    return Decision("ask", f"{tool.name} {why}")

  def _decide_path(self, tool: Tool, subject: str) -> Decision:
    if not subject:  # no file in particular
      return self._decide(tool, lambda rule: not rule.pattern)
    try:
      path = self._resolve(self._place(subject))
    except SandboxError:
      raise
    except Exception as error:  # a NUL, or a directory that is gone
      return self._decide(tool, _matching([subject]), outside=str(error))
    inside = path == self._root or path.startswith(self._root.rstrip("/") + "/")
    short = posixpath.relpath(path, self._root) if inside else ""

    def matches(rule: Rule) -> bool:
      return not rule.pattern or _path_like(path, short, rule.pattern)

    outside = "" if inside else path
    if tool.kind == WRITE and not _TELLING.isdisjoint(short.split("/")):
      outside = f"{path}, which tells programs outside what to run"
    return self._decide(tool, matches, outside=outside)

  def _decide_command(self, tool: Tool, text: str) -> Decision:
    try:
      commands = split(text)
      every = [inner for command in commands for inner in reachable(command.words)]
    except Unclear as error:
      return self._decide_unclear(tool, text, str(error))
    whole = [spell(command.words) for command in commands]
    allowed = all(_first(self._allow, tool, _matching([one])) for one in whole)
    found = self._decide(tool, _matching([text, *map(spell, every)]), allowed)
    if found.verdict == "allow":
      for command in commands:
        if command.pattern and self._may_hit(tool, command.words[0]):
          why = f"the pattern in {spell(command.words)[:80]!r} may stand for what a rule is about"
          return Decision("ask", why)
    return found

  def _may_hit(self, tool: Tool, program: str) -> bool:
    """Whether a deny or ask rule is about some commands of the program."""
    rules = [rule for rule in (*self._deny, *self._ask) if rule.names(tool) and rule.pattern]
    firsts = [rule.pattern.split()[0] for rule in rules]
    return any(_like(posixpath.basename(program), first) for first in firsts)

  def _decide_unclear(self, tool: Tool, text: str, why: str) -> Decision:
    """What is not understood runs only where no rule would have had to read it."""
    found = self._decide(tool, _matching([text]))
    patterns = any(r.pattern and r.names(tool) for r in (*self._deny, *self._ask))
    bare = self.mode == "full" or _first(self._allow, tool, lambda rule: not rule.pattern)
    if found.verdict == "deny" or (found.verdict == "allow" and bare and not patterns):
      return found
    return Decision("ask", f"it is not clear what the command of {tool.name} runs: {why}")


def _first(rules: Iterable[Rule], tool: Tool, matches: Callable[[Rule], bool]) -> Rule | None:
  return next((rule for rule in rules if rule.names(tool) and matches(rule)), None)


def _matching(texts: Sequence[str]) -> Callable[[Rule], bool]:
  """Whether a rule's pattern holds for one of them."""
  return lambda rule: any(_like(text, rule.pattern) for text in texts)


def _like(text: str, pattern: str) -> bool:
  """Whether a command matches; "" matches all, and " *" at the end also nothing."""
  regex = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
  return not pattern or any(re.fullmatch(regex, t, re.DOTALL) for t in (text, text + " "))


def _path_like(path: str, short: str, pattern: str) -> bool:
  """Whether a path matches: absolute, relative to the workspace, or by its last part."""
  if "/" not in pattern:
    return fnmatch.fnmatchcase(posixpath.basename(path), pattern)
  if not posixpath.isabs(pattern):
    pattern, path = pattern.removeprefix("./"), short
  if not path:
    return False
  regex = re.escape(pattern)
  if regex.endswith(r"/\*\*"):
    regex = regex.removesuffix(r"/\*\*") + r"(?:/.*)?"
  for written, meant in (
    (r"\*\*/", "(?:.*/)?"),
    (r"\*\*", ".*"),
    (r"\*", "[^/]*"),
    (r"\?", "[^/]"),
  ):
    regex = regex.replace(written, meant)
  return re.fullmatch(regex, path, re.DOTALL) is not None
