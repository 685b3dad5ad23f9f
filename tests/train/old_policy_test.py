"""Old log-probs: each chunk under the weights that sampled it, whatever they are today."""

import dataclasses

import jax
import numpy as np
import pytest

from rome import ipa, models, rollout
from rome.train import config as config_lib
from rome.train.old_policy import KeptWeights, old_logps
from tests.rollout.stream_test import CONFIG, KEY, TURNS, Player, T, Words, task
from tests.train.groups_config_test import rl

SAMPLING = models.Sampling(temperature=0.8)
WEIGHTS = [0.9, 1.0, 1.1]  # versions 4, 5 and 6 are the initial weights times these


def versions():
  made = jax.jit(models.init_params, static_argnums=0)(CONFIG, jax.random.key(0))
  return {4 + k: jax.tree.map(lambda x, by=by: x * by, made) for k, by in enumerate(WEIGHTS)}


@pytest.fixture(scope="module")
def played():
  """Trajectories of three versions, one of them an expert's, packed together."""
  kept, done = versions(), []
  engine = rollout.Engine(CONFIG, slots=4, max_length=192, stop_tokens=(T.end,), steps=4)
  runner = rollout.EpisodeRunner(
    engine,
    lambda one: Player(Words(one, lambda: 0.0), T, "", TURNS),
    SAMPLING,
    max_reply=6,
    invalid_cap=0.0,
  )
  for version, params in kept.items():
    done += runner.run(params, KEY, version, task, 10 * version, 3)[0]
  runner.close()
  last = done[-1]
  expert = dataclasses.replace(last, logps=np.where(last.call_ids >= 0, np.nan, 0))
  batch = rollout.pack(
    done, ipa.IPAConfig(), 6, row_length=192, max_chunks=8, rows_multiple=2, pad=T.pad,
    experts=[expert],
  )  # fmt: skip
  return kept, batch


def test_under_its_own_version_a_chunk_has_the_log_probs_it_was_sampled_with(played):
  kept, batch = played
  old = old_logps(kept, batch, CONFIG, SAMPLING, 2)
  assert old.shape == batch.tokens.shape and old.dtype == np.float32
  imitated = np.asarray(ipa.spread_to_tokens(batch.il_mask, batch.chunk_ids))
  reinforced = (batch.chunk_ids >= 0) & ~imitated
  assert imitated.any() and not old[~reinforced].any()
  np.testing.assert_allclose(old[reinforced], batch.behavior_logp[reinforced], atol=1e-4)
  # They are scored, not copied, and other weights would give others.
  assert (old[reinforced] != batch.behavior_logp[reinforced]).any()
  wrong = old_logps(dict.fromkeys(kept, kept[4]), batch, CONFIG, SAMPLING, 2)
  spread = np.asarray(ipa.spread_to_tokens(batch.versions, batch.chunk_ids))
  newest = reinforced & (spread == 6)
  assert np.abs(wrong - old)[newest].max() > 0.01
  assert (wrong == old)[reinforced & (spread == 4)].all()


def test_chunks_of_weights_that_are_gone_take_the_engines_log_probs(played):
  kept, batch = played
  old = old_logps({6: kept[6]}, batch, CONFIG, SAMPLING, 2)
  spread = np.asarray(ipa.spread_to_tokens(batch.versions, batch.chunk_ids))
  imitated = np.asarray(ipa.spread_to_tokens(batch.il_mask, batch.chunk_ids))
  gone = (batch.chunk_ids >= 0) & ~imitated & (spread < 6)
  assert gone.any() and (old[gone] == batch.behavior_logp[gone]).all()
  assert (old_logps({}, batch, CONFIG, SAMPLING, 2)[gone] == batch.behavior_logp[gone]).all()


def test_the_last_versions_are_kept():
  kept = KeptWeights(2)
  for version in (3, 4, 5):
    kept.add(version, {"w": version})
  assert kept.params == {4: {"w": 4}, 5: {"w": 5}}
  none = KeptWeights(0)
  none.add(1, {})
  assert none.params == {}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"max_staleness": -1}, "config.rl.max_staleness must be at least 0, got -1"),
    (
      {"old_logp_source": "engine"},
      "config.rl.old_logp_source must be 'kept_weights' with rl.max_staleness=0, where all sources",
    ),
    (
      {"old_logp_source": "kept", "max_staleness": 1},
      "rl.old_logp_source must be 'kept_weights' or 'engine' or 'current', got 'kept'",
    ),
  ],
)
def test_settings(changes, message):
  with pytest.raises(config_lib.ConfigError, match=message):
    config_lib.RunConfig(rl=rl(**changes))


def test_exact_numerics_need_the_same_weights():
  with pytest.raises(config_lib.ConfigError, match="rl.max_staleness must be 0 because of"):
    config_lib.RunConfig(
      numerics="exact",
      row_length=160,
      engine=config_lib.EngineConfig(slots=8),
      rl=rl(max_staleness=1),
    )
