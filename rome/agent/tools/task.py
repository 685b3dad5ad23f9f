"""Sub-agents: a loop of its own behind a tool.

A sub-agent has a private context, which begins with its own system prompt and what it is asked, a
part of the tools, and limits. Its answer is the tool's result; nothing else of it reaches the
caller's context. Its requests go the way of all requests, with its name as their purpose, so that
whoever drives the loop asks the model for them too and can tell them apart.

There are no messages between agents and no hand-off. A sub-agent has no sub-agents of its own but
where `depth` allows them.
"""

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from rome.agent.context import Context
from rome.agent.executor import Executor, Gate, Observer
from rome.agent.loop import Limits, Loop, Outcome, Skill, Spent
from rome.agent.model import ModelReply, ModelRequest, ModelSettings
from rome.agent.tools import show
from rome.agent.tools.base import MODEL, Asking, Tool, ToolResult, parameters
from rome.text.render import Renderer

NAME = "task"
MAX_ANSWER = 20_000  # characters that reach the caller
_ENDED = {
  "max_turns": "it had used up its turns",
  "max_tokens": "it had used up its tokens",
  "deadline": "its time was over",
  "context_full": "its context was full",
  "stopped": "it was stopped",
}


@dataclasses.dataclass(frozen=True)
class AgentDefinition:
  """A kind of sub-agent.

  Attributes:
    name: letters, digits, _ and -.
    description: when to use it, for the model that calls it.
    prompt: its system prompt.
    tools: names of the caller's tools that it has; () for all of them.
    limits: when it ends although it has not answered.
    context: tokens of a request and its reply, 0 for as many as the caller's.
  """

  name: str
  description: str
  prompt: str
  tools: tuple[str, ...] = ()
  limits: Limits = Limits(turns=30)
  context: int = 0


@dataclasses.dataclass(frozen=True)
class Surroundings:
  """What every sub-agent of a conversation has from it.

  Attributes:
    settings: of requests.
    limit: tokens of a request and its reply.
    renderer: of the policy's tokenizer, None where it is not known.
    gates, observers: of the executor: permission and hooks hold for sub-agents too.
    skills: makes a sub-agent's own ones, by its name.
  """

  settings: ModelSettings
  limit: int
  renderer: Renderer | None = None
  gates: Sequence[Gate] = ()
  observers: Sequence[Observer] = ()
  skills: Callable[[str], Sequence[Skill]] = lambda name: ()


def task_tool(
  definitions: Sequence[AgentDefinition],
  tools: Sequence[Tool],
  around: Surroundings,
  depth: int = 1,
) -> Tool:
  """The tool `task`.

  Args:
    definitions: kinds of sub-agents, at least one.
    tools: those of the caller, this one not among them.
    around: see there.
    depth: levels of sub-agents; 1: they have none of their own.
  Raises:
    ValueError: a definition names a tool that there is not, or two have one name.
  """
  tools = tuple(tools)
  known = {definition.name: definition for definition in definitions}
  if not known or len(known) < len(definitions):
    names = ", ".join(d.name for d in definitions)
    raise ValueError(f"sub-agents need names of their own, at least one; got: {names or 'none'}")
  for definition in definitions:
    if missing := sorted(set(definition.tools) - {tool.name for tool in tools} - {NAME}):
      raise ValueError(f"sub-agent {definition.name}: no tool is named {', '.join(missing)}")

  def run(arguments: dict[str, Any]) -> Asking:
    definition = known[arguments["agent"]]
    chosen = _chosen(definition, tools)
    if depth > 1 and (not definition.tools or NAME in definition.tools):
      chosen.append(task_tool(definitions, tools, around, depth - 1))
    loop = _loop(definition, chosen, around)
    try:
      outcome = yield from _named(loop.run(arguments["instruction"]), definition.name)
    except Spent as spent:
      outcome = loop.outcome(spent.reason)
    return _result(definition, outcome)

  kinds = "\n".join(f"- {d.name}: {d.description}" for d in definitions)
  agent = {"type": "string", "enum": list(known), "description": "which kind"}
  instruction = {
    "type": "string",
    "minLength": 1,
    "description": "all it has to know, and what its answer is to say",
  }
  return Tool(
    NAME,
    "Gives a piece of work to a sub-agent. It sees nothing of this conversation, and you see "
    f"nothing of its work but its answer. There are:\n{kinds}",
    parameters({"agent": agent, "instruction": instruction}),
    run,
    MODEL,
    subject=_agent,
  )


def _agent(arguments: Mapping[str, Any]) -> str:
  return str(arguments["agent"])


def _chosen(definition: AgentDefinition, tools: Sequence[Tool]) -> list[Tool]:
  return [tool for tool in tools if not definition.tools or tool.name in definition.tools]


def _loop(definition: AgentDefinition, tools: Sequence[Tool], around: Surroundings) -> Loop:
  executor = Executor(tools, around.gates, around.observers)
  limit = min(definition.context or around.limit, around.limit)
  context = Context(around.settings, executor.schemas(), limit, around.renderer)
  return Loop(
    context, executor, definition.limits, around.skills(definition.name), definition.prompt
  )


def _named(
  steps: Generator[ModelRequest, ModelReply, Outcome], name: str
) -> Generator[ModelRequest, ModelReply, Outcome]:
  """The same requests with the sub-agent's name as their purpose; of what else asks, behind it."""
  try:
    request = next(steps)
    while True:
      purpose = name if request.purpose == "turn" else f"{name}/{request.purpose}"
      request = steps.send((yield dataclasses.replace(request, purpose=purpose)))
  except StopIteration as end:
    return end.value
  finally:
    steps.close()


def _result(definition: AgentDefinition, outcome: Outcome) -> ToolResult:
  facts = {"agent": definition.name, "turns": outcome.turns, "tokens": outcome.tokens}
  facts["reason"] = outcome.reason
  text, cut = show.cut(outcome.text, MAX_ANSWER)
  facts["truncated"] = cut
  if outcome.reason == "answered":
    return ToolResult(text or "[it answered nothing]", facts=facts)
  why = _ENDED.get(outcome.reason, outcome.reason)
  said = f"error: {definition.name} ended without an answer after {outcome.turns} turns: {why}"
  return ToolResult(said, "error", facts)
