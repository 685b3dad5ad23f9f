"""Sandboxes of a service, with the interface of those in this process.

    with Client("http://127.0.0.1:8765", token).create() as sandbox:
      sandbox.run("echo hi").output

The service's errors come back as the exceptions that the same call raises in process. Connections
are kept alive. A call is sent again only where that is harmless: it never reached the service, the
service refused it unseen (its rate limit), or doing it twice is doing it once. Every call has a
deadline.

Needs httpx (extra `fleet`). No proxy of the environment is used: the token goes to the URL only.
"""

import json
import os
import ssl
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any
from urllib.parse import quote

import gymnasium
import httpx

from rome.envs import remote_files
from rome.envs.common import (
  BackendUnavailable,
  CommandResult,
  ImageError,
  Limits,
  SandboxError,
  SandboxLost,
)
from rome.envs.network import Attempt
from rome.envs.scoring import TestsUnfinished
from rome.envs.session import Progress
from rome.envs.task import TaskError
from rome.envs.trees import Transfer

URL_VARIABLE, TOKEN_VARIABLE = "ROME_SANDBOX_URL", "ROME_SANDBOX_TOKEN"
GRACE = 60.0  # seconds beyond what a call asks the service to wait for
_ATTEMPTS = 4
_IDLE = 10.0  # seconds: the service closes idle connections later, so none breaks under a call
_IDEMPOTENT = {"GET", "HEAD", "PUT", "DELETE"}


class RemoteError(SandboxError):
  """The service refused a call, or cannot be reached.

  Attributes:
    status: of HTTP; 0 where there was no answer.
    code: the service's word for it; "" where there was no answer.
  """

  def __init__(self, message: str, status: int = 0, code: str = ""):
    super().__init__(message)
    self.status, self.code = status, code


class UnknownRemote(RemoteError):
  """The service knows no such sandbox, session, environment or file."""


class OutOfCapacity(RemoteError, TimeoutError):
  """There is no room, or the quota is used up, and the deadline did not outlast that."""


_KINDS: Mapping[str, type[Exception]] = {
  "backend_unavailable": BackendUnavailable,
  "image_error": ImageError,
  "invalid": ValueError,
  "sandbox_lost": SandboxLost,
  "task_error": TaskError,
  "tests_unfinished": TestsUnfinished,
}


class Client:
  """A connection to a service. Thread-safe; a context manager, or call `close`."""

  def __init__(
    self,
    url: str | None = None,
    token: str | None = None,
    *,
    timeout: float = 30.0,
    certificates: str | None = None,
  ):
    """Connects at the first call.

    Args:
      url: of the service; by default what ROME_SANDBOX_URL holds.
      token: by default what ROME_SANDBOX_TOKEN holds, if anything.
      timeout: seconds for a call that does not wait for anything.
      certificates: a file of authorities to trust instead of the system's.

    Raises:
      ValueError: there is no URL.
    """
    url = url or os.environ.get(URL_VARIABLE, "")
    if not url.startswith(("http://", "https://")):
      raise ValueError(f"the service's URL must start with http:// or https://, not {url!r}")
    token = token or os.environ.get(TOKEN_VARIABLE)
    self.url, self._timeout = url.rstrip("/"), timeout
    self._http = httpx.Client(
      base_url=self.url,
      headers={"Authorization": f"Bearer {token}"} if token else {},
      limits=httpx.Limits(
        max_connections=None, max_keepalive_connections=64, keepalive_expiry=_IDLE
      ),
      trust_env=False,
      verify=_trust(certificates) if url.startswith("https") else False,
    )

  def create(
    self,
    image: str | None = None,
    *,
    limits: Limits | None = None,
    labels: Mapping[str, str] | None = None,
    ttl: float = 3600.0,
    idle_ttl: float = 600.0,
    deadline: float = 60.0,
  ) -> "RemoteSandbox":
    """Starts a sandbox.

    Args:
      image: on the service's host; None for the base image.
      limits: upper bounds, `Limits()` by default.
      labels: for the reader.
      ttl: seconds after which the service ends it, however busy.
      idle_ttl: seconds without a call after which the service ends it.
      deadline: seconds to wait for room.

    Raises:
      ImageError, SandboxLost: as `make_sandbox`.
      OutOfCapacity: there was no room in time, or the quota is used up.
    """
    body: dict[str, Any] = {"ttl": ttl, "idle_ttl": idle_ttl, "deadline": deadline}
    body |= {"image": image, "labels": dict(labels or {})}
    body["limits"] = vars(limits or Limits())
    view = self.call("POST", "/v1/sandboxes", json=body, timeout=deadline + GRACE)
    return RemoteSandbox(self, view.json())

  def get(self, sandbox_id: str) -> "RemoteSandbox":
    """A sandbox that is there already. Raises UnknownRemote where there is none."""
    return RemoteSandbox(self, self.view(sandbox_id))

  def view(self, sandbox_id: str) -> dict[str, Any]:
    """What the service knows of a sandbox: state, history and what it was made with."""
    return dict(self.call("GET", path("v1/sandboxes", sandbox_id)).json())

  def views(self) -> list[dict[str, Any]]:
    """All sandboxes of the tenant, those that have ended too."""
    return list(self.call("GET", "/v1/sandboxes").json()["sandboxes"])

  def call(
    self,
    method: str,
    url: str,
    *,
    timeout: float | None = None,
    idempotent: bool | None = None,
    **arguments: Any,
  ) -> httpx.Response:
    """One call, as often as need be; for what has no method here.

    Args:
      method: of HTTP.
      url: path and query.
      timeout: seconds until the answer must be there, those between attempts included.
      idempotent: whether it may be sent again; by default what is usual for the method.
      **arguments: of `httpx.Client.request`.

    Raises:
      SandboxError: the service cannot be reached or refused; see `_KINDS`.
    """
    end = time.monotonic() + (self._timeout if timeout is None else timeout)
    harmless = method in _IDEMPOTENT if idempotent is None else idempotent
    if "json" in arguments:  # ASCII: unpaired surrogates, which an agent may write, pass as escapes
      arguments["content"] = json.dumps(arguments.pop("json"), allow_nan=False).encode()
      arguments["headers"] = {"Content-Type": "application/json"}
    failure: Exception
    for attempt in range(_ATTEMPTS):
      left = max(0.001, end - time.monotonic())
      pause = 0.1 * 2**attempt
      try:
        response = self._http.request(method, url, timeout=left, **arguments)
      except httpx.ConnectError as error:
        failure, again = _unreachable(self.url, error), True
      except httpx.TransportError as error:
        failure, again = _unreachable(self.url, error), harmless
      else:
        if response.is_success:
          return response
        failure, unseen = _failure(response)
        again = unseen or (harmless and response.status_code in (429, 502, 503))
        pause = _seconds(response.headers.get("Retry-After"), pause)
      if not again or attempt == _ATTEMPTS - 1 or time.monotonic() + pause > end:
        raise failure
      time.sleep(pause)
    raise AssertionError("not reached")

  def close(self) -> None:
    """Closes the connections; sandboxes live on."""
    self._http.close()

  def __enter__(self) -> "Client":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


class RemoteSandbox:
  """A sandbox of a service; made by `Client.create`. Has the methods of `Sandbox`.

  Attributes:
    id, backend, image, workdir, limits: as of `Sandbox`.
  """

  def __init__(self, client: Client, view: Mapping[str, Any]):
    self.client, self.id = client, str(view["id"])
    self.backend, self.image, self.workdir = view["backend"], view["image"], view["workdir"]
    self.limits = Limits(**view["limits"])

  def run(self, command: str, timeout: float = 10.0) -> CommandResult:
    """Runs a command in the default session; see `Session.run`."""
    return self._run("commands", command, timeout)

  def session(
    self, name: str, *, user: str | int = "agent", pty: tuple[int, int] | None = None
  ) -> "RemoteSession":
    """Opens an independent session; the name must be free. At most 48 can be open."""
    size = None if pty is None else {"rows": pty[0], "cols": pty[1]}
    self.call("POST", "sessions", json={"name": name, "user": user, "pty": size})
    return RemoteSession(self, name)

  def fork(self) -> "RemoteSandbox":
    """Makes a second sandbox with the same files and default session; see `Sandbox.fork`."""
    return RemoteSandbox(self.client, self.call("POST", "fork", timeout=6 * GRACE).json())

  def commit(self, name: str) -> str:
    """Makes an image of the files, for this tenant only; returns its full name."""
    answer = self.call("POST", "commit", json={"name": name}, timeout=4 * GRACE)
    return str(answer.json()["image"])

  def attempts(self) -> list[Attempt]:
    """What was tried to reach; see `Sandbox.attempts`."""
    return [Attempt(**one) for one in self.call("GET", "attempts").json()["attempts"]]

  def verify(self, script: str, timeout: float = 60.0) -> CommandResult:
    """Ends every process of the agent, then runs a script as root; see `Sandbox.verify`."""
    return self._run("verify", script, timeout)

  def reset(self) -> None:
    """Makes the sandbox as new; see `Sandbox.reset`."""
    self.call("POST", "reset", timeout=GRACE, idempotent=True)

  def stats(self) -> dict[str, int]:
    """Returns counts; see `Sandbox.stats`."""
    return dict(self.call("GET", "stats").json())

  def view(self) -> dict[str, Any]:
    """What the service knows of it; see `Client.view`."""
    return self.client.view(self.id)

  def alive(self) -> bool:
    """Whether the sandbox answers."""
    try:
      self.stats()
    except SandboxError:
      return False
    return True

  def stop(self) -> None:
    """Ends the sandbox. Idempotent."""
    self.call("POST", "stop", timeout=2 * GRACE, idempotent=True)

  def close(self) -> None:
    """Ends the sandbox and removes all it had. Idempotent."""
    self.client.call("DELETE", path("v1/sandboxes", self.id), timeout=2 * GRACE)

  # Files; remote_files.py does the work.

  def write_file(self, path: str, data: bytes, mode: int = 0o644, owner: str = "agent") -> None:
    """Writes a file whole or not at all; see `Sandbox.write_file`."""
    remote_files.write_file(self, path, data, mode, owner)

  def read_file(self, path: str, max_bytes: int = 16 << 20) -> bytes:
    """Reads a regular file as root; see `Sandbox.read_file`."""
    return remote_files.read_file(self, path, max_bytes)

  def upload(
    self,
    local: str | os.PathLike[str],
    remote: str,
    *,
    owner: str = "agent",
    resume: bool = False,
    sha256: str | None = None,
  ) -> Transfer:
    """Copies a file or a directory from here into the sandbox; see `Sandbox.upload`."""
    return remote_files.upload(self, local, remote, owner, resume, sha256)

  def download(
    self,
    remote: str,
    local: str | os.PathLike[str],
    max_bytes: int = 256 << 20,
    *,
    max_files: int = 100_000,
    sha256: str | None = None,
  ) -> Transfer:
    """Copies a file or a directory of the sandbox to here; see `Sandbox.download`."""
    return remote_files.download(self, remote, local, max_bytes, max_files, sha256)

  def open_upload(
    self, remote: str, mode: int = 0o644, owner: str = "agent"
  ) -> "remote_files.RemoteUpload":
    """Begins an upload in parts; see `Sandbox.open_upload`."""
    return remote_files.RemoteUpload(self, remote, mode, owner)

  def open_download(self, remote: str) -> "remote_files.RemoteDownload":
    """Opens a file for reading in parts; see `Sandbox.open_download`."""
    return remote_files.RemoteDownload(self, remote)

  def remove(self, path: str) -> None:
    """Removes a file, or a directory with all it holds; see `Sandbox.remove`."""
    self.call("DELETE", "files", params={"path": path}, timeout=2 * GRACE)

  def call(self, method: str, what: str, **arguments: Any) -> httpx.Response:
    """`Client.call` on a path below this sandbox's."""
    return self.client.call(method, f"{path('v1/sandboxes', self.id)}/{what}", **arguments)

  def _run(self, what: str, command: str, timeout: float) -> CommandResult:
    if "\0" in command:
      raise ValueError("a command cannot hold a NUL character")
    if not 0 < timeout <= 3600:
      raise ValueError(f"timeout must be between 0 and 3600 seconds, not {timeout}")
    body = {"command": command, "timeout": timeout}
    result = self.call("POST", what, json=body, timeout=2 * timeout + GRACE).json()
    return CommandResult(**result)

  def __enter__(self) -> "RemoteSandbox":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self.close()


class RemoteSession:
  """A session of a remote sandbox; see `Session`."""

  def __init__(self, sandbox: RemoteSandbox, name: str):
    self._sandbox, self.name = sandbox, name

  def run(self, command: str, timeout: float = 10.0) -> CommandResult:
    """Runs a command; see `Session.run`."""
    return self._sandbox._run(f"sessions/{self.name}/commands", command, timeout)

  def start(self, command: str, timeout: float = 3600.0) -> None:
    """Starts a command and returns at once; see `Session.start`."""
    self._call("start", {"command": command, "timeout": timeout})

  def poll(self, timeout: float = 10.0) -> Progress:
    """Waits for output or the end of the started command; see `Session.poll`."""
    return self._progress(self._call("poll", {"timeout": timeout}, timeout))

  def stop(self) -> Progress:
    """Stops the started command; see `Session.stop`."""
    return self._progress(self._call("stop", {}))

  def send(self, data: bytes) -> None:
    """Types UTF-8 text into the terminal of the running command; see `Session.send`."""
    self._call("input", {"text": data.decode()})

  def resize(self, rows: int, cols: int) -> None:
    """Sets the terminal's size; see `Session.resize`."""
    self._call("resize", {"rows": rows, "cols": cols})

  def _call(self, verb: str, body: dict[str, Any], timeout: float = 10.0) -> httpx.Response:
    url = f"sessions/{self.name}/{verb}"
    return self._sandbox.call("POST", url, json=body, timeout=2 * timeout + GRACE)

  def _progress(self, answer: httpx.Response) -> Progress:
    found = answer.json()
    return Progress(found["output"], found["result"] and CommandResult(**found["result"]))

  def close(self) -> None:
    """Ends the shell and what still runs in it. Idempotent."""
    try:
      self._sandbox.call("DELETE", f"sessions/{self.name}")
    except (UnknownRemote, SandboxLost):
      pass


def path(*parts: str) -> str:
  """A path of the service; the last part is one segment, whatever it holds."""
  return "/" + "/".join((*parts[:-1], quote(parts[-1], safe="")))


def _trust(certificates: str | None) -> ssl.SSLContext:
  return ssl.create_default_context(cafile=certificates)


def _unreachable(url: str, error: Exception) -> RemoteError:
  if isinstance(error, httpx.TimeoutException):
    return RemoteError(f"{url} did not answer in time: raise the deadline, or look at its log")
  return RemoteError(f"{url} cannot be reached: {error}; is `rome sandbox serve` running there?")


def _failure(response: httpx.Response) -> tuple[Exception, bool]:
  """The exception for an answer, and whether the service refused the call unseen."""
  status = response.status_code
  try:
    error = response.json()["error"]
    code, message, mend = str(error["code"]), str(error["message"]), str(error["mend"])
  except (ValueError, KeyError, TypeError):
    return RemoteError(f"status {status}, not from a sandbox service: check the URL", status), False
  if code == "reset_needed":
    return gymnasium.error.ResetNeeded(message), False
  if code in _KINDS:
    return _KINDS[code](message), False
  text = f"{message}: {mend}"
  if status == 404:
    return UnknownRemote(text, status, code), False
  if status in (429, 503):
    return OutOfCapacity(text, status, code), code == "rate_limited"
  return RemoteError(text, status, code), False


def _seconds(header: str | None, default: float) -> float:
  return float(header) if header and header.isdigit() else default
