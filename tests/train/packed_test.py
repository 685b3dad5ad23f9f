"""What packing may not change, through the model: losses, gradients, and what is compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rome import ipa, models
from rome.rollout import pack
from rome.train import state as state_lib
from rome.train.config import StageConfig
from rome.train.step import ipa_step, sft_step
from rome.trajectory import Valid
from tests.trajectories import make

pytestmark = pytest.mark.slow

CONFIG = models.PRESETS["micro"]
ALL_TERMS = ipa.IPAConfig(
  failure_reward=-1.0, centre="group", normaliser="trajectory_mean", lambda_il=0.7, kl_weight=0.1,
  entropy_weight=0.05, mask_upper=1.05,
)  # fmt: skip
STAGE = StageConfig(steps=9, batch=6, learning_rate=1e-3, warmup=0)
EPISODES, EXPERTS = 8, 4


def episodes(seed, longest=9):
  """Two groups of random episodes, and experts."""
  rng = np.random.default_rng(seed)

  def one(n):
    chunks = [tuple(map(int, rng.integers(1, longest, 2))) for _ in range(rng.integers(1, 5))]
    reward, logp = Valid(float(rng.random() < 0.5)), float(rng.uniform(-5.7, -5.3))
    return make(f"t{n % 2}#{n}", chunks, reward, logp=logp, task=f"t{n % 2}")

  made = [one(n) for n in range(EPISODES + EXPERTS)]
  return made[:EPISODES], made[EPISODES:]


def packed(trajectories, experts, **settings):
  shape = {"row_length": 64, "max_chunks": 8, "rows_multiple": 4, "pad": 0}
  return pack(trajectories, ALL_TERMS, 0, experts=experts, **(shape | settings))


@jax.jit
def loss_and_gradient(params, batch):
  """Of the whole batch, with a reference policy that differs from token to token."""
  noise = jnp.sin(batch.tokens + 3.0 * batch.positions)
  old, ref = batch.behavior_logp + 0.1 * noise, batch.behavior_logp - 0.2 * noise
  batch = dataclasses.replace(batch, old_logp=old, ref_logp=ref)

  def loss(params):
    arrays = batch.tokens, batch.segment_ids, batch.positions
    hidden, _ = models.hidden_states(CONFIG, params, *arrays)
    kernel = models.head_kernel(CONFIG, params)
    tied = CONFIG.tie_word_embeddings
    logp, entropy = models.head_logps(hidden, kernel, batch.tokens, models.Sampling(), tied)
    return ipa.ipa_loss(logp, batch, ALL_TERMS, None, entropy)

  return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.mark.parametrize("seed", range(4))
def test_packed_rows_have_the_loss_and_the_gradient_of_separate_rows(seed):
  params = state_lib.init_state(CONFIG, state_lib.make_optimizer(STAGE), seed).params
  trajectories = episodes(seed)
  shared, alone = packed(*trajectories), packed(*trajectories, share_rows=False)
  assert len(shared.tokens) < len(alone.tokens) == EPISODES + EXPERTS
  (loss, metrics), gradient = loss_and_gradient(params, shared)
  (want, expected), separate = loss_and_gradient(params, alone)
  assert 0 < metrics["masked_share"] < 1 and metrics["il_tokens"] > 0  # no term is idle
  assert metrics["loss_regulariser"] != 0
  assert float(loss) == pytest.approx(float(want), rel=1e-6)
  assert metrics.keys() == expected.keys()
  differences = jax.tree.map(jnp.subtract, gradient, separate)
  assert 0 < optax.tree.norm(differences) <= 1e-6 * optax.tree.norm(separate)


def several_rows(seed):
  """Episodes and experts, each of whose contexts begins anew at places of its own."""
  rng = np.random.default_rng(seed)

  def cut(t):
    starts = [int(np.argmax(t.call_ids == k)) for k in range(1, t.num_chunks)]
    starts = [s - int(t.call_ids[s - 1] < 0) for s in starts]  # one token of context
    kept = [s for s in starts if rng.random() < 0.6]
    return dataclasses.replace(t, row_starts=(0, *kept))

  played, experts = episodes(seed)
  return [cut(t) for t in played], [cut(t) for t in experts]


def in_pieces(played, experts):
  """Every row as a trajectory of its own, with the returns of the whole: what packing makes."""
  whole = packed(
    *([dataclasses.replace(t, row_starts=(0,)) for t in part] for part in (played, experts)),
    share_rows=False, row_length=128,
  )  # fmt: skip
  pieces, where = ([], []), []
  for n, t in enumerate([*played, *experts]):
    for row in t.rows:
      calls = t.call_ids[row.tokens]
      piece = dataclasses.replace(
        t, id=f"{t.id}/{row.tokens.start}", tokens=t.tokens[row.tokens], row_starts=(0,),
        call_ids=np.where(calls >= 0, calls - row.chunks.start, -1).astype(np.int32),
        logps=t.logps[row.tokens], versions=t.versions[row.chunks],
        chunk_rewards=t.chunk_rewards[row.chunks], turns=(),
      )  # fmt: skip
      pieces[n >= len(played)].append(piece)
      where.append((n, row.chunks))
  batch = packed(*pieces, share_rows=False)
  for i, (n, chunks) in enumerate(where):
    k = chunks.stop - chunks.start
    batch.returns[i, :k] = whole.returns[n, chunks]
    batch.trajectory_ids[i, :k], batch.positive[i, :k] = n, whole.positive[n, 0]
  return batch


@pytest.mark.parametrize("seed", [0, 5])  # of the same shapes: one program more
def test_a_trajectory_of_several_rows_has_the_loss_and_the_gradient_of_its_rows_apart(seed):
  params = state_lib.init_state(CONFIG, state_lib.make_optimizer(STAGE), seed).params
  trajectories = several_rows(seed)
  assert max(len(t.rows) for t in trajectories[0]) > 2 < max(len(t.rows) for t in trajectories[1])
  shared, alone = packed(*trajectories), in_pieces(*trajectories)
  assert len(shared.tokens) < len(alone.tokens)
  (loss, metrics), gradient = loss_and_gradient(params, shared)
  (want, expected), separate = loss_and_gradient(params, alone)
  assert metrics["il_tokens"] > 0 and metrics["loss_regulariser"] != 0
  assert metrics["tokens"] == sum((t.call_ids >= 0).sum() for t in trajectories[0])
  assert float(loss) == pytest.approx(float(want), rel=1e-6)
  assert metrics.keys() == expected.keys()
  differences = jax.tree.map(jnp.subtract, gradient, separate)
  assert 0 < optax.tree.norm(differences) <= 1e-6 * optax.tree.norm(separate)


def test_a_ratio_a_trajectory_is_over_all_its_rows():
  """Whatever the micro-batch; where a trajectory is cut by one, this gives NaN."""
  played, _ = several_rows(0)
  config = ipa.IPAConfig(normaliser="trajectory_mean", centre="group", lambda_il=0.0)
  batch = packed(played, [], row_length=40, rows_multiple=3)
  assert len(batch.tokens) == 9
  noise = jnp.sin(batch.tokens + 3.0 * batch.positions)
  batch = dataclasses.replace(batch, old_logp=np.asarray(batch.behavior_logp + 0.1 * noise))
  logp = np.asarray(batch.behavior_logp - 0.05 * noise)
  totals = ipa.loss_totals(batch, EPISODES)
  estimator = jax.jit(ipa.topr, static_argnums=2)
  want, _ = estimator(logp, batch, config, totals)
  parts = [
    estimator(logp[i : i + 3], jax.tree.map(lambda x, i=i: x[i : i + 3], batch), config, totals)[0]
    for i in range(0, len(logp), 3)
  ]
  assert abs(float(want)) > 1e-3 and float(sum(parts)) == pytest.approx(float(want), rel=1e-5)


def test_nothing_compiles_after_the_first_update():
  """Whatever the lengths, and however many micro-batches they fill."""
  optimizer = state_lib.make_optimizer(STAGE)
  on_policy = dataclasses.replace(ALL_TERMS, kl_weight=0.0)
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
  )
  state, rows, counts = state_lib.init_state(CONFIG, optimizer, 0), [], []
  for step, longest in enumerate([9, 3, 6, 9, 2]):
    before = len(compiled)
    trajectories, experts = episodes(step, longest)
    batch = packed(trajectories, experts, rows_multiple=1)
    state, _ = ipa_step(
      state, batch, config=CONFIG, sampling=models.Sampling(), ipa_config=on_policy,
      optimizer=optimizer, micro_rows=1, num_trajectories=EPISODES + EXPERTS,
    )  # fmt: skip
    demos = packed([], [*trajectories, *experts], rows_multiple=1)
    state, _ = sft_step(state, demos, config=CONFIG, optimizer=optimizer, micro_rows=1)
    rows.append(len(batch.tokens))
    counts.append(len(compiled) - before)
  assert len(set(rows)) > 2 and counts[0] > 0, (rows, counts)
  assert counts[1:] == [0] * 4
