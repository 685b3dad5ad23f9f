"""Chunk-level initialised resampling in a run (section 3.2.4.4, arXiv:2512.24873).

`Resampler` keeps an expert trajectory for each task of a finite training set and says where members
start: "rollback" samples a task's groups from one start, which moves from the expert's last chunk
toward the initial state as the policy masters it; "anchors" spreads the members of a group over the
expert. Experts are the demonstrations at first and then what the policy solves itself, from
wherever it started. What of them is imitated (Eq. 10) follows from where the batch started.

Choice: of an expert whose context was rewritten the first row is kept; starts lie in it, and what
is imitated with them. A start behind it would stand on a context that the agent made of what it
saw.

The rules are `rome.ipa.resampling` and `rome.ipa.experts`; here are the trajectories, the tasks'
names, and one value of arrays that is saved with the run. Everything follows from the trajectories
it is given, so `rome replay` can make it again.
"""

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rome import ipa
from rome.rollout.experts import Shelf
from rome.rollout.groups import Member
from rome.rollout.starts import Start
from rome.trajectory import Trajectory

MODES = ("off", "rollback", "anchors")
_anchor_starts = jax.jit(ipa.anchor_starts, static_argnames="config")
_prefix_mask = jax.jit(ipa.imitation_prefix_mask, static_argnums=2)
_refresh_experts = jax.jit(ipa.refresh_experts)
_rollback_refresh = jax.jit(ipa.rollback_refresh)
_rollback_update = jax.jit(ipa.rollback_update, static_argnames="config")


@dataclasses.dataclass(frozen=True)
class ResamplingConfig(ipa.ResamplingConfig):
  """Where episodes start; the other settings are of `rome.ipa.ResamplingConfig`.

  Attributes:
    mode: "off" (the initial state), "rollback" or "anchors".
  """

  mode: str = "off"

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.mode not in MODES:
      raise ValueError(f"resampling.mode must be one of {', '.join(MODES)}, got {self.mode!r}")


class Resampler:
  """Experts by task, where members start, what is imitated.

  Args:
    config: a mode other than "off".
    tasks: ids of the tasks, in the order in which instances take them in turn.
    context: tokens of the longest trajectory.
    max_chunks: K, chunks of the longest trajectory.
    room: tokens that a reply may take; no start leaves less.
    key: of the run.
  """

  def __init__(
    self,
    config: ResamplingConfig,
    tasks: Sequence[str],
    context: int,
    max_chunks: int,
    room: int,
    key: jax.Array,
  ):
    self._config, self._room, self._max_chunks, self._key = config, room, max_chunks, key
    self._context, self._numbers = context, {task: n for n, task in enumerate(tasks)}
    self._tasks, count = tuple(tasks), len(tasks)
    self._shelf = Shelf(count, context)
    self._added = np.zeros(1, np.int64)
    self._lock = threading.Lock()  # members start in another thread than `add` runs in
    self._experts = jax.device_get(ipa.no_experts(count))
    self._rollback = jax.device_get(ipa.rollback_init(np.zeros(count, np.int32), max_chunks))

  def __len__(self) -> int:
    """Tasks that have an expert."""
    return int((self._experts.expert_ids >= 0).sum())

  # --- where members start ---------------------------------------------------------------------

  def start(self, member: Member) -> Start | None:
    """Where a member begins, None for the initial state; for any thread."""
    with self._lock:
      return self._start(member)

  def _start(self, member: Member) -> Start | None:
    n = member.instance % len(self._tasks)
    chunks = int(self._experts.num_chunks[n])
    if not chunks:
      return None
    if self._config.mode == "rollback":
      at = int(self._rollback.pointer[n])
    else:
      starts = _anchor_starts(
        self._experts.num_chunks[n : n + 1],
        np.array([n], np.int32),
        member.instance // len(self._tasks),
        self._key,
        config=self._config,
      )
      at = int(starts[0, member.sample % self._config.anchors])
    expert = self._expert(n)
    while at and len(Start(expert, at).context) + self._room > self._context:
      at -= 1
    return Start(expert, at) if at else None

  def _expert(self, n: int) -> Trajectory:
    id, version = self._experts.expert_ids[n], int(self._experts.versions[n])
    return self._shelf.get([n], f"expert/{id}", self._tasks[n], version)

  # --- what is imitated ------------------------------------------------------------------------

  def imitated(self, trajectories: Sequence[Trajectory], most: int) -> list[Trajectory]:
    """The experts' chunks that the update on `trajectories` imitates (Eq. 10).

    Of each task of the batch the chunks up to and including the first that its members sampled, the
    latest start counting; later chunks stay in the trajectory as tokens of no call.

    Args:
      trajectories: of the batch, before `add` has seen them.
      most: tasks at most, in their order.
    """
    at: dict[int, int] = {}
    for t in trajectories:
      n = self._numbers[t.task_id]
      at[n] = max(at.get(n, 0), t.start)
    everyone = np.arange(len(self._tasks), dtype=np.int32)
    keep = ipa.imitated_experts(
      everyone,
      np.array([self._numbers[t.task_id] for t in trajectories], np.int32),
      np.array([t.success for t in trajectories]),
      self._config,
    )
    starts = np.array([at.get(n, -1) for n in range(len(self._tasks))], np.int32)
    mask = np.asarray(_prefix_mask(starts, self._experts.num_chunks, self._max_chunks))
    known = (starts >= 0) & (self._experts.expert_ids >= 0) & np.asarray(keep)
    return [_masked(self._expert(n), mask[n]) for n in np.flatnonzero(known)[:most]]

  # --- what was played -------------------------------------------------------------------------

  def add(self, trajectories: Sequence[Trajectory]) -> None:
    """Moves pointers by what a batch earned, and takes its successes as experts.

    Demonstrations are trajectories of version -1: their log-probs are NaN.
    """
    trajectories = [t for t in trajectories if t.task_id in self._numbers]
    if trajectories:
      with self._lock:
        self._add(trajectories)

  def _add(self, trajectories: Sequence[Trajectory]) -> None:
    numbers = np.array([self._numbers[t.task_id] for t in trajectories], np.int32)
    taught = np.array([bool(np.isnan(t.logps).any()) for t in trajectories])
    starts, wins = np.array([(t.start, t.success) for t in trajectories]).T
    self._move(numbers[~taught], starts[~taught], wins[~taught].astype(bool))
    whole = [self._whole(n, t) for n, t in zip(numbers, trajectories, strict=True)]
    everything = [t.start + t.num_chunks for t in trajectories]
    fits = [w is not None and n <= self._max_chunks for w, n in zip(whole, everything, strict=True)]
    chunks = np.array([t.start + t.rows[0].chunks.stop for t in trajectories], np.int32)
    success = wins.astype(bool) & np.array(fits)
    if self._config.mode == "rollback":  # what would lose the pointer
      behind = starts < self._rollback.pointer[numbers]
      success &= ~behind | (self._experts.expert_ids[numbers] < 0)
    versions = np.array(
      [-1 if mine else int(t.versions[0]) for mine, t in zip(taught, trajectories, strict=True)],
      np.int32,
    )
    ids = self._added[0] + np.arange(len(trajectories))
    experts, winner = jax.device_get(
      _refresh_experts(self._experts, numbers, success, ids.astype(np.int32), chunks, versions)
    )
    self._added += len(trajectories)
    replaced = winner >= 0
    shared = np.zeros(len(self._tasks), np.int32)
    for n in np.flatnonzero(replaced).tolist():
      trajectory, parts = trajectories[winner[n]], whole[winner[n]]
      assert parts is not None
      tokens, call_ids = parts
      self._shelf.put(n, tokens, call_ids, everything[winner[n]])
      shared[n] = trajectory.start
    self._experts = experts
    self._rollback = jax.device_get(
      _rollback_refresh(self._rollback, replaced, experts.num_chunks, shared)
    )

  def _move(self, numbers: np.ndarray, starts: np.ndarray, wins: np.ndarray) -> None:
    """One group a task: its members that started at the pointer."""
    here = starts == self._rollback.pointer[numbers]
    attempts, successes = (
      np.bincount(numbers[some], minlength=len(self._tasks)) for some in (here, here & wins)
    )
    self._rollback = jax.device_get(
      _rollback_update(self._rollback, successes, attempts, config=self._config)
    )

  def _whole(self, n: int, t: Trajectory) -> tuple[np.ndarray, np.ndarray] | None:
    """The first row's tokens and call ids, from the initial state on.

    None where the prefix is not the expert's.
    """
    first = t.rows[0].tokens
    tokens, call_ids = t.tokens[first], t.call_ids[first]
    if not t.start:
      return tokens, call_ids
    end = int(np.argmax(t.call_ids == 0))
    expert = self._expert(n)
    if not np.array_equal(expert.tokens[:end], tokens[:end]):
      return None  # the expert was replaced while this one was played
    own = np.where(call_ids >= 0, call_ids + t.start, -1)
    return tokens, np.concatenate([expert.call_ids[:end], own[end:]]).astype(np.int32)

  # --- metrics and checkpoints -----------------------------------------------------------------

  def row(self, trajectories: Sequence[Trajectory]) -> dict[str, float | None]:
    """Metrics of a batch that started here and there, and of the state after it."""
    initial = [t.success for t in trajectories if not t.start]
    known = self._experts.expert_ids >= 0
    tasks: dict[str, list[bool]] = {t.task_id: [] for t in trajectories}
    for t in trajectories:
      tasks[t.task_id].append(t.success)
    return {
      "success_initial": float(np.mean(initial)) if initial else None,
      "success_worst": min(float(np.mean(wins)) for wins in tasks.values()),
      "start": float(np.mean([t.start for t in trajectories])),
      "pointer": float(self._rollback.pointer[known].mean()) if known.any() else None,
      "mastered_share": float(self._rollback.done.mean()),
      "crucial": int(self._rollback.crucial.sum()),
    }

  def arrays(self) -> dict[str, np.ndarray]:
    """All of it; the inverse of `load`."""
    return {
      **self._shelf.arrays(),
      "added": self._added,
      **{f"experts_{k}": np.asarray(v) for k, v in vars(self._experts).items()},
      **{f"rollback_{k}": np.asarray(v) for k, v in vars(self._rollback).items()},
    }

  def load(self, arrays: Mapping[str, np.ndarray]) -> None:
    """Takes over what `arrays` gave, of a resampler of the same sizes."""
    self._shelf.load(arrays)
    self._added = np.array(arrays["added"])

    def of(kind: str, like: Any) -> dict[str, np.ndarray]:
      return {k: np.array(arrays[f"{kind}_{k}"]) for k in vars(like)}

    self._experts = ipa.ExpertState(**of("experts", self._experts))
    self._rollback = ipa.RollbackState(**of("rollback", self._rollback))


def _masked(expert: Trajectory, keep: np.ndarray) -> Trajectory:
  """The expert with only the chunks that `keep` [K] marks; the others' tokens are of no call."""
  kept = (expert.call_ids >= 0) & keep[np.maximum(expert.call_ids, 0)]
  call_ids = np.where(kept, expert.call_ids, -1).astype(np.int32)
  return dataclasses.replace(
    expert, call_ids=call_ids, logps=np.where(kept, np.nan, 0).astype(np.float32)
  )
