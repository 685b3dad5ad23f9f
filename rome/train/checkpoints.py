"""Checkpoints by orbax: the state and the run's cursor as one atomic directory.

That of one step is `checkpoints/STEP`. A thread of its own hashes the arrays, has orbax write them
into a temporary directory that is renamed, reads the result back and only then drops older ones; a
kill at any moment leaves the earlier ones. A hash of every array travels in the cursor. What does
not match it is refused; a run that goes on sets it aside and takes the checkpoint before.

Choice: a thread around orbax's plain save instead of its asynchronous one, because the hash is part
of what is written, and room, hash, reading back and retention cost the run time as well.

Several processes save and load together, each the parts that it holds, and the first does what is
done once. Choice: they save in the loop, without the thread, because hash and orbax use collectives
that must not overlap those of an update. What was saved under one mesh comes back under any.

Left out for now: a place other than the work directory.
"""

import concurrent.futures
import contextlib
import copy
import errno
import gc
import hashlib
import itertools
import os
import pathlib
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import chex
import jax
import numpy as np
from orbax.checkpoint.experimental import v1 as orbax

from rome.train import processes
from rome.train.placement import at_hand, put_like, whole
from rome.train.state import TrainState

_UNFINISHED = ".orbax-checkpoint-tmp"  # in the names that orbax writes under
_REMOVED = ".removed"
# Errors that say nothing of the checkpoint.
_OF_THE_MACHINE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM)
_LATE = 0.2  # seconds in which reads of a damaged checkpoint end


class CheckpointError(RuntimeError):
  """A checkpoint cannot be written or read; the message says which one and what to do."""


class DamagedCheckpoint(CheckpointError):
  """It cannot be read, or is not what was written."""

  def __init__(self, path: pathlib.Path, why: str, mend: str):
    super().__init__(f"checkpoint {path} is damaged ({why}); {mend}")
    self.path, self.why = path, why


def tree_sha256(tree: chex.ArrayTree) -> str:
  """Hash of every array's path, type, shape and bytes."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    array = whole(leaf)
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
  """The checkpoints of one run. One save is under way at a time; `close` waits for it.

  Args:
    workdir: the run's directory.
    keep: the newest ones that stay.
  """

  def __init__(self, workdir: str | os.PathLike, keep: int):
    self.directory = pathlib.Path(workdir).absolute() / "checkpoints"
    self._keep = keep
    self._writer = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
    self._under_way: concurrent.futures.Future | None = None

  def steps(self) -> list[int]:
    """Steps that have a finished checkpoint, ascending."""
    if not self.directory.is_dir():
      return []
    return sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdigit())

  def path(self, step: int) -> pathlib.Path:
    return self.directory / str(step)

  def save(
    self, step: int, state: TrainState, store: Mapping[str, np.ndarray], cursor: dict[str, Any]
  ) -> None:
    """Starts to write the checkpoint of `step`, after the one before is complete.

    Everything is copied first, so the caller may change or donate it at once. Older checkpoints
    beyond `keep` go once the new one has been read back.

    Args:
      step: number that orders the checkpoints; one that a run has not saved yet.
      state: the training state.
      store: arrays of the expert store.
      cursor: what else the run needs to go on, as JSON values.
    Raises:
      CheckpointError: as `wait`, of the one before.
    """
    self.wait()
    if jax.process_count() > 1:
      self._write(self.path(step), jax.tree.map(at_hand, _arrays(state, store)), cursor)
      return
    arrays = jax.tree.map(lambda x: np.array(x, copy=True), _arrays(state, store))
    self._under_way = self._writer.submit(
      self._write, self.path(step), arrays, copy.deepcopy(cursor)
    )

  def wait(self) -> None:
    """Returns when what was saved is complete.

    Raises:
      CheckpointError: it could not be written; earlier ones are intact.
    """
    if self._under_way is not None:
      concurrent.futures.wait([self._under_way])  # interrupted, it can be called again
      done, self._under_way = self._under_way, None
      done.result()

  def check(self) -> None:
    """Raises what `wait` would, if that is known already; does not wait."""
    if self._under_way is not None and self._under_way.done():
      self.wait()

  def close(self) -> None:
    """Waits, and ends the writer; raises as `wait`."""
    try:
      self.wait()
    finally:
      self._writer.shutdown()

  def _write(self, path: pathlib.Path, arrays: dict[str, Any], cursor: dict[str, Any]) -> None:
    cursor = cursor | {"state_sha256": tree_sha256(arrays)}
    try:
      if processes.leads():
        self._make_room(sum(x.nbytes for x in jax.tree.leaves(arrays)))
      orbax.save_checkpointables(
        path,
        {"state": arrays, "cursor": cursor},
        overwrite=True,
      )
      found = _load(path)
      if isinstance(found, str):
        aside = _set_aside(path)
        raise CheckpointError(
          f"checkpoint {path} does not read back as it was written ({found}) and is now {aside}; "
          "look after the disk or choose another --workdir. Earlier checkpoints are intact"
        )
      if processes.leads():
        for old in self.steps()[: -self._keep]:
          # Renamed first: a kill must not leave half of one under the name of a whole one.
          self.path(old).rename(self.path(old).with_suffix(_REMOVED))
      self._clear()
    except (OSError, ValueError) as e:
      self._clear()
      raise CheckpointError(
        f"checkpoint {path} could not be written ({_first_line(e)}); free disk space in "
        f"{self.directory} or choose another --workdir. Earlier checkpoints are intact"
      ) from e

  def _clear(self) -> None:
    """Removes what saves left that were killed or failed, and what retention dropped."""
    if not processes.leads():
      return
    with contextlib.suppress(OSError):
      for path in self.directory.iterdir():
        if _UNFINISHED in path.name or path.suffix == _REMOVED:
          shutil.rmtree(path, ignore_errors=True)

  def _make_room(self, size: int) -> None:
    """Raises OSError where `size` bytes cannot be written: orbax would wait for minutes, or fail in
    many threads at once, each with a traceback."""
    self.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=self.directory) as file:
      os.posix_fallocate(file.fileno(), 0, size)

  def size(self) -> int:
    """Bytes of all that are finished."""
    files = (p for step in self.steps() for p in self.path(step).rglob("*") if p.is_file())
    return sum(p.stat().st_size for p in files)

  def resume(
    self,
    like: TrainState,
    like_store: Mapping[str, np.ndarray],
    warn: Callable[[str], None],
  ) -> tuple[TrainState, dict[str, np.ndarray], dict[str, Any]] | None:
    """As `restore`, of the newest one that is whole; damaged newer ones are renamed, not removed.

    Args:
      like: a state of the same structure.
      like_store: a store of the same sizes.
      warn: takes one line for each that is set aside.
    Raises:
      CheckpointError: none is whole, or the newest whole one is of another model; nothing is
        renamed.
    """
    self._clear()
    damaged: list[DamagedCheckpoint] = []
    for step in reversed(self.steps()):
      try:
        found = self.restore(like, like_store, step)
      except DamagedCheckpoint as error:
        damaged.append(error)
        continue
      for each in damaged:
        warn(
          f"checkpoint {each.path} is damaged ({each.why}) and now {_set_aside(each.path)}; "
          f"what was done after checkpoint {step} is done again"
        )
      return found
    if len(damaged) > 1:
      raise DamagedCheckpoint(
        damaged[0].path,
        damaged[0].why,
        f"so are all before it; delete {self.directory} to start afresh",
      )
    if damaged:
      raise damaged[0]
    return None

  def restore(
    self, like: TrainState, like_store: Mapping[str, np.ndarray], step: int | None = None
  ) -> tuple[TrainState, dict[str, np.ndarray], dict[str, Any]] | None:
    """State, expert store and cursor of a checkpoint, or None when there is none.

    Args:
      like: a state of the same structure.
      like_store: a store of the same sizes.
      step: which one of `steps`, None for the newest.
    Raises:
      DamagedCheckpoint: it is damaged.
      CheckpointError: it is of another model.
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
      raise DamagedCheckpoint(path, loaded, mend)
    arrays, cursor = loaded
    wanted = _arrays(like, like_store)
    if other := _other(arrays, wanted):
      raise CheckpointError(
        f"checkpoint {path} is of {other} than this config; "
        "use the config it was made with or another --workdir"
      )
    placed = {
      name: jax.tree.map(put_like, arrays[name], wanted[name])
      for name in ("params", "opt_state", "step", "key")
    }
    state = TrainState(
      params=placed["params"],
      opt_state=jax.tree.unflatten(jax.tree.structure(like.opt_state), placed["opt_state"]),
      step=placed["step"],
      key=jax.random.wrap_key_data(placed["key"]),
    )
    return state, arrays["store"], cursor


def load_params(path: pathlib.Path) -> Any:
  """The parameters in one checkpoint, of any run; raises CheckpointError where it is damaged."""
  loaded = _load(path)
  if isinstance(loaded, str):
    raise CheckpointError(f"checkpoint {path} is damaged ({loaded}); begin from another one")
  return loaded[0]["params"]


def _load(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]] | str:
  """Arrays and cursor of a checkpoint, or in one line why it is damaged.

  Raises:
    CheckpointError: it cannot be read for a reason of the machine's.
  """
  damage = ""
  with _quiet():
    try:
      # As numpy, wherever it lay when it was saved.
      saved = orbax.checkpointables_metadata(path).metadata["state"]
      like = jax.tree.map(lambda m: np.empty(m.shape, m.dtype), saved)
      loaded = orbax.load_checkpointables(path, {"state": like, "cursor": None})
      arrays, cursor = jax.tree.map(np.asarray, loaded["state"]), dict(loaded["cursor"])
    except Exception as e:  # orbax raises many kinds
      if isinstance(e, MemoryError) or getattr(e, "errno", None) in _OF_THE_MACHINE:
        raise CheckpointError(
          f"checkpoint {path} cannot be read now ({_first_line(e)}); mend that and start again"
        ) from e
      damage = _first_line(e)
    if damage:
      gc.collect()
      time.sleep(_LATE)
      return damage
  if tree_sha256(arrays) != cursor.pop("state_sha256", None):
    return "its arrays do not match their hash"
  return arrays, cursor


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps from the user what orbax leaves behind of a damaged checkpoint: coroutines, which warn
  when they are freed, and reads that end after their event loop."""
  hook = sys.unraisablehook

  def pass_over(raised: "sys.UnraisableHookArgs") -> None:
    if "Event loop is closed" not in str(raised.exc_value):
      hook(raised)

  sys.unraisablehook = pass_over
  try:
    with warnings.catch_warnings():
      warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
      yield
  finally:
    sys.unraisablehook = hook


def _set_aside(path: pathlib.Path) -> pathlib.Path:
  """Renames a damaged checkpoint, and returns its new path."""
  if not processes.leads():
    return path  # which the first process renames
  names = (path.with_suffix(f".damaged{n or ''}") for n in itertools.count())
  aside = next(p for p in names if not p.exists())
  return path.rename(aside)


def _other(arrays: dict[str, Any], wanted: dict[str, Any]) -> str:
  """In what a checkpoint differs from what is wanted, for a message; "" where it does not."""
  if arrays["store"].keys() != wanted["store"].keys():
    return "another resampling.mode or an earlier rome (run.json has its commit)"
  names = ("params", "opt_state", "step", "key")
  if any(_shapes(arrays[name]) != _shapes(wanted[name]) for name in names):
    return "another model or optimiser"
  if _shapes(arrays["store"]) != _shapes(wanted["store"]):
    return "another experts.capacity, agent.context or set of tasks"
  return ""


def _shapes(tree: chex.ArrayTree) -> list[tuple[Any, Any]]:
  return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def _first_line(error: Exception) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
