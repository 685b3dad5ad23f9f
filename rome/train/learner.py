"""The two kinds of update of a run, and a row of what was played: for the loop and for replay."""

import dataclasses
from collections.abc import Mapping, Sequence

import chex
import numpy as np

from rome import ipa, models, rollout
from rome.train import start
from rome.train import state as state_lib
from rome.train.config import RunConfig, StageConfig, chunk_slots
from rome.train.nonfinite import blaming
from rome.train.old_policy import old_logps
from rome.train.placement import Placement
from rome.train.play import RL_STREAM, SFT_STREAM
from rome.train.state import TrainState
from rome.train.step import ipa_step, sft_step
from rome.trajectory import Trajectory

Experts = rollout.ExpertStore | rollout.Resampler
Learned = tuple[TrainState, dict[str, float], int]  # next state, metrics, tokens of the batch


class Learner:
  """Packs trajectories and updates states under one run's settings. It has no state of its own.

  Raises:
    ConfigError: the mesh does not fit the devices, or the settings the mesh.
  """

  def __init__(self, config: RunConfig, timeline: rollout.Timeline = rollout.NO_TIMELINE):
    start.check_trains(config)
    self.config, self.model = config, start.model_of(config)
    self.placement = Placement(config, self.model)
    self._estimator = start.estimator_of(config)
    self._router_loss = models.RouterLoss(
      balance=config.router_balance_weight, z=config.router_z_weight
    )
    self._sft, self._rl = map(state_lib.make_optimizer, (config.sft, config.rl))
    self._pad, self._timeline = rollout.policy_tokenizer().pad, timeline

  def fresh(self) -> TrainState:
    """A state of the run's structure, with random weights."""
    return self.placement.lay_out(
      lambda: state_lib.init_state(
        self.model, self._sft, self.config.seed, adapters=self.config.lora
      )
    )

  def begin(self) -> TrainState:
    """The state that a run begins with: random weights, or those of `init_from`."""
    if not self.config.init_from:
      return self.fresh()
    params = start.load_params(self.config)
    return self.placement.lay_out(
      lambda p: state_lib.init_state(self.model, self._sft, self.config.seed, p, self.config.lora),
      params,
    )

  def reinforcing(self, state: TrainState) -> TrainState:
    """The same weights at the beginning of reinforcement learning."""
    return self.placement.lay_out(lambda s: state_lib.restart_optimizer(s, self._rl), state)

  def imitate(self, state: TrainState, demos: Sequence[Trajectory], step: int) -> Learned:
    """Update `step` of the warm start: a batch of `demos` without replacement.

    The choice is a function of (seed, step) alone.
    """
    config = self.config.sft
    rng = np.random.default_rng((self.config.seed, SFT_STREAM, step))
    chosen = [demos[i] for i in rng.choice(len(demos), min(config.batch, len(demos)), False)]
    batch = self._pack([], chosen, step, config)
    with blaming(batch, chosen), self._timeline.stage("update"), self.placement.use():
      state, learned = sft_step(
        state,
        batch,
        config=self.model,
        optimizer=self._sft,
        micro_rows=config.micro_rows,
        router_loss=self._router_loss,
      )
    return state, learned | {"occupancy": rollout.occupancy(batch)}, _tokens(batch)

  def choose(
    self, store: Experts, step: int, trajectories: Sequence[Trajectory]
  ) -> list[Trajectory]:
    """The experts that update `step` imitates beside what was played for it.

    A function of the store and the batch, or of the seed, the step and the store.
    """
    most = self.config.experts.batch
    if isinstance(store, rollout.Resampler):
      return store.imitated(trajectories, most)
    return store.sample(np.random.default_rng((self.config.seed, RL_STREAM, step)), most)

  def reinforce(
    self,
    state: TrainState,
    trajectories: Sequence[Trajectory],
    experts: Sequence[Trajectory],
    step: int,
    kept: Mapping[int, chex.ArrayTree] | None = None,
  ) -> Learned:
    """Update `step` of reinforcement learning: IPA on trajectories, imitation of experts.

    Args:
      kept: weights by version, for the old log-probs; None where those of `state` are the old ones.
    """
    config = self.config.rl
    batch = self._pack(
      trajectories, experts, step, config, share_rows=self.config.numerics == "fast"
    )
    if kept is not None:
      with self._timeline.stage("score"), self.placement.use():
        old = old_logps(kept, batch, self.model, self.config.sampling, config.micro_rows)
      batch = dataclasses.replace(batch, old_logp=old)
    blamed = blaming(batch, [*trajectories, *experts])
    with blamed, self._timeline.stage("update"), self.placement.use():
      state, learned = ipa_step(
        state,
        batch,
        config=self.model,
        sampling=self.config.sampling,
        ipa_config=self.config.ipa,
        optimizer=self._rl,
        micro_rows=config.micro_rows,
        num_trajectories=config.batch + self.config.experts.batch,
        router_loss=self._router_loss,
        estimator=self._estimator,
        numerics=self.config.numerics,
      )
    return state, learned | {"occupancy": rollout.occupancy(batch)}, _tokens(batch)

  def place(self, step: int, store: Experts) -> dict[str, float]:
    """Metrics of where update `step` stands in the run: learning rate, and experts after it."""
    rate = float(state_lib.learning_rate(self.config.rl, step))
    return {"lr": rate, "experts": len(store)}

  def _pack(
    self,
    trajectories: Sequence[Trajectory],
    experts: Sequence[Trajectory],
    step: int,
    config: StageConfig,
    share_rows: bool = True,
  ) -> ipa.ChunkBatch:
    with self._timeline.stage("pack"):
      return rollout.pack(
        trajectories,
        self.config.ipa,
        step,
        row_length=self.config.row_length,
        max_chunks=chunk_slots(self.config.row_length),
        rows_multiple=config.micro_rows,
        pad=self._pad,
        experts=experts,
        share_rows=share_rows,
      )


def _tokens(batch: ipa.ChunkBatch) -> int:
  return int((batch.segment_ids > 0).sum())


def _mean(xs: Sequence[float]) -> float | None:
  return float(np.mean(xs)) if xs else None


def rollout_row(
  trajectories: Sequence[Trajectory], stats: rollout.RolloutStats, step: int
) -> dict[str, float | None]:
  """Metrics of what was played for update `step`; None where there is nothing to average."""
  # Versions of the weights between that which sampled a chunk and that which learns from it.
  staleness = [step - int(version) for t in trajectories for version in t.versions]
  lengths = {
    sign: [float((t.call_ids >= 0).sum()) / t.num_chunks for t in trajectories if t.success == sign]
    for sign in (True, False)
  }
  lost = len(stats.invalid)
  row = {
    "success": _mean([t.success for t in trajectories]),
    "reply_length": _mean(lengths[True] + lengths[False]),
    "reply_length_positive": _mean(lengths[True]),
    "reply_length_negative": _mean(lengths[False]),
    "chunks_per_episode": _mean([t.num_chunks for t in trajectories]),
    "rows_per_episode": _mean([len(t.row_starts) for t in trajectories]),
    # Of all that finished: where groups are filtered, the batch itself is the harder part.
    "played_success": stats.succeeded / max(stats.finished, 1),
    "invalid": lost,
    "filtered": stats.filtered,
    "redundant": stats.redundant,
    "divergent": stats.divergent,
    "dropped": stats.dropped,
    "staleness": _mean(staleness),
    "staleness_max": max(staleness, default=None),
    "retries": stats.retries,
    "silent": stats.silent,
    # Of the context tokens of all calls, those whose keys and values were known already.
    "cached_share": stats.cached_tokens / max(stats.cached_tokens + stats.prefilled_tokens, 1),
    "invalid_share": lost / max(lost + stats.finished, 1),
    "filtered_share": stats.filtered / max(stats.instances, 1),
  }
  for family in sorted({t.family for t in trajectories}):
    row[f"success_{family}"] = _mean([t.success for t in trajectories if t.family == family])
  return row
