"""The chained task in a real sandbox, and whether it and the vectorised form are the same task.

The agent runs `./step WORD`; the script prints the next symbol, "!" at a dead end, "^" when the
chain is complete, and writes the words down. The tests, which the agent never sees, hold the right
words. The script works its rule out by itself, on characters, so that agreement with the arrays
says something.
"""

import dataclasses
import shlex
from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from experiments.ablations import chain, policy
from rome import envs, models

_SCRIPT = """\
#!/bin/bash
symbols={symbols}  # of this chain
now={now}          # letter that answers symbol A, B, ...
before={before}    # letter for the start, then for A, B, ... as the symbol before
alphabet={alphabet}
[ -e over ] && {{ echo '!'; exit; }}
step=$(wc -l < words)
place() {{ head=${{alphabet%%"$1"*}}; echo ${{#head}}; }}
first=${{now:$(place "${{symbols:step:1}}"):1}}
if [ "$step" = 0 ]; then second=${{before:0:1}}
else second=${{before:$(($(place "${{symbols:step-1:1}}") + 1)):1}}
fi
printf '%s\\n' "$1" >> words
if [ "$1" != "$first$second" ]; then touch over; echo '!'
elif [ "$step" = {last} ]; then touch over; echo '^'
else echo "${{symbols:step+1:1}}"
fi
"""


def make_task(symbols: Sequence[int]) -> envs.Task:
  """One instance as a task of `rome.envs`."""
  text = "".join(chain.SYMBOLS[symbol] for symbol in symbols)
  rows = np.asarray(chain.right_words(jnp.asarray([symbols], jnp.int32)))[0]
  words = ["".join(chain.TEXT[token] for token in row) for row in rows]
  script = _SCRIPT.format(
    symbols=text,
    now="".join(chain.LETTERS[i] for i in chain.NOW),
    before="".join(chain.LETTERS[i] for i in chain.BEFORE),
    alphabet=chain.SYMBOLS,
    last=len(symbols) - 1,
  )
  return envs.Task(
    id=f"chain/{text}",
    family="chain",
    instruction=f"Answer each symbol by ./step WORD. The first symbol is\n{text[0]}",
    files={
      "step": envs.TaskFile(script.encode(), 0o755),
      "words": envs.TaskFile(b""),
    },
    tests=f'[ "$(cat words)" = {shlex.quote(chr(10).join(words))} ]\n',
    solution=tuple(f"./step {word}" for word in words),
  )


@dataclasses.dataclass(frozen=True)
class Played:
  """Episodes as a real sandbox saw them.

  Attributes:
    words: int [N, H, 2], what was sent; 0 after the end.
    observations: int [N, H], the token of what came back; 0 after the end.
    rewards: float [N], of the tests.
    lengths: int [N], steps played.
  """

  words: np.ndarray
  observations: np.ndarray
  rewards: np.ndarray
  lengths: np.ndarray


# (episode, step, observation token) -> the word's two tokens
Actor = Callable[[int, int, int], Sequence[int]]


def play(sandbox: envs.Sandbox, symbols_NxH: np.ndarray, act: Actor) -> Played:
  """Plays every instance to its end in a sandbox, through `rome/Terminal-v0`."""
  num, horizon = symbols_NxH.shape
  words = np.zeros((num, horizon, 2), int)
  observations = np.zeros((num, horizon), int)
  rewards, lengths = np.zeros(num), np.zeros(num, int)
  env = envs.TerminalEnv(sandbox=sandbox, max_turns=horizon + 1)
  for n, symbols in enumerate(symbols_NxH):
    text, _ = env.reset(options={"task": make_task([int(s) for s in symbols])})
    shown = chain.TEXT.index(text[-1])
    for k in range(horizon):
      words[n, k] = act(n, k, shown)
      word = "".join(chain.TEXT[token] for token in words[n, k])
      text = env.step(f"./step {shlex.quote(word)}")[0]
      shown = chain.TEXT.index(text) if len(text) == 1 else -1
      observations[n, k], lengths[n] = shown, k + 1
      if shown in (chain.DEAD_END, chain.START, -1):
        break
    rewards[n] = env.step("submit")[1]
  env.close()
  return Played(words, observations, rewards, lengths)


def disagreements(symbols_NxH: np.ndarray, played: Played) -> int:
  """Replays the words in the vectorised form: episodes whose observations or reward differ."""
  symbols = jnp.asarray(symbols_NxH, jnp.int32)
  alive = jnp.ones(len(symbols), bool)
  reward = np.zeros(len(symbols))
  same = np.ones(len(symbols), bool)
  ended = np.zeros(len(symbols), bool)
  for k in range(symbols.shape[1]):
    alive, shown, gained = chain.transition(symbols, k, alive, jnp.asarray(played.words[:, k]))
    seen = k < played.lengths
    same &= ~seen | (np.asarray(shown) == played.observations[:, k])
    same &= seen == ~ended  # the real chain went on exactly as long as this one
    ended |= np.isin(np.asarray(shown), (chain.DEAD_END, chain.START))
    reward += np.asarray(gained)
  return int((~same | (reward != played.rewards)).sum())


def random_actor(seed: int, symbols_NxH: np.ndarray, rightness: float = 0.8) -> Actor:
  """Right words, each with this probability, else two characters of the vocabulary."""
  rng = np.random.default_rng(seed)
  right = np.asarray(chain.right_words(jnp.asarray(symbols_NxH, jnp.int32)))

  def act(episode: int, step: int, shown: int) -> Sequence[int]:
    del shown
    if rng.random() < rightness:
      return [int(token) for token in right[episode, step]]
    return [int(token) for token in rng.integers(0, len(chain.TEXT), 2)]

  return act


def policy_actor(params: chex.ArrayTree, engine: str, horizon: int, key: chex.PRNGKey) -> Actor:
  """The trained policy, one episode at a time, with its own KV cache; it sees observations only."""
  weights = policy.sampler_weights(params, engine)
  extend = jax.jit(
    lambda cache, tokens, count: models.extend(policy.MODEL, weights, cache, tokens, count)
  )
  one, two = jnp.ones(1, jnp.int32), jnp.full(1, 2, jnp.int32)
  state: dict[str, chex.ArrayTree] = {}

  def act(episode: int, step: int, shown: int) -> Sequence[int]:
    if step == 0:
      state["cache"] = models.init_cache(policy.MODEL, 1, 1 + chain.STRIDE * horizon)
      state["last"] = chain.START
    tokens, count = jnp.asarray([[state["last"], shown]], jnp.int32), two
    word = []
    for place in range(2):
      logits, state["cache"], _ = extend(state["cache"], tokens, count)
      draw = jax.random.fold_in(jax.random.fold_in(key, episode), 2 * step + place)
      logp = models.distribution(logits, policy.SAMPLING)
      word.append(int(jax.random.categorical(draw, logp)[0]))
      tokens, count = jnp.asarray([[word[-1]]], jnp.int32), one
    state["last"] = word[-1]
    return word

  return act
