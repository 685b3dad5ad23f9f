"""What a handler gets: the service, the tenant who calls, and the request, in one object."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, TypeVar

import fastapi
from fastapi.security import HTTPBearer

from rome.envs.records import Record
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

  async def record(self, sandbox_id: str) -> Record:
    """See `Service.record`."""
    return await self.quick(lambda: self.service.record(self.tenant, sandbox_id))

  async def sandbox(self, sandbox_id: str) -> Sandbox:
    """See `Service.sandbox`."""
    return await self.quick(lambda: self.service.sandbox(self.tenant, sandbox_id))

  async def quick(self, work: Callable[[], _T], timeout: float = GRACE) -> _T:
    """Runs blocking work that is soon done. The body of the request may still be coming."""
    return await self.service.workers.run(self.tenant, work, timeout)

  async def work(
    self, work: Callable[[], _T], *, timeout: float = GRACE, busy: str | None = None
  ) -> _T:
    """Runs blocking work while the client is there; see `Service.work`. The body has come."""
    return await self.service.work(self.tenant, self.request, work, timeout=timeout, busy=busy)


_BEARER = HTTPBearer(auto_error=False, description="a tenant's token")  # the guard checks it


def _call(
  request: fastapi.Request, token: Annotated[object, fastapi.Security(_BEARER)] = None
) -> Call:
  del token
  return Call(request.app.state.service, request.state.tenant, request)


CallArg = Annotated[Call, fastapi.Depends(_call)]
SandboxId = Annotated[str, fastapi.Path(max_length=64, description="the sandbox's id")]
