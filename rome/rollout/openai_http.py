"""JSON to and from a server of the OpenAI API, tried again while it is busy or cannot be reached.

What is said of a failure may be read by anybody, a sandbox too, so the key is never in it.

Left out: streams, and proxies and certificates that the environment names (`trust_env`).
"""

import dataclasses
import json
import time
from typing import Any

import httpx

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds between tries, doubled each time


class Refused(RuntimeError):
  """There is no answer.

  Attributes:
    status: of the last try; 0 where no answer came.
    text: what it said.
  """

  def __init__(self, message: str, status: int = 0, text: str = ""):
    super().__init__(message)
    self.status, self.text = status, text


@dataclasses.dataclass(frozen=True)
class _Failed:
  refused: Refused
  pause: float | None = None  # seconds to the next try that the server asks for; None: no next


class OpenAIHttp:
  """Asks one server. Threads may share it.

  Args:
    url: of the API, such as "http://127.0.0.1:8000/v1".
    api_key: the key, if one is needed.
    timeout: seconds that one try may take; one that takes longer is not made again.
    retries: further tries where the server is busy, fails or cannot be reached.
    connections: requests at a time.
  """

  def __init__(
    self,
    url: str,
    api_key: str | None = None,
    *,
    timeout: float = 600.0,
    retries: int = 4,
    connections: int = 256,
  ):
    headers = {b"Content-Type": b"application/json"}
    if api_key:
      headers[b"Authorization"] = f"Bearer {api_key}".encode()  # whatever it is, the server says so
    self._retries, self._key = retries, api_key
    self._http = httpx.Client(
      base_url=url.rstrip("/") + "/",
      headers=headers,
      timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)),
      limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
      trust_env=False,
    )

  def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The object that the server answers with.

    Raises:
      Refused: it cannot be reached, refuses, or answers something else.
    """
    pause, left = _FIRST_PAUSE, self._retries
    while True:
      now = self._try(method, path, body)
      if not isinstance(now, _Failed):
        return now
      if now.pause is None or not left:
        message = f"{method} {self._http.base_url}{path}: {now.refused}"
        raise Refused(message, now.refused.status, now.refused.text)
      time.sleep(min(max(now.pause, pause), _LONGEST_PAUSE))
      pause, left = pause * 2, left - 1

  def close(self) -> None:
    """Closes the connections."""
    self._http.close()

  def masked(self, text: str) -> str:
    """The text without the key; to be called before it is cut, as a piece of the key is a leak."""
    return text.replace(self._key, "***") if self._key else text

  def _try(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any] | _Failed:
    # ASCII: half a surrogate pair has no UTF-8.
    content = None if body is None else json.dumps(body).encode()
    try:
      response = self._http.request(method, path, content=content)
    except httpx.LocalProtocolError:  # its message spells the header with the key
      return _Failed(Refused("it cannot be sent: is there a line break in the API key?"))
    except httpx.RequestError as error:
      late = isinstance(error, httpx.ReadTimeout)
      return _Failed(Refused(f"{type(error).__name__}: {error}"), None if late else 0.0)
    status, text = response.status_code, self.masked(response.text)
    if status == 200:
      try:
        answer = response.json()
      except ValueError:
        answer = None
      if isinstance(answer, dict):
        return answer
      return _Failed(Refused(f"not JSON: {text[:200]}", status, text))
    refused = Refused(f"{status}: {text[:500]}", status, text)
    if status not in (408, 409, 429) and status < 500:
      return _Failed(refused)
    wanted = response.headers.get("Retry-After", "")
    return _Failed(refused, float(wanted) if wanted.isdigit() else 0.0)
