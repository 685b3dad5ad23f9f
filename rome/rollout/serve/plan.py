"""What a request's body asks of the engine: one `Request` for each choice.

Choices of one prompt are numbered from 0, and so are their draws: with one seed, choice i of a
prompt is the same whatever else was asked for beside it, and differs from choice i + 1.
"""

import dataclasses
import hashlib
import secrets
from collections.abc import Sequence
from typing import Any

from rome.models import Sampling
from rome.rollout.engine.request import MAX_STOP_TOKENS, Request
from rome.rollout.serve import chat, schemas
from rome.rollout.serve.core import Served
from rome.rollout.serve.errors import ApiError
from rome.rollout.serve.vocabulary import Vocabulary

_LEAST_TEMPERATURE = 1e-3  # but for 0; logits divided by less overflow
_LEAST_TOP_P = 1e-6  # the most probable of a million tokens has as much; less may be 0 in float32


@dataclasses.dataclass(frozen=True)
class Plan:
  """A request, understood.

  Attributes:
    prompts: token ids of each prompt.
    requests: for each choice one, prompt by prompt.
    n: choices a prompt.
    chat: whether it is a chat.
    tools: schemas of those whose calls replies are searched for.
    logprobs: alternatives to list with each token's log-prob; None for no log-probs.
    token_ids: whether the answer carries ids, log-probs and the version of the weights.
    usage: whether a stream ends with the usage.
  """

  prompts: list[tuple[int, ...]]
  requests: list[Request]
  n: int
  chat: bool
  tools: Sequence[dict[str, Any]]
  logprobs: int | None
  token_ids: bool
  usage: bool


def of_chat(body: schemas.ChatIn, client: str, served: Served, vocabulary: Vocabulary) -> Plan:
  """The plan of a chat.

  Args:
    body: what came in.
    client: whose turn in the engine's queue it takes.
    served: the model.
    vocabulary: its tokens.
  Raises:
    ApiError: 404, it is for another model; 400, it is not valid, as the message says.
  """
  _check_model(body, served)
  if body.prompt_token_ids is not None:
    prompt, name = body.prompt_token_ids, "prompt_token_ids"
  else:
    _check_size(chat.size(body), "messages", served, vocabulary)
    prompt, name = chat.encode(served.tokenizer, body), "messages"
  top = (body.top_logprobs or 0) if body.logprobs else None
  limit = body.max_completion_tokens or body.max_tokens
  prompts = [_checked(prompt, name, limit, served)]
  tools = chat.tools_of(body)
  return _plan(body, prompts, limit, top, client, served, is_chat=True, tools=tools)


def of_completion(
  body: schemas.CompletionIn, client: str, served: Served, vocabulary: Vocabulary
) -> Plan:
  """The plan of a completion; see `of_chat`. Texts are encoded as they are, nothing is put before
  them."""
  _check_model(body, served)
  given = body.prompt
  several: list = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
  prompts = []
  for prompt in several:
    if isinstance(prompt, str):
      _check_size(len(prompt), "prompt", served, vocabulary)
      prompt = served.tokenizer.encode(prompt)
    prompts.append(_checked(prompt, "prompt", body.max_tokens, served))
  top = body.logprobs
  return _plan(body, prompts, body.max_tokens, top, client, served, is_chat=False, tools=())


def _check_model(body: schemas._Common, served: Served) -> None:
  if body.model != served.name:
    raise ApiError(
      404,
      f"there is no model {body.model[:100]!r} here, only {served.name!r}",
      param="model",
      code="model_not_found",
    )


def _too_long(message: str, name: str) -> ApiError:
  return ApiError(400, message, param=name, code="context_length_exceeded")


def _check_size(characters: int, name: str, served: Served, vocabulary: Vocabulary) -> None:
  """Refuses a text that is too long whatever its tokens are, before it is encoded."""
  if characters > served.max_length * vocabulary.longest:
    raise _too_long(
      f"{name} of {characters} characters: a prompt and its reply may have "
      f"{served.max_length} tokens together",
      name,
    )


def _checked(
  prompt: Sequence[int], name: str, limit: int | None, served: Served
) -> tuple[int, ...]:
  if not prompt:
    raise ApiError(400, f"{name} has no tokens", param=name)
  if max(prompt) >= served.vocab_size:
    raise ApiError(
      400,
      f"{name}: token id {max(prompt)} is outside the vocabulary of {served.vocab_size}",
      param=name,
    )
  if len(prompt) + (limit or 1) > served.max_length:
    wanted = f"{limit} of the reply" if limit else "at least one of the reply"
    raise _too_long(
      f"{len(prompt)} tokens of the prompt and {wanted} are more than the {served.max_length} that "
      "they may be together",
      name if len(prompt) >= served.max_length else "max_tokens",
    )
  return tuple(prompt)


def _plan(
  body: schemas._Common,
  prompts: list[tuple[int, ...]],
  limit: int | None,
  top: int | None,
  client: str,
  served: Served,
  *,
  is_chat: bool,
  tools: Sequence[dict[str, Any]],
) -> Plan:
  n = body.n or 1
  if n * len(prompts) > schemas.MAX_CHOICES:
    raise ApiError(
      400,
      f"{len(prompts)} prompts with n={n} are more than {schemas.MAX_CHOICES} replies",
      param="n",
    )
  greedy = body.temperature == 0
  sampling = Sampling()
  if not greedy:
    sampling = Sampling(
      temperature=1.0 if body.temperature is None else max(body.temperature, _LEAST_TEMPERATURE),
      top_k=min(max(body.top_k or 0, 0), served.vocab_size),
      top_p=1.0 if body.top_p is None else max(body.top_p, _LEAST_TOP_P),
      min_p=body.min_p or 0.0,
    )
  common = Request(
    context=prompts[0],
    max_tokens=1,
    sampling=sampling,
    greedy=greedy,
    stop_tokens=_stop_tokens(body, served),
    stop_strings=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
    logit_bias=_bias(body, served),
    top_logps=top or 0,
    text=True,
    client=client,
  )
  seed = secrets.randbits(64) if body.seed is None else body.seed
  requests = [
    dataclasses.replace(
      common,
      context=prompt,
      max_tokens=limit or served.max_length - len(prompt),
      key=_key(seed, choice),
    )
    for prompt in prompts
    for choice in range(n)
  ]
  return Plan(
    prompts=prompts,
    requests=requests,
    n=n,
    chat=is_chat,
    tools=tools,
    logprobs=top,
    token_ids=body.return_token_ids,
    usage=bool(body.stream_options and body.stream_options.include_usage),
  )


def _key(seed: int, choice: int) -> tuple[int, int]:
  """64 bits for the engine's randomness."""
  digest = hashlib.blake2b(f"{seed}/{choice}".encode(), digest_size=8).digest()
  return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")


def _stop_tokens(body: schemas._Common, served: Served) -> tuple[int, ...]:
  own = () if body.ignore_eos else served.stop_tokens
  found = tuple(dict.fromkeys((*own, *(body.stop_token_ids or ()))))
  if len(found) > MAX_STOP_TOKENS:
    raise ApiError(
      400,
      f"stop_token_ids: with the model's own {len(own)} they are {len(found)}, at most "
      f"{MAX_STOP_TOKENS} may be",
      param="stop_token_ids",
    )
  _check_ids(found, "stop_token_ids", served)
  return found


def _bias(body: schemas._Common, served: Served) -> tuple[tuple[int, float], ...]:
  found = {int(token): float(bias) for token, bias in (body.logit_bias or {}).items()}
  if len(found) < len(body.logit_bias or {}):
    raise ApiError(400, "logit_bias names a token twice", param="logit_bias")
  _check_ids(found, "logit_bias", served)
  return tuple(found.items())


def _check_ids(ids: Sequence[int] | dict[int, float], name: str, served: Served) -> None:
  for token in ids:
    if not 0 <= token < served.vocab_size:
      raise ApiError(
        400,
        f"{name}: token id {str(token)[:20]} is outside the vocabulary of {served.vocab_size}",
        param=name,
      )
