"""`echo hi` through the sessions of SWE-ReX or ROCK: prints one JSON line.

  .peers-swerex/bin/python benchmarks/peers/sandbox_sessions.py swerex [--commands=100]
  .peers-rock/bin/python benchmarks/peers/sandbox_sessions.py rock

Each runs in an environment of its own (scripts/setup_peers.sh), on the host, without container and
without its HTTP layer: less than a deployment of it costs. Latencies are milliseconds seen by the
caller of one session; the throughput is that of eight sessions in one process, as its server holds
them.
"""

import argparse
import asyncio
import json
import logging
import statistics
import time
from collections.abc import Awaitable, Callable

WIDTH = 8
Call = Callable[..., Awaitable]


def swerex() -> tuple[Call, Call, Call]:
  """Returns open(name), run(name, command) and close(name)."""
  from swerex.runtime import abstract
  from swerex.runtime.local import LocalRuntime

  for name in list(logging.root.manager.loggerDict):
    logging.getLogger(name).setLevel(logging.ERROR)
  runtime = LocalRuntime()

  async def start(name: str) -> None:
    await runtime.create_session(
      abstract.CreateBashSessionRequest(session=name, startup_timeout=10)
    )

  async def run(name: str, command: str):
    return await runtime.run_in_session(
      abstract.BashAction(command=command, session=name, timeout=30)
    )

  async def close(name: str) -> None:
    await runtime.close_session(abstract.CloseBashSessionRequest(session=name))

  return start, run, close


def rock() -> tuple[Call, Call, Call]:
  """Returns open(name), run(name, command) and close(name)."""
  from rock.admin.proto import request
  from rock.rocklet.rocklet import Rocklet
  from rock.utils import get_executor

  runtime = Rocklet.create(executor=get_executor())

  async def start(name: str) -> None:
    await runtime.create_session(
      request.SandboxCreateBashSessionRequest(session=name, sandbox_id="b", startup_timeout=10)
    )

  async def run(name: str, command: str):
    return await runtime.run_in_session(
      request.SandboxBashAction(command=command, session=name, sandbox_id="b", timeout=30)
    )

  async def close(name: str) -> None:
    await runtime.close_session(
      request.SandboxCloseBashSessionRequest(session=name, sandbox_id="b")
    )

  return start, run, close


async def measure(peer: str, commands: int) -> dict[str, float | int | str]:
  start, run, close = {"swerex": swerex, "rock": rock}[peer]()
  names = [f"s{i}" for i in range(WIDTH)]
  for name in names:
    await start(name)

  async def drive(name: str, count: int) -> list[float]:
    took = []
    for _ in range(count):
      begin = time.perf_counter()
      reply = await run(name, "echo hi")
      took.append((time.perf_counter() - begin) * 1e3)
      if reply.exit_code != 0 or "hi" not in reply.output:
        raise AssertionError(f"wrong answer: {reply}")
    return took

  await drive(names[0], 3)
  alone = await drive(names[0], commands)
  begin = time.perf_counter()
  together = await asyncio.gather(*(drive(name, max(1, commands // WIDTH)) for name in names))
  wall = time.perf_counter() - begin
  for name in names:
    await close(name)
  return {
    "peer": peer,
    "echo_p50_ms": round(statistics.median(alone), 3),
    "echo_p99_ms": round(statistics.quantiles(alone, n=100)[98], 3),
    "commands_per_s_over_8": round(sum(map(len, together)) / wall, 1),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("peer", choices=["swerex", "rock"])
  parser.add_argument("--commands", type=int, default=100)
  arguments = parser.parse_args()
  print("\n" + json.dumps(asyncio.run(measure(arguments.peer, arguments.commands))))


if __name__ == "__main__":
  main()
