"""The server of `native.endpoint`, as the host asks it.

What it says of a request (400, 413, 422) is the agent's to read. Anything else that is no reply,
after tries (`rome.rollout.openai_http`), is `EndpointFailed`, which names the endpoint and a mend.

Left out: streams, proxies between it and the host, limits of what it may cost.
"""

import concurrent.futures as cf
import dataclasses
import json
import os
from typing import Any

from rome.rollout.lanes import Threads
from rome.rollout.native.config import NativeConfig
from rome.rollout.openai_http import OpenAIHttp, Refused
from rome.rollout.serve.errors import ApiError

_OF_THE_REQUEST = (400, 413, 422)
_NO_KEY = "is its key in the variable native.api_key_variable={variable}?"
_HINTS = {
  401: _NO_KEY,
  403: _NO_KEY,
  404: "is the address right, and has it the model that native.model names?",
}
_HINT = (
  "is it up, is the address right, and does a reply take less than native.silence={silence:g} s?"
)


class EndpointFailed(RuntimeError):
  """The endpoint gives no reply, which no agent can help."""


@dataclasses.dataclass(frozen=True)
class Answered:
  """What the endpoint said: a chat completion with the status 200, or why it makes none."""

  status: int
  body: dict[str, Any]


class Endpoint:
  """The endpoint of `native.endpoint`, asked with the key of `native.api_key_variable`.

  Args:
    config: names both.
  """

  def __init__(self, config: NativeConfig):
    self._config = config
    key = os.environ.get(config.api_key_variable, "").strip()
    self._http = OpenAIHttp(config.endpoint, key, timeout=config.silence)
    self._threads = Threads()  # those of an executor would be waited for at exit

  def ask(self, body: dict[str, Any]) -> "cf.Future[Answered]":
    """Sends a call; the future raises EndpointFailed."""
    return self._threads.submit(self._ask, body)

  def _ask(self, body: dict[str, Any]) -> Answered:
    try:
      answer = self._http.ask("POST", "chat/completions", body)
    except Refused as error:
      if error.status in _OF_THE_REQUEST:
        return Answered(error.status, _error_body(error))
      raise self._failed(str(error), _HINTS.get(error.status, _HINT)) from None
    if not _is_completion(answer):
      text = self._http.masked(json.dumps(answer))
      raise self._failed(f"no chat completion: {text[:500]}")
    return Answered(200, answer)

  def _failed(self, what: str, hint: str = _HINT) -> EndpointFailed:
    config = self._config
    hint = hint.format(variable=config.api_key_variable, silence=config.silence)
    return EndpointFailed(f"native.endpoint={config.endpoint} gives no reply ({what}): {hint}")

  def close(self) -> None:
    """Ends its connections."""
    self._http.close()
    self._threads.close()


def _error_body(error: Refused) -> dict[str, Any]:
  """A refusal as the endpoint wrote it, or in the API's envelope where it wrote none."""
  try:
    found = json.loads(error.text)
  except ValueError:
    found = None
  if isinstance(found, dict) and "choices" not in found:
    return found
  return ApiError(error.status, error.text[:500]).body()


def _is_completion(answer: dict[str, Any]) -> bool:
  """Whether it has at least one message, calls that can be told apart, and only JSON.

  A gateway that loses its model on the way has said 200 before, and puts the error into the choice
  (https://openrouter.ai/docs/api/reference/errors-and-debugging), beside a message that is empty or
  cut off, which may not pass for the model's.
  """
  choices = answer.get("choices")
  if not isinstance(choices, list) or not choices:
    return False
  for choice in choices:
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
      return False
    if choice.get("error") or choice.get("finish_reason") == "error":
      return False
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
      return False
  try:
    json.dumps(answer, allow_nan=False)
  except ValueError:  # Python reads NaN and 1e999, and the proxy could not write them
    return False
  return True
