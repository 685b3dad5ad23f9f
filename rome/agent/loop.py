"""The loop: ask the model, run its calls, give it the results, until it answers.

It is a generator of requests that is sent replies, so whoever drives it decides how the model is
asked: over HTTP with streaming (`rome agent`), by a script, or as rows of a batch in training
(`rome.agent.managed`). The same loop runs in all of them.

    loop = Loop(context, executor, limits, skills)
    outcome = drive(loop.run("Fix the bug."), model)

Context engineering is a list of `Skill`s (`rome.agent.skills`); permission and hooks are gates and
observers of the executor (`rome.agent.executor`). Sub-agents are tools that run a loop of their own
(`rome.agent.tools.task`): no hand-off, no messages between agents.
"""

import dataclasses
import time
from collections.abc import Generator, Sequence
from typing import TypeVar

from rome.agent.context import Context
from rome.agent.executor import Executor
from rome.agent.model import Call, Message, Model, ModelReply, ModelRequest
from rome.agent.tools.base import ToolResult
from rome.text.tool_calls import looks_like_call

CUT_OFF = "error: the reply was cut off at its limit of tokens; be shorter"
MALFORMED = "error: no well-formed tool call could be read in the reply; nothing was run"


@dataclasses.dataclass(frozen=True)
class Limits:
  """When an episode ends although the model has not answered.

  Attributes:
    turns: replies, those of summaries and sub-agents not counted.
    tokens: sampled tokens in all, summaries and sub-agents included, 0 for no bound. The reply that
      passes it is the last one.
    seconds: of wall clock, 0 for no bound; an episode with one does not repeat bit for bit.
  """

  turns: int = 100
  tokens: int = 0
  seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How an episode ended.

  Attributes:
    reason: "answered", "max_turns", "max_tokens", "deadline", "context_full", "stopped" (by a hook
      or a person), or what a skill says ("loop_detected").
    text: the answer, "" where there is none.
    turns, tokens: replies and sampled tokens, counted as `Limits` counts them.
  """

  reason: str
  text: str
  turns: int
  tokens: int


Steps = Generator[ModelRequest, ModelReply, None]
_Found = TypeVar("_Found")


class Spent(Exception):
  """Raised in a sub-agent that asks the model when its caller has used up a limit.

  Attributes:
    reason: as of `Outcome`.
  """

  def __init__(self, reason: str):
    super().__init__(reason)
    self.reason = reason


class Skill:
  """A part of context engineering. Each method may be left as it is."""

  def begin(self, context: Context) -> None:
    """The conversation has its first messages."""

  def before(self, context: Context) -> Steps:
    """Before each request: may rewrite the context and ask the model itself."""
    yield from ()

  def after(
    self, context: Context, calls: Sequence[Call], results: Sequence[ToolResult]
  ) -> Sequence[str]:
    """After the calls of a reply: reminders, which the model reads behind the results."""
    return ()

  def end(self, context: Context) -> str:
    """A reason to end here, in place of the next request; "" to go on."""
    return ""

  def final(self, context: Context, text: str) -> str:
    """The model has answered: "" to let it end, or what it is to be told so that it goes on."""
    return ""


class Loop:
  """One conversation from an instruction to its outcome.

  Args:
    context: empty, or one to go on with.
    executor: the tools.
    limits: see there.
    skills: in the order in which they act.
    system: the system prompt, "" for none.
  """

  def __init__(
    self,
    context: Context,
    executor: Executor,
    limits: Limits,
    skills: Sequence[Skill] = (),
    system: str = "",
  ):
    self.context, self.executor, self.limits, self.skills = context, executor, limits, skills
    self._system = system
    self._tokens = 0
    self._turns = 0
    self._started = time.monotonic()

  def run(self, instruction: str) -> Generator[ModelRequest, ModelReply, Outcome]:
    """Carries one instruction out; a conversation may get several, one after another.

    Yields:
      Requests; each wants its reply sent in.
    Raises:
      SandboxError: the infrastructure failed.
    """
    self._started = time.monotonic()
    self._begin(instruction)
    while True:
      if reason := self._spent():  # before a skill asks for a summary that nobody would read
        return self.outcome(reason)
      for skill in self.skills:
        yield from self._counted(skill.before(self.context))
      if reason := self._exhausted():
        return self.outcome(reason)
      reply = yield self.context.request()
      self._count(reply)
      self._turns += 1
      calls = self.context.reply(reply)
      if calls:
        results = yield from self._counted(self.executor.run(calls), bounded=True)
        self._give(calls, results)
      elif reply.finish == "length" or looks_like_call(reply.content):
        self._say(CUT_OFF if reply.finish == "length" else MALFORMED)
      elif more := self._more(reply.content):
        self._say(more)
      else:
        return self.outcome("answered", reply.content)

  def _begin(self, instruction: str) -> None:
    user: Message = {"role": "user", "content": instruction}
    if self.context.messages:
      self.context.append([user])
      return
    system = [{"role": "system", "content": self._system}] if self._system else []
    self.context.begin([*system, user])
    for skill in self.skills:
      skill.begin(self.context)

  def _counted(
    self, steps: Generator[ModelRequest, ModelReply, _Found], bounded: bool = False
  ) -> Generator[ModelRequest, ModelReply, _Found]:
    """The same requests, with their replies counted; `bounded`: `Spent` where a limit is reached.

    A tool that it is raised in has a result all the same, so that no call is left without one.
    """
    try:
      request = next(steps)
      while True:
        if bounded and (reason := self._used_up()):
          request = steps.throw(Spent(reason))
          continue
        reply = yield request
        self._count(reply)
        request = steps.send(reply)
    except StopIteration as end:
      return end.value
    finally:
      steps.close()

  def _count(self, reply: ModelReply) -> None:
    self._tokens += len(reply.ids) or reply.completion_tokens

  def _used_up(self) -> str:
    """The limit that sub-agents have used up with their caller, "" for none."""
    limits = self.limits
    if limits.tokens and self._tokens >= limits.tokens:
      return "max_tokens"
    if limits.seconds and time.monotonic() - self._started >= limits.seconds:
      return "deadline"
    return ""

  def _spent(self) -> str:
    """The limit that is reached, "" for none."""
    return "max_turns" if self._turns >= self.limits.turns else self._used_up()

  def _exhausted(self) -> str:
    """Why there is no further request, "" where there is one."""
    if reason := self._spent():
      return reason
    if self.context.room() < 0:
      return "context_full"
    return next((why for skill in self.skills if (why := skill.end(self.context))), "")

  def _give(self, calls: Sequence[Call], results: Sequence[ToolResult]) -> None:
    """Results in the order of their calls, then reminders."""
    messages: list[Message] = [
      {"role": "tool", "tool_call_id": call.id, "content": result.text}
      for call, result in zip(calls, results, strict=True)
    ]
    said = [text for skill in self.skills for text in skill.after(self.context, calls, results)]
    if said:
      messages.append({"role": "user", "content": "\n".join(map(reminder, said))})
    self.context.append(messages)

  def _say(self, text: str) -> None:
    self.context.append([{"role": "user", "content": reminder(text)}])

  def _more(self, text: str) -> str:
    """What speaks against ending here."""
    return "\n".join(told for skill in self.skills if (told := skill.final(self.context, text)))

  def outcome(self, reason: str, text: str = "") -> Outcome:
    """One that ends here for a reason."""
    return Outcome(reason, text, self._turns, self._tokens)


def reminder(text: str) -> str:
  """Words of the system among those of the user."""
  return f"<system-reminder>\n{text}\n</system-reminder>"


def drive(steps: Generator[ModelRequest, ModelReply, Outcome], model: Model) -> Outcome:
  """Runs a loop to its end, one request after another.

  Raises:
    ModelError, SandboxError: see there.
  """
  try:
    request = next(steps)
    while True:
      request = steps.send(model.complete(request))
  except StopIteration as end:
    return end.value
