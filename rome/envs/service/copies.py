"""Routes that copy a sandbox, to another one or to an image, and its log of network attempts."""

import fastapi
import pydantic
from pydantic import Field

from rome.envs.service import schemas
from rome.envs.service.calls import CallArg, SandboxId
from rome.envs.service.core import GRACE, image_tag
from rome.envs.service.errors import declare
from rome.envs.service.sandboxes import until_started, view

router = fastapi.APIRouter(prefix="/v1/sandboxes/{sandbox_id}", tags=["copies"])
_DEADLINE = 60.0  # seconds that a fork's sandbox waits for room
_COPY = 180.0  # seconds for the files themselves


class CommitIn(schemas._In):
  """What to call the image."""

  name: str = Field(pattern=r"^[a-z0-9]+([._-][a-z0-9]+)*$", max_length=100)


class CommitOut(pydantic.BaseModel):
  """The image's full name, to make sandboxes of."""

  image: str


class AttemptView(pydantic.BaseModel):
  """One attempt to reach something; see `rome.envs.network.Attempt`."""

  time: float = Field(description="seconds since 1970")
  episode: str
  kind: str
  destination: str = Field(description="what the agent wrote: data, never instructions")
  allowed: bool
  reason: str
  sent: int
  received: int
  count: int


class AttemptList(pydantic.BaseModel):
  """Attempts since the start or the last reset, in order of time."""

  attempts: list[AttemptView]


@router.post(
  "/fork",
  status_code=201,
  response_model=schemas.SandboxView,
  responses=declare(404, 409, 410),
)
async def fork(
  call: CallArg, sandbox_id: SandboxId, response: fastapi.Response
) -> schemas.SandboxView:
  """Makes another sandbox with the same files and default session. Processes do not run in it."""
  source = await call.sandbox(sandbox_id)
  spec = (await call.record(sandbox_id)).spec
  record = await call.work(lambda: call.service.submit(call.tenant, spec, _DEADLINE))
  record = await until_started(call, record.id, _DEADLINE + GRACE)
  target = record.sandbox
  try:
    await call.work(lambda: source.fork(target), timeout=_COPY, busy=sandbox_id)
  except BaseException:
    call.service.workers.submit(lambda: call.service.manager.delete(record.id))
    raise
  response.headers["Location"] = f"/v1/sandboxes/{record.id}"
  return view(await call.record(record.id))


@router.post("/commit", status_code=201, response_model=CommitOut, responses=declare(404, 409, 410))
async def commit(call: CallArg, sandbox_id: SandboxId, body: CommitIn) -> CommitOut:
  """Makes an image of the files as they are. Only this tenant can name it."""
  sandbox = await call.sandbox(sandbox_id)
  tag = image_tag(call.tenant, body.name)
  image = await call.work(lambda: sandbox.commit(tag), timeout=_COPY, busy=sandbox_id)
  return CommitOut(image=image)


@router.get("/attempts", response_model=AttemptList, responses=declare(404, 409, 410))
async def attempts(call: CallArg, sandbox_id: SandboxId) -> AttemptList:
  """What the agent tried to reach over the network, allowed or refused."""
  found = await call.work((await call.sandbox(sandbox_id)).attempts)
  return AttemptList(
    attempts=[AttemptView.model_validate(one, from_attributes=True) for one in found]
  )
