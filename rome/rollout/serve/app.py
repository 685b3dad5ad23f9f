"""The FastAPI application: routes, the guard around them, start and end."""

from typing import Annotated

import fastapi
from fastapi.security import HTTPBearer
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp

import rome
from rome.envs.service.errors import AsciiJSONResponse
from rome.envs.service.guard import Guard
from rome.rollout.serve import errors, outputs, plan, schemas
from rome.rollout.serve.core import Service
from rome.rollout.serve.errors import ApiError, declare
from rome.rollout.serve.metrics import CONTENT_TYPE
from rome.rollout.serve.stream import Answer

_DESCRIPTION = """A model behind the OpenAI API: chats and completions, streamed or whole.

Every error has the body `{"error": {"message", "type", "param", "code"}}`. No field is silently
ignored: what is not supported is answered with status 400 and the field's name."""

router = fastapi.APIRouter()
_BEARER = HTTPBearer(auto_error=False, description="a key")  # the guard checks it


def create_app(service: Service) -> ASGIApp:
  """Makes the application. The engine is loaded by whoever runs it (`Service.loop.start`).

  Args:
    service: what it serves.
  """
  app = fastapi.FastAPI(
    title="rome serve",
    version=rome.__version__,
    description=_DESCRIPTION,
    docs_url=None,  # these pages load scripts from elsewhere
    redoc_url=None,
    redirect_slashes=False,
    default_response_class=AsciiJSONResponse,
  )
  app.state.service = service
  errors.install(app)
  app.include_router(router)
  config = service.config
  return Guard(
    app,
    service.tokens,
    service.rates,
    service.metrics,
    max_requests=config.max_requests,
    max_body=config.max_body,
    max_upload=config.max_body,
    slow=config.slow,
    respond=errors.respond,
  )


def _service(
  request: fastapi.Request, token: Annotated[object, fastapi.Security(_BEARER)] = None
) -> Service:
  del token
  return request.app.state.service


def _open_service(request: fastapi.Request) -> Service:
  return request.app.state.service


ServiceArg = Annotated[Service, fastapi.Depends(_service)]
OpenServiceArg = Annotated[Service, fastapi.Depends(_open_service)]  # of routes without a key
# Of a stream the description is that of each event, as there is no other word for it before 3.2.
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_STREAM = {"content": {"text/event-stream": {"schema": _EVENT}}}


def _client(service: Service, request: fastapi.Request, body: schemas._Common) -> str:
  """Who takes turns: those who have keys, else users; a key's users must not multiply its turns."""
  tenant: str = request.state.tenant.name
  return tenant if service.tokens else body.user or tenant


@router.post(
  "/v1/chat/completions",
  response_model=outputs.ChatCompletion,
  responses={200: _STREAM, **declare(400, 404, 500, 504)},
)
async def chat(service: ServiceArg, request: fastapi.Request, body: schemas.ChatIn) -> Response:
  """The next message of a conversation."""
  service.check_ready()
  client = _client(service, request, body)
  asked = await service.think(
    lambda: plan.of_chat(body, client, service.served, service.vocabulary)
  )
  return Answer(service, asked, await service.submit(asked.requests), bool(body.stream))


@router.post(
  "/v1/completions",
  response_model=outputs.Completion,
  responses={200: _STREAM, **declare(400, 404, 500, 504)},
)
async def completions(
  service: ServiceArg, request: fastapi.Request, body: schemas.CompletionIn
) -> Response:
  """How a text, or a list of token ids, goes on."""
  service.check_ready()
  client = _client(service, request, body)
  asked = await service.think(
    lambda: plan.of_completion(body, client, service.served, service.vocabulary)
  )
  return Answer(service, asked, await service.submit(asked.requests), bool(body.stream))


@router.get("/v1/models", responses=declare())
async def models(service: ServiceArg) -> outputs.ModelList:
  """The models that are served: one."""
  return outputs.ModelList(data=[_model(service)])


@router.get("/v1/models/{name:path}", responses=declare(404))
async def model(service: ServiceArg, name: str) -> outputs.Model:
  """One model."""
  if name != service.served.name:
    raise ApiError(
      404, f"there is no such model, only {service.served.name!r}", code="model_not_found"
    )
  return _model(service)


def _model(service: Service) -> outputs.Model:
  served = service.served
  return outputs.Model(id=served.name, created=service.created, max_model_len=served.max_length)


@router.get("/health", responses=declare())
async def health(service: OpenServiceArg) -> outputs.Health:
  """Whether the engine works, while the server is being stopped too; 503 where it does not."""
  loop = service.loop
  if loop.state != "ready":
    why = f": {type(loop.failure).__name__}" if loop.failure else ""
    raise ApiError(503, f"the engine is {loop.state}{why}", code=f"engine_{loop.state}")
  return outputs.Health(status="draining" if service.draining else "ok", version=loop.stats.version)


@router.get("/ready", responses=declare())
async def ready(service: OpenServiceArg) -> outputs.Health:
  """Whether it takes new requests; 503 while it loads, is being stopped, or has failed."""
  if service.draining:
    raise ApiError(503, "the server is being stopped", code="draining", retry_after=5)
  return await health(service)


@router.get(
  "/metrics",
  response_class=PlainTextResponse,
  responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **declare()},
)
async def metrics(service: ServiceArg) -> Response:
  """Counters for Prometheus, of all clients together."""
  return Response(service.metrics.text(), media_type=CONTENT_TYPE)
