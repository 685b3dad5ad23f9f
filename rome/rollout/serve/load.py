"""Which model is served: a checkpoint's directory, a GGUF file, or a preset with random weights.

What is quick (sizes, tokenizer, stop tokens) is read at once, so that mistakes show before the
server is up; the weights are read in the engine's thread.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax

from rome import models
from rome.models.weights import read_config
from rome.rollout.engine import Engine, Request
from rome.rollout.engine.request import MAX_STOP_TOKENS
from rome.rollout.serve.core import Served
from rome.text import ByteTokenizer, Tokenizer, check_vocabulary

# Specials that end a turn, for checkpoints that do not say so in generation_config.json.
_ENDS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>")
_CONFIGS = ("generation_config.json", "config.json")
_DEFAULT_LENGTH = 2048
_STEPS = 2  # tokens a device call: few, as the pieces of a stream come that many at a time


@dataclasses.dataclass(frozen=True)
class LoadConfig:
  """What is loaded and how it runs.

  Attributes:
    model: a directory, a .gguf file, or the name of a preset.
    name: what requests call it; None for the last part of `model`.
    dtype: of the parameters, activations and matrix products.
    seed: of a preset's random weights.
    slots: requests that run at once; others wait.
    max_length: tokens of a prompt and its reply together; None for 2048, or less where the model
      was made for less.
    cache_tokens: memory for keys and values, in tokens; None for twice what the slots can need.
    max_waiting: requests that may wait.
    numerics, backend: of the engine.
  """

  model: str
  name: str | None = None
  dtype: str = "float32"
  seed: int = 0
  slots: int = 8
  max_length: int | None = None
  cache_tokens: int | None = None
  max_waiting: int = 1024
  numerics: str = "fast"
  backend: str = "auto"


def prepare(config: LoadConfig) -> Served:
  """The model, but for its weights.

  Raises:
    ValueError, OSError: there is none, it is damaged, or a setting does not fit it.
  """
  path = pathlib.Path(config.model)
  if config.model in models.PRESETS and not path.exists():
    sizes, tokenizer = models.PRESETS[config.model], _preset_tokenizer(config.model)
  elif path.exists():
    sizes, tokenizer = read_config(path), Tokenizer.from_dir(path)
  else:
    known = ", ".join(models.PRESETS)
    raise ValueError(f"--model={config.model} is no directory, no .gguf file, and none of {known}")
  check_vocabulary(tokenizer, sizes.vocab_size)
  limit = sizes.max_position_embeddings
  length = min(_DEFAULT_LENGTH, limit) if config.max_length is None else config.max_length
  if length > limit:
    raise ValueError(f"--max_length={length} is more than the {limit} that the model is made for")
  stop_tokens = _stop_tokens(path, tokenizer)
  make_engine = functools.partial(
    Engine,
    sizes,
    slots=config.slots,
    max_length=length,
    tokenizer=tokenizer,
    stop_tokens=stop_tokens,
    cache_tokens=config.cache_tokens,
    max_waiting=config.max_waiting,
    numerics=config.numerics,
    backend=config.backend,
    # Dense: on accelerators too, the few rows of a decode meet nearly all experts.
    compute=models.Compute(dtype=config.dtype, experts="dense"),
    steps=_STEPS,
  )
  make_engine()  # refuses wrong settings; takes no memory before it has weights
  return Served(
    name=config.name or path.name.removesuffix(".gguf"),
    tokenizer=tokenizer,
    vocab_size=sizes.vocab_size,
    max_length=length,
    stop_tokens=stop_tokens,
    make=functools.partial(_load, config, sizes, make_engine),
  )


def _preset_tokenizer(name: str) -> Tokenizer:
  tokenizer = ByteTokenizer()
  if models.PRESETS[name].vocab_size != tokenizer.vocab_size:
    raise ValueError(f"preset {name} has no tokenizer: give a checkpoint of that size")
  return tokenizer


def _load(config: LoadConfig, sizes: models.ModelConfig, make_engine: Any) -> Engine:
  """The engine with its weights, after it has compiled what every request needs."""
  if pathlib.Path(config.model).exists():
    _, params = models.load(config.model, dtype=config.dtype)
  else:
    init = jax.jit(models.init_params, static_argnums=0)  # at once: faster than op by op
    params = init(sizes, jax.random.key(config.seed))
    params = jax.tree.map(lambda x: x.astype(config.dtype), params)
  engine: Engine = make_engine()
  engine.publish(params, 0, jax.random.key(config.seed))
  # Contexts long and short, alone and sharing a part of a page: what these compile is all there is.
  longest = min(engine.max_length - 1, 64)
  half = longest // 2
  for context in ((0,) * longest, (0,) * half + (1,) * (longest - half), (1,)):
    engine.submit(Request(context=context, max_tokens=1, text=True, router_choices=True))
    while engine.busy:
      engine.step()
  return engine


def _stop_tokens(path: pathlib.Path, tokenizer: Tokenizer) -> tuple[int, ...]:
  """Ids that end a reply: the tokenizer's, those of the checkpoint, and known ends of turns."""
  found = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
  for name in _CONFIGS:
    file = path / name
    if path.is_dir() and file.is_file():
      try:
        named = json.loads(file.read_text()).get("eos_token_id")
      except (AttributeError, OSError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None
      found += named if isinstance(named, list) else [named]
  found += [tokenizer.specials[end] for end in _ENDS if end in tokenizer.specials]
  ids = dict.fromkeys(i for i in found if isinstance(i, int) and 0 <= i < tokenizer.vocab_size)
  return tuple(ids)[:MAX_STOP_TOKENS]
