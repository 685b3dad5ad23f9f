"""The expert store: verified successful trajectories for the imitation term.

The term is the first of Eq. 10 (arXiv:2512.24873, section 3.2.4.4). The store starts with the
demonstrations and is refreshed with what the policy itself solves. Whole trajectories are imitated;
the newest `capacity` stay. It is plain arrays, so that it is saved with the rest of the run.

One expert a task, and start states inside it: `rome.rollout.resampling`.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from rome.rollout.groups import Member
from rome.trajectory import Trajectory, Valid


class ExpertStore:
  """A ring of trajectories.

  Args:
    capacity: trajectories kept.
    context: the longest trajectory, tokens.
  """

  def __init__(self, capacity: int, context: int):
    self._tokens = np.zeros((capacity, context), np.int32)
    self._call_ids = np.full((capacity, context), -1, np.int32)
    self._lengths = np.zeros(capacity, np.int32)
    self._added = np.zeros(1, np.int64)

  def __len__(self) -> int:
    return min(int(self._added[0]), len(self._lengths))

  def add(self, trajectories: Sequence[Trajectory]) -> None:
    """Takes the successful ones among `trajectories`."""
    for trajectory in trajectories:
      if trajectory.success:
        place, n = int(self._added[0]) % len(self._lengths), len(trajectory.tokens)
        self._tokens[place, :n] = trajectory.tokens
        self._call_ids[place, :n] = trajectory.call_ids
        self._lengths[place] = n
        self._added += 1

  def sample(self, rng: np.random.Generator, count: int) -> list[Trajectory]:
    """Up to `count` different experts.

    Their log-probs are NaN, for they are imitated and never reinforced.
    """
    places = rng.choice(len(self), min(count, len(self)), replace=False)
    return [self._get(int(place)) for place in places]

  def start(self, member: Member) -> None:
    """Everybody begins at the initial state; `rome.rollout.resampling` does otherwise."""

  def row(self, trajectories: Sequence[Trajectory]) -> dict[str, float | None]:
    """Metrics of a batch that it alone knows: none."""
    return {}

  def arrays(self) -> dict[str, np.ndarray]:
    """The whole store; the inverse of `load`."""
    return {
      "tokens": self._tokens,
      "call_ids": self._call_ids,
      "lengths": self._lengths,
      "added": self._added,
    }

  def load(self, arrays: Mapping[str, np.ndarray]) -> None:
    """Takes over what `arrays` gave, of a store of the same sizes."""
    self._tokens, self._call_ids, self._lengths, self._added = (
      np.array(arrays[name]) for name in ("tokens", "call_ids", "lengths", "added")
    )

  def _get(self, place: int) -> Trajectory:
    n = self._lengths[place]
    call_ids = self._call_ids[place, :n]
    chunks = int(call_ids.max(initial=-1)) + 1
    return Trajectory(
      id=f"expert/{place}",
      task_id=f"expert/{place}",
      family="",
      instruction="",
      tokens=self._tokens[place, :n],
      call_ids=call_ids,
      logps=np.where(call_ids >= 0, np.nan, 0).astype(np.float32),
      versions=np.zeros(chunks, np.int32),
      chunk_rewards=np.zeros(chunks, np.float32),
      reward=Valid(1.0),
      end_reason="submitted",
      turns=(),
    )
