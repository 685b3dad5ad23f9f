"""A server of the OpenAI API as the sampling policy: token ids in, token ids and log-probs out.

Ids are exact: the prompt goes as ids, and the reply is read from the ids that the server returns,
never from its text. That takes a server with the extension `return_token_ids`: `rome serve`, vLLM
0.10 or newer, or one that has the same fields; any other is refused with an error that says so.

Log-probs must be those of the distribution that the tokens were drawn from, or every ratio of the
training is wrong. `rome serve` gives those. vLLM gives the model's own unless it was started with
`--logprobs-mode=processed_logprobs`; the two are the same only at temperature 1 without top-k,
top-p, min-p and bias. So `processed=False`, the default, refuses requests that have any of these.

Left out: streaming, chat messages, router choices, several choices a call: a rollout asks once for
each reply.
"""

import math
from typing import Any

from rome.rollout.engine import Reply, Request
from rome.rollout.openai_http import OpenAIHttp, Refused


class PolicyError(RuntimeError):
  """The server cannot be reached, refuses, or gives something else than was asked for."""


class OpenAIPolicy:
  """Asks one server. Threads may share it.

  Args:
    url: of the API, such as "http://127.0.0.1:8000/v1".
    model: its name there; None for the only one that is served.
    api_key: the key, if one is needed.
    processed: whether the server's log-probs are those of the distribution that tokens are drawn
      from. None asks: True where the server is `rome serve`, else False.
    timeout: seconds that one try may take; one that takes longer is not made again.
    retries: further tries where the server is busy, fails or cannot be reached. A request has a
      seed of its own, so asking again gives the same reply.
    connections: requests at a time.
  Raises:
    PolicyError: the server cannot be reached, or its models do not decide what was left open.
  """

  def __init__(
    self,
    url: str,
    model: str | None = None,
    api_key: str | None = None,
    *,
    processed: bool | None = None,
    timeout: float = 600.0,
    retries: int = 4,
    connections: int = 256,
  ):
    self._api = OpenAIHttp(url, api_key, timeout=timeout, retries=retries, connections=connections)
    self.model, self.processed = model or "", bool(processed)
    if model is None or processed is None:
      self._look(model, processed)

  def _look(self, model: str | None, processed: bool | None) -> None:
    found = self._ask("GET", "models", None).get("data") or []
    names = [entry.get("id") for entry in found]
    if model is None and len(names) != 1:
      raise PolicyError(f"the server has the models {names}: name one")
    if model is not None and model not in names:
      raise PolicyError(f"the server has the models {names}, not {model!r}")
    self.model = model or names[0]
    if processed is None:
      self.processed = found[names.index(self.model)].get("owned_by") == "rome"

  def ask(self, request: Request) -> Reply:
    """One reply.

    Args:
      request: as the engine takes it; `router_choices` cannot be had.
    Returns:
      The reply; `version` is -1 where the server does not tell its weights' version, `top` and
      `choices` are empty.
    Raises:
      ValueError: the request asks for something that this policy cannot give.
      PolicyError: the server cannot be reached, refuses, or its answer lacks ids or log-probs.
    """
    answer = self._ask("POST", "completions", self._body(request))
    try:
      (choice,) = answer["choices"]
      logprobs = choice.get("logprobs") or {}
    except (AttributeError, KeyError, TypeError, ValueError):
      raise PolicyError(f"not the answer of a completion: {str(answer)[:200]}") from None
    tokens, logps = choice.get("token_ids"), logprobs.get("token_logprobs")
    if tokens is None:
      raise PolicyError(
        "the server returns no token ids (choices[0].token_ids): serve the model with rome serve, "
        "or with vLLM 0.10 or newer"
      )
    if logps is None:
      raise PolicyError("the server returns no log-probs (choices[0].logprobs.token_logprobs)")
    prompt = choice.get("prompt_token_ids")
    if prompt is not None and list(prompt) != list(request.context):
      raise PolicyError("the server changed the prompt's token ids")
    if len(tokens) != len(logps) or not tokens or not all(map(_is_logp, logps)):
      raise PolicyError(
        f"{len(tokens)} token ids with {len(logps)} log-probs, or log-probs that are no numbers: "
        "each sampled token needs one"
      )
    finish = choice.get("finish_reason")
    if finish not in ("stop", "length"):
      raise PolicyError(f"the reply ended with {finish!r}, not with stop or length")
    usage = answer.get("usage") or {}
    return Reply(
      id=-1,
      tokens=list(tokens),
      logps=[float(x) for x in logps],
      version=choice.get("weight_version", -1),
      finish=finish,
      cached=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
      top=[],
      text=choice.get("text") or "" if request.text else "",
    )

  def close(self) -> None:
    """Closes the connections."""
    self._api.close()

  def __enter__(self) -> "OpenAIPolicy":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _body(self, request: Request) -> dict[str, Any]:
    sampling = request.sampling
    if request.router_choices or request.top_logps:
      raise ValueError("a server gives no router_choices, and this policy no top_logps")
    if request.greedy and (sampling.filters or sampling.temperature != 1):
      raise ValueError("greedy replies have the log-probs of plain sampling here")
    plain = not (sampling.filters or sampling.temperature != 1 or request.logit_bias)
    if not (self.processed or plain):
      raise ValueError(
        "this server's log-probs may be those of the model, not of the distribution that it draws "
        "from, which differ under temperature, top-k, top-p, min-p and bias: sample plainly, or "
        "say processed=True if the server gives the latter (vLLM: --logprobs-mode="
        "processed_logprobs)"
      )
    seed = (request.key[0] << 32 | request.key[1]) - (1 << 63)  # signed, as vLLM takes it
    body: dict[str, Any] = {
      "model": self.model,
      "prompt": list(request.context),
      "max_tokens": request.max_tokens,
      "temperature": 0 if request.greedy else sampling.temperature,
      "top_p": sampling.top_p,
      "logprobs": 0,
      "seed": seed,
      "return_token_ids": True,
    }
    optional = {
      "top_k": sampling.top_k,
      "min_p": sampling.min_p,
      "stop": list(request.stop_strings),
      "logit_bias": {str(token): bias for token, bias in request.logit_bias},
      "user": request.client,
    }
    body |= {name: value for name, value in optional.items() if value}
    if request.stop_tokens is not None:
      body |= {"stop_token_ids": list(request.stop_tokens), "ignore_eos": True}
    return body

  def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
    try:
      return self._api.ask(method, path, body)
    except Refused as error:
      raise PolicyError(str(error)) from None


def _is_logp(value: Any) -> bool:
  return isinstance(value, int | float) and math.isfinite(value) and value <= 0
