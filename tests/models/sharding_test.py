"""The table, the meshes that fit it, and the numbers: a mesh changes where things lie, no more."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from rome import models
from rome.models import lora, sharding
from rome.models.logprob_head import head_logps
from tests.models import meshes


def abstract(**sizes):
  return AbstractMesh(tuple(sizes.get(name, 1) for name in sharding.AXES), sharding.AXES)


def shapes_of(config, stacked=False):
  def init(key):
    params = models.init_params(config, key)
    return models.stack_layers(config, params) if stacked else params

  return jax.eval_shape(init, jax.random.key(0))


def test_the_table_of_a_sparse_model():
  specs = sharding.param_specs(shapes_of(meshes.MOE))
  assert specs["embed_tokens"]["embedding"] == P("tensor", "fsdp")
  assert specs["lm_head"]["kernel"] == P("fsdp", "tensor")
  assert specs["norm"]["scale"] == P(None)
  layer = specs["layers_1"]
  assert layer["attn"]["q_proj"]["kernel"] == P("fsdp", "tensor", None)
  assert layer["attn"]["k_proj"]["kernel"] == P("fsdp", "tensor", None)
  assert layer["attn"]["o_proj"]["kernel"] == P("tensor", None, "fsdp")
  assert layer["attn"]["q_norm"]["scale"] == P(None)
  assert layer["mlp"]["router"] == P("fsdp", None)
  assert layer["mlp"]["gate_up_proj"] == P("expert", "fsdp", "tensor")
  assert layer["mlp"]["down_proj"] == P("expert", "tensor", "fsdp")
  dense = specs["layers_0"]["mlp"]
  assert dense["gate_proj"]["kernel"] == dense["up_proj"]["kernel"] == P("fsdp", "tensor")
  assert dense["down_proj"]["kernel"] == P("tensor", "fsdp")


def test_biases_lie_as_the_outputs_they_are_added_to():
  attn = sharding.param_specs(shapes_of(meshes.DENSE))["layers_0"]["attn"]
  assert attn["v_proj"]["bias"] == P("tensor", None)
  assert attn["o_proj"]["bias"] == P("fsdp")


@pytest.mark.parametrize("stacked", [False, True])
def test_adapters_lie_as_the_sides_of_their_kernels(stacked):
  config = models.PRESETS["micro"]

  def adapted(key):
    params = models.init_params(config, key)
    params = models.stack_layers(config, params) if stacked else params
    targets = ("q_proj", "o_proj", "experts.gate_up_proj", "experts.down_proj")
    return lora.add_lora(config, params, key, 4, 8.0, targets)

  layer = sharding.param_specs(jax.eval_shape(adapted, jax.random.key(0)))
  layer = layer["layers_0_1" if stacked else "layers_0"]
  front = (None,) if stacked else ()  # layers are not split
  attn, mlp = layer["attn"], layer["mlp"]
  assert attn["q_proj"]["kernel"] == P(*front, "fsdp", "tensor", None)
  assert attn["q_proj"]["lora_a"] == P(*front, "fsdp", None)
  assert attn["q_proj"]["lora_b"] == P(*front, None, "tensor", None)
  assert attn["q_proj"]["lora_alpha"] == P(*front)
  assert attn["o_proj"]["lora_a"] == P(*front, "tensor", None, None)
  assert attn["o_proj"]["lora_b"] == P(*front, None, "fsdp")
  assert mlp["gate_up_proj_lora_a"] == P(*front, "expert", "fsdp", None)
  assert mlp["gate_up_proj_lora_b"] == P(*front, "expert", None, "tensor")
  assert mlp["down_proj_lora_b"] == P(*front, "expert", None, "fsdp")


def test_an_optimisers_state_lies_as_the_parameters_do():
  shapes = shapes_of(meshes.MOE, stacked=True)
  state = jax.eval_shape(optax.adamw(1e-3).init, shapes)
  specs = sharding.param_specs(state)
  assert specs[0].count == P()
  assert specs[0].mu == specs[0].nu == sharding.param_specs(shapes)


def test_a_mesh_without_an_axis_does_not_split_by_it():
  mesh = AbstractMesh((2, 2), ("data", "tensor"))
  specs = sharding.param_specs({"lm_head": {"kernel": jnp.zeros((4, 4))}}, mesh)
  assert specs == {"lm_head": {"kernel": P(None, "tensor")}}


@pytest.mark.parametrize(
  ("tree", "words"),
  [
    ({"attn": {"x_proj": {"kernel": jnp.zeros((2, 2))}}}, "no sharding rule.*attn/x_proj/kernel"),
    ({"attn": {"x_proj": {"lora_a": jnp.zeros((2, 2))}}}, "no sharding rule.*attn/x_proj/lora_a"),
    ({"mlp": {"w_lora_a": jnp.zeros((2, 2))}}, "no sharding rule.*mlp/w_lora_a"),
    ({"mlp": {"gate": jnp.zeros((2, 2))}}, "no sharding rule.*mlp/gate"),
    ({"norm": {"scale": jnp.zeros((2, 2))}}, "norm/scale has rank 2"),
    ({"lm_head": {"kernel": jnp.zeros((3, 4))}}, "lm_head/kernel: its hidden axis of 3.*fsdp=2"),
  ],
)
def test_a_parameter_that_the_table_does_not_fit_is_named(tree, words):
  with pytest.raises(ValueError, match=words):
    sharding.param_shardings(abstract(fsdp=2), tree)


@pytest.mark.parametrize(
  ("sizes", "words"),
  [
    ({"fsdp": 3}, "fsdp=3 does not multiply to the 2 devices"),
    ({"fsdp": 1}, "1 does not multiply to the 2 devices"),
    ({"data": 2, "fsdp": 2}, r"data=2 \* fsdp=2 does not multiply"),
    ({"data": -1, "tensor": -1, "fsdp": 1}, "only one axis may be -1, got data and tensor"),
    ({"expert": 0}, "mesh.expert must be a positive int"),
    ({"context": 2.0}, "mesh.context must be a positive int"),
  ],
)
def test_sizes_that_make_no_mesh_are_named(sizes, words):
  with pytest.raises(ValueError, match=words):
    sharding.make_mesh(**sizes, devices=jax.devices()[:1] * 2)


def odd(config, name):
  return dataclasses.replace(config, **{name: 7})


MODEL, DENSE = models.PRESETS["qwen3_30b_a3b"], models.PRESETS["smollm2_135m"]


@pytest.mark.parametrize(
  ("config", "sizes", "rows", "length", "words"),
  [
    (MODEL, {"fsdp": 3}, 3, 8, "model.hidden_size 2048 does not split over fsdp=3"),
    (MODEL, {"tensor": 3}, 1, 8, "model.num_attention_heads 32 .* tensor=3"),
    (MODEL, {"tensor": 8}, 1, 8, "model.num_key_value_heads 4 .* tensor=8"),
    (MODEL, {"expert": 3}, 3, 8, "model.num_experts 128 .* expert=3"),
    (MODEL, {"fsdp": 2, "expert": 2}, 6, 8, r"the batch 6 .* fsdp=2 \* expert=2"),
    (MODEL, {"context": 4}, 1, 12, r"the length of a row 12 is no multiple of 2 \* context=4"),
    (DENSE, {"expert": 2}, 2, 8, "expert=2: the model has no experts"),
    (odd(DENSE, "vocab_size"), {"tensor": 3}, 1, 8, "model.vocab_size 7 .* tensor=3"),
    (odd(DENSE, "intermediate_size"), {"tensor": 3}, 1, 8, "intermediate_size 7 .* tensor=3"),
    (odd(MODEL, "moe_intermediate_size"), {"tensor": 2}, 1, 8, "intermediate_size 7 .* tensor=2"),
    (odd(MODEL, "hidden_size"), {"tensor": 2}, 1, 8, "hidden_size 7 .* tensor=2"),
  ],
)
def test_what_a_mesh_does_not_divide_is_named(config, sizes, rows, length, words):
  mesh = abstract(**sizes)
  with pytest.raises(ValueError, match=words):
    sharding.check_mesh(config, mesh, rows, length)


def test_meshes_that_divide_pass():
  sharding.check_mesh(DENSE, abstract(tensor=3, data=2), 2, 7)
  sharding.check_mesh(MODEL, abstract(fsdp=8, expert=4, context=2), 32, 32_768)
  sharding.param_shardings(abstract(fsdp=8, expert=4, tensor=2), shapes_of(MODEL, stacked=True))


def test_without_a_mesh_nothing_is_constrained():
  x = jnp.ones((3, 5))
  assert sharding.constrain(x, "batch", "length") is x
  assert sharding.constrain_params({"x": x})["x"] is x


# --- eight devices -------------------------------------------------------------------------------


# Of each array, the part on one device of fsdp 2 x expert 2 x tensor 2.
PARTS = {
  ("embed_tokens", "embedding"): (32, 16),  # of 64, 32
  ("layers_0", "attn", "q_proj", "kernel"): (16, 2, 8),  # of 32, 4, 8
  ("layers_0", "attn", "k_proj", "kernel"): (16, 1, 8),  # of 32, 2, 8
  ("layers_0", "mlp", "up_proj", "kernel"): (16, 12),  # of 32, 24
  ("layers_1_2", "attn", "o_proj", "kernel"): (2, 2, 8, 16),  # of 2, 4, 8, 32
  ("layers_1_2", "mlp", "gate_up_proj"): (2, 2, 16, 16),  # of 2, 4, 32, 32
  ("layers_1_2", "mlp", "down_proj"): (2, 2, 8, 16),  # of 2, 4, 16, 32
  ("layers_1_2", "post_norm", "scale"): (2, 32),
}


def local(tree, path=()):
  for key in path:
    tree = tree[key]
  shapes = {shard.data.shape for shard in tree.addressable_shards}
  assert len(shapes) == 1
  return shapes.pop()


@pytest.mark.devices8
@pytest.mark.slow
def test_each_device_holds_its_share_of_parameters_and_moments():
  mesh = sharding.make_mesh(fsdp=2, expert=2, tensor=2)
  params, rows = meshes.put(mesh, meshes.params_of(meshes.DEEP, stacked=True), meshes.batch())
  moments = optax.adamw(1e-3).init(params)
  moments = jax.device_put(moments, sharding.param_shardings(mesh, moments))[0].mu
  for path, shape in PARTS.items():
    assert local(params, path) == local(moments, path) == shape, path
  assert local(rows[0]) == (2, 32)  # of 8, 32


@pytest.mark.devices8
@pytest.mark.slow
def test_each_device_holds_its_share_of_activations():
  mesh = sharding.make_mesh(fsdp=2, expert=2, context=2)
  params, rows = meshes.put(mesh, meshes.params_of(meshes.MOE), meshes.batch())
  hidden_states = jax.jit(models.hidden_states, static_argnums=0)
  with jax.set_mesh(mesh):
    x, stats = hidden_states(meshes.MOE, params, *rows)
  assert local(x) == (2, 16, 32)  # of 8, 32, 32
  assert local(stats["choices"]) == (1, 2, 16, 2)  # of 1, 8, 32, 2
  assert local(stats["load"]) == (1, 4)


@pytest.mark.devices8
@pytest.mark.slow
def test_a_model_can_be_born_on_its_mesh():
  want = meshes.params_of(meshes.MOE)
  mesh = sharding.make_mesh(fsdp=4, expert=2)
  with jax.set_mesh(mesh):
    init = jax.jit(
      lambda key: models.init_params(meshes.MOE, key),
      out_shardings=sharding.param_shardings(mesh, want),
    )
    got = init(jax.random.key(0))
  plain = jax.jit(models.init_params, static_argnums=0)(meshes.MOE, jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, got, plain)
  assert local(got["lm_head"]["kernel"]) == (8, 64)


SMALL = [
  (1, {}),
  (4, {"data": 2, "fsdp": 2}),
  (4, {"fsdp": 2, "expert": 2}),
  (8, {"fsdp": 2, "expert": 2, "tensor": 2}),
  (8, {"context": 8, "fsdp": 1}),
  (8, {"fsdp": 2, "context": 2, "tensor": 2}),
]
CASES = [("moe", meshes.MOE, "padded", False, *case) for case in SMALL]
CASES += [
  ("dense", meshes.DENSE, "padded", False, *case) for case in SMALL if "expert" not in case[1]
]
CASES += [
  ("stacked", meshes.DEEP, "ragged", True, 8, {"fsdp": 2, "expert": 2, "tensor": 2}),
  ("stacked", meshes.DEEP, "padded", True, 8, {"fsdp": 2, "expert": 2, "context": 2}),
]


@pytest.mark.devices8
@pytest.mark.slow
@pytest.mark.parametrize(("name", "config", "experts", "stacked", "count", "sizes"), CASES)
def test_gradients_are_those_of_one_device(name, config, experts, stacked, count, sizes):
  compute = models.Compute(experts=experts, remat="layer" if stacked else "none")
  params, rows = meshes.params_of(config, stacked), meshes.batch()
  (want, want_choices), want_grads = meshes.gradients(config, compute, params, *rows)
  mesh = meshes.mesh_of(count, **sizes)
  with jax.set_mesh(mesh):
    sharding.check_mesh(config, mesh, meshes.ROWS, meshes.LENGTH)
    params, rows = meshes.put(mesh, params, rows)
    (got, choices), grads = meshes.gradients(config, compute, params, *rows)
  # The loss is a sum of terms of order 1 that cancel: what is left says nothing of their rounding.
  assert abs(got - want) <= 1e-5 * max(1.0, abs(want))
  meshes.assert_same_gradients(grads, want_grads)
  for path, part in jax.tree_util.tree_leaves_with_path(params):
    grad = functools.reduce(lambda tree, key: tree[key.key], path, grads)
    assert grad.sharding.is_equivalent_to(part.sharding, grad.ndim), path
  if want_choices is not None:
    np.testing.assert_array_equal(choices, want_choices)


@pytest.mark.devices8
@pytest.mark.slow
def test_adapters_and_the_chunked_head_have_the_gradients_of_one_device():
  config, rows = meshes.DEEP, meshes.batch()
  params = meshes.params_of(config, stacked=True)
  params = lora.add_lora(config, params, jax.random.key(1), 4, 8.0, tuple(lora.TARGETS))
  # B begins at zero, which would leave A without a gradient.
  wave = lambda x: x + 0.05 * jnp.sin(jnp.arange(x.size)).reshape(x.shape)  # noqa: E731
  trained, frozen = lora.split(jax.tree.map(wave, params))

  def loss(trained, frozen, tokens, *where):
    params = lora.join(trained, frozen)
    x, _ = models.hidden_states(config, params, tokens, *where, models.Compute(remat="layer"))
    logps, _ = head_logps(x, models.head_kernel(config, params), tokens, models.Sampling())
    return jnp.mean(logps * jnp.sin(jnp.arange(logps.size)).reshape(logps.shape))

  gradients = jax.jit(jax.grad(loss))
  want = gradients(trained, frozen, *rows)
  mesh = sharding.make_mesh(fsdp=2, expert=2, tensor=2)
  with jax.set_mesh(mesh):
    frozen = jax.device_put(frozen, sharding.param_shardings(mesh, frozen))
    trained, rows = meshes.put(mesh, trained, rows)
    got = gradients(trained, frozen, *rows)
  meshes.assert_same_gradients(got, want)
  assert local(got, ("layers_1_2", "mlp", "gate_up_proj_lora_a")) == (2, 2, 16, 4)  # of 2, 4, 32, 4


@pytest.mark.devices8
@pytest.mark.slow
def test_a_cache_grows_on_a_mesh_as_on_one_device():
  config, (tokens, _, _) = meshes.MOE, meshes.batch(length=6)
  counts = np.array([6, 1, 4, 0, 6, 2, 3, 5], np.int32)
  extend = jax.jit(models.extend, static_argnums=0)

  def two_steps(params):
    cache = models.init_cache(config, meshes.ROWS, 12)
    first, cache, _ = extend(config, params, cache, tokens, counts)
    second, cache, _ = extend(config, params, cache, tokens[:, :1], np.ones(8, np.int32))
    return np.where((counts > 0)[:, None], first, 0), second

  want = two_steps(meshes.params_of(config))
  mesh = sharding.make_mesh(fsdp=2, context=2, tensor=2)
  with jax.set_mesh(mesh):
    got = two_steps(meshes.put(mesh, meshes.params_of(config), ())[0])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
