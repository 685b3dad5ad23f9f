"""The fused head against `token_logps` of whole logits: values, gradients, memory, meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rome.models import Sampling, head_logps, logprob_head, token_logps

SETTINGS = [
  Sampling(),
  Sampling(temperature=0.7),
  Sampling(top_k=5),
  Sampling(top_p=0.6),
  Sampling(temperature=1.3, top_k=40, top_p=0.8),
]


def naive(hidden, kernel, tokens, sampling):
  kernel = kernel.astype(hidden.dtype)
  logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
  return token_logps(logits, tokens, sampling)


def evaluate(score, hidden, kernel, tokens, sampling):
  """Log-probs, entropies, and the gradient of a sum of both with random weights, as numpy."""
  weights = jax.random.normal(jax.random.key(9), (2, *tokens.shape))

  def loss(hidden, kernel):
    logp, entropy = score(hidden, kernel, tokens, sampling)
    finite = jnp.where(jnp.isfinite(logp), logp, 0)
    return (weights[0] * finite + weights[1] * entropy).sum(), (logp, entropy)

  gradient, values = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(hidden, kernel)
  return [np.asarray(x, np.float32) for x in (*values, *gradient)]


def assert_equal(got, want, tolerance=1e-6):
  """To `tolerance` of the largest magnitude of each array, at least 1."""
  for g, w in zip(got, want, strict=True):
    finite = np.isfinite(w)
    assert (np.isfinite(g) == finite).all() and not np.isnan(g).any()
    scale = max(1.0, np.abs(w[finite]).max(initial=0.0))
    np.testing.assert_allclose(g[finite], w[finite], rtol=0, atol=tolerance * scale)


def problem(batch, length, depth, vocab, dtype=jnp.float32, seed=0):
  """Logits are exact in float32, in any order of summing: thresholds do not depend on rounding.

  Half of the tokens are the most probable ones, so that filters keep some and exclude some.
  """
  keys = jax.random.split(jax.random.key(seed), 3)
  hidden = jax.random.randint(keys[0], (batch, length, depth), -3, 4).astype(dtype)
  kernel = jax.random.randint(keys[1], (depth, vocab), -3, 4) / 8.0
  tokens = jax.random.randint(keys[2], (batch, length), 0, vocab)
  best = jnp.argmax(hidden.astype(jnp.float32) @ kernel, axis=-1)
  tokens = tokens.at[:, 1::2].set(best[:, :-1][:, : tokens[:, 1::2].shape[1] * 2 : 2])
  return hidden, kernel, tokens


@pytest.fixture
def small_chunks(monkeypatch):
  """Chunks that small problems have several of."""
  monkeypatch.setattr(logprob_head, "_SMALL", 0)
  monkeypatch.setattr(logprob_head, "_SHARE", 3)
  monkeypatch.setattr(logprob_head, "_LANES", 8)
  monkeypatch.setattr(logprob_head, "_NARROWEST", 8)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sampling", SETTINGS)
@pytest.mark.usefixtures("small_chunks")
def test_equal_to_the_whole(sampling, tied):
  """7 places and 101 tokens: chunks of 40, 40 and 21."""
  hidden, kernel, tokens = problem(3, 7, 16, 101)
  got = evaluate(functools.partial(head_logps, tied=tied), hidden, kernel, tokens, sampling)
  want = evaluate(naive, hidden, kernel, tokens, sampling)
  assert_equal(got, want)
  assert not got[0][:, 0].any() and not got[1][:, 0].any()
  excluded = np.isneginf(got[0]).mean()
  assert 0.1 < excluded < 0.6 if sampling.filters else excluded == 0


@pytest.mark.slow
@pytest.mark.parametrize(("vocab", "length"), [(40, 5), (80, 4), (48, 1), (264, 2)])
@pytest.mark.usefixtures("small_chunks")
def test_shapes_that_divide_and_do_not(vocab, length):
  problem_ = problem(2, length, 8, vocab, seed=1)
  want = evaluate(naive, *problem_, Sampling(top_p=0.9))
  assert_equal(evaluate(head_logps, *problem_, Sampling(top_p=0.9)), want)


@pytest.mark.usefixtures("small_chunks")
def test_by_hand():
  """Probabilities 1/2, 1/4, 1/8, 1/8 everywhere; the second token excluded in turn."""
  kernel = jnp.log(jnp.array([[0.5, 0.25, 0.125, 0.125]]))
  hidden, tokens = jnp.ones((1, 4, 1)), jnp.array([[3, 0, 1, 2]])
  logp, entropy, _, dkernel = evaluate(head_logps, hidden, kernel, tokens, Sampling())
  assert logp[0] == pytest.approx([0, np.log(1 / 2), np.log(1 / 4), np.log(1 / 8)])
  assert entropy[0] == pytest.approx([0, *[1.75 * np.log(2)] * 3])
  assert dkernel.sum() == pytest.approx(0, abs=1e-6)  # logits may rise together for nothing
  logp, entropy, *_ = evaluate(head_logps, hidden, kernel, tokens, Sampling(top_k=1))
  assert logp[0].tolist() == [0, 0, -np.inf, -np.inf] and not entropy.any()


@pytest.mark.slow
@pytest.mark.usefixtures("small_chunks")
def test_large_logits_neither_overflow_nor_vanish():
  hidden, kernel, tokens = problem(2, 6, 16, 101)
  for factor in (1e3, -1e3):
    got = evaluate(head_logps, hidden * factor, kernel, tokens, Sampling())
    assert_equal(got, evaluate(naive, hidden * factor, kernel, tokens, Sampling()))


@pytest.mark.slow
@pytest.mark.usefixtures("small_chunks")
def test_bfloat16():
  """Logits are as `forward` makes them; gradients are rounded to bfloat16 once on the way."""
  hidden, kernel, tokens = problem(2, 9, 32, 101, jnp.bfloat16)
  got = evaluate(head_logps, hidden, kernel, tokens, Sampling(top_k=7))
  want = evaluate(naive, hidden, kernel, tokens, Sampling(top_k=7))
  assert_equal(got[:2], want[:2])
  assert_equal(got[2:], want[2:], tolerance=2**-8)
  gradient = jax.grad(lambda h, k: head_logps(h, k, tokens, Sampling())[0].sum(), argnums=(0, 1))
  dtypes = [g.dtype for g in jax.eval_shape(gradient, hidden, kernel)]
  assert dtypes == [jnp.bfloat16, jnp.float32]


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [SETTINGS[0], SETTINGS[-1]])
@pytest.mark.usefixtures("small_chunks")
def test_a_row_does_not_depend_on_its_neighbours(sampling):
  hidden, kernel, tokens = problem(4, 6, 16, 101)
  score = jax.jit(head_logps, static_argnums=(3, 4))
  logp, entropy = score(hidden, kernel, tokens, sampling)
  others = jnp.array([0, 2, 3])
  changed = hidden.at[others].multiply(-2), kernel, tokens.at[others].add(-tokens[others])
  new_logp, new_entropy = score(*changed, sampling)
  assert np.asarray(new_logp[1]).tobytes() == np.asarray(logp[1]).tobytes()
  assert np.asarray(new_entropy[1]).tobytes() == np.asarray(entropy[1]).tobytes()
  assert not np.allclose(new_entropy[2], entropy[2])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.slow
def test_places_without_weight_have_no_gradient():
  """Padding, whatever it holds: a loss that does not read a place gets nothing from it."""
  hidden, kernel, tokens = problem(1, 6, 16, 101)

  def loss(hidden, kernel):
    return head_logps(hidden, kernel, tokens, Sampling())[0][:, :3].sum()

  gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
  dhidden, dkernel = gradient(hidden, kernel)
  assert not dhidden[:, 2:].any() and dhidden[:, :2].any()
  np.testing.assert_array_equal(gradient(hidden.at[:, 2:].set(7), kernel)[1], dkernel)


@pytest.mark.slow
def test_a_token_outside_the_vocabulary_is_not_scored_in_silence():
  hidden, kernel, tokens = problem(1, 3, 8, 40)
  logp, _ = jax.jit(head_logps, static_argnums=3)(hidden, kernel, tokens + 40, Sampling())
  assert np.isnan(logp[:, 1:]).all()


@pytest.mark.slow
@pytest.mark.parametrize(("places", "depth"), [(512, 512), (1024, 1024), (8192, 512)])
@pytest.mark.parametrize("backward", [False, True])
def test_memory(places, depth, backward):
  """Temporaries at the vocabulary of Qwen3 are at most an eighth of the naive form's."""
  vocab, tokens = 151_936, jax.ShapeDtypeStruct((1, places), jnp.int32)
  hidden = jax.ShapeDtypeStruct((1, places, depth), jnp.float32)
  kernel = jax.ShapeDtypeStruct((depth, vocab), jnp.float32)

  def temporaries(score):
    def run(hidden, kernel, tokens):
      return score(hidden, kernel, tokens, Sampling())

    def loss(*args):
      return sum(x.sum() for x in run(*args))

    function = jax.grad(loss, argnums=(0, 1)) if backward else run
    compiled = jax.jit(function).lower(hidden, kernel, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  whole = temporaries(naive)
  assert whole >= 4 * places * vocab
  assert temporaries(head_logps) <= whole / 8


@pytest.mark.devices8
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("sampling", [SETTINGS[0], SETTINGS[-1]])
def test_on_a_mesh(sampling):
  """Rows over two axes, the kernel over the other: one device's numbers."""
  hidden, kernel, tokens = problem(4, 6, 16, 104)
  want = evaluate(head_logps, hidden, kernel, tokens, sampling)
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 3)
  with jax.set_mesh(mesh):
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    hidden, tokens = jax.device_put((hidden, tokens), rows)
    kernel = jax.device_put(kernel, NamedSharding(mesh, P(None, "tensor")))
    assert_equal(evaluate(head_logps, hidden, kernel, tokens, sampling), want)
