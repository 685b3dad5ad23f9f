"""Where each array of ours lies in a Hugging Face directory: names, transposition, experts, halves.

On disk every matrix is a tensor of its own, [out, in], one an expert. Of ours, an array may hold a
stack of layers, the experts of a layer, and gate and up side by side. `Leaf` says how one array is
put together, so that any slice of it can be read without the rest.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np

from rome.models.config import ModelConfig
from rome.models.layout import stages

Index = tuple[slice, ...]
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One array of ours.

  Attributes:
    names: [*front, parts] of str, the tensors on disk: `front` are the leading axes (layers,
      experts), `parts` lie side by side along the last axis.
    core: shape of one part, as ours.
    axes: for each axis of the tensor on disk, which axes of `core` it flattens.
  """

  names: np.ndarray
  core: tuple[int, ...]
  axes: tuple[tuple[int, ...], ...]

  @property
  def shape(self) -> tuple[int, ...]:
    """Of our array."""
    return (*self.names.shape[:-1], *self.core[:-1], self.core[-1] * self.names.shape[-1])

  @property
  def disk_shape(self) -> tuple[int, ...]:
    """Of each tensor on disk."""
    return tuple(math.prod(self.core[a] for a in group) for group in self.axes)

  def read(
    self, index: Index, fetch: Callable[[str, Index], np.ndarray], dtype: np.dtype
  ) -> np.ndarray:
    """A slice of our array.

    Args:
      index: a slice of step 1 for each axis.
      fetch: gives a slice of a tensor on disk.
      dtype: of the result.
    """
    bounds = [i.indices(n)[:2] for i, n in zip(index, self.shape, strict=True)]
    front = len(self.names.shape) - 1
    names = self.names[tuple(slice(*b) for b in bounds[:front])]
    out = np.empty([hi - lo for lo, hi in bounds], dtype)
    width, (first, last) = self.core[-1], bounds[-1]
    for at in np.ndindex(names.shape[:-1]):
      for part, name in enumerate(names[at]):
        lo, hi = max(first, part * width), min(last, (part + 1) * width)
        if lo < hi:
          inner = [*bounds[front:-1], (lo - part * width, hi - part * width)]
          out[(*at, ..., slice(lo - first, hi - first))] = self._read_core(name, inner, fetch)
    return out

  def _read_core(
    self, name: str, bounds: list[tuple[int, int]], fetch: Callable[[str, Index], np.ndarray]
  ) -> np.ndarray:
    """Of flattened axes, all but the first are read whole and cut afterwards."""
    ranges, lengths, cuts = [], [], []
    for first, *rest in self.axes:
      step = math.prod(self.core[a] for a in rest)
      ranges.append(slice(bounds[first][0] * step, bounds[first][1] * step))
      lengths += [bounds[first][1] - bounds[first][0], *(self.core[a] for a in rest)]
      cuts += [slice(None), *(slice(*bounds[a]) for a in rest)]
    x = fetch(name, tuple(ranges)).reshape(lengths)[tuple(cuts)]
    order = [a for group in self.axes for a in group]
    return x.transpose(np.argsort(order))

  def tensors(self, array: np.ndarray, front: tuple[int, ...]) -> Iterator[tuple[str, np.ndarray]]:
    """Names and tensors on disk of `array`, which is ours at `front` of the leading axes."""
    names = self.names[front]
    for at in np.ndindex(names.shape):
      *lead, part = at
      core = array[tuple(lead)][..., part * self.core[-1] : (part + 1) * self.core[-1]]
      x = core.transpose([a for group in self.axes for a in group])
      yield names[at], np.ascontiguousarray(x.reshape(self.disk_shape))


def _leaf(name: str, core: tuple[int, ...], *axes: tuple[int, ...]) -> Leaf:
  return Leaf(np.array([name], object), core, axes)


def _experts(num: int, parts: tuple[str, ...], core: tuple[int, ...]) -> Leaf:
  names = [[f"mlp.experts.{e}.{part}.weight" for part in parts] for e in range(num)]
  return Leaf(np.array(names, object), core, ((1,), (0,)))


def _layer(config: ModelConfig, sparse: bool) -> dict[Path, Leaf]:
  """The arrays of one layer; names without `model.layers.N.`."""
  out: dict[Path, Leaf] = {}
  c, d, h = config, config.hidden_size, config.head_dim
  heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
  heads["v_proj"] = heads["k_proj"]
  for name, n in heads.items():
    out["attn", name, "kernel"] = _leaf(f"self_attn.{name}.weight", (d, n, h), (1, 2), (0,))
  o_shape = (c.num_attention_heads, h, d)
  out["attn", "o_proj", "kernel"] = _leaf("self_attn.o_proj.weight", o_shape, (2,), (0, 1))
  if c.attention_bias:
    for name, n in heads.items():
      out["attn", name, "bias"] = _leaf(f"self_attn.{name}.bias", (n, h), (0, 1))
    out["attn", "o_proj", "bias"] = _leaf("self_attn.o_proj.bias", (d,), (0,))
  if c.qk_norm:
    for name in ("q_norm", "k_norm"):
      out["attn", name, "scale"] = _leaf(f"self_attn.{name}.weight", (h,), (0,))
  out["input_norm", "scale"] = _leaf("input_layernorm.weight", (d,), (0,))
  out["post_norm", "scale"] = _leaf("post_attention_layernorm.weight", (d,), (0,))
  if sparse:
    e, f = c.num_experts, c.moe_intermediate_size
    out["mlp", "router"] = _leaf("mlp.gate.weight", (d, e), (1,), (0,))
    out["mlp", "gate_up_proj"] = _experts(e, ("gate_proj", "up_proj"), (d, f))
    out["mlp", "down_proj"] = _experts(e, ("down_proj",), (f, d))
  else:
    f = c.intermediate_size
    for name, core in {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}.items():
      out["mlp", name, "kernel"] = _leaf(f"mlp.{name}.weight", core, (1,), (0,))
  return out


def leaves(config: ModelConfig, stacked: bool) -> dict[Path, Leaf]:
  """Every array of a model by its path in the parameters, in the order in which files hold them."""
  d, v = config.hidden_size, config.vocab_size
  embedding = _leaf("model.embed_tokens.weight", (v, d), (0,), (1,))
  out: dict[Path, Leaf] = {("embed_tokens", "embedding"): embedding}
  for stage in stages(config, stacked):
    for path, leaf in _layer(config, stage.sparse).items():
      layers = range(stage.first, stage.first + stage.count)
      names = np.array([f"model.layers.{i}." + leaf.names for i in layers], object)
      names = names if stage.stacked else names[0]
      out[stage.name, *path] = dataclasses.replace(leaf, names=names)
  out["norm", "scale"] = _leaf("model.norm.weight", (d,), (0,))
  if not config.tie_word_embeddings:
    out["lm_head", "kernel"] = _leaf("lm_head.weight", (d, v), (1,), (0,))
  return out
