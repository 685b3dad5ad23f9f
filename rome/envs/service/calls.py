"""What a handler gets: the service, the tenant who calls, and the request, in one object."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, TypeVar

import fastapi

from rome.envs.manager import Record
from rome.envs.sandbox import Sandbox
from rome.envs.service.auth import Tenant
from rome.envs.service.core import GRACE, Service

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Call:
  """One request of a tenant."""

  service: Service
  tenant: Tenant
  request: fastapi.Request

  def record(self, sandbox_id: str) -> Record:
    """See `Service.record`."""
    return self.service.record(self.tenant, sandbox_id)

  def sandbox(self, sandbox_id: str) -> Sandbox:
    """See `Service.sandbox`."""
    return self.service.sandbox(self.tenant, sandbox_id)

  async def work(
    self, work: Callable[[], _T], *, timeout: float = GRACE, busy: str | None = None
  ) -> _T:
    """See `Service.work`."""
    return await self.service.work(self.tenant, self.request, work, timeout=timeout, busy=busy)


def _call(request: fastapi.Request) -> Call:
  return Call(request.app.state.service, request.state.tenant, request)


CallArg = Annotated[Call, fastapi.Depends(_call)]
SandboxId = Annotated[str, fastapi.Path(max_length=64, description="the sandbox's id")]
