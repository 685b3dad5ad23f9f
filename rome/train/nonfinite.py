"""What is kept of an update that was not finite: the trajectories that made it so.

WORKDIR/nonfinite/step_K/ has episodes.json, readable, and trajectories.npz, whose arrays NAME_I
belong to entry I of the former.
"""

import contextlib
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rome import ipa
from rome.train.play import transcript
from rome.train.step import NonFinite
from rome.trajectory import Trajectory, Valid

_SHOWN = 5  # ids that the error names
_ARRAYS = ("tokens", "call_ids", "logps", "versions", "chunk_rewards", "row_starts")


@contextlib.contextmanager
def blaming(batch: ipa.ChunkBatch, trajectories: Sequence[Trajectory]) -> Iterator[None]:
  """Gives a `NonFinite` raised inside the block the trajectories of its rows.

  Args:
    batch: what the update inside trains on.
    trajectories: those it was packed from; the index is the trajectory id.
  """
  try:
    yield
  except NonFinite as error:
    rows, slots = np.asarray(batch.chunk_ids), np.asarray(batch.trajectory_ids)
    owners = {row: np.unique(slots[row, np.unique(c[c >= 0])]) for row, c in enumerate(rows)}
    blamed = sorted({int(n) for row in error.rows for n in owners[row]})
    error.trajectories = tuple(trajectories[n] for n in blamed or range(len(trajectories)))
    raise


def dump(error: NonFinite, workdir: pathlib.Path, phase: str) -> NonFinite:
  """Writes the error's trajectories.

  Args:
    error: raised inside `blaming`.
    workdir: of the run.
    phase: "sft" or "rl".
  Returns:
    The error with the path and the trajectories in its message.
  """
  folder = workdir / "nonfinite" / f"step_{error.update}"
  arrays = {
    f"{name}_{n}": getattr(t, name) for n, t in enumerate(error.trajectories) for name in _ARRAYS
  }
  episodes = [
    {"index": n, "id": t.id, "reward": _reward(t)} | transcript(t, phase, error.update)
    for n, t in enumerate(error.trajectories)
  ]
  text = json.dumps(
    {"update": error.update, "phase": phase, "not_finite": error.names, "episodes": episodes},
    indent=2,
  )
  ids = [t.id for t in error.trajectories]
  more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
  which = f"trajectories {', '.join(ids[:_SHOWN])}{more}"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "trajectories.npz", **arrays)
    (folder / "episodes.json").write_text(text + "\n")
    where = f"Its {which} are in {folder}"
  except OSError as e:
    where = f"Its {which} could not be written to {folder} ({e.strerror})"
  told = NonFinite(error.update, error.names, error.rows, where)
  told.trajectories = error.trajectories
  return told


def _reward(trajectory: Trajectory) -> Any:
  """As JSON can say it."""
  if not isinstance(trajectory.reward, Valid):
    return trajectory.reward.reason
  value = trajectory.reward.value
  return value if math.isfinite(value) else repr(value)
