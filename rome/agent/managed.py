"""The loop of `rome agent` as the agent of an episode in training: trainer-managed mode.

`rome.agent.loop.Loop` is a generator of requests. Here the trainer answers them: a request's token
ids are the context, the reply is the sampled ids, and what a request adds to the one before is what
`act` gives. Where a request does not go on from the one before, as after a compaction and for a
sub-agent, it is a `NewRow`.

The requests are the same as those of `rome agent` with the same settings, byte for byte
(`ModelRequest.wire`): `agent.scaffold` names a file as `rome agent` reads it. The environment gives
the instruction and the sandbox, and judges the end: an answer submits.

Left out: beginning in the middle of an episode from a snapshot (`resumes`), as the loop's own state
is in no snapshot, so that members replay (`rome.rollout.starts`); MCP servers and ROME.md, which
are a machine's and would make runs differ between machines.
"""

import functools
import os
from collections.abc import Callable, Generator, Sequence
from typing import Any

import gymnasium

from rome.agent.agent import Agent, NewRow
from rome.agent.assemble import Parts, assemble, make_hooks
from rome.agent.executor import Observer
from rome.agent.loop import Loop, Outcome
from rome.agent.model import Call, ModelReply, ModelRequest
from rome.agent.settings import load_file
from rome.agent.tools.base import Tool, ToolResult
from rome.agent.workspace import Workspace
from rome.envs.terminal import SUBMIT
from rome.text import ByteTokenizer
from rome.text.render import Renderer
from rome.text.tool_calls import spell
from rome.trajectory import Turn

_SHELL = {"function": {"name": "shell", "parameters": {"required": ["command"]}}}
# Makes the loop of an episode that has begun, and what its tools act on.
MakeLoop = Callable[[gymnasium.Env, Renderer, Observer], tuple[Loop, Workspace]]


def scaffold(
  path: str, max_reply: int, context: int, max_turns: int, command_timeout: float
) -> Callable[..., Agent]:
  """What makes the agents of a run (`agent.factory`) by a file of settings.

  Args:
    path: the file, see `rome.agent.settings`.
    max_reply, context, max_turns: of the run; the file has to say the same.
    command_timeout: seconds that the commands of one reply may take together: where they took
      longer than `sandbox.deadline`, a policy could make its own failures invalid.
  Raises:
    ValueError: it cannot be used; the message names file and key.
  """
  settings = load_file(path)
  for key, value, name in (
    ("max_tokens", settings.max_tokens, f"agent.max_reply={max_reply}"),
    ("context_tokens", settings.context_tokens, f"agent.context={context}"),
    ("limits.turns", settings.limits.turns, f"agent.max_turns={max_turns}"),
    ("limits.seconds", settings.limits.seconds, "0: a run has no clock"),
    ("memory", settings.memory, "false: files of this machine are no part of a run"),
    ("mcp", dict(settings.mcp), "empty: servers are no part of a run"),
  ):
    wanted = {"limits.seconds": 0, "memory": False, "mcp": {}}.get(key)
    if value != (int(name.partition("=")[2]) if wanted is None else wanted):
      raise ValueError(f"agent.scaffold: {path}: {key} is {value!r}, but must be {name}")

  directory = os.path.dirname(os.path.abspath(path))

  def make_loop(
    env: gymnasium.Env, renderer: Renderer, observer: Observer
  ) -> tuple[Loop, Workspace]:
    sandbox: Any = env.unwrapped
    parts = Parts(renderer, hooks=make_hooks(settings, directory), observers=[observer])
    workspace = Workspace(sandbox.sandbox)
    return assemble(settings, workspace, parts).loop(), workspace

  return functools.partial(ManagedAgent, make_loop=make_loop, command_timeout=command_timeout)


def demonstration(tokenizer: ByteTokenizer, solution: Sequence[str]) -> list[list[int]]:
  """Replies that carry a task's solution out: a call of the shell each, then an answer."""
  t = tokenizer
  calls = [spell(t, [_SHELL], "shell", {"command": command}) for command in solution]
  said = [[t.call, *t.encode(call.removeprefix("<|call|>"))] for call in calls]
  return [[*ids, t.end] for ids in [*said, t.encode("done")]]


def read_reply(
  renderer: Renderer, request: ModelRequest, ids: Sequence[int], end: int
) -> ModelReply:
  """Sampled ids as the loop takes a reply.

  Args:
    renderer: of the policy's tokenizer.
    request: what they answer.
    ids: the reply; it was cut off if the last of them is not `end`.
  """
  message = renderer.parse(ids, request.tools, (end,))
  calls = tuple(
    Call(call["id"], call["function"]["name"], call["function"]["arguments"])
    for call in message.get("tool_calls", ())
  )
  whole = bool(ids) and ids[-1] == end
  finish = ("tool_calls" if calls else "stop") if whole else "length"
  return ModelReply(message["content"], calls, finish, len(request.ids), len(ids), ids=tuple(ids))


class ManagedAgent(Agent):
  """One episode of a policy in the scaffold.

  Args:
    env, tokenizer, system, max_turns: as of `Agent`; the loop has prompt and limits of its own.
    make_loop: makes the loop, once the environment has its sandbox.
    command_timeout: seconds that the commands of one reply may take together.
  Attributes:
    request: what the policy was asked last, from `begin` on.
  """

  resumes = False

  def __init__(
    self,
    env: gymnasium.Env,
    tokenizer: ByteTokenizer,
    *,
    system: str,
    max_turns: int,
    make_loop: MakeLoop,
    command_timeout: float,
  ):
    super().__init__(env, tokenizer, system, max_turns)
    self._make_loop, self._command_timeout = make_loop, command_timeout
    self._renderer = Renderer(tokenizer)
    self._exit_code: int | None = None  # of the last shell command of a reply
    self._over: Outcome  # of a loop that ended before its first request
    self.request: ModelRequest
    self._workspace: Workspace
    self._steps: Generator[ModelRequest, ModelReply, Outcome]

  def begin(self) -> list[int]:
    self.instruction, _ = self.env.reset()
    loop, self._workspace = self._make_loop(self.env, self._renderer, self._look)
    self._steps = loop.run(self.instruction)
    try:
      self.request = next(self._steps)
    except StopIteration as end:  # no room for a reply; whoever has the engine tells both figures
      self.request, self._over = loop.context.request(), end.value
    return list(self.request.ids)

  def act(self, reply: Sequence[int]) -> list[int] | NewRow | None:
    text, self._exit_code = self.tokenizer.decode(reply).removesuffix("<|end|>"), None
    seen = [*self.request.ids, *reply]
    before = len(self.request.messages)
    self._workspace.allow(self._command_timeout)
    try:
      self.request = self._steps.send(
        read_reply(self._renderer, self.request, reply, self.tokenizer.end)
      )
    except StopIteration as end:
      self._end(text, end.value or self._over)
      return None
    if len(self.turns) + 1 >= self.max_turns:  # summaries and sub-agents take turns as well
      self._end(text, Outcome("max_turns", "", 0, 0))
      return None
    ids = list(self.request.ids)
    grown = ids[: len(seen)] == seen
    news = self.request.messages[before + 1 :] if grown else self.request.messages
    told = "\n".join(str(message["content"]) for message in news)
    self.turns.append(Turn(text, told, self._exit_code))
    return ids[len(seen) :] if grown else NewRow(ids)

  def stop(self, reason: str) -> None:
    self._leave()
    super().stop(reason)

  def _leave(self) -> None:
    """Ends the loop and its shell; the sandbox is the environment's."""
    self._steps.close()
    self._workspace.close()

  def _look(self, tool: Tool, arguments: dict[str, Any], result: ToolResult) -> ToolResult:
    """An observer of the tools."""
    if tool.name == "shell":
      self._exit_code = result.facts.get("exit_code")
    return result

  def _end(self, text: str, outcome: Outcome) -> None:
    """The loop has ended: the tests judge an answer, or what there is after the last turn."""
    self._leave()
    told = ""
    if outcome.reason in ("answered", "max_turns"):
      told, reward, *_ = self.env.step(SUBMIT)
      self._finish(float(reward), "submitted" if outcome.reason == "answered" else outcome.reason)
    else:
      self.stop(outcome.reason)
    self.turns.append(Turn(text, told, None))
