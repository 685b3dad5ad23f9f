"""An agent out of its parts, by its settings: where tools, gates and skills are joined.

`rome agent` and the trainer (`rome.agent.world`) both come here, so that the same settings make the
same requests. Order matters and is this:

  gates      hooks, permission, then those of the caller
  observers  those of the caller, hooks, spilling of long outputs
  skills     environment, lossless, compress, remind, detect, hooks, then those of the caller

The settings' table `skills` has a table of numbers for each, `on = false` takes one away:
spill, lossless, compress, remind, detect, environment, recall.
"""

import dataclasses
import fnmatch
import posixpath
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rome.agent.context import Context
from rome.agent.executor import Executor, Gate, Observer
from rome.agent.hooks import Hooks
from rome.agent.loop import Loop, Skill
from rome.agent.permissions import Ask, Permissions
from rome.agent.settings import AgentSettings, SettingsError
from rome.agent.skills import Compress, Detect, Environment, Lossless, Recall, Remind, Spill
from rome.agent.tools.base import Tool
from rome.agent.tools.builtin import builtin_tools
from rome.agent.tools.notes import read_todo
from rome.agent.tools.task import NAME, AgentDefinition, Surroundings, task_tool
from rome.agent.workspace import Workspace
from rome.text.render import Renderer

SYSTEM = """You are a coding agent in the terminal of a person. You work in one directory, with \
tools. Look before you change, make small changes, check them by running what the project has for \
that, and say in the end in a few sentences what you did and what is left."""
SKILLS = ("spill", "lossless", "compress", "remind", "detect", "environment", "recall")


@dataclasses.dataclass(frozen=True)
class Parts:
  """What is not in the settings. Everything may be left out.

  Attributes:
    renderer: of the policy's tokenizer, where it is known: then counts are exact.
    ask: asks a person whether a call may run.
    resolve: the real path of one in the workspace, for permission.
    hooks: `make_hooks` of the settings.
    tools: further ones, of MCP servers.
    agents: kinds of sub-agents.
    memory: instructions from files, as text.
    gates, observers, skills: further ones.
  """

  renderer: Renderer | None = None
  ask: Ask | None = None
  resolve: Callable[[str], str] | None = None
  hooks: Hooks | None = None
  tools: Sequence[Tool] = ()
  agents: Sequence[AgentDefinition] = ()
  memory: str = ""
  gates: Sequence[Gate] = ()
  observers: Sequence[Observer] = ()
  skills: Sequence[Skill] = ()


@dataclasses.dataclass(frozen=True)
class Agency:
  """An agent, put together.

  Attributes:
    context: empty.
    executor: its tools.
    skills: in the order in which they act.
    system: the system prompt, instructions from files included.
    permissions: the gate, whose mode may be changed.
    compress: what /compact asks, None where it is off.
  """

  settings: AgentSettings
  context: Context
  executor: Executor
  skills: Sequence[Skill]
  system: str
  permissions: Permissions
  compress: Compress | None

  def loop(self) -> Loop:
    """A loop that goes on where the context stands."""
    return Loop(self.context, self.executor, self.settings.limits, self.skills, self.system)


def make_hooks(
  settings: AgentSettings,
  directory: str,
  session: str = "",
  warn: Callable[[str], None] = lambda line: None,
) -> Hooks:
  """The hooks of the settings, which run in `directory` on this host."""
  return Hooks(settings.hooks, directory, session, warn)


def assemble(settings: AgentSettings, workspace: Workspace, parts: Parts = Parts()) -> Agency:
  """Makes an agent in a workspace.

  Raises:
    SettingsError: a skill or a tool is unknown, or a number of a skill is wrong.
  """
  unknown = [name for name in settings.skills if name not in SKILLS]
  if unknown:
    raise SettingsError(f"skills.{unknown[0]}: no such skill; there are: {', '.join(SKILLS)}")
  permissions = _permissions(settings, workspace, parts)
  gates: list[Gate] = [parts.hooks.gate] if parts.hooks else []
  gates += [permissions, *parts.gates]
  observers = [*parts.observers]
  if parts.hooks:
    observers.append(parts.hooks.observe)
  if spill := _skill(settings, "spill", lambda **kw: Spill(workspace, **kw)):
    observers.append(spill)
  recall = _skill(settings, "recall", lambda **kw: Recall(workspace, **kw))
  tools = [*builtin_tools(workspace), *([recall.tool()] if recall else []), *parts.tools]
  tools = _chosen(settings, tools)
  if parts.agents and settings.tools.wants(NAME):
    hooks = parts.hooks
    around = Surroundings(
      settings.request(),
      settings.context_tokens,
      parts.renderer,
      gates,
      observers,
      lambda name: [hooks.subagent(name)] if hooks else (),
    )
    tools.append(task_tool(parts.agents, tools, around))
  environment = _skill(settings, "environment", lambda **kw: Environment(workspace, **kw))
  if environment:
    gates.append(environment.gate)
  executor = Executor(tools, gates, observers)
  skills, compress = _skills(settings, workspace, executor, recall)
  found = [*([environment] if environment else []), *skills]
  found += [parts.hooks] if parts.hooks else []
  context = Context(settings.request(), executor.schemas(), settings.context_tokens, parts.renderer)
  system = "\n\n".join(filter(None, [settings.system(SYSTEM), parts.memory]))
  return Agency(settings, context, executor, [*found, *parts.skills], system, permissions, compress)


def _permissions(settings: AgentSettings, workspace: Workspace, parts: Parts) -> Permissions:
  resolve = parts.resolve or posixpath.normpath  # links of a sandbox are not those of this host
  rules = settings.permissions
  return Permissions(rules, workspace.root, parts.ask, resolve, workspace.place)


def _skills(
  settings: AgentSettings, workspace: Workspace, executor: Executor, recall: Recall | None
) -> tuple[list[Skill], Compress | None]:
  """Those that look at the context, in their order."""
  tools = executor.tools

  def todo() -> str:
    return read_todo(workspace) if "todo" in tools else ""

  archive: dict[str, Any] = {"archive": recall.archive} if recall else {}
  lossless = _skill(settings, "lossless", lambda **kw: Lossless(workspace, tools, **kw))
  compress = _skill(
    settings, "compress", lambda **kw: Compress(lossless=lossless, todo=todo, **archive, **kw)
  )
  remind = _skill(settings, "remind", lambda **kw: Remind(todo=todo, **kw))
  detect = _skill(settings, "detect", lambda **kw: Detect(**kw))
  return [skill for skill in (lossless, compress, remind, detect) if skill], compress


def _skill(settings: AgentSettings, name: str, make: Callable[..., Any]) -> Any:
  """A skill with the numbers of the settings, None where it is off."""
  numbers: Mapping[str, Any] = settings.skills.get(name, {})
  if not numbers.get("on", True):
    return None
  try:
    return make(**{key: value for key, value in numbers.items() if key != "on"})
  except (TypeError, ValueError) as error:
    raise SettingsError(f"skills.{name}: {error}") from None


def _chosen(settings: AgentSettings, tools: Sequence[Tool]) -> list[Tool]:
  """The tools that the settings want."""
  names = [*(tool.name for tool in tools), NAME]
  for pattern in (*settings.tools.only, *settings.tools.off):
    if not fnmatch.filter(names, pattern):
      raise SettingsError(f"tools: no tool is named {pattern!r}; there are: {', '.join(names)}")
  return settings.tools.choose(tools)
