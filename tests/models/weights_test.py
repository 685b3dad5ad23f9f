"""Weights survive the disk bit for bit, in any slices; a file that does not fit is named."""

import json
import os
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from rome import models
from rome.models import hf_files, hf_names, sharding

CONFIG = models.ModelConfig(
  vocab_size=24,
  hidden_size=16,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=6,
  num_experts=4,
  num_experts_per_tok=2,
  moe_intermediate_size=8,
  intermediate_size=20,
  mlp_only_layers=(0,),
  attention_bias=True,
  tie_word_embeddings=False,
)
DENSE = models.ModelConfig(
  vocab_size=24,
  hidden_size=16,
  num_hidden_layers=2,
  num_attention_heads=2,
  num_key_value_heads=1,
  head_dim=8,
  intermediate_size=12,
)
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
FUSED = "model.layers.1.mlp.experts.gate_up_proj"


def make_params(config, stacked=False, seed=0, dtype="float32"):
  """Random ones; numpy, so that nothing compiles."""
  rng = np.random.default_rng(seed)
  return traverse_util.unflatten_dict(
    {
      path: rng.normal(size=leaf.shape).astype(jnp.dtype(dtype))
      for path, leaf in hf_names.leaves(config, stacked).items()
    }
  )


def stack(params):
  """Layers 1 and 2 of CONFIG as one."""
  pair = (params["layers_1"], params["layers_2"])
  out = {k: v for k, v in params.items() if k not in ("layers_1", "layers_2")}
  return out | {"layers_1_2": jax.tree.map(lambda *x: np.stack(x), *pair)}


def assert_same(a, b):
  a, b = (traverse_util.flatten_dict(x, sep=".") for x in (a, b))
  assert a.keys() == b.keys()
  for key, value in a.items():
    np.testing.assert_array_equal(value, b[key], strict=True, err_msg=key)


@pytest.fixture(scope="module")
def params():
  return make_params(CONFIG)


@pytest.fixture(scope="module")
def original(tmp_path_factory, params):
  path = tmp_path_factory.mktemp("original")
  models.save(path, CONFIG, params)
  return path


@pytest.fixture
def saved(tmp_path, original):
  return shutil.copytree(original, tmp_path / "m")


@pytest.mark.parametrize("config", [CONFIG, DENSE, models.PRESETS["tiny"]])
@pytest.mark.parametrize("stacked", [False, True])
def test_the_arrays_are_those_of_the_decoder(config, stacked):
  def init():
    params = models.init_params(config, jax.random.key(0))
    return models.stack_layers(config, params) if stacked else params

  want = traverse_util.flatten_dict(jax.eval_shape(init))
  found = hf_names.leaves(config, stacked)
  assert {k: leaf.shape for k, leaf in found.items()} == {k: x.shape for k, x in want.items()}


def test_the_layout_on_disk(original, params):
  """Literal indices: output before input, heads joined, gate in front of up."""
  flat = safetensors.numpy.load_file(original / "model.safetensors")
  attn, mlp = params["layers_1"]["attn"], params["layers_1"]["mlp"]
  at = "model.layers.1."
  # Head 2, place 4 of it, from input 7; out of head 3, place 5, to output 9.
  assert flat[at + "self_attn.q_proj.weight"][2 * 6 + 4, 7] == attn["q_proj"]["kernel"][7, 2, 4]
  assert flat[at + "self_attn.o_proj.weight"][9, 3 * 6 + 5] == attn["o_proj"]["kernel"][3, 5, 9]
  assert flat[at + "self_attn.k_proj.bias"][1 * 6 + 2] == attn["k_proj"]["bias"][1, 2]
  assert flat[at + "mlp.experts.2.gate_proj.weight"][5, 7] == mlp["gate_up_proj"][2, 7, 5]
  assert flat[at + "mlp.experts.2.up_proj.weight"][5, 7] == mlp["gate_up_proj"][2, 7, 8 + 5]
  assert flat[at + "mlp.experts.3.down_proj.weight"][7, 5] == mlp["down_proj"][3, 5, 7]
  assert flat[at + "mlp.gate.weight"][3, 7] == mlp["router"][7, 3]
  assert flat["lm_head.weight"][20, 7] == params["lm_head"]["kernel"][7, 20]
  down = params["layers_0"]["mlp"]["down_proj"]["kernel"]
  assert flat["model.layers.0.mlp.down_proj.weight"][7, 19] == down[19, 7]
  assert json.loads((original / "config.json").read_text())["model_type"] == "qwen3_moe"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stacked", [False, True])
def test_round_trip_is_exact(tmp_path, dtype, stacked):
  params = make_params(CONFIG, stacked, dtype=dtype)
  models.save(tmp_path, CONFIG, jax.tree.map(jnp.asarray, params), shard_bytes=3000)
  assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 5
  config, loaded = models.load(tmp_path, dtype=dtype, stacked=stacked)
  assert config == CONFIG
  assert_same(loaded, params)


def test_stacking_is_only_layout(tmp_path, original, params):
  stacked = stack(params)
  assert_same(models.load(original, stacked=True)[1], stacked)
  models.save(tmp_path, CONFIG, stacked)
  assert_same(models.load(tmp_path)[1], params)


def test_types_are_cast(tmp_path):
  params = make_params(DENSE)
  models.save(tmp_path, DENSE, params)
  half = models.load(tmp_path, dtype="bfloat16")[1]
  assert_same(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
  models.save(tmp_path, DENSE, half)
  assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
  assert_same(models.load(tmp_path)[1], jax.tree.map(lambda x: x.astype(np.float32), half))
  with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got 'f8'"):
    models.load(tmp_path, dtype="f8")


def test_shards_are_as_large_as_asked(tmp_path, params):
  models.save(tmp_path, CONFIG, params, shard_bytes=4000)
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
  sizes = []
  for file in sorted(tmp_path.glob("*.safetensors")):
    flat = safetensors.numpy.load_file(file)
    assert all(index["weight_map"][name] == file.name for name in flat)
    sizes.append(sum(x.nbytes for x in flat.values()))
  assert max(sizes) <= 4000
  assert sum(sizes) == index["metadata"]["total_size"]
  assert sum(sizes) == sum(x.nbytes for x in jax.tree.leaves(params))
  assert file.name == f"model-{len(sizes):05}-of-{len(sizes):05}.safetensors"


def test_any_slice_is_read(original, params):
  """Also slices that no sharding of today makes: of head places, across gate and up."""
  rng = np.random.default_rng(1)
  tensors = hf_files.open_tensors(original)
  for stacked in (False, True):
    tree = stack(params) if stacked else params
    flat = traverse_util.flatten_dict(tree)
    for path, leaf in hf_names.leaves(CONFIG, stacked).items():
      for _ in range(4):
        ends = [sorted(rng.choice(n + 1, 2, replace=False)) for n in leaf.shape]
        index = tuple(slice(int(lo), int(hi)) for lo, hi in ends)
        got = leaf.read(index, lambda name, i: tensors[name].read(i), np.dtype("float32"))
        np.testing.assert_array_equal(got, flat[path][index], err_msg=f"{path} {index}")


@pytest.fixture
def counted(monkeypatch):
  """Bytes of each read of a tensor, and of each array put together from them."""
  reads, arrays = [], []
  read, build = hf_files.Tensor.read, hf_names.Leaf.read

  def counted_read(self, index):
    x = read(self, index)
    reads.append(x.nbytes)
    return x

  def counted_build(self, *args):
    x = build(self, *args)
    arrays.append(x.nbytes)
    return x

  monkeypatch.setattr(hf_files.Tensor, "read", counted_read)
  monkeypatch.setattr(hf_names.Leaf, "read", counted_build)
  return reads, arrays


@pytest.mark.devices8
@pytest.mark.parametrize("stacked", [False, True])
def test_a_mesh_reads_each_byte_once_and_only_slices(original, params, stacked, counted):
  mesh = sharding.make_mesh(fsdp=2, expert=2, tensor=2)
  config, loaded = models.load(original, mesh, stacked=stacked)
  want = stack(params) if stacked else params
  assert_same(loaded, want)
  shardings = sharding.param_shardings(mesh, want)
  assert jax.tree.map(lambda x: x.sharding, loaded) == shardings
  reads, arrays = counted
  assert sum(reads) == sum(x.nbytes for x in jax.tree.leaves(params))
  # The largest thing ever on the host is one device's slice of one array: not all of it.
  slices = [max(s.data.nbytes for s in x.addressable_shards) for x in jax.tree.leaves(loaded)]
  assert max(arrays) == max(slices)
  assert max(slices) < max(x.nbytes for x in jax.tree.leaves(loaded))


@pytest.mark.devices8
def test_a_mesh_that_does_not_divide_stops_before_reading(original, counted):
  with pytest.raises(ValueError, match="kv_heads axis of 2 does not split over tensor=4"):
    models.load(original, sharding.make_mesh(fsdp=2, tensor=4))
  assert counted == ([], [])


# One of two processes with four devices each; prints what it read and what its devices hold.
HALF = """
import json, sys
import jax, numpy as np
from flax import traverse_util
jax.distributed.initialize("localhost:" + sys.argv[2], 2, int(sys.argv[3]))
from rome import models
from rome.models import hf_files, sharding

read, count = hf_files.Tensor.read, 0

def counted(self, index):
  global count
  x = read(self, index)
  count += x.nbytes
  return x

_, whole = models.load(sys.argv[1], stacked=True)
hf_files.Tensor.read = counted
mesh = sharding.make_mesh(fsdp=2, expert=2, tensor=2)
config, params = models.load(sys.argv[1], mesh, stacked=True)
models.save(sys.argv[4], config, params)
whole, mine = traverse_util.flatten_dict(whole), {}
for key, x in traverse_util.flatten_dict(params).items():
  for shard in x.addressable_shards:
    np.testing.assert_array_equal(shard.data, np.asarray(whole[key])[shard.index])
    mine[key, str(shard.index)] = shard.data.nbytes
print(json.dumps([count, sum(mine.values()), sum(x.nbytes for x in whole.values())]))
"""


@pytest.mark.slow
def test_two_processes_read_their_halves_and_save_the_whole(original, params, tmp_path):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
  flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
  halves = [
    subprocess.Popen(
      [sys.executable, "-c", HALF, original, port, str(i), tmp_path],
      env=os.environ | flags,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  try:
    outputs = [half.communicate(timeout=240) for half in halves]
  finally:
    for half in halves:
      half.kill()
  for half, (out, err) in zip(halves, outputs, strict=True):
    assert half.returncode == 0, err
    read, held, whole = json.loads(out.splitlines()[-1])
    assert read == held
    assert read < 0.52 * whole  # norms and biases are whole in both
  assert_same(models.load(tmp_path)[1], params)


def edit(path, change, name="model.safetensors"):
  """Applies `change` to the dict of tensors on disk."""
  flat = dict(safetensors.numpy.load_file(path / name))
  change(flat)
  safetensors.numpy.save_file(flat, path / name)


def fill(value):
  def change(flat):
    flat[EXPERT][3, 2] = value

  return change


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda flat: flat.pop(EXPERT), f"missing tensor {EXPERT}"),
    (lambda flat: flat.update(more=np.zeros(3, np.float32)), "unknown tensor more"),
    (
      lambda flat: flat.update({EXPERT: flat[EXPERT][:, :-1].copy()}),
      rf"{EXPERT} has shape \(8, 15\), config.json asks for \(8, 16\)",
    ),
    (
      lambda flat: flat.update({EXPERT: flat[EXPERT].astype(np.int32)}),
      f"{EXPERT} has type I32, want one of F32, BF16, F16",
    ),
    (
      lambda flat: flat.update({EXPERT: flat[EXPERT].astype(np.float64)}),
      f"{EXPERT} has type F64",
    ),
    (fill(np.nan), f"{EXPERT} has NaN or infinite values"),
    (fill(-np.inf), f"{EXPERT} has NaN or infinite values"),
  ],
)
@pytest.mark.parametrize("stacked", [False, True])
def test_a_bad_tensor_is_named(saved, change, message, stacked):
  edit(saved, change)
  with pytest.raises(ValueError, match=f"{saved}: {message}"):
    models.load(saved, stacked=stacked)


def test_what_a_narrow_type_cannot_hold(saved):
  edit(saved, fill(70_000.0))
  assert models.load(saved, dtype="bfloat16")
  with pytest.raises(ValueError, match=rf"{EXPERT} has NaN or infinite values \(as float16\)"):
    models.load(saved, dtype="float16")


@pytest.mark.parametrize("keep", [0, 4, 8, 200, 5000, -1])
def test_a_truncated_file(saved, keep):
  file = saved / "model.safetensors"
  file.write_bytes(file.read_bytes()[:keep])
  with pytest.raises(ValueError, match=f"{file} is damaged or truncated: "):
    models.load(saved)


def test_damaged_bytes_never_break_out(saved, params):
  """A byte of the header is changed: the same model, or a ValueError that names the directory."""
  file, rng, refused = saved / "model.safetensors", np.random.default_rng(0), 0
  good = file.read_bytes()
  header = 8 + int.from_bytes(good[:8], "little")
  for _ in range(60):
    at = int(rng.integers(header))
    file.write_bytes(good[:at] + bytes([int(rng.integers(256))]) + good[at + 1 :])
    try:
      loaded = models.load(saved)[1]
    except ValueError as e:
      assert str(saved) in str(e)
      refused += 1
    else:
      assert_same(loaded, params)
  assert refused > 30


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_file(saved, name):
  (saved / name).unlink()
  with pytest.raises(ValueError, match=f"(missing file|cannot read) {saved / name}"):
    models.load(saved)


def test_no_directory(tmp_path):
  with pytest.raises(ValueError, match="cannot read .*nowhere/config.json: No such file"):
    models.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("{", "is no JSON: Expecting"),
    (b"\xff\xfe", "is no JSON: "),
    ("[]", "config.json must hold an object, got list"),
    ('{"model_type": "gpt2"}', "model_type must be one of"),
  ],
)
def test_a_config_that_is_none(saved, content, message):
  file = saved / "config.json"
  file.write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(ValueError, match=f"{file}:? {message}"):
    models.load(saved)


def test_a_config_that_does_not_fit(saved):
  raw = json.loads((saved / "config.json").read_text())
  (saved / "config.json").write_text(json.dumps(raw | {"vocab_size": 25}))
  with pytest.raises(ValueError, match=r"lm_head.weight has shape \(24, 16\), .* for \(25, 16\)"):
    models.load(saved)
  (saved / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 2}))
  with pytest.raises(ValueError, match="unknown tensor model.layers.2"):
    models.load(saved)
  (saved / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 9_000}))
  with pytest.raises(ValueError, match="num_hidden_layers=9000, but the files hold 68 tensors"):
    models.load(saved)


@pytest.fixture
def sharded(tmp_path, params):
  models.save(tmp_path / "s", CONFIG, params, shard_bytes=8000)
  return tmp_path / "s"


def first_two(path):
  return sorted(file.name for file in path.glob("*.safetensors"))[:2]


def test_a_tensor_in_two_shards(sharded):
  one, two = first_two(sharded)
  name, x = next(iter(safetensors.numpy.load_file(sharded / one).items()))
  edit(sharded, lambda flat: flat.update({name: x}), two)
  with pytest.raises(ValueError, match=f"{name} is in both {one} and {two}"):
    models.load(sharded)


def test_a_shard_and_the_index_differ(sharded):
  one, two = first_two(sharded)
  name = next(iter(safetensors.numpy.load_file(sharded / one)))
  edit(sharded, lambda flat: flat.update(more=np.zeros(3, np.float32)), one)
  with pytest.raises(ValueError, match=f"unknown tensor more in {one}"):
    models.load(sharded)
  edit(sharded, lambda flat: [flat.pop("more"), flat.pop(name)], one)
  with pytest.raises(ValueError, match=f"missing tensor {name}: .* says it is in {one}"):
    models.load(sharded)
  (sharded / two).unlink()
  with pytest.raises(ValueError, match=f"missing file {sharded / two}"):
    models.load(sharded)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("[]", "has no weight_map"),
    ('{"weight_map": {}}', "has no weight_map"),
    ('{"weight_map": {"a": "../b.safetensors"}}', "'../b.safetensors', which is no file name"),
    ('{"weight_map": {"a": 3}}', "a is in 3, which is no file name"),
    ("{", "is no JSON"),
  ],
)
def test_an_index_that_is_none(sharded, content, message):
  (sharded / "model.safetensors.index.json").write_text(content)
  with pytest.raises(ValueError, match=message):
    models.load(sharded)


def test_one_file_and_shards(sharded, original):
  shutil.copy(original / "model.safetensors", sharded)
  with pytest.raises(ValueError, match="has both model.safetensors and model.safetensors.index"):
    models.load(sharded)


def fuse(flat, layer):
  """Experts of a layer as transformers 5 holds them in memory: [experts, out, in]."""
  at = f"model.layers.{layer}.mlp.experts"
  parts = {
    p: np.stack([flat.pop(f"{at}.{e}.{p}.weight") for e in range(4)])
    for p in ("gate_proj", "up_proj", "down_proj")
  }
  flat[f"{at}.gate_up_proj"] = np.concatenate([parts["gate_proj"], parts["up_proj"]], 1)
  flat[f"{at}.down_proj"] = parts["down_proj"]


def test_fused_experts_are_read_too(saved, params):
  edit(saved, lambda flat: fuse(flat, 1))
  assert_same(models.load(saved)[1], params)
  expert = safetensors.numpy.load_file(saved / "model.safetensors")[FUSED][2, :8].copy()
  edit(saved, lambda flat: flat.update({EXPERT.replace("up_proj", "gate_proj"): expert}))
  with pytest.raises(ValueError, match="experts.2.gate_proj.weight"):
    models.load(saved)
  edit(saved, lambda flat: flat.update({FUSED: expert}))
  with pytest.raises(ValueError, match=rf"{FUSED} has shape \(8, 16\), which no fused"):
    models.load(saved)


def test_buffers_of_old_files_are_passed_over(saved, params):
  name = "model.layers.0.self_attn.rotary_emb.inv_freq"
  edit(saved, lambda flat: flat.update({name: np.ones(3, np.float32)}))
  assert_same(models.load(saved)[1], params)


def test_a_tied_head_must_be_the_embedding(tmp_path):
  params = make_params(DENSE)
  models.save(tmp_path, DENSE, params)
  head = params["embed_tokens"]["embedding"].copy()
  edit(tmp_path, lambda flat: flat.update({"lm_head.weight": head}))
  assert_same(models.load(tmp_path)[1], params)
  head[3, 2] += 1
  edit(tmp_path, lambda flat: flat.update({"lm_head.weight": head}))
  with pytest.raises(ValueError, match="lm_head.weight is not model.embed_tokens.weight, but"):
    models.load(tmp_path)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda attn: attn.pop("q_norm"), "missing parameter layers_1.attn.q_norm.scale"),
    (
      lambda attn: attn["q_norm"].update(scale=np.ones(7, np.float32)),
      r"layers_1.attn.q_norm.scale has shape \(7,\), want \(6,\)",
    ),
    (lambda attn: attn["q_norm"].update(scale=np.ones(6, np.int32)), "has type int32"),
    (lambda attn: attn["q_norm"].update(scale=np.full(6, np.nan, np.float32)), "has NaN"),
    (
      lambda attn: attn["q_proj"].update(lora_a=np.ones((16, 2), np.float32)),
      "unknown parameter layers_1.attn.q_proj.lora_a: merge adapters first",
    ),
  ],
)
def test_params_that_do_not_fit_are_not_saved(saved, params, change, message):
  broken = jax.tree.map(np.copy, params)
  change(broken["layers_1"]["attn"])
  before = sorted(os.listdir(saved))
  with pytest.raises(ValueError, match=message):
    models.save(saved, CONFIG, broken)
  assert sorted(os.listdir(saved)) == before
  assert_same(models.load(saved)[1], params)


class Killed(BaseException):
  """What no code expects."""


def whole_models(path):
  """Sizes of the models that can be loaded: the directory itself, or the one it had before."""
  found = []
  for place in (path, path / ".replaced"):
    try:
      found.append((place, *models.load(place)))
    except ValueError:
      continue
  return found


def test_a_save_that_is_killed_loses_nothing(tmp_path, monkeypatch, params):
  """Killed at each call that changes a directory, in turn: the old model or the new is whole."""
  path, step, outcomes = tmp_path / "m", 0, []
  dense = make_params(DENSE)
  (tmp_path / "m").mkdir()
  while True:
    models.save(path, CONFIG, params, shard_bytes=20_000)
    (path / "notes.txt").write_text("mine")
    step += 1
    left = [step]

    def count(name, left=left):
      function = getattr(os, name)

      def run(*args, **kwargs):
        left[0] -= 1
        if not left[0]:
          raise Killed
        return function(*args, **kwargs)

      return run

    with monkeypatch.context() as patch:
      for name in ("link", "mkdir", "replace", "unlink", "fsync", "rmdir"):
        patch.setattr(os, name, count(name))
      try:
        models.save(path, DENSE, dense)
        break
      except Killed:
        pass
    place, config, loaded = whole_models(path)[0]
    assert config in (CONFIG, DENSE)
    assert_same(loaded, params if config == CONFIG else dense)
    if place != path:
      with pytest.raises(ValueError, match=f"a save was interrupted; .* is whole in {place}"):
        models.load(path)
    outcomes.append((config == DENSE, place == path))
    # Saving again mends all.
    models.save(path, DENSE, dense)
    assert sorted(os.listdir(path)) == ["config.json", "model.safetensors", "notes.txt"]
    assert_same(models.load(path)[1], dense)
  assert sorted(os.listdir(path)) == ["config.json", "model.safetensors", "notes.txt"]
  # All three have been seen, in this order.
  assert list(dict.fromkeys(outcomes)) == [(False, True), (False, False), (True, True)]
