"""Routes of sandboxes: create, list, look, stop, delete."""

import asyncio
import time
from typing import Annotated

import fastapi
from pydantic import Field

from rome.envs.common import SandboxSpec
from rome.envs.records import Record
from rome.envs.service import schemas
from rome.envs.service.calls import Call, CallArg, SandboxId
from rome.envs.service.core import FIRST_LOOK, GRACE, LOOKS, ended, unless_gone
from rome.envs.service.errors import ClientGone, declare

router = fastapi.APIRouter(prefix="/v1/sandboxes", tags=["sandboxes"])


class SandboxIn(schemas._In):
  """What to make."""

  image: schemas.ImageName | None = Field(default=None, description="null for the base image")
  limits: schemas.LimitsModel = schemas.LimitsModel()
  labels: dict[schemas.Name, Annotated[str, Field(max_length=200)]] = Field(
    default_factory=dict, max_length=32
  )
  ttl: schemas.Seconds = 3600.0
  idle_ttl: schemas.Seconds = 600.0
  deadline: float = Field(default=60.0, gt=0, le=600, description="seconds it may wait for room")


def view(record: Record) -> schemas.SandboxView:
  """The record as JSON."""
  sandbox, spec = record.sandbox, record.spec
  return schemas.SandboxView(
    id=record.id,
    state=record.state,
    image=sandbox.image if sandbox else spec.image,
    backend=sandbox.backend if sandbox else None,
    workdir=sandbox.workdir if sandbox else None,
    limits=schemas.LimitsModel.of(spec.limits),
    labels=dict(spec.labels),
    ttl=spec.ttl,
    idle_ttl=spec.idle_ttl,
    host=record.host,
    error=str(record.error) if record.error else None,
    history=[schemas.Event(time=t, state=state, reason=why) for t, state, why in record.history],
  )


@router.post(
  "",
  status_code=201,
  response_model=schemas.SandboxView,
  responses={
    202: {"model": schemas.SandboxView, "description": "entered; look again until it runs"},
    **declare(410),
  },
)
async def create(
  call: CallArg, body: SandboxIn, response: fastapi.Response, wait: bool = True
) -> schemas.SandboxView:
  """Makes a sandbox. With `wait=false` it answers at once, and the sandbox starts when it can."""
  spec = SandboxSpec(
    image=body.image,
    backend=call.service.config.backend,
    limits=body.limits.limits(),
    labels=tuple(sorted(body.labels.items())),
    ttl=body.ttl,
    idle_ttl=body.idle_ttl,
  )
  record = await call.work(lambda: call.service.submit(call.tenant, spec, body.deadline))
  response.headers["Location"] = f"/v1/sandboxes/{record.id}"
  if not wait:
    response.status_code = 202
    return view(record)
  return view(await until_started(call, record.id, body.deadline + GRACE))


async def until_started(call: Call, sandbox_id: str, timeout: float) -> Record:
  """Waits until a pending sandbox runs; where the client hangs up, it is deleted.

  Raises:
    ApiError: 410 it failed; 503 there was no room in time.
  """
  task = asyncio.ensure_future(_look_until_started(call, sandbox_id, timeout))
  try:
    record = await unless_gone(call.request, task)
  except (ClientGone, TimeoutError, asyncio.CancelledError):
    call.service.workers.submit(lambda: call.service.manager.delete(sandbox_id))
    raise
  if record.state != "running":
    raise ended(record)
  return record


async def _look_until_started(call: Call, sandbox_id: str, timeout: float) -> Record:
  pause, end = FIRST_LOOK, time.monotonic() + timeout
  while (record := await call.record(sandbox_id)).state == "pending":
    if time.monotonic() > end:
      raise TimeoutError(f"sandbox {sandbox_id} did not start within {timeout:g} s")
    await asyncio.sleep(pause)
    pause = min(LOOKS, 1.5 * pause)
  return record


@router.get("", response_model=schemas.SandboxList, responses=declare())
async def list_sandboxes(call: CallArg) -> schemas.SandboxList:
  """All sandboxes of the tenant that the service remembers, those that have ended too."""
  records = await call.work(lambda: call.service.manager.list(call.tenant.name))
  return schemas.SandboxList(sandboxes=[view(record) for record in records])


@router.get("/{sandbox_id}", response_model=schemas.SandboxView, responses=declare(404))
async def look(call: CallArg, sandbox_id: SandboxId) -> schemas.SandboxView:
  """One sandbox: its state, and how it came to it."""
  return view(await call.record(sandbox_id))


@router.get("/{sandbox_id}/stats", response_model=dict[str, int], responses=declare(404, 409, 410))
async def stats(call: CallArg, sandbox_id: SandboxId) -> dict[str, int]:
  """Counts: processes, sessions, bytes in use."""
  return await call.work(lambda: call.service.sandbox(call.tenant, sandbox_id).stats())


@router.post("/{sandbox_id}/stop", response_model=schemas.SandboxView, responses=declare(404))
async def stop(call: CallArg, sandbox_id: SandboxId) -> schemas.SandboxView:
  """Ends it and keeps its record. Stopping twice is no error."""
  await call.record(sandbox_id)
  await call.work(lambda: call.service.manager.stop(sandbox_id), timeout=120)
  return view(await call.record(sandbox_id))


@router.delete("/{sandbox_id}", status_code=204, responses=declare(404))
async def delete(call: CallArg, sandbox_id: SandboxId) -> None:
  """Ends it. Deleting twice is no error."""
  await call.record(sandbox_id)
  await call.work(lambda: call.service.manager.delete(sandbox_id), timeout=120)


@router.post("/{sandbox_id}/reset", status_code=204, responses=declare(404, 409, 410))
async def reset(call: CallArg, sandbox_id: SandboxId) -> None:
  """Makes it as new: no processes, no files of the agent, fresh sessions."""
  await call.work((await call.sandbox(sandbox_id)).reset, timeout=60)
