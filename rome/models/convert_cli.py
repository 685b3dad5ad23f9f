"""`rome convert`: a model of another kind or type becomes a Hugging Face directory.

The whole model passes through the memory of this host, on the CPU.
"""

import argparse
import json
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import jax

from rome.models.hf_config import TOKEN_IDS
from rome.models.weights import DTYPES, load, save
from rome.text.tokenizer import Tokenizer

# Files beside the weights that a tokenizer or a generator reads.
COPIED = (
  "added_tokens.json",
  "chat_template.jinja",
  "chat_template.json",
  "generation_config.json",
  "merges.txt",
  "rome_tokenizer.json",
  "special_tokens_map.json",
  "tokenizer.json",
  "tokenizer.model",
  "tokenizer_config.json",
  "vocab.json",
)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the subcommand.

  Args:
    argv: arguments without the program's name; sys.argv where None.
  Returns:
    0, or 1 after one line on stderr that says what is wrong.
  """
  arguments = _parser().parse_args(argv)
  try:
    _convert(arguments.source, arguments.target, arguments.dtype, arguments.shard_gb)
  except (OSError, ValueError) as e:
    print(f"rome convert: {e}", file=sys.stderr)
    return 1
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="rome convert",
    description="Write a model as a Hugging Face directory, with its tokenizer files.",
  )
  parser.add_argument("source", type=pathlib.Path, help="a Hugging Face directory or a .gguf file")
  parser.add_argument("target", type=pathlib.Path, help="the directory to write")
  parser.add_argument(
    "--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)"
  )
  parser.add_argument(
    "--shard_gb", type=float, default=5.0, help="largest file in GB (default: %(default)s)"
  )
  return parser


def _convert(source: pathlib.Path, target: pathlib.Path, dtype: str, shard_gb: float) -> None:
  if not shard_gb > 0:
    raise ValueError(f"--shard_gb must be a positive number, got {shard_gb}")
  if target.resolve() == source.resolve():
    raise ValueError(f"{target} is the source: name another directory to write")
  jax.config.update("jax_platforms", "cpu")
  config, params = load(source, dtype=dtype)
  tokenizer = Tokenizer.from_dir(source) if source.suffix == ".gguf" else None
  save(target, config, params, int(shard_gb * 1e9), _token_ids(source, tokenizer))
  if tokenizer is not None:
    tokenizer.save(target)
  for name in COPIED:
    if (source / name).is_file():
      shutil.copyfile(source / name, target / name)
  size = sum(f.stat().st_size for f in target.glob("*.safetensors"))
  print(f"{target}: {size / 1e6:.1f} MB of {dtype} weights")


def _token_ids(source: pathlib.Path, tokenizer: Tokenizer | None) -> dict[str, Any]:
  """Which tokens begin and end a text, for config.json."""
  if tokenizer is not None:
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
  raw = json.loads((source / "config.json").read_text())
  return {name: raw.get(name) for name in TOKEN_IDS}
