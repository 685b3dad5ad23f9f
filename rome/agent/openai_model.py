"""A model behind an endpoint of the OpenAI API, by the `openai` client.

What is sent is exactly `ModelRequest.wire()`; where the reply is to be shown as it comes, the
fields that ask for a stream follow it (`_STREAMED`). Attempts that fail on the way (no connection,
408, 409, 429, 5xx, a stream that ends early) are made again with back-off; everything else is a
`ModelError` that says what to do.

Thinking that a server gives beside the content goes back to it under the name under which it came.
Left out: the `Responses` API.
"""

import json
import random
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rome.agent.model import REASONING, Call, ModelError, ModelReply, ModelRequest

if TYPE_CHECKING:
  from openai import OpenAI

MAX_REPLY = 8 << 20  # bytes of one reply on the wire
_STREAMED = b',"stream":true,"stream_options":{"include_usage":true}}'
_NONSENSE = (ValueError, TypeError, LookupError, AttributeError)  # where a reply is something else
_BACKOFF = 0.5  # seconds before the second attempt; doubled for each further one
_LONGEST = 20.0

# Shows what comes: "text", "thinking" beside it, "call" (a tool's name and pieces of its
# arguments), and "again", after which everything of this reply comes once more.
Shown = Callable[[str, str], None]


class OpenAIModel:
  """See the module. Usable from several threads.

  Args:
    base_url: such as http://127.0.0.1:8000/v1.
    key: the bearer key, "" for none.
    shown: gets replies in pieces; None asks for them whole.
    tries: attempts in all.
    timeout: seconds without a byte after which an attempt has failed.
  Raises:
    ModelError: the address is none.
  """

  def __init__(
    self,
    base_url: str,
    key: str = "",
    shown: Shown | None = None,
    tries: int = 4,
    timeout: float = 600.0,
  ):
    if not base_url.startswith(("http://", "https://")):
      raise ModelError(f"base_url {base_url!r} must begin with http:// or https://")
    self.base_url, self.shown, self._tries = base_url.rstrip("/"), shown, tries
    self._client = _client(self.base_url, key, timeout)

  def complete(self, request: ModelRequest) -> ModelReply:
    """The reply; see `rome.agent.model.Model`."""
    import openai

    for attempt in range(self._tries):
      try:
        return self._once(request)
      except (openai.APIConnectionError, _Broken) as error:
        failure: Exception = error
      except openai.APIStatusError as error:
        if error.status_code not in (408, 409, 429) and error.status_code < 500:
          raise ModelError(self._refusal(error)) from error
        failure = error
      except (openai.OpenAIError, RecursionError, *_NONSENSE) as error:
        raise ModelError(
          f"{self.base_url} answers what is no chat completion: {_line(error)}"
        ) from error
      if self.shown:
        self.shown("again", "")
      if attempt + 1 < self._tries:
        time.sleep(min(_LONGEST, _BACKOFF * 2**attempt) * (0.5 + random.random() / 2))
    what = self._refusal(failure) if isinstance(failure, openai.APIStatusError) else _line(failure)
    raise ModelError(
      f"{self.base_url} gave no reply in {self._tries} attempts ({what}): "
      "is it up, and is the address right?"
    ) from failure

  def close(self) -> None:
    """Ends its connections."""
    self._client.close()

  def _once(self, request: ModelRequest) -> ModelReply:
    from openai import Stream
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    wire = request.wire()
    if self.shown is None:
      whole = self._client.post("/chat/completions", cast_to=ChatCompletion, content=wire)
      return _checked(_whole(whole))
    stream = self._client.post(
      "/chat/completions",
      cast_to=ChatCompletion,
      content=wire[:-1] + _STREAMED,
      stream=True,
      stream_cls=Stream[ChatCompletionChunk],
    )
    with stream:
      return _checked(_gather(stream, self.shown))

  def _refusal(self, error: Any) -> str:
    hints = {
      401: "set the key (--api-key-variable)",
      403: "set the key (--api-key-variable)",
      404: "check --endpoint and --model",
      413: "the request is too long: /compact",
    }
    hint = hints.get(error.status_code, "")
    return f"{self.base_url} refuses with {error.status_code}: {_line(error)}" + (
      f"; {hint}" if hint else ""
    )


class _Broken(RuntimeError):
  """A reply, or a stream of one, that ended before it was whole."""


def _client(base_url: str, key: str, timeout: float) -> "OpenAI":
  import httpx2
  import openai

  class Bounded(httpx2.HTTPTransport):
    """Bounds what a reply may have of bytes."""

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
      response = super().handle_request(request)
      if (coding := response.headers.get("content-encoding", "identity")) != "identity":
        response.close()  # 8 MiB of it may be 8 GiB
        raise ValueError(f"its reply is encoded, {coding!r}, which was not asked for")
      response.stream = _bounded(response.stream)
      return response

  class _bounded(httpx2.SyncByteStream):
    def __init__(self, stream: Any):
      self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
      size = 0
      for part in self._stream:
        size += len(part)
        if size > MAX_REPLY:
          raise ValueError(f"its reply has more than {MAX_REPLY >> 20} MiB")
        yield part

    def close(self) -> None:
      self._stream.close()

  return openai.OpenAI(
    base_url=base_url,
    api_key=key or "none",
    max_retries=0,
    timeout=httpx2.Timeout(timeout, connect=10.0),
    http_client=httpx2.Client(transport=Bounded(), timeout=timeout),
    default_headers={"Content-Type": "application/json", "Accept-Encoding": "identity"},
  )


def _whole(reply: Any) -> ModelReply:
  choice = reply.choices[0]
  calls = tuple(
    Call(call.id or "", call.function.name, call.function.arguments or "")
    for call in choice.message.tool_calls or ()
  )
  usage = reply.usage
  return ModelReply(
    choice.message.content or "",
    calls,
    _finish(choice.finish_reason),
    (usage.prompt_tokens or 0) if usage else 0,
    (usage.completion_tokens or 0) if usage else 0,
    reasoning=_reasoning(choice.message),
  )


def _reasoning(said: Any) -> dict[str, str]:
  """Thinking beside the content of a message, or of a piece of one."""
  found = {name: getattr(said, name, None) for name in REASONING}
  return dict([(k, v) for k, v in found.items() if v and isinstance(v, str)][:1])


def _checked(reply: ModelReply) -> ModelReply:
  """The same, of the types that it says; the library checks nothing.

  Raises:
    TypeError: it is not.
  """
  texts = [reply.content, *(t for c in reply.calls for t in (c.id, c.name, c.arguments))]
  if not all(isinstance(text, str) for text in texts):
    raise TypeError("a text of its reply is none")
  counts = (reply.prompt_tokens, reply.completion_tokens)
  if not all(isinstance(count, int) and 0 <= count < 1 << 53 for count in counts):
    raise TypeError(f"its counts of tokens are none, {counts!r:.100}")
  return reply


def _gather(stream: Any, shown: Shown) -> ModelReply:
  """Puts the pieces of a reply together and shows them.

  Raises:
    _Broken: it ends without having finished.
  """
  import httpx2

  text: list[str] = []
  reasoning: dict[str, str] = {}
  calls: dict[int, list[str]] = {}  # id, name, arguments
  finish, counts = "", (0, 0)
  try:
    for chunk in stream:
      if chunk.usage:
        counts = chunk.usage.prompt_tokens or 0, chunk.usage.completion_tokens or 0
      for choice in chunk.choices or ():
        finish = choice.finish_reason or finish
        for name, thought in _reasoning(choice.delta).items():
          reasoning[name] = reasoning.get(name, "") + thought
          shown("thinking", thought)
        if piece := choice.delta.content:
          text.append(piece)
          shown("text", piece)
        for part in choice.delta.tool_calls or ():
          _add(calls.setdefault(part.index, ["", "", ""]), part, shown)
  except (httpx2.TransportError, json.JSONDecodeError) as error:
    raise _Broken(f"its stream broke: {_line(error)}") from error
  if not finish:
    raise _Broken("its stream ended before the reply did")
  found = tuple(Call(*calls[index]) for index in sorted(calls))
  return ModelReply("".join(text), found, _finish(finish), *counts, reasoning=reasoning)


def _add(call: list[str], part: Any, shown: Shown) -> None:
  call[0] = call[0] or part.id or ""
  if part.function and part.function.name:
    call[1] += part.function.name
    shown("call", part.function.name + " ")
  if part.function and part.function.arguments:
    call[2] += part.function.arguments
    shown("call", part.function.arguments)


def _finish(reason: str | None) -> str:
  """As the loop knows it. Raises _Broken: a gateway says that its model failed midway."""
  if reason == "error":
    raise _Broken("it failed in the middle of the reply")
  return reason if reason in ("length", "tool_calls") else "stop"


def _line(error: Exception) -> str:
  """What an error says, in one line; of a failed connection also what lies beneath."""
  cause = error.__cause__
  said = f"{error}" + (f" ({cause})" if cause is not None and str(cause) not in str(error) else "")
  return " ".join((said or type(error).__name__).split())[:300]
