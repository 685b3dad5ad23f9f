"""Demonstrations for a small policy: the scripted one without its weaknesses, as token ids.

What the policy reads comes from the same loop, skills and sandboxes as in the experiment. To show
what to do where a summary lost a fact, some teachers write such summaries; these are read in
training and not imitated (`lossy`).
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from experiments.contexts.families import Task
from experiments.contexts.play import SMALL, Result, Scale, play
from experiments.contexts.policy import UNKNOWN, Scripted, View
from rome.agent.model import ModelReply, ModelRequest
from rome.rollout.recorder import Recorder
from rome.text.render import Renderer
from rome.trajectory import Trajectory, Valid

_KEPT = 0.8  # of the facts, in a summary that is lossy


class Teacher(Scripted):
  """Does its task as far as can be seen how, and keeps what it read and said.

  Args:
    task, seed: of the episode.
    lossy: whether its summaries lose facts.
    renderer: of the policy's tokenizer.
  Attributes:
    rows: one record for each row; a row ends where the context is rewritten.
  """

  far, stubborn, kept = math.inf, 0.0, 1.0

  def __init__(self, task: Task, seed: int, lossy: bool, renderer: Renderer):
    super().__init__(task, seed)
    self._lossy, self._renderer = lossy, renderer
    if lossy:
      self.kept = _KEPT
    self.rows: list[Recorder] = []

  def complete(self, request: ModelRequest) -> ModelReply:
    reply = super().complete(request)
    calls = [
      {"id": "c", "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
      for c in reply.calls
    ]
    message = {"role": "assistant", "content": reply.content, "tool_calls": calls}
    ids = self._renderer.spell(message, request.tools)
    context = list(request.ids)
    if not self.rows or context[: len(self.rows[-1].row)] != self.rows[-1].row:
      self.rows.append(Recorder())
    row = self.rows[-1]
    row.context(context[len(row.row) :])
    if self._lossy and request.purpose == "summary":
      row.context(ids)
    else:
      row.reply(ids, [0.0] * len(ids), 0)
    return dataclasses.replace(reply, ids=tuple(ids))

  def _summary(self, view: View, request: ModelRequest) -> str:
    """Says what is stale: the todo list may still have it."""
    stale = [f"FACT {name} = {UNKNOWN}" for name in sorted(view.stale)]
    return "\n".join([super()._summary(view, request), *stale])

  def _items(self, view: View) -> list[dict[str, str]]:
    """One item for all facts: an item each would be long."""
    facts = "; ".join(f"FACT {name} = {value}" for name, value in view.facts.items())
    return [{"text": facts, "state": "done"}]


def demonstrate(
  family: str, arm: str, seed: int, lossy: bool = False, scale: Scale = SMALL
) -> tuple[Result, list[Trajectory]]:
  """One episode of the teacher, and its rows as trajectories of one row each."""
  made: list[Teacher] = []

  def make(task: Task, seed: int) -> Teacher:
    made.append(Teacher(task, seed, lossy, Renderer(scale.tokenizer())))
    return made[-1]

  result = play(family, arm, seed, make, scale)
  rows = [
    imitated(f"{family}/{seed}#{arm}, row {i}", family, row.tokens, row.call_ids)
    for i, row in enumerate(made[0].rows)
    if row.calls
  ]
  return result, rows


def imitated(id: str, family: str, tokens: Sequence[int], call_ids: Sequence[int]) -> Trajectory:
  """A row to imitate; without a text view and log-probs, which nothing here needs.

  Args:
    id, family: of the row.
    tokens, call_ids: [T], as of `Trajectory`.
  """
  calls = max(call_ids) + 1
  return Trajectory(
    id=id,
    task_id=id,
    family=family,
    instruction="",
    tokens=np.array(tokens, np.int32),
    call_ids=np.array(call_ids, np.int32),
    logps=np.zeros(len(tokens), np.float32),
    versions=np.zeros(calls, np.int32),
    chunk_rewards=np.zeros(calls, np.float32),
    reward=Valid(1.0),
    end_reason="submitted",
    turns=(),
  )
