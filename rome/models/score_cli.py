"""`rome score`: logits, or log-probs of the given tokens, of a file of token ids.

Rows run one at a time and logits are written to disk in pieces, so that memory holds the model and
one row's hidden states, however long the input. Left out: several devices, sampling transforms.
"""

import argparse
import functools
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rome.models.config import ModelConfig
from rome.models.decoder import hidden_states, logits_of
from rome.models.logprobs import Sampling, distribution
from rome.models.weights import load

PIECE = 1 << 24  # logits computed at once: 64 MiB


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the subcommand.

  Args:
    argv: arguments without the program's name; sys.argv where None.
  Returns:
    0, or 1 after one line on stderr that says what is wrong.
  """
  arguments = _parser().parse_args(argv)
  try:
    _run(arguments)
  except (OSError, ValueError) as e:
    print(f"rome score: {e}", file=sys.stderr)
    return 1
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="rome score", description="Logits of token ids: place t predicts token t + 1."
  )
  add = functools.partial(parser.add_argument, type=pathlib.Path, required=True)
  add("--model", help="a Hugging Face directory or a .gguf file")
  add("--input", help="a .npy file of ids, [T] or [B, T], any integer type")
  add("--output", help="the .npy file to write, float32 [..., T, V]")
  parser.add_argument(
    "--logprobs",
    action="store_true",
    help="write instead the log-prob of each token given those in front of it, [..., T] in nats; "
    "0 for the first, which nothing predicts",
  )
  return parser


def _run(arguments: argparse.Namespace) -> None:
  ids = _read_ids(arguments.input)
  if not arguments.output.parent.is_dir():
    raise ValueError(f"--output: there is no directory {arguments.output.parent}")
  config, params = load(arguments.model, stacked=True)
  if ids.min() < 0 or ids.max() >= config.vocab_size:
    worst = ids.min() if ids.min() < 0 else ids.max()
    raise ValueError(
      f"{arguments.input}: id {worst} is outside the vocabulary of {config.vocab_size}"
    )
  shape = ids.shape if arguments.logprobs else (*ids.shape, config.vocab_size)
  # Written beside and renamed at the end: half a result never has the name of a whole one.
  part = arguments.output.with_name(f"{arguments.output.name}.{os.getpid()}.part")
  try:
    out = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape)
    rows = out.reshape(-1, *shape[ids.ndim - 1 :])
    for row, tokens in zip(rows, ids.reshape(-1, ids.shape[-1]), strict=True):
      _score(config, params, tokens.astype(np.int32), arguments.logprobs, row)
    out.flush()
    os.replace(part, arguments.output)
  finally:
    part.unlink(missing_ok=True)
  print(f"{arguments.output}: float32 {list(shape)}")


def _read_ids(path: pathlib.Path) -> np.ndarray:
  try:
    ids = np.load(path, allow_pickle=False)
  except (OSError, EOFError, ValueError) as e:
    raise ValueError(f"{path}: no readable .npy file: {e}") from None
  if not isinstance(ids, np.ndarray) or not np.issubdtype(ids.dtype, np.integer):
    raise ValueError(f"{path} must hold integers, got {getattr(ids, 'dtype', 'an archive')}")
  if ids.ndim not in (1, 2) or not ids.size:
    raise ValueError(f"{path} must have shape [T] or [B, T] and tokens, got {list(ids.shape)}")
  return ids


@functools.partial(jax.jit, static_argnums=0)
def _hidden(config: ModelConfig, params: dict, tokens_T: jax.Array) -> jax.Array:
  """[T, D] of one row."""
  one_1xT = jnp.ones((1, len(tokens_T)), jnp.int32)
  places_1xT = jnp.arange(len(tokens_T), dtype=jnp.int32)[None]
  return hidden_states(config, params, tokens_T[None], one_1xT, places_1xT)[0][0]


@functools.partial(jax.jit, static_argnums=0)
def _logps(
  config: ModelConfig, params: dict, hidden_PxD: jax.Array, next_P: jax.Array
) -> jax.Array:
  """[P] log-probs of the tokens that follow."""
  logp_PxV = distribution(logits_of(config, params, hidden_PxD), Sampling())
  return jnp.take_along_axis(logp_PxV, next_P[:, None], axis=-1)[:, 0]


_logits: Callable[..., jax.Array] = jax.jit(logits_of, static_argnums=0)


def _pieces(count: int, width: int) -> Iterator[slice]:
  """`width` places at a time; the last piece ends at the end, over places done already."""
  for start in range(0, count, width):
    first = min(start, count - width)
    yield slice(first, first + width)


def _score(
  config: ModelConfig, params: dict, tokens_T: np.ndarray, logprobs: bool, out: np.ndarray
) -> None:
  """Fills `out`, [T] or [T, V]."""
  hidden_TxD = _hidden(config, params, tokens_T)
  # Pieces of one width, that the head compiles once.
  width = max(1, min(len(tokens_T), PIECE // config.vocab_size))
  following_T = np.append(tokens_T[1:], 0)
  if logprobs:
    out[0] = 0
  for where in _pieces(len(tokens_T), width):
    if logprobs:
      ahead = out[where.start + 1 : where.stop + 1]
      ahead[:] = _logps(config, params, hidden_TxD[where], following_T[where])[: len(ahead)]
    else:
      out[where] = _logits(config, params, hidden_TxD[where])
