"""The two kinds of update of a run, and a row of what was played: for the loop and for replay."""

from collections.abc import Sequence

import numpy as np

from rome import ipa, models, rollout
from rome.train import state as state_lib
from rome.train.config import RunConfig, StageConfig, chunk_slots
from rome.train.nonfinite import blaming
from rome.train.play import RL_STREAM, SFT_STREAM
from rome.train.state import TrainState
from rome.train.step import ipa_step, sft_step
from rome.trajectory import Trajectory

Learned = tuple[TrainState, dict[str, float], int]  # next state, metrics, tokens of the batch


class Learner:
  """Packs trajectories and updates states under one run's settings. It has no state of its own."""

  def __init__(self, config: RunConfig, timeline: rollout.Timeline = rollout.NO_TIMELINE):
    self.config, self.model = config, models.PRESETS[config.model]
    self._router_loss = models.RouterLoss(
      balance=config.router_balance_weight, z=config.router_z_weight
    )
    self._sft, self._rl = map(state_lib.make_optimizer, (config.sft, config.rl))
    self._pad, self._timeline = rollout.policy_tokenizer().pad, timeline

  def fresh(self) -> TrainState:
    """The state that a run begins with."""
    return state_lib.init_state(self.model, self._sft, self.config.seed)

  def reinforcing(self, state: TrainState) -> TrainState:
    """The same weights at the beginning of reinforcement learning."""
    return state_lib.restart_optimizer(state, self._rl)

  def imitate(self, state: TrainState, demos: Sequence[Trajectory], step: int) -> Learned:
    """Update `step` of the warm start: a batch of `demos` without replacement.

    The choice is a function of (seed, step) alone.
    """
    config = self.config.sft
    rng = np.random.default_rng((self.config.seed, SFT_STREAM, step))
    chosen = [demos[i] for i in rng.choice(len(demos), min(config.batch, len(demos)), False)]
    batch = self._pack([], chosen, step, config)
    with blaming(batch, chosen), self._timeline.stage("update"):
      state, learned = sft_step(
        state,
        batch,
        config=self.model,
        optimizer=self._sft,
        micro_rows=config.micro_rows,
        router_loss=self._router_loss,
      )
    return state, learned | {"occupancy": rollout.occupancy(batch)}, _tokens(batch)

  def choose(self, store: rollout.ExpertStore, step: int) -> list[Trajectory]:
    """The experts that update `step` imitates: a function of the seed, the step and the store."""
    rng = np.random.default_rng((self.config.seed, RL_STREAM, step))
    return store.sample(rng, self.config.experts.batch)

  def reinforce(
    self,
    state: TrainState,
    trajectories: Sequence[Trajectory],
    experts: Sequence[Trajectory],
    step: int,
  ) -> Learned:
    """Update `step` of reinforcement learning: IPA on trajectories, imitation of experts."""
    config = self.config.rl
    batch = self._pack(
      trajectories, experts, step, config, share_rows=self.config.numerics == "fast"
    )
    with blaming(batch, [*trajectories, *experts]), self._timeline.stage("update"):
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
        numerics=self.config.numerics,
      )
    return state, learned | {"occupancy": rollout.occupancy(batch)}, _tokens(batch)

  def place(self, step: int, store: rollout.ExpertStore) -> dict[str, float]:
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
  trajectories: Sequence[Trajectory], stats: rollout.RolloutStats
) -> dict[str, float | None]:
  """Metrics of what was played; None where there is nothing to average."""
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
    # Of all that finished: where groups are filtered, the batch itself is the harder part.
    "played_success": stats.succeeded / max(stats.finished, 1),
    "invalid": lost,
    "filtered": stats.filtered,
    "redundant": stats.redundant,
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
