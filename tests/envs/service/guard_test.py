"""What passes the guard, without a server around it."""

import asyncio
import hashlib

from rome.envs.service import auth, guard, limits
from rome.envs.service.metrics import Metrics


async def statuses(app, tokens, requests):
  """Sends requests of these tokens, one after the other; returns their statuses, 0 for none yet."""
  whole = guard.Guard(
    app, tokens, limits.Rates(), Metrics(),
    max_requests=4, max_body=100, max_upload=100, slow=5.0,
  )  # fmt: skip
  found = [0] * len(requests)

  async def one(number, token):
    async def receive():
      return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
      if message["type"] == "http.response.start":
        found[number] = message["status"]

    headers = [(b"authorization", f"Bearer {token}".encode())]
    scope = {"type": "http", "method": "GET", "path": "/v1/sandboxes", "headers": headers}
    await whole(scope, receive, send)

  tasks = [asyncio.ensure_future(one(*pair)) for pair in enumerate(requests)]
  await asyncio.sleep(0.1)
  for task in tasks:
    task.cancel()
  await asyncio.gather(*tasks, return_exceptions=True)
  return found


def test_requests_that_wait_leave_room_for_other_tenants():
  names = ("alice", "bob")
  hashes = [hashlib.sha256(name.encode()).digest() for name in names]
  tokens = auth.Tokens(list(zip(hashes, map(auth.Tenant, names), strict=True)))

  async def waits(scope, receive, send):
    if scope["state"]["tenant"].name == "alice":
      await asyncio.sleep(60)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})

  # Alice may have two of the four places.
  found = asyncio.run(statuses(waits, tokens, ["alice", "alice", "alice", "bob", "eve"]))
  assert found == [0, 0, 429, 200, 401]
