"""What each update trained on, in WORKDIR/updates, so that `rome replay` can make it again.

`updates/000007.npz` is update 7 of reinforcement learning: the trajectories that were played, which
experts were imitated, and its row of metrics. `updates/demonstrations.npz` is what the warm start
learnt from; its batches follow from these and the seed. Where rollout goes on while training does,
`updates/buffer_N.npz` is what checkpoint N found played and not trained on.

A file holds plain arrays (no pickle), one of them a JSON header, with a hash over all; it is
written aside and renamed.

Choice: records stay from the first update on, so that every step can be replayed, as long as they
take no more room than the checkpoints that the run keeps; beyond that, those that no kept
checkpoint needs are dropped. A record takes 2 to 3 bytes a token of its trajectories; log-probs,
4 bytes a sampled token, hardly compress.
"""

import dataclasses
import hashlib
import io
import json
import numbers
import os
import pathlib
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rome import files, rollout
from rome.train import start
from rome.train.checkpoints import tree_sha256
from rome.train.config import MAY_CHANGE, RunConfig
from rome.train.placement import mesh_of
from rome.trajectory import Trajectory, Turn, Valid

FORMAT = 3
_NO_CODE = -(1 << 31)  # of a turn without an exit code
_NAME = re.compile(r"\d{6,}\.npz")
_COUNTS = tuple(f.name for f in dataclasses.fields(rollout.RolloutStats) if f.name != "invalid")


class RecordError(ValueError):
  """A record is missing, damaged or of something else; the message says which and what to do."""


@dataclasses.dataclass(frozen=True)
class Update:
  """The record of one update.

  Attributes:
    trajectories: what was played, in the order of the batch; turns have exit codes alone.
    stats: counts of the rollout; `invalid` stands for as many trajectories as there were.
    experts: ids of the experts imitated, and the hash of their tokens.
    row: the update's metrics, those of the clock too.
    origin: see `origin`.
  """

  trajectories: list[Trajectory]
  stats: rollout.RolloutStats
  experts: tuple[list[str], str]
  row: dict[str, Any]
  origin: dict[str, str]


def origin(config: RunConfig) -> dict[str, str]:
  """What the bits of a run rest on: settings (a hash, those that may change apart), devices,
  engine, jax."""
  settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in MAY_CHANGE}
  device, model = jax.devices()[0], start.model_of(config)
  mesh = mesh_of(config, model)
  layout = "".join(f" {k}={n}" for k, n in mesh.shape.items() if n > 1) if mesh else ""
  return {
    "settings": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
    "device": f"{device.platform} {device.device_kind}{layout}",
    "engine": rollout.backend_name(model, config.numerics),
    "jax": jax.__version__,
  }


def update_of(checkpoint: int, config: RunConfig) -> int:
  """Updates of reinforcement learning that a checkpoint has seen; negative in the warm start."""
  return checkpoint // 2 - config.sft.steps


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
  """Metrics as JSON has them: integers, floats and strings; what was not measured is left out."""
  return {
    name: value if isinstance(value, str) else _number(value)
    for name, value in row.items()
    if value is not None
  }


def _number(value: Any) -> int | float:
  return int(value) if isinstance(value, numbers.Integral) else float(value)


def fingerprint(experts: Sequence[Trajectory]) -> tuple[list[str], str]:
  """Ids of experts, and a hash of their tokens, call ids and rows."""
  parts = [(t.tokens, t.call_ids, np.array(t.row_starts)) for t in experts]
  return [t.id for t in experts], tree_sha256(parts)


class Updates:
  """The records of one run.

  Args:
    workdir: the run's directory.
    config: its settings.
  """

  def __init__(self, workdir: str | os.PathLike, config: RunConfig):
    self.directory = pathlib.Path(workdir) / "updates"
    self._origin = origin(config)

  def path(self, step: int) -> pathlib.Path:
    return self.directory / f"{step:06d}.npz"

  @property
  def demonstrations(self) -> pathlib.Path:
    return self.directory / "demonstrations.npz"

  def steps(self) -> list[int]:
    """Updates that have a record, ascending."""
    if not self.directory.is_dir():
      return []
    return sorted(int(p.stem) for p in self.directory.iterdir() if _NAME.fullmatch(p.name))

  def write(
    self,
    step: int,
    trajectories: Sequence[Trajectory],
    stats: rollout.RolloutStats,
    experts: Sequence[Trajectory],
    row: Mapping[str, Any],
  ) -> None:
    """Records update `step`, the first of which is 1; an earlier record of it is replaced.

    Raises:
      WriteError: it cannot be written.
    """
    header = {
      "stats": {name: getattr(stats, name) for name in _COUNTS} | {"invalid": len(stats.invalid)},
      "experts": fingerprint(experts),
      "row": plain(row),
      "step": step,
    }
    self._write(self.path(step), header, trajectories)

  def write_demonstrations(self, demos: Sequence[Trajectory]) -> None:
    """Records what the warm start learns from."""
    self._write(self.demonstrations, {}, demos)

  def read(self, step: int) -> Update:
    """The record of update `step`.

    Raises:
      RecordError: it is missing, damaged, or of other settings, devices or engines.
    """
    header, trajectories = self._read(self.path(step))
    if header.get("step") != step:
      raise RecordError(f"{self.path(step)} is of another step; give it back its name")
    counts = header["stats"]
    invalid = tuple(trajectories[:1] * counts.pop("invalid"))  # whose number alone is recorded
    stats = rollout.RolloutStats(**counts, invalid=invalid)
    ids, digest = header["experts"]
    return Update(trajectories, stats, (ids, digest), header["row"], header["origin"])

  def read_demonstrations(self) -> list[Trajectory]:
    """What the warm start learnt from; raises as `read` does."""
    return self._read(self.demonstrations)[1]

  def buffer(self, checkpoint: int) -> pathlib.Path:
    """Where the trajectories are that had been played and not trained on at a checkpoint."""
    return self.directory / f"buffer_{checkpoint}.npz"

  def write_buffer(self, checkpoint: int, trajectories: Sequence[Trajectory]) -> None:
    """Records them; raises as `write` does."""
    self._write(self.buffer(checkpoint), {}, trajectories)

  def read_buffer(self, checkpoint: int) -> list[Trajectory]:
    """The inverse of `write_buffer`; raises as `read` does."""
    return self._read(self.buffer(checkpoint))[1]

  def prune_buffers(self, checkpoints: Sequence[int]) -> None:
    """Drops the buffers of all checkpoints but these."""
    kept = set(map(self.buffer, checkpoints))
    for path in set(self.directory.glob("buffer_*.npz")) - kept:
      path.unlink()

  def forget_after(self, step: int) -> None:
    """Drops the records of updates after `step`: a resumed run makes them anew."""
    for later in [s for s in self.steps() if s > step]:
      self.path(later).unlink()

  def prune(self, needed: int, room: int) -> None:
    """Drops the records of updates before `needed` where all together take more than `room` bytes.

    Args:
      needed: the first update that the oldest checkpoint leads to.
      room: bytes.
    """
    steps = self.steps()
    if sum(self.path(step).stat().st_size for step in steps) > room:
      for step in [s for s in steps if s < needed]:
        self.path(step).unlink()

  def _write(
    self, path: pathlib.Path, header: dict[str, Any], trajectories: Sequence[Trajectory]
  ) -> None:
    names = ("id", "task_id", "family", "end_reason", "start", "row_starts")
    header |= {"format": FORMAT, "origin": self._origin}
    header |= {name: [getattr(t, name) for t in trajectories] for name in names}
    text = json.dumps(header, allow_nan=False).encode()
    arrays = {"header": np.frombuffer(text, np.uint8), **_arrays(trajectories)}
    buffer = io.BytesIO()
    digest = np.frombuffer(bytes.fromhex(tree_sha256(arrays)), np.uint8)
    np.savez_compressed(buffer, allow_pickle=False, sha256=digest, **arrays)
    with files.writing(path):
      self.directory.mkdir(exist_ok=True)
    files.write_atomic(path, buffer.getvalue())

  def _read(self, path: pathlib.Path) -> tuple[dict[str, Any], list[Trajectory]]:
    mend = "train with the same settings in a new --workdir, or replay a step that needs it not"
    try:
      with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as loaded:
        arrays = {name: loaded[name] for name in loaded.files}
      digest = arrays.pop("sha256").tobytes().hex()
      whole = digest == tree_sha256(arrays)
      header = json.loads(arrays.pop("header").tobytes()) if whole else {}
    except FileNotFoundError:
      raise RecordError(f"there is no {path}; {mend}") from None
    except OSError as error:
      raise RecordError(f"{path} cannot be read ({error.strerror or error})") from None
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError):
      whole = False
    if not whole:
      raise RecordError(f"{path} is damaged; {mend}")
    self._check(path, header)
    return header, _trajectories(header, arrays)

  def _check(self, path: pathlib.Path, header: dict[str, Any]) -> None:
    if header["format"] != FORMAT:
      raise RecordError(
        f"{path} has format {header['format']}, this rome reads {FORMAT}; go on with the rome that "
        "wrote it (run.json has its commit), or train in a new --workdir"
      )
    here, there = self._origin, header["origin"]
    if there["settings"] != here["settings"]:
      raise RecordError(
        f"{path} was recorded under other settings than those of config.json beside it; put the "
        "config.json back that the run was made with"
      )
    if there["device"] != here["device"]:
      raise RecordError(
        f"{path} was recorded on {there['device']}, and this is {here['device']}, which rounds "
        "otherwise; replay it on the same kind of device"
      )
    if there["engine"] != here["engine"]:
      raise RecordError(
        f"{path} was recorded with the engine's backend {there['engine']}, which here is "
        f"{here['engine']}; install what the other one needs (BUILD.md)"
      )


def _arrays(trajectories: Sequence[Trajectory]) -> dict[str, np.ndarray]:
  """Trajectories end to end."""

  def joined(parts: Sequence[Any], dtype: Any) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(np.asarray(p, dtype) for p in parts)])

  codes = [
    [_NO_CODE if turn.exit_code is None else turn.exit_code for turn in t.turns]
    for t in trajectories
  ]
  rewards = [t.reward.value if isinstance(t.reward, Valid) else np.nan for t in trajectories]
  return {
    "tokens": joined([t.tokens for t in trajectories], np.int32),
    "call_ids": joined([t.call_ids for t in trajectories], np.int32),
    "logps": joined([t.logps for t in trajectories], np.float32),
    "versions": joined([t.versions for t in trajectories], np.int32),
    "chunk_rewards": joined([t.chunk_rewards for t in trajectories], np.float32),
    "exit_codes": joined(codes, np.int32),
    "rewards": np.array(rewards, np.float64),
    # Tokens, chunks and turns of each.
    "sizes": np.array(
      [(len(t.tokens), t.num_chunks, len(t.turns)) for t in trajectories], np.int32
    ).reshape(-1, 3),
  }


def _trajectories(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> list[Trajectory]:
  """The inverse of `_arrays`."""
  tokens, chunks, turns = (np.cumsum(sizes)[:-1] for sizes in arrays["sizes"].T)
  by = {"tokens": tokens, "call_ids": tokens, "logps": tokens, "versions": chunks}
  by |= {"chunk_rewards": chunks, "exit_codes": turns}
  parts = {name: np.split(arrays[name], bounds) for name, bounds in by.items()}
  return [
    Trajectory(
      id=header["id"][n],
      task_id=header["task_id"][n],
      family=header["family"][n],
      instruction="",
      tokens=parts["tokens"][n],
      call_ids=parts["call_ids"][n],
      logps=parts["logps"][n],
      versions=parts["versions"][n],
      chunk_rewards=parts["chunk_rewards"][n],
      reward=Valid(float(reward)),
      end_reason=header["end_reason"][n],
      start=header["start"][n],
      row_starts=tuple(header["row_starts"][n]),
      turns=tuple(
        Turn("", "", None if code == _NO_CODE else code) for code in parts["exit_codes"][n].tolist()
      ),
    )
    for n, reward in enumerate(arrays["rewards"])
  ]
