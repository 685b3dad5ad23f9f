"""The vocabulary of the small scale: byte-level BPE of what its episodes say.

  python -m experiments.contexts.vocabulary

makes vocabulary.json anew from episodes of the teacher; it is in the repository, so that windows
mean the same everywhere. Special tokens, template and the format of calls are the byte tokenizer's;
a value is one token.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Iterable

from absl import app

from experiments.contexts.families import FAMILIES, WORDS
from rome.text import ByteTokenizer, Tokenizer
from rome.text.bpe_tokenizer import BPETokenizer

_FILE = pathlib.Path(__file__).parent / "vocabulary.json"
_SIZE = 768
_TASK = 999
_SPECIAL = re.compile(r"<\|\w+\|>")


@functools.cache
def tokenizer() -> Tokenizer:
  """The tokenizer of vocabulary.json."""
  bos, end = "<|bos|>", "<|end|>"
  template = ByteTokenizer.chat_templates["default"]
  config = {"bos_token": bos, "eos_token": end, "chat_template": template}
  return BPETokenizer(json.loads(_FILE.read_text(encoding="utf-8")), config)


def learn(texts: Iterable[str]) -> str:
  """A tokenizer.json made of texts."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, trainers

  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
  )
  made.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=_SIZE,
    special_tokens=list(ByteTokenizer.specials),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  made.train_from_iterator(texts, trainer)
  specification = json.loads(made.to_str())
  for token in specification["added_tokens"]:  # what a policy writes itself is no special
    token["special"] = token["content"] not in ByteTokenizer.markup
  return json.dumps(specification, ensure_ascii=False)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  from experiments.contexts import play, teacher

  byte = ByteTokenizer()
  scale = dataclasses.replace(play.SMALL, tokenizer=ByteTokenizer, window=3000, reply=300)
  texts = []
  for family in FAMILIES:
    for arm in ("all", "compaction", "all - todo", "all - lossless"):
      _, rows = teacher.demonstrate(family, arm, _TASK, scale=scale)
      texts += [text for row in rows for text in _SPECIAL.split(byte.decode(row.tokens.tolist()))]
  texts += [f" {word}" for words in WORDS.values() for word in words] * 100  # each a token
  _FILE.write_text(learn(texts), encoding="utf-8")


if __name__ == "__main__":
  app.run(main)
