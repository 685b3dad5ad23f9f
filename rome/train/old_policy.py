"""Old log-probs where training lags rollout: each chunk under the weights that sampled it.

On-policy they are the stop-gradient of the forward pass of the update, and nothing here is used.
Where trajectories may be older than the update (`rl.max_staleness`), the versions that they can
have been sampled under are kept, and each chunk is scored again under its own
(spec of section 3.2.4.2, arXiv:2512.24873: pi_theta/pi_old measures how far the policy has moved,
pi_old/mu how far the engine's arithmetic is from the trainer's).

Choice: where a version is gone (after a restart the weights of earlier updates are not there any
more), its chunks take the engine's log-probs: pi_old/mu is 1 then.
"""

import functools
from collections.abc import Mapping

import chex
import jax
import numpy as np

from rome import ipa, models


class KeptWeights:
  """The weights of the last versions.

  Args:
    count: how many; 0 keeps none.
  """

  def __init__(self, count: int):
    self._count = count
    self.params: dict[int, chex.ArrayTree] = {}

  def add(self, version: int, params: chex.ArrayTree) -> None:
    """Keeps the weights of the newest version, in place of the oldest ones."""
    self.params[version] = params
    for old in [v for v in self.params if v <= version - self._count]:
      del self.params[old]


def old_logps(
  kept: Mapping[int, chex.ArrayTree],
  batch: ipa.ChunkBatch,
  config: models.ModelConfig,
  sampling: models.Sampling,
  micro_rows: int,
) -> np.ndarray:
  """Log-prob of every token under the version that sampled its chunk.

  Args:
    kept: weights by version.
    batch: rows a multiple of `micro_rows`.
    config: the model's sizes.
    sampling: the settings that the batch was sampled under.
    micro_rows: rows a device call.
  Returns:
    [B, T] float32: the engine's log-prob where the version is not kept, 0 in imitated chunks and
    outside chunks.
  """
  chex.assert_rank([batch.tokens, batch.chunk_ids], 2)
  chunk_ids = np.asarray(batch.chunk_ids)
  # In numpy: the number of rows is another one each time, and nothing should compile for it.
  spread, imitated = (
    np.take_along_axis(np.asarray(of_chunk), np.maximum(chunk_ids, 0), axis=1)
    for of_chunk in (batch.versions, batch.il_mask)
  )
  reinforced = (chunk_ids >= 0) & ~imitated
  old = np.where(reinforced, batch.behavior_logp, 0).astype(np.float32)
  for version, params in kept.items():
    of_version = reinforced & (spread == version)
    for start in range(0, len(old), micro_rows):
      rows = slice(start, start + micro_rows)
      if of_version[rows].any():
        arrays = (x[rows] for x in (batch.tokens, batch.segment_ids, batch.positions))
        logps = jax.device_get(_score(config, sampling, params, *arrays))
        old[rows] = np.where(of_version[rows], logps, old[rows])
  return old


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(
  config: models.ModelConfig,
  sampling: models.Sampling,
  params: chex.ArrayTree,
  tokens: chex.Array,
  segment_ids: chex.Array,
  positions: chex.Array,
) -> chex.Array:
  hidden, _ = models.hidden_states(config, params, tokens, segment_ids, positions)
  kernel = models.head_kernel(config, params)
  logps, _ = models.head_logps(hidden, kernel, tokens, sampling, config.tie_word_embeddings)
  return logps
