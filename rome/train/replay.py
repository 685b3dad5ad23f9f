"""`rome replay WORKDIR --step K`: makes update K of a run again and compares it bit for bit.

Takes the newest checkpoint before K (or the initial state, where retention left none), applies the
recorded updates up to K, asks the engine again for every recorded chunk of K, packs, scores and
updates. No environment is needed. Step K is the update whose row in metrics.jsonl has "step": K.

Bit for bit are metrics on CPUs, and tokens and log-probs with the engine's backends "native" (CPUs)
and "exact". Elsewhere numbers are compared up to rounding (`ROUNDING`), and a draw that falls
within rounding of a boundary shows as a difference. What the clock measured is not compared. What
counts environments (retries, say) rests on recorded counts.
"""

import argparse
import dataclasses
import json
import logging
import math
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from rome import rollout
from rome.rollout import Reply
from rome.train import metrics, record
from rome.train.checkpoints import CheckpointError, Checkpoints
from rome.train.config import ConfigError
from rome.train.learner import Learner, rollout_row
from rome.train.play import RL_STREAM, make_engine, make_experts
from rome.train.start import read_config
from rome.train.state import TrainState
from rome.trajectory import Trajectory

ROUNDING = 1e-3  # nats of log-probs; relative, of metrics
_ERRORS = (
  CheckpointError,
  ConfigError,
  rollout.CustomError,
  metrics.JsonlError,
  record.RecordError,
  FloatingPointError,
)


@dataclasses.dataclass
class Line:
  """One line of the table: how many were compared, how many differ, the first of these in words."""

  what: str
  compared: int = 0
  differing: int = 0
  first: str = ""

  def add(self, count: int, differences: Sequence[str]) -> None:
    self.compared += count
    self.differing += len(differences)
    self.first = self.first or (differences[0] if differences else "")


class Replay:
  """Replays updates of the run in `workdir`, which it only reads.

  Raises:
    ConfigError: the directory holds no run, or its settings cannot be used.
  """

  def __init__(self, workdir: pathlib.Path):
    self.workdir, self.config = workdir, read_config(workdir)
    if self.config.rl.max_staleness:
      raise ConfigError(
        f"{workdir} was trained with config.rl.max_staleness={self.config.rl.max_staleness}: one "
        "reply of a batch may be of other weights than the next, so it cannot be asked for again; "
        "only runs with rl.max_staleness=0 can be replayed"
      )
    self._updates = record.Updates(workdir, self.config)
    self._checkpoints = Checkpoints(workdir, self.config.keep_checkpoints)
    self._learner = Learner(self.config)
    if self._learner.placement.mesh:
      raise ConfigError(
        f"{workdir} was trained last with config.mesh over several devices; replay is for one"
      )
    self._store = make_experts(self.config)

  def run(
    self, step: int, say: Callable[[str], None]
  ) -> tuple[list[Line], dict[str, Any], list[str]]:
    """Makes update `step` again.

    Args:
      step: from 1.
      say: takes lines about the way there.
    Returns:
      The table, the metrics that came out, and names of metrics that no replay can make.
    Raises:
      RecordError: what it needs is missing, damaged, or of something else.
      CheckpointError: the checkpoint to start from is damaged.
      JsonlError: metrics.jsonl is damaged.
      FloatingPointError: the recorded batch gives numbers that are not finite.
    """
    update = self._last(step)
    if update.origin["jax"] != jax.__version__:
      say(f"recorded under jax {update.origin['jax']}, replayed under {jax.__version__}")
    way = Line("updates before")
    state = self._begin(step, say, way)
    lines = [way, *self._generation(state, update, step)]
    row = self._learn(state, update, step, lines[-1])[1]
    recorded = Line("metrics (record)")
    recorded.add(*self._metrics(row, update.row, f"update {step}"))
    lines.append(recorded)
    for logged in metrics.read_jsonl(self.workdir / "metrics.jsonl"):
      if (logged.get("phase"), logged.get("step")) == ("rl", step):
        lines.append(Line("metrics.jsonl"))
        lines[-1].add(*self._metrics(row, logged, f"update {step}"))
    return lines, row, [name for name in update.row if name not in row]

  def _last(self, step: int) -> record.Update:
    steps = self._updates.steps()
    if step not in steps:
      here = f"updates {steps[0]} to {steps[-1]} have one" if steps else "this run has none"
      raise record.RecordError(f"no record of update {step} in {self._updates.directory}: {here}")
    return self._updates.read(step)

  def _begin(self, step: int, say: Callable[[str], None], way: Line) -> TrainState:
    """The state before update `step`."""
    seen = {n: record.update_of(n, self.config) for n in self._checkpoints.steps()}
    usable = [number for number, updates in seen.items() if 0 <= updates < step]
    first = seen[usable[-1]] + 1 if usable else 1
    missing = sorted(set(range(first, step)) - set(self._updates.steps()))
    if missing:
      start = f"checkpoint {usable[-1]}" if usable else "the initial state"
      raise record.RecordError(
        f"update {step} follows from {start} and the updates from {first} on, and the record of "
        f"update {missing[0]} is gone{self._replayable(seen)}"
      )
    before = step - first
    if usable:
      say(f"from checkpoint {usable[-1]} (update {first - 1}), {before} recorded updates on")
      found = self._checkpoints.restore(self._learner.fresh(), self._store.arrays(), usable[-1])
      assert found is not None
      state, arrays, _ = found
      self._store.load(arrays)
    else:
      demos = self._updates.read_demonstrations()
      supervised = self.config.sft.steps
      say(
        f"no checkpoint before update {step} is left: from the initial state, {supervised} updates "
        f"of warm start and {before} recorded updates on; about as long as the run trained for them"
      )
      state = self._learner.begin()
      for k in self._bar(range(supervised), "warm start"):
        state, _, _ = self._learner.imitate(state, demos, k)
      state = self._learner.reinforcing(state)
      self._store.add(demos)
    for k in self._bar(range(first, step), "IPA"):
      state, _ = self._learn(state, self._updates.read(k), k, way, compare=True)
    return state

  def _replayable(self, seen: dict[int, int]) -> str:
    steps, starts = self._updates.steps(), [u for u in seen.values() if u >= 0]
    later = [s for s in steps if starts and s > min(starts)]
    return f"; updates {later[0]} to {later[-1]} can be replayed" if later else ""

  def _bar(self, steps: range, what: str) -> Any:
    return tqdm(steps, desc=what, unit="update", leave=False, disable=not steps or None)

  def _learn(
    self, state: TrainState, update: record.Update, step: int, line: Line, compare: bool = False
  ) -> tuple[TrainState, dict[str, Any]]:
    """Applies a recorded update: the next state, and its row without what the clock measured.

    The experts are chosen again and compared, to `line`; with `compare` the row is, too.
    """
    experts = self._learner.choose(self._store, step - 1, update.trajectories)
    ids, digest = record.fingerprint(experts)
    wanted, recorded = update.experts
    pairs = zip(ids, wanted, strict=False)
    wrong = [f"{b} was recorded, {a} is chosen" for a, b in pairs if a != b]
    if not wrong and (len(ids) != len(wanted) or digest != recorded):
      wrong = ["other tokens than were recorded"]
    wrong = [f"update {step}, experts: {words}" for words in wrong]
    line.add(0 if compare else len(wanted), [] if compare else wrong)
    try:
      state, learned, _ = self._learner.reinforce(state, update.trajectories, experts, step - 1)
    except ValueError as error:
      raise record.RecordError(f"{self._updates.path(step)} cannot be packed: {error}") from None
    self._store.add(update.trajectories)
    row = learned | rollout_row(update.trajectories, update.stats, step - 1)
    row |= rollout.tool_use(update.trajectories, rollout.policy_tokenizer())
    row = record.plain(
      row | self._learner.place(step - 1, self._store) | self._store.row(update.trajectories)
    )
    if compare:
      differing = wrong or self._metrics(row, update.row, f"update {step}")[1]
      line.add(1, differing[:1])
    return state, row

  def _generation(self, state: TrainState, update: record.Update, step: int) -> list[Line]:
    """Asks the engine again; the last line is still empty, for the experts."""
    tokens, logps = Line("tokens"), Line("log-probs")
    try:
      replies = rollout.ask_again(
        make_engine(self.config, self._learner.model),
        state.params,
        jax.random.fold_in(state.key, RL_STREAM),
        update.trajectories,
        self.config.sampling,
        self.config.agent.max_reply,
      )
    except ValueError as error:
      raise record.RecordError(
        f"{self._updates.path(step)} holds what the engine cannot have been asked: {error}"
      ) from None
    rounding = ROUNDING if update.origin["engine"] == "xla" else 0.0
    for trajectory, chunks in zip(update.trajectories, replies, strict=True):
      for k, reply in enumerate(chunks):
        _chunk(trajectory, k, reply, tokens, logps, rounding)
    return [tokens, logps, Line("experts")]

  def _metrics(
    self, row: dict[str, Any], wanted: dict[str, Any], where: str
  ) -> tuple[int, list[str]]:
    """How many metrics a replay derives, and which differ from what was written."""
    exact = jax.default_backend() == "cpu"

    def same(a: Any, b: Any) -> bool:
      if exact or not (metrics.is_number(a) and metrics.is_number(b)):
        return json.dumps(a) == json.dumps(b)
      return math.isclose(a, b, rel_tol=ROUNDING, abs_tol=ROUNDING)

    return len(row), [
      f"{where}, {name}: {wanted.get(name, 'nothing')!r} was written, {value!r} comes out"
      for name, value in row.items()
      if not same(value, wanted.get(name))
    ]


def _chunk(
  trajectory: Trajectory, k: int, reply: Reply, tokens: Line, logps: Line, rounding: float
) -> None:
  """Compares one reply with the recorded chunk k."""
  at = trajectory.call_ids == k
  old, new = trajectory.tokens[at], np.array(reply.tokens, np.int32)
  where = f"{trajectory.id}, call {k}"
  n = min(len(old), len(new))
  wrong = [
    f"{where}, token {i}: {old[i]} was recorded, {new[i]} is drawn"
    for i in np.flatnonzero(old[:n] != new[:n])
  ]
  if len(old) != len(new):
    wrong.append(f"{where}: {len(old)} tokens were recorded, {len(new)} are drawn")
  tokens.add(len(old), wrong)
  was, now = trajectory.logps[at][:n], np.array(reply.logps, np.float32)[:n]
  differ = was.view(np.uint32) != now.view(np.uint32)
  if rounding:
    differ &= ~(np.abs(was - now) <= rounding)
  logps.add(
    n,
    [
      f"{where}, token {i}: {was[i]:.9g} was recorded, {now[i]:.9g} comes out"
      for i in np.flatnonzero(differ)
    ],
  )


def main(argv: Sequence[str] | None = None) -> int:
  """Runs `rome replay ...`: 0 all the same, 1 something differs, 2 bad input (one line), 130."""
  parser = argparse.ArgumentParser(
    prog="rome replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("workdir", type=pathlib.Path, help="directory of the run")
  parser.add_argument("--step", type=int, required=True, help="update of reinforcement learning")
  arguments = parser.parse_args(argv)
  logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax tells every failure before it raises
  jax.config.update("jax_cpu_enable_async_dispatch", False)  # as runs do: less memory
  started = time.monotonic()
  try:
    lines, row, left_out = Replay(arguments.workdir).run(arguments.step, tqdm.write)
  except (*_ERRORS, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    return 130
  print(f"update {arguments.step}: loss {row['loss']!r}, gradient norm {row['grad_norm']!r}")
  print(f"{'':18}{'compared':>10}{'differing':>11}  first difference")
  for line in lines:
    print(f"{line.what:18}{line.compared:>10}{line.differing:>11}  {line.first or '-'}")
  differing = sum(line.differing for line in lines)
  verdict = f"{differing} differences" if differing else "everything is the same"
  print(f"not compared, of the clock: {', '.join(left_out)}")
  print(f"{verdict}; {time.monotonic() - started:.1f} s")
  return 1 if differing else 0


if __name__ == "__main__":
  sys.exit(main())
