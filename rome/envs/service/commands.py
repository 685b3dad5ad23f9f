"""Routes of commands and sessions.

Calls on one session take turns on the event loop, so those that wait hold no thread. Where a client
hangs up, its wait ends; the command goes on to its own deadline, and the next one waits for it.
"""

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Annotated, Literal, TypeVar

import fastapi
import pydantic
from pydantic import Field

from rome.envs.sandbox import Sandbox
from rome.envs.service import schemas
from rome.envs.service.calls import Call, CallArg, SandboxId
from rome.envs.service.core import GRACE
from rome.envs.service.errors import ApiError, declare
from rome.envs.session import Progress, Session

router = fastapi.APIRouter(prefix="/v1/sandboxes/{sandbox_id}", tags=["commands"])
MAX_SESSIONS = 48  # a sandbox has room for 63 besides the default one, those of `exec` too
_T = TypeVar("_T")
SessionName = Annotated[
  str, fastapi.Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$", description="the session's name")
]


class PtyIn(schemas._In):
  """The size of a terminal."""

  rows: int = Field(default=24, ge=1, le=65535)
  cols: int = Field(default=80, ge=1, le=65535)


class SessionIn(schemas._In):
  """What to open."""

  name: schemas.Name
  user: Literal["agent", "root"] | Annotated[int, Field(ge=1000, le=65533)] = "agent"
  pty: PtyIn | None = Field(default=None, description="null for pipes, with a closed stdin")


class SessionView(pydantic.BaseModel):
  """A session."""

  name: str
  user: str | int
  pty: PtyIn | None


class PollIn(schemas._In):
  """How long to wait, in seconds."""

  timeout: float = Field(default=10.0, gt=0, le=300)


class PollOut(pydantic.BaseModel):
  """What a started command did since the last look."""

  output: str
  result: schemas.CommandOut | None = Field(description="null while it runs")

  @classmethod
  def of(cls, progress: Progress) -> "PollOut":
    result = None if progress.result is None else schemas.CommandOut.of(progress.result)
    return cls(output=progress.output, result=result)


class StartIn(schemas._In):
  """A command that runs on by itself, and the seconds after which it is stopped."""

  command: schemas.CommandText
  timeout: schemas.Seconds = 3600.0


class InputIn(schemas._In):
  """What to type: text (UTF-8), control characters too."""

  text: str = Field(max_length=65536, examples=["\u0003"])


class SessionList(pydantic.BaseModel):
  """The sessions of a sandbox that were opened here; the default one has no name."""

  sessions: list[SessionView]


@dataclasses.dataclass
class Turns:
  """One session of a sandbox, and whose turn it is. None is the default session."""

  session: Session | None
  view: SessionView | None
  turn: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)


async def in_turn(
  call: Call, sandbox_id: str, turns: Turns, work: Callable[[], _T], timeout: float
) -> _T:
  """Runs work on a session when it is its turn, which it waits for as long again."""
  try:
    async with asyncio.timeout(timeout):
      await turns.turn.acquire()
  except TimeoutError as error:
    raise ApiError(
      409, "session_busy", "other commands of this session are running", "open another session"
    ) from error
  try:
    return await call.work(work, timeout=timeout, busy=sandbox_id)
  finally:
    turns.turn.release()


async def sessions(call: Call, sandbox_id: str) -> tuple[Sandbox, dict[str, Turns]]:
  """A running sandbox and its sessions by name; "" is the default one."""
  sandbox = await call.sandbox(sandbox_id)
  return sandbox, call.service.sessions.setdefault(sandbox_id, {"": Turns(None, None)})


async def named(call: Call, sandbox_id: str, name: str) -> Turns:
  """A session by name. Raises ApiError 404 where there is none."""
  found = (await sessions(call, sandbox_id))[1].get(name)
  if found is None or found.session is None:
    raise ApiError(404, "unknown_session", f"there is no session {name}", "open it")
  return found


@router.post("/commands", response_model=schemas.CommandOut, responses=declare(404, 409, 410))
async def run(call: CallArg, sandbox_id: SandboxId, body: schemas.CommandIn) -> schemas.CommandOut:
  """Runs a command in the default session. At its deadline it ends, and the session lives on."""
  sandbox, open_ones = await sessions(call, sandbox_id)
  result = await in_turn(
    call,
    sandbox_id,
    open_ones[""],
    lambda: sandbox.run(body.command, body.timeout),
    body.timeout + GRACE,
  )
  return schemas.CommandOut.of(result)


@router.post("/verify", response_model=schemas.CommandOut, responses=declare(404, 409, 410))
async def verify(
  call: CallArg, sandbox_id: SandboxId, body: schemas.CommandIn
) -> schemas.CommandOut:
  """Ends every process of the agent, then runs a script as root."""
  sandbox = await call.sandbox(sandbox_id)
  result = await call.work(
    lambda: sandbox.verify(body.command, body.timeout),
    timeout=body.timeout + GRACE,
    busy=sandbox_id,
  )
  return schemas.CommandOut.of(result)


@router.post(
  "/sessions", status_code=201, response_model=SessionView, responses=declare(404, 409, 410)
)
async def open_session(call: CallArg, sandbox_id: SandboxId, body: SessionIn) -> SessionView:
  """Opens an independent session."""
  sandbox, open_ones = await sessions(call, sandbox_id)
  if body.name in open_ones:
    raise ApiError(409, "session_exists", f"session {body.name} is open", "use it, or close it")
  if len(open_ones) > MAX_SESSIONS:
    raise ApiError(409, "too_many_sessions", f"{MAX_SESSIONS} are open", "close one")
  view = SessionView(name=body.name, user=body.user, pty=body.pty)
  pty = (body.pty.rows, body.pty.cols) if body.pty else None
  turns = open_ones[body.name] = Turns(None, view)  # the name is taken from now on
  try:
    turns.session = await call.work(lambda: sandbox.session(body.name, user=body.user, pty=pty))
  except BaseException:
    open_ones.pop(body.name, None)
    raise
  return view


@router.get("/sessions", response_model=SessionList, responses=declare(404, 409, 410))
async def list_sessions(call: CallArg, sandbox_id: SandboxId) -> SessionList:
  """The sessions opened here."""
  open_ones = (await sessions(call, sandbox_id))[1].values()
  return SessionList(sessions=[turns.view for turns in open_ones if turns.view])


@router.post(
  "/sessions/{name}/commands",
  response_model=schemas.CommandOut,
  responses=declare(404, 409, 410),
)
async def run_in_session(
  call: CallArg, sandbox_id: SandboxId, name: SessionName, body: schemas.CommandIn
) -> schemas.CommandOut:
  """Runs a command in a session."""
  turns = await named(call, sandbox_id, name)
  session = turns.session
  assert session is not None
  result = await in_turn(
    call,
    sandbox_id,
    turns,
    lambda: session.run(body.command, body.timeout),
    body.timeout + GRACE,
  )
  return schemas.CommandOut.of(result)


async def _in_session(
  call: Call, sandbox_id: str, name: str, work: Callable[[Session], _T], timeout: float = GRACE
) -> _T:
  turns = await named(call, sandbox_id, name)
  session = turns.session
  assert session is not None
  return await in_turn(call, sandbox_id, turns, lambda: work(session), timeout)


@router.post("/sessions/{name}/start", status_code=204, responses=declare(404, 409, 410))
async def start(call: CallArg, sandbox_id: SandboxId, name: SessionName, body: StartIn) -> None:
  """Starts a command and answers at once; poll it. The session is busy until it was polled."""
  await _in_session(call, sandbox_id, name, lambda s: s.start(body.command, body.timeout))


@router.post("/sessions/{name}/poll", response_model=PollOut, responses=declare(404, 409, 410))
async def poll(call: CallArg, sandbox_id: SandboxId, name: SessionName, body: PollIn) -> PollOut:
  """Waits until the started command wrote something or ended, or for `timeout` seconds."""
  progress = await _in_session(
    call, sandbox_id, name, lambda s: s.poll(body.timeout), body.timeout + GRACE
  )
  return PollOut.of(progress)


@router.post("/sessions/{name}/stop", response_model=PollOut, responses=declare(404, 409, 410))
async def stop_command(call: CallArg, sandbox_id: SandboxId, name: SessionName) -> PollOut:
  """Stops the started command now; the session lives on."""
  return PollOut.of(await _in_session(call, sandbox_id, name, lambda s: s.stop()))


@router.post("/sessions/{name}/input", status_code=204, responses=declare(404, 409, 410))
async def send(call: CallArg, sandbox_id: SandboxId, name: SessionName, body: InputIn) -> None:
  """Types into the terminal of the running command; the text "\\u0003" is Ctrl-C."""
  await _in_session(call, sandbox_id, name, lambda s: s.send(body.text.encode()))


@router.post("/sessions/{name}/resize", status_code=204, responses=declare(404, 409, 410))
async def resize(call: CallArg, sandbox_id: SandboxId, name: SessionName, body: PtyIn) -> None:
  """Sets the terminal's size."""
  await _in_session(call, sandbox_id, name, lambda s: s.resize(body.rows, body.cols))


@router.delete("/sessions/{name}", status_code=204, responses=declare(404, 409, 410))
async def close_session(call: CallArg, sandbox_id: SandboxId, name: SessionName) -> None:
  """Ends a session's shell and what runs in it, a command too."""
  session = (await named(call, sandbox_id, name)).session
  assert session is not None
  call.service.sessions.get(sandbox_id, {}).pop(name, None)
  await call.work(session.close)
