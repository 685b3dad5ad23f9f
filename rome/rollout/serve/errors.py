"""What goes wrong, as answers in the envelope of the OpenAI API.

    {"error": {"message": "...", "type": "invalid_request_error", "param": "top_p", "code": null}}

`message` says what to change, `param` names the field where there is one, `code` is for programs.
Bad input is 400, 401, 404, 405, 408 or 413, never 422 and never a 5xx.
"""

import logging
from collections.abc import Sequence
from typing import Any

import fastapi
import pydantic
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from rome.envs.service import errors as service_errors
from rome.envs.service.errors import AsciiJSONResponse

_log = logging.getLogger("rome.rollout.serve")
_MOST = 200  # characters of a field's name in a message
_NO_OBJECT = ("missing", "model_attributes_type", "model_type")  # pydantic's words for it


class ErrorDetail(pydantic.BaseModel):
  """What went wrong."""

  message: str = pydantic.Field(description="what happened, and what to change")
  type: str = pydantic.Field(description="the kind of error")
  param: str | None = pydantic.Field(description="the field that is wrong, if it is one")
  code: str | None = pydantic.Field(description="for programs; stable")


class ErrorBody(pydantic.BaseModel):
  """The body of every answer that is not a success."""

  error: ErrorDetail


class ApiError(Exception):
  """An error with all that its answer needs; `retry_after` in seconds."""

  def __init__(
    self,
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    retry_after: float | None = None,
  ):
    super().__init__(message)
    self.status, self.message, self.param, self.code = status, message, param, code
    self.retry_after = retry_after

  def body(self) -> dict[str, Any]:
    """The envelope."""
    kind = _TYPES.get(self.status, "invalid_request_error")
    detail = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
    return {"error": detail}

  def response(self) -> Response:
    """The answer."""
    headers = {}
    if self.retry_after is not None:
      headers["Retry-After"] = str(max(1, round(self.retry_after)))
    if self.status == 401:
      headers["WWW-Authenticate"] = 'Bearer realm="rome"'
    return AsciiJSONResponse(self.body(), self.status, headers)


_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "server_error"}
_DESCRIPTIONS = {
  400: "the request is not valid, or asks for something that is not supported",
  401: "no valid key",
  403: "without keys the server answers only to its own address on this machine",
  404: "there is no such model or path",
  408: "the request's body came too slowly",
  413: "the body is too large",
  429: "too many requests wait; Retry-After says how long to",
  500: "the engine has failed",
  503: "the server is loading, being stopped, or has failed",
  504: "the reply took longer than the server allows",
}


def declare(*statuses: int) -> dict[int | str, dict[str, Any]]:
  """The error answers of a route, for its OpenAPI description; what every route has is added."""
  retry = {
    "Retry-After": {"description": "seconds to wait", "schema": {"type": "integer", "minimum": 1}}
  }
  declared: dict[int | str, dict[str, Any]] = {}
  for status in sorted({*statuses, 401, 403, 408, 413, 429, 503}):
    declared[status] = {"model": ErrorBody, "description": _DESCRIPTIONS[status]}
    if status == 429:
      declared[status]["headers"] = retry
  return declared


def install(app: fastapi.FastAPI) -> None:
  """Makes every error of the app an answer of the one shape."""

  @app.exception_handler(RequestValidationError)
  async def invalid(_: fastapi.Request, error: RequestValidationError) -> Response:
    return of_validation(error.errors()).response()

  @app.exception_handler(HTTPException)
  async def http(_: fastapi.Request, error: HTTPException) -> Response:
    cause = error.__cause__  # of reading and parsing the body, which FastAPI answers alike
    if isinstance(cause, service_errors.ApiError):
      return respond(cause)
    if cause is not None:
      reason = "nested too deeply" if isinstance(cause, RecursionError) else str(cause)[:_MOST]
      return ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json").response()
    code = {404: "no_such_path", 405: "method_not_allowed"}.get(error.status_code)
    response = ApiError(error.status_code, str(error.detail), code=code).response()
    response.headers.update(error.headers or {})
    return response

  for kind in (ApiError, Exception):
    app.add_exception_handler(kind, _known)


async def _known(_: fastapi.Request, error: Exception) -> Response:
  return respond(error)


def respond(error: Exception) -> Response:
  """The answer for any exception: of the handlers, or of the guard around them."""
  if isinstance(error, ApiError):
    return error.response()
  if isinstance(error, service_errors.ApiError):  # what the guard refuses
    code = "invalid_api_key" if error.status == 401 else error.code
    message = f"{error.message}: {error.mend}"
    return ApiError(error.status, message, code=code, retry_after=error.retry_after).response()
  _log.error("unexpected error", exc_info=error)
  message = f"{type(error).__name__} in the server; its log says more"
  return ApiError(500, message, code="internal").response()


def of_validation(found: Sequence[Any]) -> ApiError:
  """The answer for what pydantic found; never a value, which may be secret or huge."""
  first, messages = "", []
  for item in found[:5]:
    where = [str(part) for part in item.get("loc", ()) if part != "body"]
    name = ".".join(where)[:_MOST]
    messages.append(f"{name}: {_reason(item)}" if name else _reason(item))
    first = first or (where[0][:_MOST] if where else "")
  if any(item.get("loc") == ("body",) and item.get("type") in _NO_OBJECT for item in found):
    messages.append(
      "the body must be a JSON object, sent with the header Content-Type: application/json"
    )
  code = "unknown_field" if found[0].get("type") == "extra_forbidden" else None
  if found[0].get("type") == "json_invalid":
    return ApiError(400, f"the body is not valid JSON: {_reason(found[0])}", code="invalid_json")
  return ApiError(400, "; ".join(messages), param=first or None, code=code)


def _reason(item: Any) -> str:
  match item.get("type"):
    case "extra_forbidden":
      return "this field is not known, and no field is silently ignored"
    case "json_invalid":
      return str(item.get("ctx", {}).get("error", "invalid"))
    case "missing":
      return "this field is required"
  return str(item.get("msg", "invalid")).removeprefix("Value error, ")
