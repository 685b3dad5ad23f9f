"""Chained tasks: h dependent steps, a reward only where every step was right.

An instance is a sequence of h symbols, A to H. At each step the agent sees one symbol and answers
with a word of two letters: the first letter stands for the symbol seen now, the second for the one
seen before it (the start counts as a symbol of its own), so a word depends on the context and not
on the last observation alone. After the right word the next symbol is shown. A wrong word is a dead
end: the agent sees "!" and the episode is over. The reward is 1 after the h-th right word.

Here are the rules and their vectorised form on arrays; `container` has the same task as a shell
script. Characters and token ids are one to one, so a text is a view of its tokens.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp

SYMBOLS = "ABCDEFGH"
LETTERS = "abcdefgh"
TEXT = "^" + SYMBOLS + LETTERS + "!"  # a token's id is its place here
START, FIRST_SYMBOL, FIRST_LETTER, DEAD_END = 0, 1, 9, 17
NUM = len(SYMBOLS)
STRIDE = 3  # tokens a step: a symbol and the two letters of a word
_HELD_OUT_MODULUS = 4

# Letter of a symbol seen now and of one seen before; place 0 of BEFORE is the start.
NOW = (3, 6, 1, 4, 7, 2, 5, 0)
BEFORE = (0, 5, 2, 7, 4, 1, 6, 3, 0)


@dataclasses.dataclass(frozen=True)
class Teacher:
  """Who writes the demonstrations of the warm start: right, but for a habit with each symbol.

  Attributes:
    rightness: for each symbol, the probability that its word's first letter is the right one; else
      it is the next letter of the alphabet. Below a half the habit is the likelier word, so that
      sharpening the warm policy is not enough to solve the task.
  """

  rightness: tuple[float, ...]

  def __post_init__(self) -> None:
    if len(self.rightness) != NUM or not all(0 <= p <= 1 for p in self.rightness):
      raise ValueError(f"Teacher.rightness must be {NUM} probabilities, got {self.rightness!r}")


def draw_instances(key: chex.PRNGKey, num: int, horizon: int, held_out: bool) -> chex.Array:
  """Draws instances of one side of the split: [num, horizon] int32 symbols in 0..7.

  An instance is held out iff its symbols sum to a multiple of 4. All but the last symbol are
  uniform and the last is uniform over those that put the sum on the asked side; so a quarter of all
  sequences is held out, and no held-out one is ever seen in training. Training holds every symbol
  from two steps on, and every pair of neighbours from three.
  """
  head_key, residue_key, high_key = jax.random.split(key, 3)
  head = jax.random.randint(head_key, (num, horizon - 1), 0, NUM)
  if held_out:
    residue = jnp.zeros(num, jnp.int32)
  else:
    residue = jax.random.randint(residue_key, (num,), 1, _HELD_OUT_MODULUS)
  low = (residue - head.sum(axis=1)) % _HELD_OUT_MODULUS
  high = jax.random.randint(high_key, (num,), 0, NUM // _HELD_OUT_MODULUS)
  last = low + _HELD_OUT_MODULUS * high
  return jnp.concatenate([head, last[:, None]], axis=1).astype(jnp.int32)


def right_words(symbols_BxH: chex.Array) -> chex.Array:
  """Tokens of the right word of every step: [B, H, 2] int32."""
  start_Bx1 = jnp.zeros_like(symbols_BxH[:, :1])
  before_BxH = jnp.concatenate([start_Bx1, symbols_BxH[:, :-1] + 1], axis=1)
  letters = (jnp.asarray(NOW)[symbols_BxH], jnp.asarray(BEFORE)[before_BxH])
  return FIRST_LETTER + jnp.stack(letters, axis=-1).astype(jnp.int32)


def taught_words(key: chex.PRNGKey, symbols_BxH: chex.Array, teacher: Teacher) -> chex.Array:
  """Tokens of the words that the teacher writes: [B, H, 2] int32."""
  words = right_words(symbols_BxH)
  right_BxH = (
    jax.random.uniform(key, symbols_BxH.shape) < jnp.asarray(teacher.rightness)[symbols_BxH]
  )
  habit_BxH = FIRST_LETTER + (words[..., 0] - FIRST_LETTER + 1) % NUM
  return words.at[..., 0].set(jnp.where(right_BxH, words[..., 0], habit_BxH))


def transition(
  symbols_BxH: chex.Array, step: chex.Numeric, alive_B: chex.Array, word_Bx2: chex.Array
) -> tuple[chex.Array, chex.Array, chex.Array]:
  """One step of every chain.

  Args:
    symbols_BxH: the instances.
    step: which step the words answer, 0..H-1; may be traced.
    alive_B: bool, whether the chain has not reached a dead end.
    word_Bx2: int32 tokens.

  Returns:
    (alive_B, observation_B, reward_B): the observation is the next symbol's token, `DEAD_END` for a
    chain that is dead, `START` for one that is complete.
  """
  horizon = symbols_BxH.shape[1]
  right_Bx2 = right_words(symbols_BxH)[:, step]
  alive_B = alive_B & (word_Bx2 == right_Bx2).all(axis=-1)
  complete = jnp.asarray(step) == horizon - 1
  shown_B = FIRST_SYMBOL + symbols_BxH[:, jnp.minimum(jnp.asarray(step) + 1, horizon - 1)]
  observation_B = jnp.where(alive_B, jnp.where(complete, START, shown_B), DEAD_END)
  return alive_B, observation_B, jnp.where(alive_B & complete, 1.0, 0.0)


def lay_out(symbols_BxH: chex.Array, words_BxHx2: chex.Array) -> chex.Array:
  """An episode's tokens: start, then symbol and word of every step; [B, 1 + 3 H] int32."""
  batch = symbols_BxH.shape[0]
  steps = jnp.concatenate([FIRST_SYMBOL + symbols_BxH[..., None], words_BxHx2], axis=-1)
  start = jnp.full((batch, 1), START, jnp.int32)
  return jnp.concatenate([start, steps.reshape(batch, -1).astype(jnp.int32)], axis=1)


def chunk_layout(taken_BxH: chex.Array) -> chex.Array:
  """Chunk ids of `lay_out`'s tokens: [B, 1 + 3 H]; step k is chunk k where `taken`, else -1."""
  batch, horizon = taken_BxH.shape
  ids_BxH = jnp.where(taken_BxH, jnp.arange(horizon)[None], -1)
  outside = jnp.full((batch, horizon, 1), -1, jnp.int32)
  steps = jnp.concatenate([outside, ids_BxH[..., None], ids_BxH[..., None]], axis=-1)
  start = jnp.full((batch, 1), -1, jnp.int32)
  return jnp.concatenate([start, steps.reshape(batch, -1).astype(jnp.int32)], axis=1)
