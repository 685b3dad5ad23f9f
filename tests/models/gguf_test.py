"""GGUF in: bits against the reference implementation, names and layouts by family, bad files."""

import gguf
import jax
import numpy as np
import pytest

from rome.models import ModelConfig, init_params
from rome.models.gguf import dequantize, load_gguf
from rome.text.gguf_file import Tensor

Q = gguf.GGMLQuantizationType
SIZES = {
  "vocab_size": 10,
  "hidden_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 8,
  "intermediate_size": 64,
  "rope_theta": 5e4,
  "rms_norm_eps": 1e-5,
  "max_position_embeddings": 128,
}
CONFIGS = {
  "llama": ModelConfig(**SIZES, qk_norm=False),
  "qwen3": ModelConfig(**SIZES, tie_word_embeddings=False),
  "qwen3moe": ModelConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
}


def interleave(x, heads):
  """Order of q and k rows in a llama file: (0, H/2, 1, H/2 + 1, ...) in each head."""
  width = x.shape[0] // heads
  order = [i // 2 + (i % 2) * (width // 2) for i in range(width)]
  return np.concatenate([x[h * width :][:width][order] for h in range(heads)])


def layer_tensors(arch, c, layer, i):
  """The tensors of one layer in the file, from our parameters, by explicit loops."""
  attn = {k: np.asarray(v["kernel"]) for k, v in layer["attn"].items() if "kernel" in v}
  joined = {k: attn[k].reshape(c.hidden_size, -1).T for k in ("q_proj", "k_proj", "v_proj")}
  if arch == "llama":
    joined["q_proj"] = interleave(joined["q_proj"], c.num_attention_heads)
    joined["k_proj"] = interleave(joined["k_proj"], c.num_key_value_heads)
  out = {
    "attn_norm": layer["input_norm"]["scale"],
    "ffn_norm": layer["post_norm"]["scale"],
    "attn_q": joined["q_proj"],
    "attn_k": joined["k_proj"],
    "attn_v": joined["v_proj"],
    "attn_output": attn["o_proj"].reshape(-1, c.hidden_size).T,
  }
  if c.qk_norm:
    out |= {f"attn_{n}_norm": layer["attn"][f"{n}_norm"]["scale"] for n in "qk"}
  mlp = layer["mlp"]
  if c.num_experts:
    gate_up = np.asarray(mlp["gate_up_proj"])
    f = gate_up.shape[-1] // 2
    out["ffn_gate_inp"] = np.asarray(mlp["router"]).T
    out["ffn_gate_exps"] = np.stack([e[:, :f].T for e in gate_up])
    out["ffn_up_exps"] = np.stack([e[:, f:].T for e in gate_up])
    out["ffn_down_exps"] = np.stack([e.T for e in np.asarray(mlp["down_proj"])])
  else:
    out |= {f"ffn_{n}": np.asarray(mlp[f"{n}_proj"]["kernel"]).T for n in ("gate", "up", "down")}
  return {f"blk.{i}.{k}.weight": np.asarray(v) for k, v in out.items()}


def metadata(arch, c):
  values = {
    "block_count": c.num_hidden_layers,
    "context_length": c.max_position_embeddings,
    "embedding_length": c.hidden_size,
    "feed_forward_length": c.intermediate_size,
    "attention.head_count": c.num_attention_heads,
    "attention.head_count_kv": c.num_key_value_heads,
    "attention.key_length": c.head_dim,
    "attention.value_length": c.head_dim,
    "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
    "rope.freq_base": c.rope_theta,
  }
  if c.num_experts:
    values |= {
      "expert_count": c.num_experts,
      "expert_used_count": c.num_experts_per_tok,
      "expert_feed_forward_length": c.moe_intermediate_size,
    }
  return {f"{arch}.{k}": v for k, v in values.items()}


def contents(arch):
  """Our parameters, and what the file of them holds: metadata and tensors."""
  c = CONFIGS[arch]
  random = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: init_params(c, jax.random.key(0)))
  params = jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), shapes)
  tensors = {
    "token_embd.weight": np.asarray(params["embed_tokens"]["embedding"]),
    "output_norm.weight": np.asarray(params["norm"]["scale"]),
  }
  if not c.tie_word_embeddings:
    tensors["output.weight"] = np.asarray(params["lm_head"]["kernel"]).T
  for i in range(c.num_hidden_layers):
    tensors |= layer_tensors(arch, c, params[f"layers_{i}"], i)
  return params, metadata(arch, c), tensors


def write(path, arch, keys, tensors, kind=Q.F32):
  writer = gguf.GGUFWriter(path, arch)
  for name, value in keys.items():
    add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
    (writer.add_string if isinstance(value, str) else add)(name, value)
  for name, x in tensors.items():
    if x.ndim == 1:
      writer.add_tensor(name, x.astype(np.float32))
    else:
      writer.add_tensor(name, gguf.quantize(x.astype(np.float32), kind), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.mark.parametrize("arch", CONFIGS)
@pytest.mark.slow
def test_each_family_comes_back_bit_for_bit(arch, tmp_path):
  params, keys, tensors = contents(arch)
  config, got = load_gguf(write(tmp_path / "a.gguf", arch, keys, tensors))
  assert config == CONFIGS[arch]
  jax.tree.map(np.testing.assert_array_equal, got, params)


@pytest.mark.parametrize("kind", [Q.F16, Q.Q8_0, Q.Q4_1])
def test_quantised_files_are_what_the_reference_makes_of_them(kind, tmp_path):
  _, keys, tensors = contents("qwen3moe")
  rounded = {
    k: x if x.ndim == 1 else gguf.dequantize(gguf.quantize(x.astype(np.float32), kind), kind)
    for k, x in tensors.items()
  }
  _, want = load_gguf(write(tmp_path / "a.gguf", "qwen3moe", keys, rounded))
  _, got = load_gguf(write(tmp_path / "b.gguf", "qwen3moe", keys, tensors, kind))
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("kind", [Q.F16, Q.Q8_0, Q.Q4_1])
def test_dequantisation_equals_the_reference_on_all_bytes(kind):
  block, size = gguf.GGML_QUANT_SIZES[kind]
  raw = np.random.default_rng(0).integers(0, 256, (64, 8 * size), np.uint8)
  for half in range(0, 4 if kind == Q.Q4_1 else 2, 2):
    raw[:, half + 1 :: size if block > 1 else 2] &= 0x3F  # keeps scales finite
  want = gguf.dequantize(raw, kind)
  got = dequantize("t", Tensor(want.shape, int(kind), 3), b"xyz" + raw.tobytes())
  np.testing.assert_array_equal(got, want)


def test_q4_1_by_hand():
  # Scale 0.5, minimum -1; byte 0x21 has nibble 1 at place 0 and nibble 2 at place 16.
  raw = np.array([0.5, -1.0], "<f2").tobytes() + bytes([0x21]) + bytes(15)
  got = dequantize("t", Tensor((32,), 3, 0), raw)
  assert got[0] == -0.5 and got[16] == 0.0 and set(np.delete(got, [0, 16])) == {-1.0}


def test_q8_0_by_hand():
  raw = np.array([0.25], "<f2").tobytes() + np.array([4, -8, *[0] * 30], np.int8).tobytes()
  assert dequantize("t", Tensor((32,), 8, 0), raw)[:3].tolist() == [1.0, -2.0, 0.0]


def test_other_types_of_parameters(tmp_path):
  params, keys, tensors = contents("llama")
  path = write(tmp_path / "a.gguf", "llama", keys, tensors)
  _, got = load_gguf(path, "bfloat16")
  want = jax.tree.map(lambda x: x.astype("bfloat16"), params)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  tensors["blk.1.ffn_up.weight"] = tensors["blk.1.ffn_up.weight"] * 1e6
  path = write(tmp_path / "b.gguf", "llama", keys, tensors)
  load_gguf(path)
  with pytest.raises(ValueError, match="blk.1.ffn_up.weight has values too large for float16"):
    load_gguf(path, "float16")


def without(name):
  return lambda keys, tensors: (keys | tensors, keys.pop(name, None), tensors.pop(name, None))


def put(name, value):
  return lambda keys, tensors: (keys if name in keys or "llama." in name else tensors).update(
    {name: value}
  )


@pytest.mark.parametrize(
  "change, message",
  [
    (without("blk.1.attn_q.weight"), "missing tensor blk.1.attn_q.weight"),
    (without("token_embd.weight"), "missing tensor token_embd.weight"),
    (put("rope_freqs.weight", np.ones(4)), "unknown tensor rope_freqs.weight"),
    (put("blk.2.attn_q.weight", np.ones((32, 32))), "unknown tensor blk.2.attn_q.weight"),
    (
      put("blk.0.attn_k.weight", np.ones((32, 32))),
      r"blk.0.attn_k.weight has shape \(32, 32\), the settings ask \(16, 32\)",
    ),
    (put("token_embd.weight", np.ones(32)), r"token_embd.weight has shape \(32,\)"),
    (put("output_norm.weight", np.full(32, np.nan)), "output_norm.weight has NaN or infinite"),
    (without("llama.block_count"), "missing setting llama.block_count"),
    (without("llama.context_length"), "missing setting llama.context_length"),
    (put("llama.block_count", 4_000_000_000), "llama.block_count = 4000000000, but 20 tensors"),
    (put("llama.expert_count", 8), "llama.expert_count = 8 is not supported"),
    (put("llama.rope.scaling.type", "yarn"), "unknown setting llama.rope.scaling.type = yarn"),
    (put("llama.rope.dimension_count", 4), "llama.rope.dimension_count = 4 is not supported"),
    (put("llama.vocab_size", 11), "llama.vocab_size = 11 is not supported: .* ask 10"),
    (put("llama.attention.head_count", 0), "num_attention_heads must be an int >= 1"),
    (put("llama.attention.head_count", "4"), "head_count must be int, got 4"),
    (put("llama.attention.head_count_kv", 3), "num_key_value_heads=3 must divide"),
    (put("llama.embedding_length", "x"), "embedding_length must be int, got x"),
  ],
)
@pytest.mark.slow
def test_wrong_files_are_named_errors(change, message, tmp_path):
  _, keys, tensors = contents("llama")
  change(keys, tensors)
  path = write(tmp_path / "a.gguf", "llama", keys, tensors)
  with pytest.raises(ValueError, match=f"a.gguf: .*({message})"):
    load_gguf(path)


def test_unsupported_quantisation_and_architecture(tmp_path):
  _, keys, tensors = contents("llama")
  path = write(tmp_path / "a.gguf", "llama", keys, tensors, Q.Q4_0)
  with pytest.raises(ValueError, match="token_embd.weight: quantisation 2 .* is not supported"):
    load_gguf(path)
  path = write(tmp_path / "b.gguf", "mamba", keys, tensors)
  with pytest.raises(ValueError, match="architecture 'mamba' is not supported"):
    load_gguf(path)


def test_truncated_tensors_are_a_named_error(tmp_path):
  _, keys, tensors = contents("llama")
  path = write(tmp_path / "a.gguf", "llama", keys, tensors)
  data = path.read_bytes()
  for cut in (33, len(data) // 2):
    path.write_bytes(data[:-cut])
    with pytest.raises(ValueError, match="a.gguf: truncated: .* ends at byte"):
      load_gguf(path)
