"""Routes of files: streamed up and down, in parts of a megabyte, whatever their size.

An upload that broke off goes on with the query `offset`; HEAD tells where. The header
`X-Checksum-SHA256` carries the digest of the whole file up, and that of what is sent down.
"""

import functools
import hashlib
from collections.abc import AsyncIterator
from typing import Annotated, Literal

import fastapi
import pydantic
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse

from rome.envs.channel import PART, channel
from rome.envs.sandbox import Sandbox
from rome.envs.service import uploads
from rome.envs.service.calls import Call, CallArg, SandboxId
from rome.envs.service.errors import ApiError, ClientGone, declare
from rome.envs.transfer import Download, Upload

router = fastapi.APIRouter(prefix="/v1/sandboxes/{sandbox_id}", tags=["files"])
CHECKSUM = "X-Checksum-SHA256"
_OCTETS = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}

Path = Annotated[
  str,
  fastapi.Query(
    min_length=1,
    max_length=4096,
    pattern=r"^[^\x00]+$",
    description="absolute, or relative to the work directory",
  ),
]
Digest = Annotated[
  str | None,
  fastapi.Header(alias=CHECKSUM, pattern=r"^[0-9a-fA-F]{64}$", description="of the whole file"),
]
Mode = Annotated[str, fastapi.Query(pattern=r"^[0-7]{1,3}$", description="octal")]
Owner = Annotated[Literal["agent", "root"], fastapi.Query()]
Whole = Annotated[int, fastapi.Query(ge=0, le=2**62)]


class Uploaded(pydantic.BaseModel):
  """A file that is in place, or what has arrived of it."""

  path: str
  size: int
  sha256: str | None = pydantic.Field(description="null while the upload is unfinished")


class DirectoryEntry(pydantic.BaseModel):
  """A name in a directory."""

  name: str = pydantic.Field(description="bytes that are not UTF-8 are unpaired surrogates")
  kind: Literal["file", "directory", "link", "other"]
  mode: str = pydantic.Field(description="octal")


class Directory(pydantic.BaseModel):
  """What a directory holds."""

  entries: list[DirectoryEntry]


@router.put(
  "/files",
  status_code=201,
  response_model=Uploaded,
  responses={
    202: {"model": Uploaded, "description": "the part has arrived; the file is not in place yet"},
    **declare(404, 409, 410),
  },
  openapi_extra={"requestBody": {"required": True, "content": _OCTETS}},
)
async def put(
  call: CallArg,
  response: Response,
  sandbox_id: SandboxId,
  path: Path,
  mode: Mode = "644",
  owner: Owner = "agent",
  offset: Whole = 0,
  finish: Annotated[bool, fastapi.Query(description="false where more is to come")] = True,
  checksum: Digest = None,
) -> Uploaded:
  """Writes a file, whole or not at all. The end of the body is its end unless `finish=false`."""
  sandbox, known = await call.sandbox(sandbox_id), call.service.uploads
  if offset:
    feeding = known.resuming(sandbox_id, path, offset)
  else:
    old = known.make_room(sandbox_id, path)
    upload = await call.quick(lambda: uploads.begin(sandbox, old, path, int(mode, 8), owner))
    feeding = known.feeding(sandbox_id, path, upload)
  with feeding as upload:
    try:
      await _feed(call, sandbox_id, upload)
      if not finish:
        response.status_code = 202
        return Uploaded(path=path, size=upload.offset, sha256=None)
      digest = await call.quick(lambda: upload.finish(checksum), 60)
    except (ClientGone, ApiError):
      raise  # what has arrived stays
    except Exception:
      known.forget(sandbox_id, path)
      await call.quick(upload.drop)
      raise
    known.forget(sandbox_id, path)
    return Uploaded(path=path, size=upload.offset, sha256=digest)


def _write(call: Call, sandbox_id: str, upload: Upload, data: bytes) -> None:
  upload.write(data)
  call.service.manager.touch(sandbox_id)


async def _feed(call: Call, sandbox_id: str, upload: Upload) -> None:
  """Streams the body into an upload. What came before the client hung up is kept."""
  buffer, gone = bytearray(), False
  stream = call.request.stream()
  while not gone:
    try:
      piece = await anext(stream, None)
    except ClientDisconnect:
      piece, gone = None, True
    buffer += piece or b""
    if buffer and (len(buffer) >= PART or piece is None):
      data = bytes(buffer)
      buffer.clear()
      await call.quick(functools.partial(_write, call, sandbox_id, upload, data), 60)
    if piece is None:
      break
  if gone:
    raise ClientGone


@router.head(
  "/files",
  response_class=Response,  # its default would promise JSON
  responses={
    200: {
      "description": "there is a file or an unfinished upload",
      "headers": {
        "X-Upload-Offset": {
          "description": "bytes of the unfinished upload",
          "schema": {"type": "integer"},
        },
        "X-File-Size": {"description": "bytes of the file", "schema": {"type": "integer"}},
        "X-File-Mode": {"description": "octal", "schema": {"type": "string"}},
      },
    },
    **declare(404, 409, 410),
  },
)
async def head(call: CallArg, sandbox_id: SandboxId, path: Path) -> Response:
  """Where an unfinished upload stands, and what file lies there now."""
  sandbox = await call.sandbox(sandbox_id)
  offset = call.service.uploads.offset(sandbox_id, path)
  headers = {} if offset is None else {"X-Upload-Offset": str(offset)}
  try:
    stat = await call.work(lambda: sandbox.lstat(path))
  except Exception:
    if offset is None:
      raise
  else:
    if stat.kind == "file":
      headers |= {"X-File-Size": str(stat.size), "X-File-Mode": f"{stat.mode:o}"}
    elif offset is None:
      raise ApiError(404, "no_such_file", f"{path!r} is no file", "list it if it is a directory")
  return Response(headers=headers)


@router.get(
  "/files",
  response_class=StreamingResponse,
  responses={
    200: {
      "description": "the bytes",
      "content": _OCTETS,
      "headers": {
        CHECKSUM: {
          "description": "of these bytes; always there up to 1 MiB",
          "schema": {"type": "string"},
        },
        "X-File-Size": {"description": "of the whole file", "schema": {"type": "integer"}},
        "X-File-Mode": {"description": "octal", "schema": {"type": "string"}},
      },
    },
    **declare(404, 409, 410, 416),
  },
)
async def get(
  call: CallArg,
  sandbox_id: SandboxId,
  path: Path,
  offset: Whole = 0,
  length: Annotated[
    int | None, fastapi.Query(ge=0, le=2**62, description="to the end by default")
  ] = None,
  checksum: Annotated[bool, fastapi.Query(description="read a large file twice for it")] = False,
) -> Response:
  """Reads a file. An answer that breaks off means that the file changed or the sandbox died."""
  sandbox = await call.sandbox(sandbox_id)
  download = await call.work(lambda: sandbox.open_download(path))
  try:
    if offset > download.size:
      raise ApiError(
        416, "beyond_end", f"the file has {download.size} bytes", "ask for what is there"
      )
    end = download.size if length is None else min(download.size, offset + length)
    headers = {
      "Content-Length": str(end - offset),
      "X-File-Size": str(download.size),
      "X-File-Mode": f"{download.stat.mode:o}",
    }
    if checksum or end - offset <= PART:
      headers[CHECKSUM] = await _digest(call, sandbox_id, download, offset, end)
  except BaseException:
    await call.work(download.close)
    raise
  body = _body(call, sandbox_id, download, offset, end)
  return StreamingResponse(body, headers=headers, media_type="application/octet-stream")


async def _digest(call: Call, sandbox_id: str, download: Download, offset: int, end: int) -> str:
  digest = hashlib.sha256()
  while offset < end:
    part = await _part(call, sandbox_id, download, offset, end)
    digest.update(part)
    offset += len(part)
  return digest.hexdigest()


async def _body(
  call: Call, sandbox_id: str, download: Download, offset: int, end: int
) -> AsyncIterator[bytes]:
  try:
    while offset < end:
      part = await _part(call, sandbox_id, download, offset, end)
      offset += len(part)
      yield part
  finally:
    call.service.workers.submit(download.close)


async def _part(call: Call, sandbox_id: str, download: Download, offset: int, end: int) -> bytes:
  size = min(PART, end - offset)
  part = await call.quick(lambda: download.read(offset, size), 60)
  await call.quick(lambda: call.service.manager.touch(sandbox_id))
  if not part:
    raise ApiError(409, "changed", f"{download.path!r} became shorter meanwhile", "read it again")
  return part


@router.delete("/files", status_code=204, responses=declare(404, 409, 410))
async def remove(call: CallArg, sandbox_id: SandboxId, path: Path) -> None:
  """Removes a file, a directory with all it holds, or an unfinished upload."""
  sandbox = await call.sandbox(sandbox_id)
  unfinished = call.service.uploads.forget(sandbox_id, path)
  if unfinished is not None:
    await call.work(unfinished.drop)
    return
  await call.work(lambda: sandbox.remove(path), timeout=90, busy=sandbox_id)


@router.put("/directory", status_code=204, responses=declare(404, 409, 410))
async def make_directory(
  call: CallArg, sandbox_id: SandboxId, path: Path, mode: Mode = "755", owner: Owner = "agent"
) -> None:
  """Makes a directory and those above it; one that is there stays as it is."""
  sandbox = await call.sandbox(sandbox_id)

  def make() -> None:
    with channel(sandbox) as lent:
      lent.make_dir(path, int(mode, 8), owner)

  await call.work(make)


_KINDS = {"f": "file", "d": "directory", "l": "link"}


@router.get("/directory", response_model=Directory, responses=declare(404, 409, 410))
async def list_directory(
  call: CallArg,
  sandbox_id: SandboxId,
  path: Path = ".",
  most: Annotated[int, fastapi.Query(ge=1, le=100_000)] = 10_000,
) -> Directory:
  """The names in a directory, sorted; refused where there are more than `most`."""
  sandbox = await call.sandbox(sandbox_id)
  found = await call.work(lambda: _list(sandbox, path, most))
  entries = [
    DirectoryEntry.model_construct(name=name, kind=_KINDS.get(kind, "other"), mode=f"{mode:o}")
    for kind, mode, name in found
  ]
  return Directory.model_construct(entries=entries)


def _list(sandbox: Sandbox, path: str, most: int) -> list[tuple[str, int, str]]:
  with channel(sandbox) as lent:
    return lent.list(path, most)[0]
