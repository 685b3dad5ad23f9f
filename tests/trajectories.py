"""Trajectories of stated shapes, for tests that need no episodes."""

from collections.abc import Sequence

import numpy as np

from rome.trajectory import Reward, Trajectory


def make(
  name: str,
  chunks: Sequence[tuple[int, int]],
  reward: Reward,
  logp: float = -1.0,
  task: str | None = None,
  new_rows: Sequence[int] = (),
) -> Trajectory:
  """A trajectory whose (context, reply) pairs have the given lengths; tokens follow from them.

  Rows begin in front of the pairs in `new_rows`.
  """
  rng = np.random.default_rng(len(name) * 100 + sum(map(sum, chunks)))
  call_ids = np.concatenate(
    [[-1] * context + [k] * reply for k, (context, reply) in enumerate(chunks)]
  ).astype(np.int32)
  return Trajectory(
    id=name,
    task_id=task or name,
    family="f",
    instruction="",
    tokens=rng.integers(0, 256, len(call_ids)).astype(np.int32),
    call_ids=call_ids,
    logps=np.where(call_ids >= 0, logp, 0).astype(np.float32),
    versions=np.full(len(chunks), 7, np.int32),
    chunk_rewards=np.zeros(len(chunks), np.float32),
    reward=reward,
    end_reason="submitted",
    turns=(),
    row_starts=(0, *(sum(map(sum, chunks[:k])) for k in new_rows)),
  )
