"""The batch as a pytree, and the errors of its host-side check."""

import dataclasses

import jax
import numpy as np
import pytest

from rome import ipa
from tests.ipa import oracle


def small_batch():
  chunks = [
    oracle.chunk_of([-1.0, -2.0], trajectory=0),
    oracle.chunk_of([-1.0], trajectory=1),
    oracle.chunk_of([-0.5], behavior=[np.nan], il=True, trajectory=2),
  ]
  batch = oracle.pack(chunks, [[0], [1, 2]], 5, 2, garbage=np.nan)[1]
  return dataclasses.replace(batch, ref_logp=batch.behavior_logp.copy())


def changed(name, index, value):
  array = np.array(getattr(small_batch(), name))
  array[index] = value
  return dataclasses.replace(small_batch(), **{name: array})


def test_a_good_batch_passes_whatever_its_padding_holds():
  ipa.validate(small_batch())
  ipa.validate(dataclasses.replace(small_batch(), old_logp=None, ref_logp=None))
  ipa.validate(jax.tree.map(jax.numpy.asarray, small_batch()))


@pytest.mark.parametrize(
  ("name", "index", "value", "message"),
  [
    ("behavior_logp", (1, 1), np.nan, "behavior_logp: row 1, token 1 is not finite: the engine"),
    ("behavior_logp", (0, 2), -np.inf, "behavior_logp: row 0, token 2 is not finite"),
    ("old_logp", (0, 1), np.inf, "old_logp: row 0, token 1 is not finite"),
    ("ref_logp", (0, 1), np.nan, "ref_logp: row 0, token 1 is not finite"),
    ("returns", (1, 0), np.nan, "returns: row 1, chunk 0 is not finite"),
    ("returns", (1, 1), np.inf, "returns: row 1, chunk 1 is not finite"),
    ("chunk_ids", (0, 4), 2, r"chunk_ids: row 0, token 4 is outside -1\.\.1"),
    ("chunk_ids", (1, 0), -2, r"chunk_ids: row 1, token 0 is outside -1\.\.1"),
    ("trajectory_ids", (1, 0), 4, r"trajectory_ids: row 1, chunk 0 is outside 0\.\.3"),
    ("trajectory_ids", (0, 0), -1, r"trajectory_ids: row 0, chunk 0 is outside 0\.\.3"),
  ],
)
def test_bad_values_name_their_row_and_field(name, index, value, message):
  with pytest.raises(ValueError, match=message):
    ipa.validate(changed(name, index, value))


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(ipa.ChunkBatch)])
def test_bad_shapes_name_their_field(name):
  array = np.asarray(getattr(small_batch(), name))
  with pytest.raises(ValueError, match="must have shape"):
    ipa.validate(dataclasses.replace(small_batch(), **{name: array[0]}))


def test_a_batch_is_a_pytree_with_or_without_old_log_probs():
  batch = small_batch()
  assert len(jax.tree.leaves(batch)) == 13
  on_policy = jax.tree.map(lambda x: x[:1], dataclasses.replace(batch, old_logp=None))
  assert on_policy.old_logp is None and on_policy.chunk_ids.shape == (1, 5)
