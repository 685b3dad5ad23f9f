"""Routes for those who run the service: health, readiness, metrics and the status page."""

import asyncio

import fastapi
from starlette.responses import HTMLResponse, PlainTextResponse

from rome.envs.service import page, schemas
from rome.envs.service.calls import CallArg
from rome.envs.service.errors import ApiError, declare
from rome.envs.service.metrics import CONTENT_TYPE

router = fastapi.APIRouter(tags=["operations"])


@router.get("/health", response_model=schemas.Health, responses=declare())
async def health() -> schemas.Health:
  """Whether the process answers."""
  return schemas.Health(status="ok")


@router.get("/ready", response_model=schemas.Health, responses=declare())
async def ready(request: fastapi.Request) -> schemas.Health:
  """Whether it takes new work; 503 while it drains."""
  if request.app.state.service.draining:
    raise ApiError(503, "draining", "the service is being stopped", "use another one", 5)
  return schemas.Health(status="ok")


@router.get(
  "/metrics",
  response_class=PlainTextResponse,
  responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **declare()},
)
async def metrics(call: CallArg) -> fastapi.Response:
  """Counters for Prometheus, of all tenants together."""
  text = await call.work(call.service.metrics.text)
  return fastapi.Response(text, media_type=CONTENT_TYPE)


@router.get(
  "/",
  response_class=HTMLResponse,
  responses={200: {"content": {"text/html": {"schema": {"type": "string"}}}}, **declare()},
)
async def status(call: CallArg) -> HTMLResponse:
  """The status page. A browser may send the token as the password of basic authentication."""
  service, tenant = call.service, call.tenant
  records, counts = await asyncio.gather(
    call.work(lambda: service.manager.list(tenant.name)), call.work(service.manager.metrics)
  )
  return HTMLResponse(page.render(tenant, records, counts, service.started_at))
