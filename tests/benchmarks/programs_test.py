"""The programs in benchmarks/ that measure the engine run, and their counts are right."""

import json
import math
import pathlib
import subprocess
import sys

import jax
import pytest

from benchmarks._counts import context_flops, step_bytes
from rome import models

ROOT = pathlib.Path(__file__).parents[2]
MICRO = models.PRESETS["micro"]


def lines(program, *arguments):
  """What a program prints, one dict a line."""
  done = subprocess.run(
    [sys.executable, "-m", f"benchmarks.{program}", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=280,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  found = [json.loads(line) for line in done.stdout.splitlines()]
  for line in found:
    assert line["benchmark"] == program and line["settings"]["seed"] == 0
    assert line["device"] and line["commit"] and line["date"]
  return found


@pytest.mark.parametrize("preset", ["micro", "bench_small", "dense_1b", "smollm2_135m"])
def test_a_step_that_visits_everything_reads_all_weights_but_norms_and_embedding(preset):
  config = models.PRESETS[preset]
  shapes = jax.eval_shape(lambda: models.init_params(config, jax.random.key(0)))
  sizes = {
    jax.tree_util.keystr(path): leaf.size
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
  }
  weights = sum(n for path, n in sizes.items() if "norm" not in path and "embed_tokens" not in path)
  if config.tie_word_embeddings:
    weights += config.vocab_size * config.hidden_size
  read = step_bytes(config, batch=3, context=0, distinct=config.num_experts, itemsize=4)
  assert read == 4 * weights
  keys = config.num_key_value_heads * config.head_dim * config.num_hidden_layers
  more = step_bytes(config, batch=3, context=7, distinct=config.num_experts, itemsize=4)
  assert more - read == 4 * 3 * 7 * 2 * keys


def test_flops_of_a_context_are_those_of_its_parts():
  whole = context_flops(MICRO, 0, 100)
  parts = context_flops(MICRO, 0, 37) + context_flops(MICRO, 37, 100)
  assert math.isclose(whole, parts)
  later = context_flops(MICRO, 50, 51) - context_flops(MICRO, 0, 1)
  scores = MICRO.num_hidden_layers * MICRO.num_attention_heads * MICRO.head_dim
  assert later == 4 * 50 * scores


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["native", "xla"])
def test_what_is_shared_is_computed_once(backend):
  group, episode, resampling = lines(
    "prefix", "--preset=micro", f"--backend={backend}", "--samples=4", "--context=150",
    "--turns=4", "--reply=9", "--tool=21", "--repeats=2",
  )  # fmt: skip
  assert group["computed_tokens"] == 149 + 4
  assert 1 < group["tokens_to_one_prompt"] <= group["flops_to_one_prompt"] < 1.06
  assert set(group["seconds"]) == {"one_prompt", "group", "separate_prompts"}
  # Each turn: the tool's text, and the last token of the reply in front of it.
  assert episode["final_length"] == 4 * 30
  assert episode["computed_tokens"] == 21 + 3 * 22
  assert episode["through_model_to_length"] == round(119 / 120, 4)
  assert resampling["context_tokens"] == [21, 51, 81, 111]
  assert resampling["computed_tokens"] == [1] * 4
  assert len(resampling["seconds_to_first_token"]) == 4


@pytest.mark.slow
def test_generation_is_measured():
  found = lines(
    "engine", "--preset=micro", "--peers=", "--batches=1,3", "--prompt=8", "--new=20",
    "--rounds=1", "--repeats=2",
  )  # fmt: skip
  assert [line["batch"] for line in found] == [1, 3]
  for line in found:
    assert line["tokens_per_s"]["rome"] > 0 and "ratio" not in line
    assert 0 < line["bandwidth_share"] < 1 and line["bandwidth_gbytes_per_s"] > 0
  assert found[0]["distinct_experts"] == MICRO.num_experts_per_tok
  assert found[0]["distinct_experts"] < found[1]["distinct_experts"] <= MICRO.num_experts


@pytest.mark.slow
def test_a_server_under_load():
  (line,) = lines(
    "serve_load", "--model=micro", "--minutes=0.1", "--clients=12", "--slots=4", "--kills=2"
  )
  assert line["violations"] == [] and line["errors"] == {} and line["stuck"] == 0
  assert line["requests"] >= 12 and line["tokens_per_s"] > 0
  assert line["kills"]["pages_back"] >= line["kills"]["pages_due_at_least"]
  assert line["kills"]["slots_free_after_s"] < 10
