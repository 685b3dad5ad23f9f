"""The FastAPI application: routes, the guard around them, start and end."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import fastapi
from starlette.types import ASGIApp

import rome
from rome.envs.manager import Manager
from rome.envs.service import commands, copies, envs, errors, files, operations, sandboxes
from rome.envs.service.auth import Tokens
from rome.envs.service.core import Service, ServiceConfig
from rome.envs.service.guard import Guard

TIDY_EVERY = 10.0  # seconds between looks for what belongs to sandboxes that have ended
_DESCRIPTION = """Sandboxes and shell environments over HTTP.

Every error has the body `{"error": {"code", "message", "mend"}}`. Status 410 means that the sandbox
is gone, which says nothing about the work done in it; 429 and 503 name the seconds to wait."""


def create_app(manager: Manager, tokens: Tokens, config: ServiceConfig) -> ASGIApp:
  """Makes the application. It drains and closes the manager at its end.

  Args:
    manager: whose sandboxes it serves.
    tokens: who may call.
    config: its bounds.
  """

  @contextlib.asynccontextmanager
  async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[None]:
    tidying = asyncio.ensure_future(_tidy(app.state.service))
    yield
    tidying.cancel()
    await app.state.service.close()

  app = fastapi.FastAPI(
    title="rome sandbox service",
    version=rome.__version__,
    description=_DESCRIPTION,
    docs_url=None,  # these pages load scripts from elsewhere
    redoc_url=None,
    lifespan=lifespan,
    redirect_slashes=False,
    default_response_class=errors.AsciiJSONResponse,
  )
  service = app.state.service = Service(manager, tokens, config)
  errors.install(app)
  for part in (operations, sandboxes, commands, files, copies, envs):
    app.include_router(part.router)
  return Guard(
    app,
    tokens,
    service.rates,
    service.metrics,
    max_requests=config.max_requests,
    max_body=config.max_body,
    max_upload=config.max_upload,
    slow=config.slow,
  )


async def _tidy(service: Service) -> None:
  """Forgets what belongs to sandboxes that have ended, and closes idle environments."""
  while True:
    await asyncio.sleep(TIDY_EVERY)
    await service.tidy(envs.IDLE)
