"""The HTTP side: what any client of the OpenAI API can be pointed at, one bearer key an episode.

`POST /v1/chat/completions`, streamed or whole, and `GET /v1/models`. What a request says of
sampling (`OVERRIDDEN`) is the run's business: a ratio of the loss compares the policy with the
distribution that a reply was drawn from, which must be one for all of them. Such fields are read
and not used, and the header `x-rome-overridden` of the answer names them. What would change the
reply in other ways is one clear 400 (`REFUSED`).

A stream carries the reply in one piece when it is there, behind comments that keep the connection
open: no agent acts on half a call. Left out: completions without messages, several replies a
request, stop strings, and log-probs in the answer (the record has them).

With another server in the policy's place (`native.endpoint`) only the calls are others, those of
`rome.rollout.native.external`.
"""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Annotated, Any, TypeVar

import fastapi
import uvicorn
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp

from rome.envs.service.errors import AsciiJSONResponse
from rome.envs.service.guard import Guard
from rome.envs.service.limits import Rates
from rome.envs.service.metrics import Metrics
from rome.envs.service.sockets import bounded, listen
from rome.rollout.native.sessions import Answer, EpisodeEnded, PolicySession, Sessions
from rome.rollout.serve import chat, errors, schemas
from rome.rollout.serve.errors import ApiError

A = TypeVar("A")
# Fields that the run decides.
OVERRIDDEN = (
  "temperature",
  "top_p",
  "top_k",
  "min_p",
  "seed",
  "max_tokens",
  "max_completion_tokens",
)
REFUSED = (
  "prompt_token_ids",
  "stop",
  "stop_token_ids",
  "ignore_eos",
  "logit_bias",
  "logprobs",
  "top_logprobs",
  "return_token_ids",
  "chat_template_kwargs",
)
EVENTS = "text/event-stream; charset=utf-8"
PING = 10.0  # seconds between comments in a stream that waits
_MAX_REQUESTS = 4096
_MAX_BODY = 16 << 20
_SLOW = 60.0  # seconds that one piece of a body or of an answer may take
_START = 30.0  # seconds for the server's thread to listen
_KEEP_ALIVE = 120  # seconds a connection may idle between requests

router = fastapi.APIRouter()
policy_calls = fastapi.APIRouter()


class Proxy:
  """The server, in a thread of its own. A context manager.

  Args:
    sessions: who may call, and where calls go.
    model: its name for the agents.
    calls: the route of /v1/chat/completions.
    host, port: where it listens; port 0 takes a free one.
  Attributes:
    address: where it listens.
    url: of the API.
  Raises:
    OSError: the port cannot be had.
  """

  def __init__(
    self,
    sessions: Sessions,
    model: str,
    calls: fastapi.APIRouter = policy_calls,
    host: str = "127.0.0.1",
    port: int = 0,
  ):
    self.sessions, self.model = sessions, model
    self._listener = listen(host, port)
    self.address: tuple[str, int] = self._listener.getsockname()[:2]
    self.url = f"http://{self.address[0]}:{self.address[1]}/v1"
    self._server = uvicorn.Server(
      uvicorn.Config(
        create_app(self, calls),
        http=bounded(2 * _MAX_REQUESTS),
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=1,
        server_header=False,
        proxy_headers=False,
      )
    )
    self._thread = threading.Thread(target=self._serve, name="model-proxy", daemon=True)
    self._thread.start()

  def _serve(self) -> None:
    asyncio.run(self._server.serve([self._listener]))

  def close(self) -> None:
    """Ends the server. Idempotent."""
    self._server.should_exit = True
    self._thread.join(_START)
    self._listener.close()

  def __enter__(self) -> "Proxy":
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    self.close()


def create_app(proxy: Proxy, calls: fastapi.APIRouter) -> ASGIApp:
  """The application of a proxy."""
  app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
  app.state.proxy = proxy
  errors.install(app)
  app.include_router(router)
  app.include_router(calls)
  return Guard(
    app,
    proxy.sessions,
    Rates(),
    Metrics(),
    max_requests=_MAX_REQUESTS,
    max_body=_MAX_BODY,
    max_upload=_MAX_BODY,
    slow=_SLOW,
    respond=errors.respond,
  )


def _proxy(request: fastapi.Request) -> Proxy:
  return request.app.state.proxy


ProxyArg = Annotated[Proxy, fastapi.Depends(_proxy)]


@router.get("/v1/models")
async def models(proxy: ProxyArg) -> dict[str, Any]:
  """The one model."""
  entry = {"id": proxy.model, "object": "model", "created": 0, "owned_by": "rome"}
  return {"object": "list", "data": [entry]}


@policy_calls.post("/v1/chat/completions")
async def completions(proxy: ProxyArg, request: fastapi.Request, body: schemas.ChatIn) -> Response:
  """The next message of a conversation: one call, one chunk."""
  session = proxy.sessions.of(request.state.tenant.name)
  assert isinstance(session, PolicySession)
  check_model(body.model, proxy.model)
  _check(body)
  same = same_call(body.model_dump())
  answer = session.ask(same, chat.messages_of(body), chat.tools_of(body))
  given = [name for name in OVERRIDDEN if getattr(body, name) is not None]
  headers = {"x-rome-overridden": ", ".join(given)} if given else {}
  if body.stream:
    usage = bool(body.stream_options and body.stream_options.include_usage)
    events = events_of(answer, lambda found: _whole(found, proxy.model), usage)
    return StreamingResponse(events, 200, headers, EVENTS)
  return AsciiJSONResponse(_whole(await outcome(answer), proxy.model), 200, headers)


def check_model(name: Any, model: str) -> None:
  """Raises ApiError where a request names another model than the one there is."""
  if name != model:
    raise ApiError(
      404, f"there is no model {str(name)[:100]!r}, only {model!r}", code="model_not_found"
    )


def _check(body: schemas.ChatIn) -> None:
  """Raises ApiError where the request asks for what the proxy does not give."""
  if (body.n or 1) > 1:
    raise ApiError(400, "n must be 1: a call is one chunk", param="n", code="unsupported_parameter")
  for name in REFUSED:
    if getattr(body, name):
      raise ApiError(
        400,
        f"{name} is not supported by the model proxy of training: leave it out",
        param=name,
        code="unsupported_parameter",
      )


def same_call(fields: dict[str, Any]) -> str:
  """What is equal of bodies that ask for the same, however they are written."""
  how = ("stream", "stream_options")
  said = {name: value for name, value in fields.items() if name not in how}
  return json.dumps(said, sort_keys=True)  # pydantic's own cannot write half a surrogate pair


async def outcome(answer: "asyncio.Future[A]") -> A:
  """The answer; who stops waiting does not end it. Raises ApiError where there is none."""
  try:
    return await asyncio.shield(answer)
  except EpisodeEnded as error:
    raise ApiError(401, str(error), code="invalid_api_key") from None
  except asyncio.CancelledError:
    if answer.cancelled():
      raise ApiError(503, "the run is ending", code="draining") from None
    raise


def _finish(answer: Answer) -> str:
  calls = answer.reply.finish == "stop" and answer.message.get("tool_calls")
  return "tool_calls" if calls else answer.reply.finish


def _usage(answer: Answer) -> dict[str, Any]:
  sampled = len(answer.reply.tokens)
  return {
    "prompt_tokens": answer.prompt_tokens,
    "completion_tokens": sampled,
    "total_tokens": answer.prompt_tokens + sampled,
    "prompt_tokens_details": {"cached_tokens": answer.reply.cached},
  }


def _whole(answer: Answer, model: str) -> dict[str, Any]:
  message = {"refusal": None, **answer.message}
  choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish(answer)}
  return {
    "id": answer.id,
    "object": "chat.completion",
    "created": answer.created,
    "model": model,
    "system_fingerprint": f"rome-v{answer.reply.version}",
    "choices": [choice],
    "usage": _usage(answer),
  }


async def events_of(
  waited: "asyncio.Future[A]", whole: Callable[[A], dict[str, Any]], usage: bool
) -> AsyncIterator[str]:
  """The events of a stream.

  Args:
    waited: what is waited for.
    whole: makes the chat completion, or the body of an error, of it.
    usage: whether the stream ends with its counts of tokens.
  """
  while not waited.done():
    await asyncio.wait([waited], timeout=PING)
    if not waited.done():
      yield ": waiting for the model\n\n"
  try:
    found = dict(whole(await outcome(waited)))
  except Exception as error:
    known = error if isinstance(error, ApiError) else ApiError(500, str(error))
    found = known.body()
  choices, counts = found.pop("choices", None), found.pop("usage", None)
  if choices is None:
    yield f"data: {json.dumps(found)}\n\n"
    return
  head = found | {"object": "chat.completion.chunk"}
  for choice in choices:
    for piece in _pieces(choice):
      yield f"data: {json.dumps(head | {'choices': [piece]})}\n\n"
  if usage:
    yield f"data: {json.dumps(head | {'choices': [], 'usage': counts})}\n\n"
  yield "data: [DONE]\n\n"


def _pieces(choice: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """A choice as two of a stream: all that is said, and how it ends."""
  rest = {name: value for name, value in choice.items() if name != "message"}
  delta = dict(choice["message"])
  if delta.get("tool_calls"):
    delta["tool_calls"] = [{"index": i, **c} for i, c in enumerate(delta["tool_calls"])]
  return rest | {"delta": delta, "finish_reason": None}, rest | {"delta": {}, "logprobs": None}
