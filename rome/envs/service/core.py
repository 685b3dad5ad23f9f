"""The service without its HTTP: tenants' sandboxes, sessions, uploads and environments.

Everything here blocks or is quick; the routes run what blocks in `Workers`. The manager owns the
sandboxes. A sandbox of another tenant does not exist, in words and in time.
"""

import asyncio
import contextlib
import dataclasses
import re
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import fastapi

from rome.envs.common import ImageError, Limits, SandboxError, SandboxLost, SandboxSpec
from rome.envs.manager import Manager
from rome.envs.records import CreationFailed, Record, UnknownSandbox
from rome.envs.sandbox import Sandbox
from rome.envs.service.auth import Tenant, Tokens
from rome.envs.service.errors import ApiError, ClientGone
from rome.envs.service.limits import Rates, Workers
from rome.envs.service.metrics import Metrics
from rome.envs.service.uploads import Uploads

if TYPE_CHECKING:
  from rome.envs.service.commands import Turns
  from rome.envs.service.envs import Entry

_T = TypeVar("_T")
_IMAGES = "rome-tenant."  # how the names of tenants' images begin
_WORD = "[a-z0-9]+(?:[._-]+[a-z0-9]+)*"
_IMAGE = re.compile(rf"(?:[A-Za-z0-9.-]+(?::[0-9]+)?/)?(?:{_WORD}/)*{_WORD}(?::[A-Za-z0-9_.-]+)?")
LIVE = ("pending", "running")
GRACE = 30.0  # seconds that a call may take beyond what it was asked to wait for
FIRST_LOOK, LOOKS = 0.001, 0.05  # seconds between looks at a pending sandbox, from and up to
TOUCH_EVERY = 5.0  # seconds: while a call waits, its sandbox is not idle


@dataclasses.dataclass(frozen=True)
class ServiceConfig:
  """How the service runs.

  Attributes:
    host, port: where it listens; port 0 takes a free one.
    certfile, keyfile: of TLS; None for plain HTTP.
    backend: of every sandbox.
    threads: calls that work at a time, of all tenants.
    max_requests: requests at a time, those that wait too.
    max_body: bytes of a JSON body.
    max_upload: bytes of an uploaded file.
    slow: seconds that one piece of a body or an answer may take.
    drain: seconds that running requests have to end after SIGTERM.
  """

  host: str = "127.0.0.1"
  port: int = 8765
  certfile: str | None = None
  keyfile: str | None = None
  backend: str = "auto"
  threads: int = 128
  max_requests: int = 1024
  max_body: int = 8 << 20
  max_upload: int = 16 << 30
  slow: float = 30.0
  drain: float = 30.0


class Service:
  """What the routes share."""

  def __init__(self, manager: Manager, tokens: Tokens, config: ServiceConfig):
    self.manager, self.tokens, self.config = manager, tokens, config
    self.workers, self.rates, self.metrics = Workers(config.threads), Rates(), Metrics()
    self.started_at = time.time()
    self.draining = False
    self.sessions: dict[str, dict[str, Turns]] = {}  # by sandbox, then by name
    self.uploads = Uploads()
    self.envs: dict[str, Entry] = {}
    self._quota_lock = threading.Lock()
    self.metrics.watch(manager.metrics)

  def record(self, tenant: Tenant, sandbox_id: str) -> Record:
    """The record of a tenant's sandbox.

    Raises:
      ApiError: 404, there is none, or it is somebody else's.
    """
    with contextlib.suppress(UnknownSandbox):
      record = self.manager.get(sandbox_id)
      if record.tenant == tenant.name:
        return record
    raise ApiError(404, "unknown_sandbox", f"there is no sandbox {sandbox_id}", "list them")

  def sandbox(self, tenant: Tenant, sandbox_id: str) -> Sandbox:
    """A tenant's running sandbox, which is thereby not idle.

    Raises:
      ApiError: 404 as `record`; 409 it does not run yet; 410 it does not run any more.
    """
    record = self.record(tenant, sandbox_id)
    sandbox = record.sandbox
    if record.state == "running" and sandbox is not None:
      self.manager.touch(sandbox_id)
      return sandbox
    if record.state == "pending":
      raise ApiError(409, "not_running", f"sandbox {sandbox_id} is pending", "wait until it runs")
    raise ended(record)

  def submit(self, tenant: Tenant, spec: SandboxSpec, deadline: float) -> Record:
    """Enters a sandbox of a tenant, within his quotas; it starts when there is room.

    Args:
      tenant: whose it will be.
      spec: what it is.
      deadline: seconds it may wait for room.

    Raises:
      ApiError: 422 it is larger than the quota; 429 the quota is used up for now.
    """
    check_image(tenant, spec.image)
    with self._quota_lock:
      live = [record for record in self.manager.list(tenant.name) if record.state in LIVE]
      check_quotas(tenant, [record.spec.limits for record in live], spec.limits)
      return self.manager.create(spec, tenant=tenant.name, deadline=deadline, wait=False)

  def started(self, sandbox_id: str) -> Record:
    """Waits in this thread until a sandbox that was submitted runs.

    Raises:
      SandboxError: it failed, or found no room in time.
    """
    pause = FIRST_LOOK
    while (record := self.manager.get(sandbox_id)).state == "pending":
      time.sleep(pause)
      pause = min(LOOKS, 1.5 * pause)
    if record.state != "running":
      raise ended(record)
    return record

  async def tidy(self, idle: float) -> None:
    """Forgets sessions of ended sandboxes; closes environments idle for `idle` seconds."""
    known = {*self.sessions, *self.uploads.sandboxes}
    running = await asyncio.to_thread(self._running, known)
    for sandbox_id in set(self.sessions) - running:
      del self.sessions[sandbox_id]
    for upload in self.uploads.stale(running):
      await asyncio.to_thread(upload.drop)
    now = time.monotonic()
    for entry in list(self.envs.values()):
      if now - entry.used > idle and not entry.lock.locked():
        del self.envs[entry.id]
        await asyncio.to_thread(entry.locked, entry.env.close)

  def _running(self, known: set[str]) -> set[str]:
    running = set()
    for sandbox_id in known:
      with contextlib.suppress(UnknownSandbox):
        if self.manager.get(sandbox_id).state in LIVE:
          running.add(sandbox_id)
    return running

  async def close(self) -> None:
    """Ends all sandboxes; work on them that still runs ends by that."""
    self.draining = True
    await asyncio.to_thread(self.manager.close)
    self.workers.close()

  async def work(
    self,
    tenant: Tenant,
    request: fastapi.Request,
    work: Callable[[], _T],
    *,
    timeout: float = GRACE,
    busy: str | None = None,
  ) -> _T:
    """Runs blocking work in a thread while the client is there.

    Args:
      tenant: on whose account.
      request: the request, whose client may hang up.
      work: what to do.
      timeout: seconds.
      busy: the sandbox that is not idle meanwhile.
    """
    task = asyncio.ensure_future(self.workers.run(tenant, work, timeout))
    toucher = asyncio.ensure_future(self._touch(busy)) if busy else None
    try:
      return await unless_gone(request, task)
    finally:
      if toucher:
        toucher.cancel()

  async def _touch(self, sandbox_id: str) -> None:
    while True:
      await asyncio.sleep(TOUCH_EVERY)
      try:
        await asyncio.to_thread(self.manager.touch, sandbox_id)
      except UnknownSandbox:
        return


def ended(record: Record) -> Exception:
  """Why a sandbox does not run (any more): its own error where it failed, else 410."""
  if record.state == "failed" and isinstance(record.cause, SandboxError):
    return record.cause
  if record.state == "failed" and record.started == 0:
    return CreationFailed(f"sandbox {record.id} did not start: {record.error}")
  return SandboxLost(f"sandbox {record.id} is {record.state}: {record.history[-1][2]}")


def image_tag(tenant: Tenant, name: str) -> str:
  """The tag of an image that a tenant commits; no tenant's name holds a dot."""
  return f"{_IMAGES}{tenant.name}.{name}"


def check_image(tenant: Tenant, image: str | None) -> None:
  """Raises ImageError for an image that another tenant has committed, by name, digest or id.

  An id may be shortened to a few digits, so whatever could be one is refused. So is what Podman
  takes beside NAME:TAG: a digest, behind any name, and its store's own way of naming an id.
  """
  if image is None:
    return
  name = image.rpartition("/")[2]
  foreign = name.startswith(_IMAGES) and not name.startswith(image_tag(tenant, ""))
  is_id = re.fullmatch(r"(sha256:)?[0-9a-fA-F]+", image)
  if foreign or is_id or image.startswith("containers-storage:") or not _IMAGE.fullmatch(image):
    raise ImageError(f"there is no image {image}: name one as NAME:TAG")


def check_quotas(tenant: Tenant, live: list[Limits], wanted: Limits) -> None:
  """Raises ApiError where one more sandbox would break the tenant's quotas."""
  quotas = tenant.quotas
  for name, most, have, more in (
    ("sandboxes", quotas.sandboxes, len(live), 1),
    ("cpus", quotas.cpus, sum(limits.cpus for limits in live), wanted.cpus),
    ("memory_mb", quotas.memory_mb, sum(limits.memory_mb for limits in live), wanted.memory_mb),
  ):
    if more > most:
      raise ApiError(
        422,
        "over_quota",
        f"{name}={more:g} is more than the quota of {most:g}",
        f"ask for less {name}",
      )
    if have + more > most + 1e-9:
      raise ApiError(
        429,
        "quota_used_up",
        f"tenant {tenant.name} has {have:g} of {most:g} {name} in use and asks for {more:g} more",
        "delete sandboxes or environments, or wait for their end",
        retry_after=5,
      )


async def unless_gone(request: fastapi.Request, task: "asyncio.Future[_T]") -> _T:
  """The result of a task, or `ClientGone` as soon as the client hangs up."""
  gone = asyncio.ensure_future(_gone(request))
  try:
    waited: set[asyncio.Future[Any]] = {task, gone}
    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
      raise ClientGone
    return task.result()
  finally:
    gone.cancel()
    if not task.done():
      task.cancel()


async def _gone(request: fastapi.Request) -> None:
  message: dict[str, Any] = {}
  while message.get("type") != "http.disconnect":
    message = dict(await request.receive())
