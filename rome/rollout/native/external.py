"""Another server in the policy's place: an OpenAI-compatible chat endpoint answers the agents.

The host asks it (`rome.rollout.native.endpoint`). A sandbox still reaches the proxy alone, by the
key of its episode; the endpoint's own key stays on the host. Bodies go through as the agent wrote
them, sampling included, and answers come back as they are. The model is `native.model`, whose
result it is; another one is a 404 of the proxy, as with the policy: the endpoint's own would make
the episode invalid, and a failure could be played again at will. One call is sent once however
often it comes, and a refusal is the same each time. A stream is asked for whole, and given in one
piece like the policy's. An endpoint that fails is a 502 that names it, and the episode is invalid:
neither the agent nor its model failed.

This is for evaluation alone: see `rome.rollout.native.transcript`. Contexts are as long as the
endpoint allows; `agent.context`, `agent.max_reply` and the run's sampling are the policy's.
"""

import asyncio
import concurrent.futures as cf
import contextlib
from collections.abc import Coroutine, Sequence
from typing import Annotated, Any

import fastapi
from starlette.responses import Response, StreamingResponse

from rome.envs.service.errors import AsciiJSONResponse
from rome.rollout.engine import Stats, Update
from rome.rollout.groups import Member
from rome.rollout.native.endpoint import Answered, Endpoint, EndpointFailed
from rome.rollout.native.proxy import (
  EVENTS,
  PING,
  ProxyArg,
  check_model,
  events_of,
  outcome,
  same_call,
)
from rome.rollout.native.record import Message
from rome.rollout.native.sessions import ENDPOINT_FAILED, Session, Sessions, Terms
from rome.rollout.native.transcript import Transcript
from rome.rollout.serve.errors import ApiError

external_calls = fastapi.APIRouter()


class ExternalSession(Session):
  """Calls that an endpoint answers.

  Args:
    endpoint: whom to ask.
    sessions, member, terms: as for `Session`; of the terms `max_calls` holds, and a call that the
      endpoint refuses counts, as it was sent.
  """

  record: Transcript

  def __init__(self, endpoint: Endpoint, sessions: Sessions, member: Member, terms: Terms):
    super().__init__(sessions, member, terms, Transcript())
    self._endpoint = endpoint

  def ask(self, body: dict[str, Any]) -> "asyncio.Future[Answered]":
    """What the endpoint says to a call, as a future of the event loop that several may wait for.

    Args:
      body: of the request, as the agent wrote it.
    Raises:
      ApiError: 400 there are no messages, 403 it is one call too many, 502 the endpoint has failed.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
      raise ApiError(400, "messages must be a list of objects", param="messages")
    return self._once(same_call(body), lambda: self._begin(body, messages))

  def drop(self) -> None:
    """Whoever waits is told at once; what the endpoint still says is not read."""
    super().drop()
    for answer in tuple(self._answers.values()):
      with contextlib.suppress(RuntimeError):  # the proxy was closed
        answer.get_loop().call_soon_threadsafe(answer.cancel)

  def _begin(
    self, body: dict[str, Any], messages: Sequence[Message]
  ) -> Coroutine[Any, Any, Answered]:
    if self.failure:
      raise self._failed()
    number = self.record.begin(messages)
    whole = {name: body[name] for name in body if name not in ("stream", "stream_options")}
    done = self._endpoint.ask(whole)
    self._open.add(done)
    return self._answer(number, done)

  async def _answer(self, number: int, done: "cf.Future[Answered]") -> Answered:
    with self._waiting(done):
      try:
        answer = await asyncio.shield(asyncio.wrap_future(done))
      except Exception as error:  # a bug, too, may not pass for the agent's failure
        self.failure = str(error) if isinstance(error, EndpointFailed) else repr(error)
        self.stopped = ENDPOINT_FAILED
        raise self._failed() from None
      if answer.status == 200:
        self.record.answer(number, answer.body["choices"][0]["message"])
      self.overflowed = _is_overflow(answer)
    return answer

  def _failed(self) -> ApiError:
    return ApiError(502, self.failure, code=ENDPOINT_FAILED)


def _is_overflow(answer: Answered) -> bool:
  error = answer.body.get("error")
  return isinstance(error, dict) and error.get("code") == "context_length_exceeded"


class NoEngine:
  """Stands where an engine would: as many episodes at once as it has slots, nothing to generate."""

  busy, version, stats = False, -1, Stats()

  def __init__(self, slots: int):
    self.slots = slots

  def publish(self, *_: Any) -> None:
    """Weights are not needed."""

  def step(self) -> list[Update]:
    """Nothing was asked."""
    return []


@external_calls.post("/v1/chat/completions")
async def completions(
  proxy: ProxyArg, request: fastapi.Request, body: Annotated[dict[str, Any], fastapi.Body()]
) -> Response:
  """What the endpoint says to the request."""
  session = proxy.sessions.of(request.state.tenant.name)
  assert isinstance(session, ExternalSession)
  check_model(body.get("model"), proxy.model)
  answer = session.ask(body)
  if body.get("stream"):
    await asyncio.wait([answer], timeout=PING)  # a refusal mostly comes at once, with its status
    done = answer.done()
    if not (done and (answer.cancelled() or answer.exception() or answer.result().status != 200)):
      options = body.get("stream_options")
      usage = bool(isinstance(options, dict) and options.get("include_usage"))
      return StreamingResponse(events_of(answer, lambda a: a.body, usage), 200, None, EVENTS)
  found = await outcome(answer)
  return AsciiJSONResponse(found.body, found.status)
