"""The expert store: verified successful trajectories for the imitation term.

The term is the first of Eq. 10 (arXiv:2512.24873, section 3.2.4.4). The store starts with the
demonstrations and is refreshed with what the policy itself solves. Whole trajectories are imitated;
the newest stay, as many as have `capacity` rows. It is plain arrays, so that it is saved with the
rest of the run.

One expert a task, and start states inside it: `rome.rollout.resampling`.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from rome.rollout.groups import Member
from rome.trajectory import Trajectory, Valid


class Shelf:
  """Rows of expert trajectories in arrays of one size, saved with the rest of a run.

  Args:
    places: rows kept.
    context: the longest row, tokens.
  """

  def __init__(self, places: int, context: int):
    self._tokens = np.zeros((places, context), np.int32)
    self._call_ids = np.full((places, context), -1, np.int32)
    self._lengths = np.zeros(places, np.int32)
    self._chunks = np.zeros(places, np.int32)  # of the whole trajectory

  def __len__(self) -> int:
    return len(self._lengths)

  def put(self, place: int, tokens: np.ndarray, call_ids: np.ndarray, chunks: int) -> None:
    """Keeps a row in place of another, of a trajectory of so many chunks."""
    n = len(tokens)
    self._tokens[place, :n], self._call_ids[place, :n], self._lengths[place] = tokens, call_ids, n
    self._chunks[place] = chunks

  def get(self, places: Sequence[int], id: str, task_id: str, version: int = 0) -> Trajectory:
    """The trajectory of the rows in these places, under an id.

    Its log-probs are NaN: it is imitated, never reinforced.
    """
    lengths = self._lengths[list(places)].tolist()
    call_ids, tokens = (
      np.concatenate([of[p, :n] for p, n in zip(places, lengths, strict=True)])
      for of in (self._call_ids, self._tokens)
    )
    chunks = int(self._chunks[places[0]])
    return Trajectory(
      id=id,
      task_id=task_id,
      family="",
      instruction="",
      tokens=tokens,
      call_ids=call_ids,
      logps=np.where(call_ids >= 0, np.nan, 0).astype(np.float32),
      versions=np.full(chunks, version, np.int32),
      chunk_rewards=np.zeros(chunks, np.float32),
      reward=Valid(1.0),
      end_reason="submitted",
      turns=(),
      row_starts=tuple(itertools.accumulate([0, *lengths[:-1]])),
    )

  def arrays(self) -> dict[str, np.ndarray]:
    """All of it; the inverse of `load`."""
    return {
      "tokens": self._tokens,
      "call_ids": self._call_ids,
      "lengths": self._lengths,
      "chunks": self._chunks,
    }

  def load(self, arrays: Mapping[str, np.ndarray]) -> None:
    """Takes over what `arrays` gave, of a shelf of the same size."""
    self._tokens, self._call_ids, self._lengths, self._chunks = (
      np.array(arrays[name]) for name in ("tokens", "call_ids", "lengths", "chunks")
    )


class ExpertStore:
  """A ring of rows; those of a trajectory lie behind each other, and it goes with the first.

  Args:
    capacity: rows kept. A trajectory that has more is none of the experts.
    context: the longest row, tokens.
  """

  def __init__(self, capacity: int, context: int):
    self._shelf = Shelf(capacity, context)
    self._rows = np.zeros(capacity, np.int32)  # of the trajectory that begins there, else 0
    self._added = np.zeros(1, np.int64)  # rows

  def __len__(self) -> int:
    return int(np.count_nonzero(self._rows))

  def add(self, trajectories: Sequence[Trajectory]) -> None:
    """Takes the successful ones among `trajectories`."""
    for t in trajectories:
      if not t.success or len(t.rows) > len(self._shelf):
        continue
      for n, row in enumerate(t.rows):
        place = int(self._added[0]) % len(self._shelf)
        self._shelf.put(place, t.tokens[row.tokens], t.call_ids[row.tokens], t.num_chunks)
        self._rows[place] = 0 if n else len(t.rows)
        self._added += 1

  def sample(self, rng: np.random.Generator, count: int) -> list[Trajectory]:
    """Up to `count` different experts."""
    first = np.flatnonzero(self._rows)
    chosen = first[rng.choice(len(first), min(count, len(first)), replace=False)].tolist()
    return [self._shelf.get(self._places(p), f"expert/{p}", f"expert/{p}") for p in chosen]

  def _places(self, first: int) -> list[int]:
    """Of the rows of the trajectory that begins there."""
    return [(first + n) % len(self._shelf) for n in range(self._rows[first])]

  def start(self, member: Member) -> None:
    """Everybody begins at the initial state; `rome.rollout.resampling` does otherwise."""

  def row(self, trajectories: Sequence[Trajectory]) -> dict[str, float | None]:
    """Metrics of a batch that it alone knows: none."""
    return {}

  def arrays(self) -> dict[str, np.ndarray]:
    """The whole store; the inverse of `load`."""
    return self._shelf.arrays() | {"rows": self._rows, "added": self._added}

  def load(self, arrays: Mapping[str, np.ndarray]) -> None:
    """Takes over what `arrays` gave, of a store of the same sizes."""
    self._shelf.load(arrays)
    self._rows, self._added = np.array(arrays["rows"]), np.array(arrays["added"])
