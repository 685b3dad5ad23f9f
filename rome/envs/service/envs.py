"""Routes of environments: GEM's make, reset, step and close, over gymnasium's.

The environment is the very class that runs in process. Each episode gets a sandbox of its own from
the manager, within the tenant's quotas, and gives it back at its end; its tests get a second one.
Where there is no room for that, the last step is refused and can be made again.
"""

import asyncio
import dataclasses
import secrets
import threading
import time
from collections.abc import Callable
from typing import Annotated, Any

import fastapi

from rome.envs.common import SandboxSpec
from rome.envs.sandbox import Sandbox
from rome.envs.service import schemas
from rome.envs.service.auth import Tenant
from rome.envs.service.calls import Call, CallArg
from rome.envs.service.core import GRACE, Service
from rome.envs.service.errors import ApiError, declare
from rome.envs.task import Task
from rome.envs.terminal import TerminalEnv

router = fastapi.APIRouter(prefix="/v1/envs", tags=["environments"])
START = 60.0  # seconds that an episode waits for its sandbox
IDLE = 3600.0  # seconds without a call after which an environment is closed
_ENV_ID = "rome/Terminal-v0"
EnvId = Annotated[str, fastapi.Path(max_length=64, description="the environment's id")]


class EpisodeSandboxes:
  """Gives an environment a fresh sandbox an episode; has the methods of `SandboxPool` for that."""

  def __init__(self, service: Service, tenant: Tenant, spec: SandboxSpec):
    self._service, self._tenant, self._spec = service, tenant, spec
    self._held: dict[Sandbox, str] = {}

  def acquire(self, timeout: float = START) -> Sandbox:
    """A fresh sandbox; the rest as `Service.submit`."""
    record = self._service.submit(self._tenant, self._spec, min(timeout, START))
    record = self._service.started(record.id)
    assert record.sandbox is not None
    self._held[record.sandbox] = record.id
    return record.sandbox

  def release(self, sandbox: Sandbox, healthy: bool = True) -> None:
    """Ends it; a sandbox serves one episode."""
    del healthy
    self._service.manager.delete(self._held.pop(sandbox))

  def ids(self) -> list[str]:
    """Of the sandboxes that are held: one, or none."""
    return list(self._held.values())


@dataclasses.dataclass
class Entry:
  """One environment of a tenant; `lock` keeps its calls in order."""

  id: str
  tenant: str
  env: TerminalEnv
  sandboxes: EpisodeSandboxes
  seed: int | None
  lock: asyncio.Lock
  thread_lock: threading.Lock
  used: float

  def view(self) -> schemas.EnvView:
    ids = self.sandboxes.ids()
    return schemas.EnvView(id=self.id, env_id=_ENV_ID, sandbox=ids[0] if ids else None)

  def locked(self, work: Callable[[], Any]) -> Any:
    """Runs work on the environment, after any that a client who hung up has left running."""
    with self.thread_lock:
      return work()


def _task(task: str | schemas.TaskIn) -> str | Task:
  return task.task() if isinstance(task, schemas.TaskIn) else task


def _entry(call: Call, env_id: str) -> Entry:
  entry = call.service.envs.get(env_id)
  if entry is None or entry.tenant != call.tenant.name:
    raise ApiError(404, "unknown_env", f"there is no environment {env_id}", "make one")
  entry.used = time.monotonic()
  return entry


async def _work(call: Call, entry: Entry, work: Callable[[], Any], timeout: float) -> Any:
  async with entry.lock:
    try:
      return await call.work(lambda: entry.locked(work), timeout=timeout)
    finally:
      entry.used = time.monotonic()


@router.post("", status_code=201, response_model=schemas.EnvView, responses=declare())
async def make(call: CallArg, body: schemas.EnvIn) -> schemas.EnvView:
  """Makes an environment; its sandbox starts at the first reset."""
  envs, tenant = call.service.envs, call.tenant
  if sum(entry.tenant == tenant.name for entry in envs.values()) >= tenant.quotas.sandboxes:
    raise ApiError(
      429, "quota_used_up", f"{tenant.quotas.sandboxes} environments are open", "close some", 5
    )
  spec = SandboxSpec(
    image=body.image, backend=call.service.config.backend, limits=body.limits.limits()
  )
  sandboxes = EpisodeSandboxes(call.service, tenant, spec)
  arguments: dict[str, Any] = {
    "task": None if body.task is None else _task(body.task),
    "tasks": None if body.tasks is None else [_task(task) for task in body.tasks],
    "pool": sandboxes,
    "judges": sandboxes,  # not the environment's own, which no quota would know of
  }
  for name in ("max_turns", "command_timeout", "tests_timeout", "max_observation"):
    arguments[name] = getattr(body, name)
  env = await call.work(lambda: TerminalEnv(**arguments))
  now = time.monotonic()
  entry = Entry(
    f"env-{secrets.token_hex(6)}", tenant.name, env, sandboxes, body.seed,
    asyncio.Lock(), threading.Lock(), now,
  )  # fmt: skip
  envs[entry.id] = entry
  return entry.view()


@router.get("", response_model=schemas.EnvList, responses=declare())
async def list_envs(call: CallArg) -> schemas.EnvList:
  """The tenant's open environments."""
  mine = [e for e in call.service.envs.values() if e.tenant == call.tenant.name]
  return schemas.EnvList(envs=[entry.view() for entry in mine])


@router.post("/{env_id}/reset", response_model=schemas.ResetOut, responses=declare(404, 409, 410))
async def reset(call: CallArg, env_id: EnvId, body: schemas.ResetIn) -> schemas.ResetOut:
  """Starts an episode: the first observation, and info."""
  entry = _entry(call, env_id)
  seed = entry.seed if body.seed is None else body.seed
  entry.seed = None
  task = body.options.task if body.options else None
  options = None if task is None else {"task": _task(task)}
  timeout = START + 2 * GRACE
  observation, info = await _work(
    call, entry, lambda: entry.env.reset(seed=seed, options=options), timeout
  )
  return schemas.ResetOut(observation=observation, info=info)


@router.post("/{env_id}/step", response_model=schemas.StepOut, responses=declare(404, 409, 410))
async def step(call: CallArg, env_id: EnvId, body: schemas.StepIn) -> schemas.StepOut:
  """One action."""
  entry = _entry(call, env_id)
  timeout = 2 * schemas.MAX_TIMEOUT + GRACE  # the environment has its own for both its parts
  observation, reward, terminated, truncated, info = await _work(
    call, entry, lambda: entry.env.step(body.action), timeout
  )
  return schemas.StepOut(
    observation=observation, reward=reward, terminated=terminated, truncated=truncated, info=info
  )


@router.delete("/{env_id}", status_code=204, responses=declare(404))
async def close(call: CallArg, env_id: EnvId) -> None:
  """Closes it. Its id means nothing afterwards."""
  entry = _entry(call, env_id)
  call.service.envs.pop(env_id, None)
  await _work(call, entry, entry.env.close, 4 * GRACE)
