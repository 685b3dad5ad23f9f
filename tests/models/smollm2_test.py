"""Real weights: SmolLM2-135M-Instruct against transformers, from chat messages to log-probs.

The goldens are tests/models/goldens/smollm2.json; the program beside it wrote them.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome.models import PRESETS, Compute, extend, forward, init_cache, load, save
from rome.text import Tokenizer, check_vocabulary
from rome.text.templates import encode_chat, render_chat
from tests.pretrained import smollm2_gguf

GOLDENS = json.loads((pathlib.Path(__file__).parent / "goldens" / "smollm2.json").read_text())
NAMES = sorted(GOLDENS)
NEW = 64
PLACES = 256  # of each row of the cache; the longest prompt and its continuation fit


@pytest.fixture(name="tokenizer", scope="module")
def _tokenizer():
  return Tokenizer.from_dir(smollm2_gguf())


@pytest.fixture(name="model", scope="module")
def _model():
  return load(smollm2_gguf(), stacked=True)


def test_there_are_enough_goldens_of_every_sort():
  assert len(GOLDENS) >= 5 and all(len(g["greedy"]) == NEW for g in GOLDENS.values())
  assert any(m["role"] == "tool" for g in GOLDENS.values() for m in g["messages"])
  assert max(len(g["ids"]) for g in GOLDENS.values()) + NEW <= PLACES


@pytest.mark.parametrize("name", NAMES)
def test_chats_render_to_the_bytes_and_ids_of_transformers(name, tokenizer):
  golden = GOLDENS[name]
  assert render_chat(tokenizer, golden["messages"], add_generation_prompt=True) == golden["text"]
  assert encode_chat(tokenizer, golden["messages"], add_generation_prompt=True) == golden["ids"]
  assert tokenizer.decode(golden["ids"]) == golden["text"]


def test_tokenizer_and_model_belong_together(tokenizer):
  check_vocabulary(tokenizer, PRESETS["smollm2_135m"].vocab_size)


@pytest.mark.slow
def test_the_sizes_are_those_of_the_preset(model):
  assert model[0] == PRESETS["smollm2_135m"]


@pytest.mark.slow
def test_greedy_continuations_equal_those_of_transformers(model):
  """All prompts as rows of one cache: prefill, then one token a step."""
  config, params = model
  step = jax.jit(extend, static_argnums=(0, 5))
  compute = Compute(experts="dense")
  prompts = [GOLDENS[name]["ids"] for name in NAMES]
  tokens = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
  for row, ids in zip(tokens, prompts, strict=True):
    row[: len(ids)] = ids
  counts = jnp.asarray([len(ids) for ids in prompts], jnp.int32)
  cache = init_cache(config, len(prompts), PLACES, stacked=True)
  logits, cache, _ = step(config, params, cache, tokens, counts, compute)
  got = []
  for _ in range(NEW):
    got.append(np.argmax(logits, axis=-1).astype(np.int32))
    logits, cache, _ = step(config, params, cache, got[-1][:, None], jnp.ones_like(counts), compute)
  for name, row in zip(NAMES, np.stack(got, axis=1), strict=True):
    assert row.tolist() == GOLDENS[name]["greedy"], name


@pytest.mark.slow
def test_log_probs_of_the_continuations(model):
  """Within 2e-4 nats of transformers, by whole rows."""
  config, params = model
  score = jax.jit(lambda *a: jax.nn.log_softmax(forward(config, *a), axis=-1))
  worst = 0.0
  for golden in GOLDENS.values():
    ids, new = golden["ids"], golden["greedy"]
    tokens = np.zeros((1, PLACES), np.int32)
    tokens[0, : len(ids) + NEW] = ids + new
    real = (np.arange(PLACES) < len(ids) + NEW).astype(np.int32)[None]
    logp = score(params, tokens, real, np.arange(PLACES, dtype=np.int32)[None])
    got = np.asarray(logp[0, len(ids) - 1 : len(ids) + NEW - 1])[np.arange(NEW), new]
    worst = max(worst, np.abs(got - golden["logps"]).max())
  print(f"largest difference of log-probs: {worst:.2e}")
  assert worst < 2e-4


@pytest.mark.slow
def test_save_and_load_are_bit_equal(model, tmp_path):
  config, params = model
  save(tmp_path, config, params)
  again, got = load(tmp_path, stacked=True)
  assert again == config
  jax.tree.map(np.testing.assert_array_equal, got, params)
