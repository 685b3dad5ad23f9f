"""What goes into the engine and what comes out of it: requests, updates, replies."""

import dataclasses

import numpy as np

from rome.models import Sampling

MAX_TOP = 20  # alternatives a token, as in the OpenAI API
MAX_BIAS = 300  # biased tokens a request, as in the OpenAI API
LARGEST_BIAS = 100.0  # as in the OpenAI API
MAX_STOP_TOKENS = 8
MAX_STOP_LENGTH = 1000  # characters
MIN_TEMPERATURE = 1e-3


class QueueFull(RuntimeError):
  """The engine holds as many waiting requests as it may; try again later."""


@dataclasses.dataclass(frozen=True)
class Request:
  """One LLM call: a context, and how to go on from it.

  Attributes:
    context: token ids to go on from, at least one.
    max_tokens: the reply has at most this many tokens.
    sampling: the distribution to draw from, after `logit_bias`.
    greedy: take the most probable token instead of a draw; log-probs stay those of `sampling`.
    key: what keys the randomness: token i is drawn with fold_in(base, (key[0], key[1], i)), each
      an int in [0, 2**32). Rollouts use (episode, chunk), the server (seed, choice).
    stop_tokens: ids that end the reply and belong to it; None for the engine's own.
    stop_strings: texts that end the reply; its tokens go up to the one that completes the text.
    logit_bias: (id, addend) pairs, applied to the logits before everything else.
    top_logps: how many most probable alternatives to record with each token, at most MAX_TOP.
    router_choices: whether the reply carries the experts that the router chose.
    text: whether updates and the reply carry text.
    client: whose request it is; clients take turns when there is a queue.
  """

  context: tuple[int, ...]
  max_tokens: int
  sampling: Sampling = Sampling()
  greedy: bool = False
  key: tuple[int, int] = (0, 0)
  stop_tokens: tuple[int, ...] | None = None
  stop_strings: tuple[str, ...] = ()
  logit_bias: tuple[tuple[int, float], ...] = ()
  top_logps: int = 0
  router_choices: bool = False
  text: bool = False
  client: str = ""


Alternatives = list[tuple[int, float]]  # (id, log-prob), most probable first


@dataclasses.dataclass(frozen=True)
class Reply:
  """A finished LLM call.

  Attributes:
    id: what `Engine.submit` returned.
    tokens: sampled ids, the stop token included if one was sampled.
    logps: their log-probs in nats under the distribution they were drawn from.
    version: of the weights, one for the whole reply.
    finish: "stop" (a stop token or string), "length" (max_tokens) or "cancelled".
    cached: context tokens that were not computed, as their keys and values were known.
    top: for each token its alternatives, empty unless asked for.
    choices: [T, S, K] int32, experts of the T tokens that went through the model, at each of S
      sparse layers: all of context and reply but the last one, unless the request was cancelled.
      None unless asked for.
    text: of the tokens up to the stop, which is not part of it; "" unless asked for.
  """

  id: int
  tokens: list[int]
  logps: list[float]
  version: int
  finish: str
  cached: int
  top: list[Alternatives]
  choices: np.ndarray | None = None
  text: str = ""


@dataclasses.dataclass(frozen=True)
class Update:
  """What a step of the engine added to one reply.

  Attributes:
    id: what `Engine.submit` returned.
    tokens: new ids.
    logps: their log-probs in nats.
    top: their alternatives, where asked for.
    text: new text, where asked for. What may yet turn out to begin a stop string, or is an
      unfinished character, is held back.
    reply: the whole reply, in its last update.
  """

  id: int
  tokens: list[int]
  logps: list[float]
  top: list[Alternatives]
  text: str = ""
  reply: Reply | None = None


def check(request: Request, vocab: int, max_length: int, has_tokenizer: bool) -> None:
  """Checks a request against what an engine can do.

  Args:
    request: the request.
    vocab: rows of the model's vocabulary.
    max_length: tokens that context and reply may have together.
    has_tokenizer: whether the engine knows text.
  Raises:
    ValueError: it can never be served; the message says why.
  """
  r, longest = request, MAX_STOP_LENGTH
  total = len(r.context) + r.max_tokens
  stops = r.stop_tokens if r.stop_tokens is not None else ()
  for holds, message in (
    (len(r.context) >= 1, "the context is empty"),
    (r.max_tokens >= 1, f"max_tokens must be at least 1, got {r.max_tokens}"),
    (
      total <= max_length,
      f"a context of {len(r.context)} tokens and max_tokens={r.max_tokens} exceed the "
      f"{max_length} tokens that a request may have",
    ),
    (
      0 <= min(r.context, default=0) and max(r.context, default=0) < vocab,
      f"the context has token ids outside the vocabulary of {vocab}",
    ),
    (len(stops) <= MAX_STOP_TOKENS, f"at most {MAX_STOP_TOKENS} stop tokens, got {len(stops)}"),
    (
      all(0 <= t < vocab for t in stops),
      f"stop_tokens has ids outside the vocabulary of {vocab}",
    ),
    (0 <= r.top_logps <= MAX_TOP, f"top_logps must be in 0..{MAX_TOP}, got {r.top_logps}"),
    (
      len(r.logit_bias) <= MAX_BIAS,
      f"at most {MAX_BIAS} entries of logit_bias, got {len(r.logit_bias)}",
    ),
    (
      all(0 <= t < vocab and abs(b) <= LARGEST_BIAS for t, b in r.logit_bias),
      f"logit_bias has ids outside the vocabulary of {vocab}, or addends beyond {LARGEST_BIAS}",
    ),
    (
      r.sampling.temperature >= MIN_TEMPERATURE,
      f"sampling.temperature must be at least {MIN_TEMPERATURE}, got {r.sampling.temperature}: "
      "logits divided by less overflow; ask for greedy",
    ),
    (
      all(0 < len(stop) <= longest for stop in r.stop_strings),
      f"a stop string is empty or longer than {longest} characters",
    ),
    (
      has_tokenizer or not (r.text or r.stop_strings),
      "text and stop strings need an engine with a tokenizer",
    ),
    (all(0 <= k < 1 << 32 for k in r.key), f"key must be in [0, 2**32), got {r.key}"),
  ):
    if not holds:
      raise ValueError(message)
