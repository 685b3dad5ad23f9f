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


class Shelf:
  """Whole expert trajectories in arrays of one size, so that they are saved with the rest of a run.

  Args:
    places: trajectories kept.
    context: the longest trajectory, tokens.
  """

  def __init__(self, places: int, context: int):
    self._tokens = np.zeros((places, context), np.int32)
    self._call_ids = np.full((places, context), -1, np.int32)
    self._lengths = np.zeros(places, np.int32)

  def __len__(self) -> int:
    return len(self._lengths)

  def put(self, place: int, tokens: np.ndarray, call_ids: np.ndarray) -> None:
    """Keeps a trajectory in place of another."""
    n = len(tokens)
    self._tokens[place, :n], self._call_ids[place, :n], self._lengths[place] = tokens, call_ids, n

  def get(self, place: int, id: str, task_id: str, version: int = 0) -> Trajectory:
    """The trajectory there, under an id; log-probs are NaN, as it is imitated, never reinforced."""
    n = self._lengths[place]
    call_ids = self._call_ids[place, :n].copy()
    chunks = int(call_ids.max(initial=-1)) + 1
    return Trajectory(
      id=id,
      task_id=task_id,
      family="",
      instruction="",
      tokens=self._tokens[place, :n].copy(),
      call_ids=call_ids,
      logps=np.where(call_ids >= 0, np.nan, 0).astype(np.float32),
      versions=np.full(chunks, version, np.int32),
      chunk_rewards=np.zeros(chunks, np.float32),
      reward=Valid(1.0),
      end_reason="submitted",
      turns=(),
    )

  def arrays(self) -> dict[str, np.ndarray]:
    """All of it; the inverse of `load`."""
    return {"tokens": self._tokens, "call_ids": self._call_ids, "lengths": self._lengths}

  def load(self, arrays: Mapping[str, np.ndarray]) -> None:
    """Takes over what `arrays` gave, of a shelf of the same size."""
    self._tokens, self._call_ids, self._lengths = (
      np.array(arrays[name]) for name in ("tokens", "call_ids", "lengths")
    )


class ExpertStore:
  """A ring of trajectories.

  Args:
    capacity: trajectories kept.
    context: the longest trajectory, tokens.
  """

  def __init__(self, capacity: int, context: int):
    self._shelf = Shelf(capacity, context)
    self._added = np.zeros(1, np.int64)

  def __len__(self) -> int:
    return min(int(self._added[0]), len(self._shelf))

  def add(self, trajectories: Sequence[Trajectory]) -> None:
    """Takes the successful ones among `trajectories`."""
    for trajectory in trajectories:
      if trajectory.success:
        place = int(self._added[0]) % len(self._shelf)
        self._shelf.put(place, trajectory.tokens, trajectory.call_ids)
        self._added += 1

  def sample(self, rng: np.random.Generator, count: int) -> list[Trajectory]:
    """Up to `count` different experts."""
    places = rng.choice(len(self), min(count, len(self)), replace=False)
    names = ((int(place), f"expert/{place}") for place in places)
    return [self._shelf.get(place, id=name, task_id=name) for place, name in names]

  def start(self, member: Member) -> None:
    """Everybody begins at the initial state; `rome.rollout.resampling` does otherwise."""

  def row(self, trajectories: Sequence[Trajectory]) -> dict[str, float | None]:
    """Metrics of a batch that it alone knows: none."""
    return {}

  def arrays(self) -> dict[str, np.ndarray]:
    """The whole store; the inverse of `load`."""
    return self._shelf.arrays() | {"added": self._added}

  def load(self, arrays: Mapping[str, np.ndarray]) -> None:
    """Takes over what `arrays` gave, of a store of the same sizes."""
    self._shelf.load(arrays)
    self._added = np.array(arrays["added"])
