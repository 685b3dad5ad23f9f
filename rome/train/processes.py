"""Several processes of one run: who writes, who plays which instances, and what they exchange.

Every process runs the same loop. Episodes are shared out and then exchanged, so that all pack the
same batches; files are written by the first. With one process nothing here costs anything.

Choice: contiguous shares, one exchange a batch. What a process computes from exchanged values is
the same in all of them, and so are its decisions; nothing else may decide.
"""

import pickle
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from rome import rollout
from rome.trajectory import Trajectory

T = TypeVar("T")
# What collectives and the coordination service say.
_LOST = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "coordination service")
_LEAST = 1 << 16  # bytes exchanged; sizes are powers of two, so that few programs are compiled


def leads() -> bool:
  """Whether this process writes the files of the run."""
  return jax.process_index() == 0


class Nowhere:
  """Takes every call of a writer and does nothing; a position in it is 0. A context manager."""

  def __enter__(self) -> "Nowhere":
    return self

  def __exit__(self, *_: object) -> None:
    pass

  def __getattr__(self, name: str) -> Callable[..., int]:
    return lambda *args, **kwargs: 0


def if_leading(make: Callable[..., T], *args: Any) -> T:
  """What `make(*args)` gives, a writer, in the first process; in the others `Nowhere`."""
  return make(*args) if leads() else cast(T, Nowhere())


def lost_peer(error: Exception) -> bool:
  """Whether this is what an exchange or a collective raises where another process is gone."""
  return jax.process_count() > 1 and any(word in str(error) for word in _LOST)


def share(first: int, count: int) -> tuple[int, int]:
  """The part of `count` instances from `first` on that this process plays: its first, how many."""
  mine, all_of_them = jax.process_index(), jax.process_count()
  start, end = (count * n // all_of_them for n in (mine, mine + 1))
  return first + start, end - start


def exchange(value: T) -> list[T]:
  """The value of every process, in their order; all of them have to call it together.

  The bytes are pickles, which only processes of this run can have made.
  """
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(pickle.dumps(value), np.uint8)
  sizes = multihost_utils.process_allgather(np.array([len(data)], np.int32))
  width = max(1 << (int(sizes.max()) - 1).bit_length(), _LEAST)
  rows = multihost_utils.process_allgather(np.pad(data, (0, width - len(data))))
  return [pickle.loads(row[: int(n)].tobytes()) for row, n in zip(rows, sizes[:, 0], strict=True)]


def together(
  trajectories: list[Trajectory], stats: rollout.RolloutStats
) -> tuple[list[Trajectory], rollout.RolloutStats]:
  """What all processes played, sorted by id; counts are summed, seconds are of the slowest."""
  parts = exchange((trajectories, stats))
  if len(parts) == 1:
    return parts[0]
  slowest = max((s for _, s in parts), key=lambda s: s.seconds)
  total = rollout.RolloutStats(
    generate_seconds=slowest.generate_seconds, env_wait_seconds=slowest.env_wait_seconds
  )
  for _, part in parts:
    for name, value in vars(part).items():
      if not name.endswith("_seconds"):
        setattr(total, name, getattr(total, name) + value)
  return sorted((t for played, _ in parts for t in played), key=lambda t: t.id), total
