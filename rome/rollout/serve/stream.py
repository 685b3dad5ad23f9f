"""Answers as server-sent events, and the wait for a client that may hang up.

One write a step of the engine: all that its updates add, to every choice of the request, whether it
was sampled in one step or piled up while the client was slow to read. The ASGI server holds writes
back while the client does not read; other clients do not notice.
"""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rome.envs.service.errors import AsciiJSONResponse, ClientGone
from rome.rollout.engine import Reply, Update
from rome.rollout.serve import replies
from rome.rollout.serve.core import Service, engine_failed
from rome.rollout.serve.errors import ApiError
from rome.rollout.serve.loop import EngineFailed, Ticket
from rome.rollout.serve.plan import Plan

_dumps = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class Answer(Response):
  """The answer to a request whose replies are under way. It cancels them if the client hangs up.

  Args:
    service: the server.
    plan: what was asked for.
    ticket: the replies.
    stream: whether they are sent as they come.
  """

  media_type = "application/json"

  def __init__(self, service: Service, plan: Plan, ticket: Ticket, stream: bool):
    super().__init__()
    self._service, self._plan, self._ticket, self._stream = service, plan, ticket, stream
    self._choices = [replies.Choice(i, plan, service.vocabulary) for i in range(len(plan.requests))]
    self._replies: dict[int, Reply] = {}

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    gone = asyncio.ensure_future(_gone(receive))
    work = asyncio.ensure_future(self._events(send) if self._stream else self._whole())
    try:
      waited: set[asyncio.Future[Any]] = {gone, work}
      await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
      if not work.done():
        raise ClientGone
      answer = work.result()
      if answer is not None:
        await answer(scope, receive, send)
    finally:
      self._service.loop.cancel(self._ticket)
      for task in (gone, work):
        task.cancel()
      await asyncio.gather(gone, work, return_exceptions=True)

  async def _whole(self) -> Response:
    try:
      async with asyncio.timeout(self._service.config.deadline):
        while news := await self._ticket.news():
          self._keep(news)
    except (EngineFailed, TimeoutError) as error:
      raise self._failure(error) from None
    found = self._ordered()
    version = max(reply.version for reply in found)
    return AsciiJSONResponse(
      replies.head(self._plan, self._service.served.name, version, stream=False)
      | {
        "choices": [c.whole(r) for c, r in zip(self._choices, found, strict=True)],
        "usage": replies.usage(self._plan, found),
      }
    )

  async def _events(self, send: Send) -> None:
    head = replies.head(
      self._plan, self._service.served.name, self._service.loop.stats.version, stream=True
    )
    ids = {"prompt_token_ids": head.pop("prompt_token_ids")} if "prompt_token_ids" in head else {}
    start = _dumps(head)[:-1]
    end = ',"usage":null}\n\n' if self._plan.usage else "}\n\n"

    async def write(text: str, more: bool = True) -> None:
      await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

    await send(
      {
        "type": "http.response.start",
        "status": 200,
        "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
      }
    )
    if self._plan.chat:
      opening = _dumps(ids)[1:-1]
      opening = f",{opening}" if opening else ""
      choices = [_dumps(choice.opening()) for choice in self._choices]
      await write("".join(f'data: {start}{opening},"choices":[{c}]{end}' for c in choices))
    try:
      async with asyncio.timeout(self._service.config.deadline):
        while news := await self._ticket.news():
          self._keep(news)
          text = "".join(f'data: {start},"choices":[{chunk}]{end}' for chunk in self._chunks(news))
          if text:
            await write(text)
    except (ApiError, EngineFailed, TimeoutError) as error:
      await write(f"data: {_dumps(self._failure(error).body())}\n\n", more=False)
      return
    last = ""
    if self._plan.usage:
      counts = _dumps(replies.usage(self._plan, self._ordered()))
      last = f'data: {start},"choices":[],"usage":{counts}}}\n\n'
    await write(f"{last}data: [DONE]\n\n", more=False)

  def _chunks(self, news: list[tuple[int, Update]]) -> Iterator[str]:
    for index, update in news:
      chunk = self._choices[index].chunk(update)
      if chunk is not None:
        yield _dumps(chunk)

  def _keep(self, news: list[tuple[int, Update]]) -> None:
    self._replies |= {i: update.reply for i, update in news if update.reply is not None}

  def _ordered(self) -> list[Reply]:
    return [self._replies[i] for i in range(len(self._choices))]

  def _failure(self, error: Exception) -> ApiError:
    if isinstance(error, TimeoutError):
      message = f"the reply was not done within {self._service.config.deadline:g} s"
      return ApiError(504, message, code="deadline")
    return error if isinstance(error, ApiError) else engine_failed(EngineFailed(str(error)))


async def _gone(receive: Receive) -> None:
  """Returns when the client hangs up."""
  while (await receive())["type"] != "http.disconnect":
    pass
