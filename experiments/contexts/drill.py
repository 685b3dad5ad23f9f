"""Rows in which facts are listed over and over: looking one up is all that there is to learn.

A policy of two million parameters takes these first. Of tasks alone, where a row has a handful of
facts among other text, it had not learnt to copy a value within 200 updates.
"""

import random

import numpy as np

from experiments.contexts.families import LETTERS, SMALL
from experiments.contexts.vocabulary import tokenizer
from rome.trajectory import Trajectory, Valid

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
  return Trajectory(
    id=f"drill {seed}",
    task_id=f"drill {seed}",
    family="drill",
    instruction="",
    tokens=np.array(ids, np.int32),
    call_ids=np.array(calls, np.int32),
    logps=np.zeros(len(ids), np.float32),
    versions=np.zeros(1, np.int32),
    chunk_rewards=np.zeros(1, np.float32),
    reward=Valid(1.0),
    end_reason="submitted",
    turns=(),
  )
