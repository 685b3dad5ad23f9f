"""What is kept of an episode whose replies come from another server: text.

Its ids and log-probs are not known, so trajectories have turns and no tokens: there is nothing in
them to train on.
"""

import json
import threading
from collections.abc import Sequence

import numpy as np

from rome.agent import Agent
from rome.rollout.native.record import LONGEST_VIEW, Message
from rome.rollout.recorder import Episode, Recorder
from rome.trajectory import Reward, Trajectory, Turn


class Transcript(Recorder):
  """The calls of one episode as text: messages and replies, no ids.

  `begin` and `answer` are for one thread.
  """

  def __init__(self) -> None:
    super().__init__()
    self._lock = threading.Lock()
    self._calls: list[tuple[Sequence[Message], Message | None]] = []  # messages, the reply

  @property
  def calls(self) -> int:
    """Calls so far, those without a reply too."""
    return len(self._calls)

  def begin(self, messages: Sequence[Message]) -> int:
    """Takes a call; returns its number."""
    with self._lock:
      self._calls.append((messages, None))
    return len(self._calls) - 1

  def answer(self, number: int, reply: Message) -> None:
    """Takes the reply to a call."""
    with self._lock:
      self._calls[number] = (self._calls[number][0], reply)

  def finish(
    self, episode: Episode, agent: Agent | None, reward: Reward, reason: str
  ) -> Trajectory:
    """The trajectory of the calls that were answered: turns without tokens."""
    with self._lock:
      calls = [(messages, reply) for messages, reply in self._calls if reply is not None]
    after = [_news(messages) for messages, _ in calls[1:]] + [""]
    turns = [
      Turn(_text(reply), seen[:LONGEST_VIEW], None)
      for (_, reply), seen in zip(calls, after, strict=False)  # without calls one more
    ]
    return Trajectory(
      id=episode.id,
      task_id=episode.task.id,
      family=episode.task.family,
      instruction=agent.instruction if agent else "",
      tokens=np.zeros(0, np.int32),
      call_ids=np.zeros(0, np.int32),
      logps=np.zeros(0, np.float32),
      versions=np.full(len(turns), -1, np.int32),
      chunk_rewards=np.zeros(len(turns), np.float32),
      reward=reward,
      end_reason=reason,
      turns=tuple(turns),
    )


def _news(messages: Sequence[Message]) -> str:
  """What a request says behind the last reply in it."""
  new: list[str] = []
  for message in reversed(messages):
    if message.get("role") == "assistant":
      break
    new.insert(0, _text(message))
  return "\n".join(new)


def _text(message: Message) -> str:
  """A message to read: its content, then its calls as JSON. It may be anything: agents write it."""
  content, calls = message.get("content"), message.get("tool_calls")
  parts = [content if isinstance(content, str) else json.dumps(content)] if content else []
  return "\n".join([*parts, json.dumps(calls)] if calls else parts)
