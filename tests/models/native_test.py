"""The native forward pass: the decoder's numbers, and bits that only a token's context decides."""

import dataclasses
import functools
import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome import models
from rome.models import decoder, lora, native
from rome.models.native import build

MICRO, TINY = models.PRESETS["micro"], models.PRESETS["tiny"]
DENSE = models.ModelConfig(  # a dense Qwen3, whose head is not its embedding
  vocab_size=100,
  hidden_size=48,
  num_hidden_layers=2,
  num_attention_heads=6,
  num_key_value_heads=2,
  head_dim=16,
  intermediate_size=72,
  tie_word_embeddings=False,
)
# Nothing is a multiple of what vectors, panels and blocks of queries hold.
ODD = models.ModelConfig(
  vocab_size=131,
  hidden_size=71,
  num_hidden_layers=4,
  num_attention_heads=9,
  num_key_value_heads=3,
  head_dim=10,
  num_experts=21,
  num_experts_per_tok=3,
  moe_intermediate_size=37,
  intermediate_size=50,
  decoder_sparse_step=2,
  mlp_only_layers=(3,),
  norm_topk_prob=False,
  attention_bias=True,
)
WIDE = dataclasses.replace(  # ten query heads a key head; heads of more than one block of vectors
  DENSE, num_attention_heads=10, num_key_value_heads=1, head_dim=80
)
CONFIGS = {
  "micro": MICRO,
  "tiny": TINY,
  "dense": DENSE,
  "llama": dataclasses.replace(DENSE, qk_norm=False, rms_norm_eps=1e-5, rope_theta=5e5),
  "bias": dataclasses.replace(MICRO, attention_bias=True, tie_word_embeddings=False),
  "weights of all experts": dataclasses.replace(MICRO, norm_topk_prob=False),
  "mixture": dataclasses.replace(
    MICRO, num_hidden_layers=5, decoder_sparse_step=2, mlp_only_layers=(1,), intermediate_size=40
  ),
  "odd": ODD,
  "wide": WIDE,
}
MAX = 192  # longest context here


@functools.cache
def params_of(config):
  """Parameters whose biases and scales are not what they start from."""
  params = jax.jit(models.init_params, static_argnums=0)(config, jax.random.key(0))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  moved = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
  return jax.tree.unflatten(tree, moved)


@functools.cache
def packed_of(config):
  return pack(config, params_of(config), MAX)


pack = jax.jit(native.pack, static_argnums=(0, 2))
extend = jax.jit(native.extend, static_argnums=(0, 7), donate_argnums=2)
logits = jax.jit(native.logits, static_argnums=(0, 4))


def draw(config, lengths, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, config.vocab_size, n).astype(np.int32) for n in lengths]


def table_for(lengths, pool, seed=0):
  """Pages of rows, none shared; entries that no row needs name no page."""
  ids = np.random.default_rng(seed).permutation(pool)
  table = np.full((len(lengths), -(-MAX // native.PAGE)), -1, np.int32)
  for row, length in enumerate(lengths):
    count = -(-length // native.PAGE)
    table[row, :count], ids = ids[:count], ids[count:]
  return table


def prefill(config, packed, contexts, pages=None, seed=0):
  """Everything in one call: hidden states and logits of each context, the pages, the table."""
  lengths = [len(c) for c in contexts]
  table = table_for(lengths, 40, seed)
  rows = np.repeat(np.arange(len(contexts)), lengths)
  positions = np.concatenate([np.arange(n) for n in lengths])
  pages = native.init_pages(config, 40) if pages is None else pages
  hidden, pages = extend(config, packed, pages, np.concatenate(contexts), rows, positions, table, 0)
  scores = logits(config, packed, hidden, np.ones(len(hidden), bool), 0)
  cut = np.cumsum(lengths)[:-1]
  return np.split(hidden, cut), np.split(scores, cut), pages, table


def in_pieces(config, packed, contexts, seed, threads=0, sizes=(5, 40)):
  """The same in random calls, companies, orders, rows and pages, in calls of `sizes` places."""
  rng = np.random.default_rng(seed)
  lengths = [len(c) for c in contexts]
  row_of = rng.permutation(len(contexts))
  table = table_for(np.array(lengths)[np.argsort(row_of)], 40, seed)
  pages = jax.tree.map(lambda x: x + jnp.asarray(7, x.dtype), native.init_pages(config, 40))
  done = [0] * len(contexts)
  hidden = [np.zeros((n, config.hidden_size), np.float32) for n in lengths]
  scores = [np.zeros((n, config.vocab_size), np.float32) for n in lengths]
  while any(d < n for d, n in zip(done, lengths, strict=True)):
    size, batch = rng.choice(sizes), []
    for i in rng.permutation(len(contexts)):
      most = min(size - len(batch), lengths[i] - done[i])
      count = min(most, int(rng.choice([0, 1, 1, 2, 3, 17, MAX])))
      batch += [(i, done[i] + t) for t in range(count)]
      done[i] += count
    if rng.integers(2):
      rng.shuffle(batch)
    at = rng.permutation(size)[: len(batch)] if rng.integers(2) else np.arange(len(batch))
    tokens, rows, positions = np.full((3, size), -1, np.int32)
    for place, (i, t) in zip(at, batch, strict=True):
      tokens[place], rows[place], positions[place] = contexts[i][t], row_of[i], t
    h, pages = extend(config, packed, pages, tokens, rows, positions, table, threads)
    s = logits(config, packed, h, positions >= 0, threads)
    for place, (i, t) in zip(at, batch, strict=True):
      hidden[i][t], scores[i][t] = h[place], s[place]
    idle = np.setdiff1d(np.arange(size), at)
    assert not np.any(np.asarray(h)[idle]) and not np.any(np.asarray(s)[idle])
  return hidden, scores


def decoder_says(config, params, contexts):
  """Logits, hidden states and choices [S, T, K] of each context, by the decoder."""
  width = max(len(c) for c in contexts)
  tokens = np.stack([np.pad(c, (0, width - len(c))) for c in contexts])
  place = np.broadcast_to(np.arange(width), tokens.shape)
  real = (place < np.array([len(c) for c in contexts])[:, None]).astype(np.int32)
  hidden, stats = jax.jit(models.hidden_states, static_argnums=0)(
    config, params, tokens, real, place
  )
  scores = decoder.logits_of(config, params, hidden)
  for i, c in enumerate(contexts):
    chosen = stats["choices"][:, i, : len(c)] if stats else np.zeros((0, len(c), 0))
    yield scores[i, : len(c)], hidden[i, : len(c)], chosen


def close(got, want):
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.max(np.abs(want)))


def choices_of(pages, table, row, length):
  """[S, T, K]."""
  places = np.arange(length)
  found = np.asarray(pages.choices)[table[row, places // native.PAGE], places % native.PAGE]
  return np.moveaxis(found, 1, 0)


def check_parity(config, packed, params):
  lengths = (150, 1, 61)  # a row of two steps of pages, of one place, of no whole page
  contexts = draw(config, lengths)
  hidden, scores, pages, table = prefill(config, packed, contexts)
  for row, (want, states, chosen) in enumerate(decoder_says(config, params, contexts)):
    close(scores[row], want)
    close(hidden[row], states)
    if chosen.size:
      np.testing.assert_array_equal(choices_of(pages, table, row, lengths[row]), chosen)


def assert_same_bits(got, want):
  for g, w in zip(got, want, strict=True):
    np.testing.assert_array_equal(np.asarray(g).view(np.int32), np.asarray(w).view(np.int32))


# --- what it computes ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["micro", "odd"])
def test_it_computes_what_the_decoder_does(name):
  config = CONFIGS[name]
  check_parity(config, packed_of(config), params_of(config))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"micro", "odd"}))
def test_it_computes_what_the_decoder_does_for_every_kind(name):
  config = CONFIGS[name]
  check_parity(config, packed_of(config), params_of(config))


@pytest.mark.slow
def test_it_continues_what_the_decoder_extends():
  config, params = TINY, params_of(TINY)
  (context,) = draw(config, [50])
  cache = models.init_cache(config, 1, 50)
  step = jax.jit(models.extend, static_argnums=0)
  want = []
  for token in context:
    scores, cache, _ = step(config, params, cache, token[None, None], np.ones(1, np.int32))
    want.append(scores[0])
  close(prefill(config, packed_of(config), [context])[1][0], np.stack(want))


def test_stacked_parameters_pack_to_the_same_bits():
  for config in (MICRO, ODD):
    stacked = models.stack_layers(config, params_of(config))
    got, want = pack(config, stacked, MAX), packed_of(config)
    assert_same_bits(jax.tree.leaves(got), jax.tree.leaves(want))


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [False, True])
def test_adapters_are_merged(stacked):
  config = dataclasses.replace(ODD, tie_word_embeddings=False)
  params = params_of(config)
  if stacked:
    params = models.stack_layers(config, params)
  params = models.add_lora(config, params, jax.random.key(2), 3, 6.0, list(lora.TARGETS))
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: x + 0.05 if path[-1].key.endswith("lora_b") else x, params
  )
  check_parity(config, pack(config, params, MAX), params)


def test_of_equal_experts_the_lower_is_chosen():
  config = dataclasses.replace(ODD, norm_topk_prob=True)
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: jnp.zeros_like(x) if path[-1].key == "router" else x, params_of(config)
  )
  _, _, pages, table = prefill(config, pack(config, params, MAX), draw(config, [5]))
  want = np.broadcast_to(np.arange(3), (1, 5, 3))  # of four layers one is sparse
  np.testing.assert_array_equal(choices_of(pages, table, 0, 5), want)


def test_packed_weights_outlive_donated_parameters():
  params = jax.tree.map(jnp.copy, params_of(MICRO))
  packed = pack(MICRO, params, MAX)
  jax.tree.map(lambda x: x.delete(), params)
  assert_same_bits(jax.tree.leaves(packed), jax.tree.leaves(packed_of(MICRO)))


# --- bits ----------------------------------------------------------------------------------------


def check_bits(config, lengths, seeds, sizes=(5, 40)):
  contexts = draw(config, lengths)
  packed = packed_of(config)
  hidden, scores = in_pieces(config, packed, contexts, 0, threads=1, sizes=(1,))  # token by token
  whole = prefill(config, packed, contexts)
  assert_same_bits(whole[0], hidden)
  assert_same_bits(whole[1], scores)
  for seed in seeds:
    got = in_pieces(config, packed, contexts, seed, threads=seed % 2, sizes=sizes)
    assert_same_bits(got[0], hidden)
    assert_same_bits(got[1], scores)


def test_bits_depend_on_the_context_alone():
  check_bits(MICRO, (3, 150, 20), range(1, 5))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "odd", "wide", "bias"])
def test_bits_depend_on_the_context_alone_in_every_kind(name):
  # More tokens than a chunk of rows holds, and rows of more pages than a batch of scores.
  check_bits(CONFIGS[name], (1, 150, 16, 17, 90, 64), range(1, 9), sizes=(3, 17, 120))


def test_neighbours_that_are_not_finite_change_nothing():
  """A row of a weight's infinities next door, and places of a page that nobody wrote."""
  config, packed = MICRO, packed_of(MICRO)
  contexts = draw(config, (20, 20))
  contexts[0][:] = np.minimum(contexts[0], config.vocab_size - 2)
  contexts[1][5:] = config.vocab_size - 1
  bad = packed.replace(embedding=packed.embedding.at[-1].set(jnp.inf))
  pages = jax.tree.map(
    lambda x: jnp.full_like(x, jnp.nan if x.dtype == jnp.float32 else 0),
    native.init_pages(config, 40),
  )
  hidden, scores, _, _ = prefill(config, bad, contexts, pages)
  assert np.all(np.isnan(hidden[1][5:])) and np.all(np.isfinite(hidden[1][:5]))
  want = prefill(config, packed, contexts[:1])
  assert_same_bits(hidden[:1], want[0])
  assert_same_bits(scores[:1], want[1])


def test_numbers_too_small_to_be_normal_are_kept_by_every_thread():
  """XLA's threads flush them to zero, some of them: bits would depend on who computes."""
  packed = packed_of(MICRO)
  tiny = packed.replace(head=np.asarray(packed.head) * np.float32(1e-40))
  hidden = np.random.default_rng(0).normal(size=(200, MICRO.hidden_size)).astype(np.float32)
  one, all_ = (np.asarray(logits(MICRO, tiny, hidden, np.ones(200, bool), n)) for n in (1, 0))
  assert (one.view(np.int32) << 1).any(axis=1).all()
  assert_same_bits([all_], [one])


# --- pages ---------------------------------------------------------------------------------------


def test_only_the_places_of_the_tokens_are_written():
  config = MICRO
  before = jax.tree.map(
    lambda x: jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), native.init_pages(config, 6)
  )
  kept = jax.tree.map(np.array, before)
  tokens = np.array([5, 6, 7, 8], np.int32)
  rows, positions = np.array([1, 0, 1, 0]), np.array([16, -1, 17, -1])
  table = np.array([[0, 1], [4, 2]], np.int32)
  _, after = extend(config, packed_of(config), before, tokens, rows, positions, table, 0)
  written = np.zeros((6, native.PAGE), bool)
  written[2, :2] = True
  for name, place in (("k", -1), ("v", 3), ("choices", 1)):
    old, new = (np.moveaxis(np.asarray(getattr(x, name)), place, 1) for x in (kept, after))
    same = (old == new).reshape(6, native.PAGE, -1)
    assert same[~written].all(), name
    assert not same[written].all(axis=-1).any(), name


def test_nothing_happens_where_no_token_is_active():
  pages = jax.tree.map(lambda x: x + jnp.asarray(3, x.dtype), native.init_pages(MICRO, 2))
  kept = jax.tree.map(np.array, pages)
  none = np.full(4, -1, np.int32)
  hidden, pages = extend(MICRO, packed_of(MICRO), pages, none, none, none, none[None], 0)
  assert not np.any(hidden)
  jax.tree.map(np.testing.assert_array_equal, pages, kept)
  assert not np.any(logits(MICRO, packed_of(MICRO), hidden, np.zeros(4, bool), 0))


def test_copies_of_pages_are_read_before_they_are_written():
  pages = jax.tree.map(
    lambda x: jnp.broadcast_to(
      jnp.arange(4, dtype=x.dtype).reshape(4, *[1] * (x.ndim - 1)), x.shape
    ),
    native.init_pages(MICRO, 4),
  )
  copy = jax.jit(native.copy_pages, donate_argnums=0)
  args = (pages, np.array([0, 1, 2, 3]), np.array([1, 0, 4, -1]))
  assert copy.lower(*args).compile().memory_analysis().alias_size_in_bytes >= pages.k.nbytes
  copied = copy(*args)
  for x in jax.tree.leaves(copied):
    np.testing.assert_array_equal(x.reshape(4, -1)[:, 0], [1, 0, 2, 3])
    np.testing.assert_array_equal(x.reshape(4, -1).min(axis=1), x.reshape(4, -1).max(axis=1))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def generate(config, packed, pages, tokens, table, steps):
  """Greedy tokens of rows that begin with one token each: the pages, [R, MAX]."""
  rows = jnp.arange(len(tokens))

  def body(carry):
    t, pages, out = carry
    now = jnp.full(len(tokens), t, jnp.int32)
    hidden, pages = native.extend(config, packed, pages, out[:, t], rows, now, table)
    best = jnp.argmax(native.logits(config, packed, hidden, now >= 0), axis=-1)
    return t + 1, pages, out.at[:, t + 1].set(best.astype(jnp.int32))

  out = jnp.zeros((len(tokens), MAX), jnp.int32).at[:, 0].set(tokens)
  return jax.lax.while_loop(lambda c: c[0] < steps, body, (0, pages, out))[1:]


def test_a_loop_generates_in_place():
  config, rows, steps = MICRO, 3, 40
  tokens, pool = np.array([1, 2, 3], np.int32), 3000
  table = table_for([steps + 1] * rows, 40)
  args = (config, packed_of(config), native.init_pages(config, pool), tokens, table, steps)
  size = sum(x.nbytes for x in jax.tree.leaves(args[2]))
  memory = generate.lower(*args).compile().memory_analysis()
  assert memory.temp_size_in_bytes < size / 10 and memory.alias_size_in_bytes >= size
  place = args[2].k.unsafe_buffer_pointer()
  pages, out = generate(*args)
  assert pages.k.unsafe_buffer_pointer() == place
  out = np.asarray(out)
  contexts = [row[:steps] for row in out]
  for row, scores in enumerate(prefill(config, args[1], contexts)[1]):
    np.testing.assert_array_equal(np.argmax(scores, axis=-1), out[row, 1 : steps + 1])


# --- calls ---------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_programs_that_run_at_once_do_not_disturb_each_other():
  config, steps = MICRO, 60
  starts = [np.arange(4, dtype=np.int32) + 10 * i for i in range(4)]
  table = table_for([steps + 1] * 4, 40)

  def run(i):
    pages = native.init_pages(config, 40)
    return np.asarray(generate(config, packed_of(config), pages, starts[i], table, steps)[1])

  alone = [run(i) for i in range(4)]
  assert len({x.tobytes() for x in alone}) == 4
  found = [[] for _ in alone]

  def repeat(i):
    for _ in range(5):
      found[i].append(run(i))

  workers = [threading.Thread(target=repeat, args=(i,)) for i in range(4)]
  for worker in workers:
    worker.start()
  for worker in workers:
    worker.join()
  for want, got in zip(alone, found, strict=True):
    assert len(got) == 5 and all(np.array_equal(want, g) for g in got)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"tokens": 264}, "token id"),
    ({"tokens": -1}, "token id"),
    ({"rows": 1}, "page table"),
    ({"positions": MAX}, "longest context"),
    ({"positions": 16}, "columns"),
    ({"table": 2}, "pool"),
    ({"table": -1}, "pool"),
  ],
)
def test_what_is_out_of_range_is_an_error(change, message):
  one = {"tokens": 0, "rows": 0, "positions": 0} | change
  arrays = [np.array([one[k]], np.int32) for k in ("tokens", "rows", "positions")]
  table = np.array([[one.get("table", 0)]], np.int32)
  with pytest.raises(jax.errors.JaxRuntimeError, match=message):
    done = extend(MICRO, packed_of(MICRO), native.init_pages(MICRO, 2), *arrays, table, 0)
    jax.block_until_ready(done)


def test_what_cannot_be_served_is_named(monkeypatch):
  assert native.unavailable(TINY, models.Compute()) is None
  assert "bfloat16" in native.unavailable(TINY, models.Compute(dtype="bfloat16"))
  with jax.set_mesh(jax.make_mesh((1,), ("data",))):
    assert "mesh" in native.unavailable(TINY, models.Compute())
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert "gpu" in native.unavailable(TINY, models.Compute())


# --- the build -----------------------------------------------------------------------------------


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
  monkeypatch.setenv("PATH", str(tmp_path))
  monkeypatch.setattr(build, "_register", build.build)
  with pytest.raises(native.NativeUnavailable, match="gcc"):
    build.build()
  assert "gcc" in native.unavailable(TINY, models.Compute())


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
  compiler = tmp_path / "gcc"
  compiler.write_text("#!/bin/sh\necho 'x.c:1: error: no such thing' >&2\nexit 1\n")
  compiler.chmod(0o755)
  monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  with pytest.raises(native.NativeUnavailable, match="no such thing"):
    build.build()
  assert not list((tmp_path / "cache").rglob("*.so"))


@pytest.mark.slow
def test_processes_may_build_at_once(tmp_path):
  script = "from rome.models.native import build; build.register(); print(build.build())"
  environ = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
  builds = [
    subprocess.Popen([sys.executable, "-c", script], env=environ, stdout=subprocess.PIPE, text=True)
    for _ in range(2)
  ]
  said = [process.communicate(timeout=120)[0].strip() for process in builds]
  assert [process.returncode for process in builds] == [0, 0]
  assert said[0] == said[1] and [str(x) for x in (tmp_path / "rome").iterdir()] == [said[0]]
