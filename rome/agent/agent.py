"""The agent of one episode: it builds the context, reads replies, acts in the environment.

The loop is cut in two so that a caller may batch the model: `begin` gives the prompt, then
`act(reply)` gives what to append, or None when the episode is over. A context grows by appending;
an agent that rewrites it says so with a `NewRow`, which for training begins a new row. The text
view is kept beside the ids. `rome.agent.managed` has the same two methods over the whole scaffold.
"""

import dataclasses
from collections.abc import Sequence

import gymnasium

from rome.agent.parse import MalformedCall, parse_reply
from rome.text import ByteTokenizer, render_observation, render_prompt
from rome.trajectory import Turn


@dataclasses.dataclass(frozen=True)
class NewRow:
  """A context that was rewritten: in place of all that the policy saw so far.

  Attributes:
    ids: the whole new context. What the policy said before and stands in it is context now; it is
      trained on where it was sampled.
  """

  ids: Sequence[int]

  def __post_init__(self) -> None:
    if not self.ids:
      raise ValueError("a NewRow without token ids: there is nothing to reply to")


@dataclasses.dataclass
class Agent:
  """One episode of one policy in one environment.

  Attributes:
    env: a `rome/Terminal-v0` environment, or another one of strings.
    tokenizer: the policy's tokenizer.
    system: the system prompt, "" for none.
    max_turns: replies the policy gets, malformed ones included.
  """

  env: gymnasium.Env
  tokenizer: ByteTokenizer
  system: str
  max_turns: int

  def __post_init__(self) -> None:
    self.turns: list[Turn] = []
    self.instruction = ""
    self.reward = 0.0
    self.end_reason = ""

  def begin(self) -> list[int]:
    """Resets the environment and returns the prompt's token ids."""
    self.instruction, _ = self.env.reset()
    return render_prompt(self.tokenizer, self.system, self.instruction)

  def read(self, reply: Sequence[int]) -> str | MalformedCall:
    """The action in a reply, or what is wrong with it; subclasses may read otherwise."""
    call = parse_reply(reply, self.tokenizer)
    if isinstance(call, MalformedCall):
      return call
    return "submit" if call.name == "submit" else call.argument

  def resume(self, context: Sequence[int], turns: Sequence[Turn]) -> None:
    """Takes up an episode, just begun, where another one of the same task stood.

    Args:
      context: what that one's context was; an agent that keeps no context of its own ignores it.
      turns: what had been played.
    """
    del context
    self.turns = list(turns)

  def act(self, reply: Sequence[int]) -> list[int] | NewRow | None:
    """Carries out one reply.

    Args:
      reply: the sampled token ids of one LLM call, `<|end|>` included if it was sampled.
    Returns:
      The token ids to append to the context, a `NewRow` in place of it, or None when the episode is
      over (`reward` and `end_reason` are set).
    Raises:
      SandboxError: the infrastructure failed; the episode is invalid.
    """
    action = self.read(reply)
    text = self.tokenizer.decode(reply).removesuffix("<|end|>")
    if isinstance(action, MalformedCall):
      self.turns.append(Turn(text, action.message, None))
      observation = action.message
    else:
      observation, reward, terminated, truncated, info = self.env.step(action)
      self.turns.append(Turn(text, observation, info.get("exit_code")))
      if terminated or truncated:
        self._finish(float(reward), "submitted" if terminated else "max_turns")
        return None
    if len(self.turns) >= self.max_turns:
      self.stop("max_turns")
      return None
    ids = render_observation(self.tokenizer, observation)
    # A reply that was cut off lacks its end token; the template closes it so that every turn has
    # the same shape.
    return ids if reply and reply[-1] == self.tokenizer.end else [self.tokenizer.end, *ids]

  def stop(self, reason: str) -> None:
    """Ends the episode from outside, for example because the context is full.

    A stopped episode earns nothing.
    """
    self._finish(0.0, reason)

  def _finish(self, reward: float, reason: str) -> None:
    self.reward = reward
    self.end_reason = reason
