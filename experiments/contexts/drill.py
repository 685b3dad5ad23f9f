"""Rows in which facts are listed over and over: looking one up is all that there is to learn.

A policy of two million parameters takes these first. Of tasks alone, where a row has a handful of
facts among other text, it copied no more values right after 100 updates than chance would (0.2).
"""

import random

from experiments.contexts.families import LETTERS, SMALL
from experiments.contexts.teacher import imitated
from experiments.contexts.vocabulary import tokenizer
from rome.trajectory import Trajectory

_LENGTH = 250  # tokens


def drill(seed: int) -> Trajectory:
  """One row; imitated are the values of facts that were said before."""
  rng = random.Random(f"drill {seed}")
  encode, names = tokenizer().encode, LETTERS[: rng.randrange(3, len(LETTERS) + 1)]
  values = {name: SMALL.value(rng, name) for name in names}
  ids, calls, said = [tokenizer().specials["<|bos|>"]], [-1], set[str]()
  while len(ids) < _LENGTH:
    for name in rng.sample(names, len(names)):
      before, value, after = (
        encode(part) for part in (f"FACT {name} =", f" {values[name]}", rng.choice(("\n", "; ")))
      )
      ids += [*before, *value, *after]
      calls += [-1] * len(before) + [0 if name in said else -1] * len(value) + [-1] * len(after)
      said.add(name)
  return imitated(f"drill {seed}", "drill", ids, calls)
