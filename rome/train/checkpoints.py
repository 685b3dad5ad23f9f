"""Checkpoints by orbax: the state and the run's cursor as one atomic directory.

That of one step is `checkpoints/STEP`. Orbax writes into a temporary directory and renames it, so
a killed save leaves nothing that looks whole. A hash of every array travels in the cursor; a
checkpoint that does not match it is refused and the earlier ones stay.

Left out for now: asynchronous saves, resharding, falling back by itself.
"""

import gc
import hashlib
import os
import pathlib
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from typing import Any

import chex
import jax
import numpy as np
from orbax.checkpoint.experimental import v1 as orbax

from rome.train.state import TrainState


class CheckpointError(RuntimeError):
  """A checkpoint cannot be written or read; the message says which one and what to do."""


def tree_sha256(tree: chex.ArrayTree) -> str:
  """Hash of every array's path, type, shape and bytes."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    array = np.asarray(leaf)
    digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()


def _arrays(state: TrainState, store: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The state and the expert store as plain arrays; a typed key becomes its data."""
  return {
    "params": state.params,
    "opt_state": jax.tree.leaves(state.opt_state),
    "step": state.step,
    "key": jax.random.key_data(state.key),
    "store": dict(store),
  }


class Checkpoints:
  """The checkpoints of one run.

  Args:
    workdir: the run's directory.
    keep: the newest ones that stay.
  """

  def __init__(self, workdir: str | os.PathLike, keep: int):
    self.directory = pathlib.Path(workdir).absolute() / "checkpoints"
    self._keep = keep

  def steps(self) -> list[int]:
    """Steps that have a finished checkpoint, ascending."""
    if not self.directory.is_dir():
      return []
    return sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdigit())

  def path(self, step: int) -> pathlib.Path:
    return self.directory / str(step)

  def save(
    self, step: int, state: TrainState, store: Mapping[str, np.ndarray], cursor: dict[str, Any]
  ) -> pathlib.Path:
    """Writes the checkpoint of `step`, then drops those beyond `keep`.

    Args:
      step: number that orders the checkpoints.
      state: the training state.
      store: arrays of the expert store.
      cursor: what else the run needs to go on, as JSON values.
    Raises:
      CheckpointError: it could not be written; earlier ones are intact.
    """
    arrays = jax.tree.map(np.asarray, _arrays(state, store))
    try:
      self._make_room(sum(x.nbytes for x in jax.tree.leaves(arrays)))
      orbax.save_checkpointables(
        self.path(step),
        {"state": arrays, "cursor": cursor | {"state_sha256": tree_sha256(arrays)}},
        overwrite=True,
      )
      for old in self.steps()[: -self._keep]:
        shutil.rmtree(self.path(old))
    except (OSError, ValueError) as e:
      raise CheckpointError(
        f"checkpoint {self.path(step)} could not be written ({_first_line(e)}); free disk space "
        "or choose another --workdir. Earlier checkpoints are intact"
      ) from e
    return self.path(step)

  def _make_room(self, size: int) -> None:
    """Raises OSError where `size` bytes cannot be written: orbax would wait for minutes, or fail in
    many threads at once, each with a traceback."""
    self.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=self.directory) as file:
      os.posix_fallocate(file.fileno(), 0, size)

  def size(self) -> int:
    """Bytes of all of them."""
    return sum(p.stat().st_size for p in self.directory.rglob("*") if p.is_file())

  def restore(
    self, like: TrainState, like_store: Mapping[str, np.ndarray], step: int | None = None
  ) -> tuple[TrainState, dict[str, np.ndarray], dict[str, Any]] | None:
    """State, expert store and cursor of a checkpoint, or None when there is none.

    Args:
      like: a state of the same structure.
      like_store: a store of the same sizes.
      step: which one of `steps`, None for the newest.
    Raises:
      CheckpointError: it is damaged or of another model.
    """
    steps = [s for s in self.steps() if step is None or s <= step]
    if not steps:
      return None
    path = self.path(steps[-1])
    mend = (
      f"delete {path} to resume from step {steps[-2]}"
      if len(steps) > 1
      else f"delete {path} to start afresh"
    )
    loaded = _load(path)
    if isinstance(loaded, str):
      raise CheckpointError(f"checkpoint {path} is damaged ({loaded}); {mend}")
    arrays, cursor = loaded
    if _shapes(arrays) != _shapes(_arrays(like, like_store)):
      raise CheckpointError(
        f"checkpoint {path} is of another model or optimiser than this config; "
        "use the config it was made with or another --workdir"
      )
    opt_state = jax.tree.unflatten(
      jax.tree.structure(like.opt_state), _to_device(arrays["opt_state"])
    )
    state = TrainState(
      params=_to_device(arrays["params"]),
      opt_state=opt_state,
      step=_to_device(arrays["step"]),
      key=jax.random.wrap_key_data(_to_device(arrays["key"])),
    )
    return state, arrays["store"], cursor


def load_params(path: pathlib.Path) -> Any:
  """The parameters in one checkpoint, of any run; raises CheckpointError where it is damaged."""
  loaded = _load(path)
  if isinstance(loaded, str):
    raise CheckpointError(f"checkpoint {path} is damaged ({loaded}); begin from another one")
  return loaded[0]["params"]


def _load(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]] | str:
  """Arrays and cursor of a checkpoint, or in one line why it is damaged."""
  damage = ""
  # Of a damaged checkpoint orbax leaves coroutines behind, which warn when they are freed.
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    try:
      loaded = orbax.load_checkpointables(path)
      arrays, cursor = jax.tree.map(np.asarray, loaded["state"]), dict(loaded["cursor"])
    except Exception as e:  # orbax raises many kinds
      damage = _first_line(e)
    if damage:
      gc.collect()
      return damage
  if tree_sha256(arrays) != cursor.pop("state_sha256", None):
    return "its arrays do not match their hash"
  return arrays, cursor


def _shapes(tree: chex.ArrayTree) -> list[tuple[Any, Any]]:
  return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def _to_device(tree: chex.ArrayTree) -> Any:
  return jax.tree.map(jax.numpy.asarray, tree)


def _first_line(error: Exception) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
