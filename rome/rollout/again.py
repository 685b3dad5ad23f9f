"""Asks the engine again for the chunks of finished trajectories.

What the engine says follows from weights, key and context, and the context of every chunk is in the
record; so no environment is needed. `backend_name` says how far the answer must agree: "native" and
"exact" give the same bits, "xla" the same up to rounding.
"""

import collections
from collections.abc import Sequence

import chex
import numpy as np

from rome import models
from rome.rollout.crew import request_key
from rome.rollout.engine import Engine, Reply, Request
from rome.rollout.engine.choice import choose
from rome.rollout.groups import Member
from rome.trajectory import Trajectory


def backend_name(config: models.ModelConfig, numerics: str) -> str:
  """The engine's backend for a model on this machine: "native", "xla" or "exact"."""
  return choose(config, numerics, "auto", None, stacked=False, steps=1, max_length=16).name


def member_of(id: str) -> Member:
  """What keys the randomness of a trajectory, from its id "{task}#{instance}[.{sample}]".

  Raises:
    ValueError: it is not such an id.
  """
  instance, _, sample = id.rpartition("#")[2].partition(".")
  return Member(int(instance), int(sample or 0))


def ask_again(
  engine: Engine,
  params: chex.ArrayTree,
  key: chex.PRNGKey,
  trajectories: Sequence[Trajectory],
  sampling: models.Sampling,
  max_reply: int,
) -> list[list[Reply]]:
  """The replies that stand where the chunks of the trajectories do.

  Args:
    engine: of the same settings.
    params: weights that sampled all of the chunks.
    key: base key of `EpisodeRunner.run`.
    trajectories: N of them.
    sampling, max_reply: as for `EpisodeRunner`.
  Returns:
    One list a trajectory, one reply a chunk.
  Raises:
    ValueError: a context is none that the engine can have been asked with.
  """
  engine.publish(params, engine.version + 1, key)
  waiting = collections.deque(
    (n, k) for n, t in enumerate(trajectories) for k in range(t.num_chunks)
  )
  asked: dict[int, tuple[int, int]] = {}
  replies: dict[tuple[int, int], Reply] = {}
  while waiting or asked:
    while waiting and len(asked) < 2 * engine.slots:
      n, k = waiting.popleft()
      t = trajectories[n]
      start = int(np.argmax(t.call_ids == k))
      row = max(s for s in t.row_starts if s <= start)
      request = Request(
        context=tuple(t.tokens[row:start].tolist()),
        max_tokens=max_reply,
        sampling=sampling,
        key=request_key(member_of(t.id), k),
      )
      asked[engine.submit(request)] = n, k
    for update in engine.step():
      if update.reply:
        replies[asked.pop(update.id)] = update.reply
  return [[replies[n, k] for k in range(t.num_chunks)] for n, t in enumerate(trajectories)]
