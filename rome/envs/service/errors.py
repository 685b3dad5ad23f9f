"""What goes wrong, as answers: one shape, a status by the kind of error, never a 5xx for bad input.

    {"error": {"code": "sandbox_lost", "message": "...", "mend": "..."}}

`code` is for programs (the Python client turns it back into the exception), `message` says what
happened, `mend` what to do about it.
"""

import errno
import json
import logging
from collections.abc import Sequence
from typing import Any

import fastapi
import gymnasium
import pydantic
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from rome.envs.admission import CapacityExceeded
from rome.envs.common import BackendUnavailable, ImageError, SandboxError, SandboxLost
from rome.envs.queueing import QueueFull
from rome.envs.records import CreationFailed, ManagerClosed, UnknownSandbox
from rome.envs.rocklet import client
from rome.envs.scoring import TestsUnfinished
from rome.envs.task import TaskError

_log = logging.getLogger("rome.envs.service")


class ErrorDetail(pydantic.BaseModel):
  """What went wrong and what to do about it."""

  code: str = pydantic.Field(description="for programs; stable")
  message: str = pydantic.Field(description="what happened")
  mend: str = pydantic.Field(description="what to do about it")


class ErrorBody(pydantic.BaseModel):
  """The body of every answer that is not a success."""

  error: ErrorDetail


class ApiError(Exception):
  """An error with all that its answer needs; `retry_after` in seconds, `challenge` of a 401."""

  def __init__(
    self,
    status: int,
    code: str,
    message: str,
    mend: str,
    retry_after: float | None = None,
    challenge: str = "Bearer",
  ):
    super().__init__(message)
    self.status, self.code, self.message, self.mend = status, code, message, mend
    self.retry_after, self._challenge = retry_after, challenge

  def headers(self) -> dict[str, str]:
    """Headers of the answer besides its length and type."""
    headers = {}
    if self.retry_after is not None:
      headers["Retry-After"] = str(max(1, round(self.retry_after)))
    if self.status == 401:
      headers["WWW-Authenticate"] = f'{self._challenge} realm="rome"'
    return headers

  def response(self) -> Response:
    """The answer. ASCII, so that no text a command printed can break its encoding."""
    body = {"error": {"code": self.code, "message": self.message, "mend": self.mend}}
    return AsciiJSONResponse(body, self.status, self.headers())


class AsciiJSONResponse(JSONResponse):
  """JSON in ASCII: unpaired surrogates, which names of files may hold, pass as escapes."""

  def render(self, content: Any) -> bytes:
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


class ClientGone(Exception):
  """The client hung up; nobody reads an answer."""


_MENDS = {
  401: "send the header Authorization: Bearer TOKEN",
  404: "check the path against /openapi.json",
  405: "the header Allow names the methods of this path",
}
_CODES = {404: "no_such_path", 405: "method_not_allowed", 401: "unauthorized"}


def declare(*statuses: int) -> dict[int | str, dict[str, Any]]:
  """The error answers of a route, for its OpenAPI description; what every route has is added."""
  retry = {
    "Retry-After": {"description": "seconds to wait", "schema": {"type": "integer", "minimum": 1}}
  }
  declared: dict[int | str, dict[str, Any]] = {}
  for status in sorted({*statuses, 401, 403, 408, 413, 422, 429, 503, 504}):
    declared[status] = {"model": ErrorBody, "description": _DESCRIPTIONS[status]}
    if status in (429, 503):
      declared[status]["headers"] = retry
  return declared


_DESCRIPTIONS = {
  401: "no valid token",
  403: "refused: a foreign origin, or not for this tenant",
  404: "there is no such thing, or it belongs to another tenant",
  408: "the request's body came too slowly",
  409: "the thing is not in a state for this",
  410: "the sandbox is lost or closed; the message says why",
  413: "the body or the file is too large",
  416: "the offset lies beyond the end",
  422: "the input is not valid, or the sandbox refused it",
  429: "too many requests, or the tenant's quota is used up",
  503: "out of capacity for now",
  504: "the work took longer than the service allows",
}


def to_api_error(error: Exception) -> ApiError:
  """The answer for any exception that a handler lets through."""
  text = str(error) or type(error).__name__
  match error:
    case ApiError():
      return error
    case SandboxLost():
      return ApiError(410, "sandbox_lost", text, "make another sandbox")
    case ImageError():
      return ApiError(422, "image_error", text, "name an image that is on the host and holds bash")
    case BackendUnavailable():
      return ApiError(422, "backend_unavailable", text, "leave this part of the request out")
    case TestsUnfinished():
      return ApiError(409, "tests_unfinished", text, "count the episode as invalid and reset")
    case client.RequestError():
      return _refused(error, text)
    case QueueFull() | CreationFailed() | TimeoutError():
      return ApiError(503, "out_of_capacity", text, "try again later", retry_after=5)
    case ManagerClosed():
      return ApiError(503, "draining", text, "use another service", retry_after=30)
    case CapacityExceeded():
      return ApiError(422, "over_capacity", text, "ask for lower limits")
    case UnknownSandbox():
      return ApiError(404, "unknown_sandbox", text, "list them")
    case SandboxError():
      return ApiError(422, "refused", text, "change the request as the message says")
    case gymnasium.error.ResetNeeded():
      return ApiError(409, "reset_needed", text, "reset the environment first")
    case TaskError():
      return ApiError(422, "task_error", text, "name a task as family/seed, or give it whole")
    case ValueError():
      return ApiError(422, "invalid", text, "change the request as the message says")
  _log.error("unexpected error", exc_info=error)
  return ApiError(
    500, "internal", f"{type(error).__name__} in the service", "report it with the service's log"
  )


def _refused(error: client.RequestError, text: str) -> ApiError:
  if error.errno in (errno.ENOENT, errno.ENOTDIR):
    return ApiError(404, "no_such_file", text, "list the directory to see what is there")
  if error.errno in (errno.EFBIG, errno.ENOSPC, errno.EDQUOT):
    return ApiError(413, "too_large", text, "send less, or make the sandbox with a larger disk_mb")
  if error.errno == errno.E2BIG:
    return ApiError(422, "too_many_entries", text, "raise the limit, or list its directories")
  return ApiError(422, "refused", text, "change the request as the message says")


def install(app: fastapi.FastAPI) -> None:
  """Makes every error of the app an answer of the one shape."""

  @app.exception_handler(RequestValidationError)
  async def invalid(_: fastapi.Request, error: RequestValidationError) -> Response:
    message = "; ".join(_where(item) for item in error.errors()[:5])
    return ApiError(422, "invalid", message, "see /openapi.json for what is accepted").response()

  @app.exception_handler(HTTPException)
  async def http(_: fastapi.Request, error: HTTPException) -> Response:
    if isinstance(error.__cause__, ApiError):  # the guard's, while the body was read
      return error.__cause__.response()
    status = error.status_code
    code, mend = _CODES.get(status, "invalid"), _MENDS.get(status, "see /openapi.json")
    response = ApiError(status, code, str(error.detail), mend).response()
    response.headers.update(error.headers or {})
    return response

  async def known(_: fastapi.Request, error: Exception) -> Response:
    return to_api_error(error).response()

  for kind in (ApiError, SandboxError, ValueError, TimeoutError, gymnasium.error.Error, Exception):
    app.add_exception_handler(kind, known)

  @app.exception_handler(ClientGone)
  async def gone(_: fastapi.Request, error: ClientGone) -> Response:
    return Response(status_code=499)  # nobody reads it; the metrics count it


def _where(item: dict[str, Any]) -> str:
  """Which field, and why; never the value, which may be secret, huge or unencodable."""
  location: Sequence[Any] = item.get("loc", ())
  return f"{'.'.join(str(part) for part in location)}: {item.get('msg', 'invalid')}"
