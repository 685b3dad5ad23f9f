"""The loop of `rome agent` as the agent of an episode in training: trainer-managed mode.

`rome.agent.loop.Loop` is a generator of requests. Here the trainer answers them: a request's token
ids are the context, the reply is the sampled ids, and what a request adds to the one before is what
`act` gives. Where a request does not go on from the one before, as after a compaction and for a
sub-agent, it is a `NewRow`.

The requests are the same as those of `rome agent` with the same settings, byte for byte
(`ModelRequest.wire`). The environment gives the instruction and the sandbox, and judges the end:
an answer submits. Left out: beginning in the middle of an episode from a snapshot (`resume`), as
the loop's own state is in no snapshot; whoever needs it replays (`rome.rollout.starts`).
"""

from collections.abc import Callable, Generator, Sequence

import gymnasium

from rome.agent.agent import Agent, NewRow
from rome.agent.loop import Loop, Outcome
from rome.agent.model import Call, ModelReply, ModelRequest
from rome.envs.terminal import SUBMIT
from rome.text import ByteTokenizer
from rome.text.render import Renderer
from rome.text.tool_calls import spell
from rome.trajectory import Turn

# Makes the loop of an episode that has begun.
MakeLoop = Callable[[gymnasium.Env, Renderer], Loop]


class ManagedAgent(Agent):
  """One episode of a policy in the scaffold.

  Args:
    env, tokenizer, system, max_turns: as of `Agent`; the loop has prompt and limits of its own.
    make_loop: makes the loop, once the environment has its sandbox.
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
  ):
    super().__init__(env, tokenizer, system, max_turns)
    self._make_loop = make_loop
    self._renderer = Renderer(tokenizer)
    self._request: ModelRequest
    self._steps: Generator[ModelRequest, ModelReply, Outcome]

  def begin(self) -> list[int]:
    self.instruction, _ = self.env.reset()
    self._steps = self._make_loop(self.env, self._renderer).run(self.instruction)
    self._request = next(self._steps)
    return list(self._request.ids)

  def act(self, reply: Sequence[int]) -> list[int] | NewRow | None:
    text = self.tokenizer.decode(reply).removesuffix("<|end|>")
    seen = [*self._request.ids, *reply]
    before = len(self._request.messages)
    try:
      self._request = self._steps.send(self._read(reply))
    except StopIteration as end:
      self._end(text, end.value)
      return None
    ids = list(self._request.ids)
    grown = ids[: len(seen)] == seen
    news = self._request.messages[before + 1 :] if grown else self._request.messages
    told = "\n".join(str(message["content"]) for message in news)
    self.turns.append(Turn(text, told, None))
    return ids[len(seen) :] if grown else NewRow(ids)

  def demonstrate(self, solution: Sequence[str]) -> list[list[int]]:
    """Replies that carry a task's solution out: a call of the shell each, then an answer."""
    calls = [
      spell(self.tokenizer, self._request.tools, "shell", {"command": command})
      for command in solution
    ]
    bare = [call.removeprefix("<|call|>") for call in calls]
    t = self.tokenizer
    return [*([t.call, *t.encode(call), t.end] for call in bare), [*t.encode("done"), t.end]]

  def _read(self, reply: Sequence[int]) -> ModelReply:
    """The reply as the loop takes it."""
    end = self.tokenizer.end
    message = self._renderer.parse(reply, self._request.tools, (end,))
    calls = tuple(
      Call(call["id"], call["function"]["name"], call["function"]["arguments"])
      for call in message.get("tool_calls", ())
    )
    whole = bool(reply) and reply[-1] == end
    finish = ("tool_calls" if calls else "stop") if whole else "length"
    counts = len(self._request.ids), len(reply)
    return ModelReply(message["content"], calls, finish, *counts, ids=tuple(reply))

  def _end(self, text: str, outcome: Outcome) -> None:
    """The loop has ended: the tests judge an answer, or what there is after the last turn."""
    told = ""
    if outcome.reason in ("answered", "max_turns"):
      told, reward, *_ = self.env.step(SUBMIT)
      self._finish(float(reward), "submitted" if outcome.reason == "answered" else outcome.reason)
    else:
      self.stop(outcome.reason)
    self.turns.append(Turn(text, told, None))
