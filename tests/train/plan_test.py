"""Plans for fake CPU devices against counts by hand, errors, and plans for TPUs without one."""

import dataclasses
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome import ipa, models
from rome.train import chips, plan, plan_cli
from rome.train.config import StageConfig
from rome.train.state import TrainState, make_optimizer
from rome.train.step import ipa_step

MICRO = models.PRESETS["micro"]
LIBTPU = pathlib.Path(__file__).parents[2] / ".cache" / "libtpu" / "libtpu" / "libtpu.so"


def _request(topology: str, mesh: dict[str, int], **changes) -> plan.Request:
  request = plan.Request(
    MICRO, chips.parse_topology(topology), mesh, batch=8, length=64, dtype="float32", remat="none"
  )
  return dataclasses.replace(request, **changes)


@pytest.fixture(scope="module")
def report():
  return plan.plan(_request("cpu:8", {"fsdp": 8}))


# Of micro: [D]-wide things split over fsdp, norms do not. Two layers of q, k, v, o, router and
# experts, and the tied embedding; two norms of 16 and two of 8 a layer, and the last.
SPLIT = 2 * (2 * 256 + 2 * 128 + 64 + 4 * 3 * 256) + 16 * 264
WHOLE = 2 * (2 * 16 + 2 * 8) + 16
PARAMS = 4 * (SPLIT // 8 + WHOLE)


@pytest.mark.slow
@pytest.mark.devices8
class TestOnEightCpuDevices:
  def test_parameters_and_optimiser(self, report):
    assert report["parameters"] == SPLIT + WHOLE
    memory = report["steps"]["train"]["memory"]
    # Adam's two moments, and two counters of updates.
    assert memory["held"] == {"params": PARAMS, "optimizer": 2 * PARAMS + 8}
    # All of the state is donated, with its step and its key.
    assert memory["alias"] == 3 * PARAMS + 8 + 4 + 8
    assert memory["peak"] >= memory["argument"] > memory["alias"]
    assert memory["limit"] is None

  def test_cache(self, report):
    memory = report["steps"]["decode"]["memory"]
    # One row a device: keys and values of two layers, 64 places, a head of 8; and its length.
    assert memory["held"] == {"params": PARAMS, "cache": 2 * 2 * 64 * 8 * 4 + 4}

  def test_flops(self, report):
    tokens, layer = 8 * 64, 2 * 256 + 2 * 128 + 64 + 2 * 768
    attention = 4 * 2 * 16 * 8 * (64 * 65 / 2)
    model = report["steps"]["train"]["flops"]["model"]
    assert model == 6 * (2 * layer + 16 * 264) * tokens + 3 * attention

  def test_weights_are_gathered_and_gradients_reduced(self, report):
    found = report["steps"]["train"]["collectives"]
    # Each weight arrives at least once; each gradient is summed once.
    assert found["all-gather"]["bytes"] >= 4 * SPLIT
    reduced = found["all-reduce"]["bytes"] + found.get("reduce-scatter", {"bytes": 0})["bytes"]
    assert reduced >= 4 * SPLIT
    traffic = report["steps"]["train"]["traffic"]
    assert traffic["network"] == pytest.approx(sum(f["sent"] for f in found.values()))
    assert traffic["memory"] > 2 * 3 * PARAMS  # the update alone reads and writes the state

  def test_schema(self, report):
    again = json.loads(json.dumps(report))
    assert again == report
    assert list(again["steps"]) == ["train", "decode"]
    for step in again["steps"].values():
      assert step["fits"] is True and step["roofline"] is None
      assert set(step) == {
        *("rows", "length", "fits", "compile_seconds", "memory", "flops", "traffic"),
        *("collectives", "roofline"),
      }

  def test_too_few_devices(self):
    with pytest.raises(ValueError, match="cpu:9.*runs with 8 CPU devices"):
      plan.plan(_request("cpu:9", {"fsdp": 9}))


@pytest.mark.slow
def test_the_planned_step_is_the_trainers():
  request = _request("cpu:1", {}, batch=3, length=32)
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(0, 264, (3, 32)), jnp.int32)
  chunk_ids = jnp.tile(jnp.repeat(jnp.array([-1, 0, 1, -1]), 8)[None], (3, 1))
  batch = ipa.ChunkBatch(
    tokens=tokens,
    segment_ids=jnp.ones_like(tokens),
    positions=jnp.tile(jnp.arange(32)[None], (3, 1)),
    chunk_ids=chunk_ids,
    old_logp=None,
    behavior_logp=jnp.full((3, 32), -5.0),
    returns=jnp.asarray(rng.normal(size=(3, 2)), jnp.float32),
    positive=jnp.ones((3, 2), bool),
    il_mask=jnp.zeros((3, 2), bool),
    trajectory_ids=jnp.tile(jnp.arange(3)[:, None], (1, 2)),
    group_ids=jnp.zeros((3, 2), jnp.int32),
    versions=jnp.zeros((3, 2), jnp.int32),
  )
  optimizer = make_optimizer(StageConfig(steps=1, batch=3, learning_rate=1e-2))
  params = models.stack_layers(
    MICRO, jax.jit(models.init_params, static_argnums=0)(MICRO, jax.random.key(0))
  )
  state = TrainState(
    params=params,
    opt_state=optimizer.init(params),
    step=jnp.zeros((), jnp.int32),
    key=jax.random.key(1),
  )
  step = jax.jit(functools.partial(plan.train_step, request, optimizer))
  got, metrics = step(state, batch)
  want, expected = ipa_step(
    state,
    batch,
    config=MICRO,
    sampling=models.Sampling(),
    ipa_config=ipa.IPAConfig(),
    optimizer=optimizer,
    micro_rows=3,
    num_trajectories=3,
  )
  assert float(metrics["grad_norm"]) == pytest.approx(expected["grad_norm"], rel=1e-5)
  moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), want.params, state.params)
  assert min(jax.tree.leaves(moved)) > 1e-4
  for a, b in zip(jax.tree.leaves(got.params), jax.tree.leaves(want.params), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-4)  # Adam turns rounding of tiny gradients into steps


# --- the command ---------------------------------------------------------------------------------

GOOD = {"--preset": "micro", "--topology": "cpu:1", "--batch": "8", "--length": "64"}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"--preset": "macro"}, "no preset 'macro'; known are tiny, micro"),
    ({"--topology": "v9:2x2"}, "no chip 'v9'; known are v5e, v5p, v6e and cpu"),
    ({"--topology": "v5p:4x4"}, "v5p slice has 3 dimensions, as v5p:4x4x4"),
    ({"--topology": "v5e:4xfour"}, "v5e slice has 2 dimensions, as v5e:4x4"),
    ({"--topology": "cpu:none"}, "write cpu:8"),
    ({"--batch": "0"}, "--batch must be 1 or more, got 0"),
    ({"--mesh": "fsdp=two"}, "'fsdp=two' is not one of data=N, fsdp=N"),
    ({"--mesh": "pipeline=2"}, "'pipeline=2' is not one of"),
    ({"--mesh": "fsdp=3"}, "fsdp=3 does not multiply to the 1 devices"),
  ],
)
def test_bad_input_is_one_line(changes, message, capsys):
  argv = [f"{name}={value}" for name, value in (GOOD | changes).items()]
  assert plan_cli.main(argv) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1


@pytest.mark.devices8
def test_a_mesh_that_does_not_divide_is_named_before_compiling(capsys):
  argv = [f"{k}={v}" for k, v in (GOOD | {"--topology": "cpu:8", "--mesh": "tensor=8"}).items()]
  assert plan_cli.main(argv) == 2
  error = capsys.readouterr().err
  assert "model.num_attention_heads 2 does not split over tensor=8" in error
  assert "compiling" not in error


def test_without_libtpu_the_line_to_install_it(monkeypatch, capsys):
  monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
  monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
  argv = [f"{k}={v}" for k, v in (GOOD | {"--topology": "v5e:2x2"}).items()]
  assert plan_cli.main(argv) == 2
  assert 'pip install "rome[tpu]"' in capsys.readouterr().err


def test_default_mesh_splits_rows_first():
  assert plan.default_mesh(64, 64) == {"fsdp": 64, "context": 1}
  assert plan.default_mesh(64, 16) == {"fsdp": 16, "context": 4}
  assert plan.default_mesh(8, 12) == {"fsdp": 4, "context": 2}


def _command(*argv: str) -> list[str]:
  return [sys.executable, "-m", "rome.cli", "plan", *argv]


@pytest.mark.slow
def test_json_of_the_command():
  argv = [f"{k}={v}" for k, v in (GOOD | {"--topology": "cpu:4"}).items()]
  done = subprocess.run(
    _command(*argv, "--json", "--steps", "decode"), capture_output=True, text=True, check=True
  )
  (line,) = done.stdout.splitlines()
  report = json.loads(line)
  assert (report["preset"], report["devices"], report["mesh"]) == ("micro", 4, {"fsdp": 4})
  assert report["compute"]["decode"]["dtype"] == "bfloat16"
  assert list(report["steps"]) == ["decode"]


@pytest.mark.slow
def test_ctrl_c_ends_a_compilation():
  argv = [f"{k}={v}" for k, v in (GOOD | {"--preset": "bench_small"}).items()]
  with subprocess.Popen(_command(*argv), stderr=subprocess.PIPE, text=True) as process:
    assert process.stderr.readline().startswith("rome plan: compiling the train step")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
  assert process.returncode == 130
  assert error == "rome plan: interrupted\n"


# --- TPUs ----------------------------------------------------------------------------------------


def _tpu_plan(*argv: str) -> dict:
  assert LIBTPU.exists(), "no TPU compiler: run scripts/setup_libtpu.sh"
  env = os.environ | {"TPU_LIBRARY_PATH": str(LIBTPU)}
  command = _command(*argv, "--json")
  done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_tiny_fits_on_four_chips():
  report = _tpu_plan("--preset=tiny", "--topology=v5e:2x2", "--batch=4", "--length=256")
  assert report["compute"]["train"]["attention"] == "splash"
  assert report["compute"]["train"]["experts"] == "megablox"
  for step in report["steps"].values():
    assert step["fits"] is True
    assert step["memory"]["peak"] < step["memory"]["limit"]
    roofline = step["roofline"]
    assert roofline["bound"] == max(roofline["seconds"], key=roofline["seconds"].get)
    assert 0 < roofline["mfu"] < 1
  tokens_per_second = report["steps"]["train"]["roofline"]["tokens_per_second"]
  assert tokens_per_second * max(report["steps"]["train"]["roofline"]["seconds"].values()) == (
    pytest.approx(4 * 256)
  )


@pytest.mark.slow
def test_what_does_not_fit_is_said_by_the_compiler():
  report = _tpu_plan(
    "--preset=dense_1b",
    "--topology=v5e:2x2",
    "--batch=4",
    "--length=32768",
    "--remat=none",
    "--steps=train",
  )
  step = report["steps"]["train"]
  assert step["fits"] is False
  assert step["memory"]["peak"] > step["memory"]["limit"] == 15.75 * 2**30


@pytest.mark.slow
def test_a_mesh_may_split_an_axis_of_the_torus():
  """fsdp=8 and context=2 multiply to 4x4, but neither is a product of whole axes of it."""
  report = _tpu_plan(
    "--preset=tiny",
    "--topology=v6e:4x4",
    "--batch=8",
    "--length=2048",
    "--mesh=fsdp=8,context=2",
    "--steps=train",
  )
  assert report["steps"]["train"]["fits"] is True
