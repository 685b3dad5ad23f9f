"""`rome serve` under many streaming clients for some minutes: prints one JSON line.

  python -m benchmarks.serve_load [--minutes=5 --clients=200] [--model=smollm2 | GGUF | PRESET]

The server is a process of its own on 127.0.0.1; this process holds the clients (asyncio, a
connection each) and reads the server's memory and gauges. A client asks for a chat of a short
random prompt and 16 to 64 tokens, reads the stream to its end, and begins again. Server and clients
share the cores. More clients than slots wait in line: the time to the first token is mostly the
line's, and the first event (`first_byte_seconds`) only says that the request was taken.

`inter_token_seconds`: intervals between events with tokens, each divided by the tokens it brings
and counted as often, as the engine samples a few tokens a step; `event_seconds`: the intervals as
they are. A stream is `stuck` if it brings no byte for `--stuck` seconds, in line or later. Memory
is the server's resident memory: when it came up, the medians of the fifth of the run that ends its
first half (warm) and of its last fifth (end), and `growth_mib` between the two. Give the cache and
the allocator minutes to fill up: a short run grows.

At the end `--kills` curl processes stream long replies and are killed with SIGKILL: their slots
must be free within ten seconds, with the pages that were kept for what they would still have said,
and all slots must serve again. Exits with status 1 where there are `violations`. Not measured: a
real network, other servers.
"""

import asyncio
import dataclasses
import json
import logging
import os
import pathlib
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
from absl import app, flags

from rome.train import summary
from tests import pretrained

_MINUTES = flags.DEFINE_float("minutes", 5.0, "How long.", lower_bound=0.1, upper_bound=120.0)
_CLIENTS = flags.DEFINE_integer("clients", 200, "At once.", lower_bound=1, upper_bound=1000)
_MODEL = flags.DEFINE_string("model", "smollm2", "smollm2 (the wheel's), a .gguf file or a preset.")
_SLOTS = flags.DEFINE_integer("slots", 32, "Of the server.", lower_bound=1)
_KILLS = flags.DEFINE_integer("kills", 4, "Clients that are killed.", lower_bound=1, upper_bound=16)
_STUCK = flags.DEFINE_float("stuck", 60.0, "Seconds without a byte.", lower_bound=1.0)
_GROWTH = flags.DEFINE_float("growth", 32.0, "MiB that the server may grow.")
_SEED = flags.DEFINE_integer("seed", 0, "Of prompts, lengths and draws.")
_SETTINGS = (_MINUTES, _CLIENTS, _MODEL, _SLOTS, _KILLS, _STUCK, _GROWTH, _SEED)

_PAGE = 16  # tokens
_MAX_LENGTH, _CACHE = 2048, 32_768  # tokens of a request, and of all that is kept
_LONG = 1800  # tokens of a reply that is killed
_UP, _DOWN, _FREE = 300.0, 60.0, 10.0  # seconds that coming up, ending, freeing slots may take
_WORDS = "river seven paint hollow engine moss letter copper sail quiet number dust".split()
_OTHER_FILES = 128  # descriptors beside the clients'


@dataclasses.dataclass
class Seen:
  """What the clients saw."""

  requests: int = 0
  tokens: int = 0
  stuck: int = 0
  errors: dict[str, int] = dataclasses.field(default_factory=dict)
  first_byte: list[float] = dataclasses.field(default_factory=list)
  first_token: list[float] = dataclasses.field(default_factory=list)
  intervals: list[tuple[float, int]] = dataclasses.field(default_factory=list)  # seconds, tokens

  def error(self, text: str) -> None:
    self.errors[text[:200]] = self.errors.get(text[:200], 0) + 1


class Server:
  """A server that runs."""

  def __init__(self, process: asyncio.subprocess.Process, url: str):
    self.process, self.url = process, url
    self.memory: list[float] = [self.rss()]  # MiB, once a second

  def rss(self) -> float:
    pages = int(pathlib.Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

  async def watch(self) -> None:
    while self.process.returncode is None:
      self.memory.append(self.rss())
      await asyncio.sleep(1)


@asynccontextmanager
async def running(log: pathlib.Path) -> AsyncIterator[Server]:
  """Starts the server, and ends it whatever happens.

  Raises:
    RuntimeError: it does not come up, or does not end in order; the message has its last words.
  """
  model = str(pretrained.smollm2_gguf()) if _MODEL.value == "smollm2" else _MODEL.value
  command = [sys.executable, "-m", "rome.cli", "serve", f"--model={model}", "--name=served"]
  command += ["--port=0", f"--slots={_SLOTS.value}", f"--max_length={_MAX_LENGTH}"]
  command.append(f"--cache_tokens={_CACHE}")
  command += [f"--max_waiting={_CLIENTS.value + _SLOTS.value + _KILLS.value}"]
  environ = {k: v for k, v in os.environ.items() if not k.startswith("ROME_")}
  with log.open("wb") as errors:
    process = await asyncio.create_subprocess_exec(
      *command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=environ
    )
  assert process.stdout is not None
  try:
    try:
      line = (await asyncio.wait_for(process.stdout.readline(), _UP)).decode()
    except TimeoutError:
      line = f"nothing within {_UP:.0f} s"
    found = re.fullmatch(r"serving served on (\S+) \(pid \d+\)\n", line)
    if not found:
      raise RuntimeError(f"the server is not up: {line}\n{log.read_text(errors='replace')[-2000:]}")
    yield Server(process, found[1])
    process.terminate()
    status = await asyncio.wait_for(process.wait(), _DOWN)
    if status:
      raise RuntimeError(f"the server ended with {status}:\n{log.read_text()[-2000:]}")
  finally:
    if process.returncode is None:
      process.kill()
      await process.wait()


def body(rng: random.Random, max_tokens: int, **rest: Any) -> dict[str, Any]:
  """A streamed chat with a short random prompt."""
  text = " ".join(rng.choices(_WORDS, k=rng.randint(3, 20)))
  return {
    "model": "served",
    "messages": [{"role": "user", "content": f"Tell me about: {text}?"}],
    "max_tokens": max_tokens,
    "seed": rng.getrandbits(32),
    "stream": True,
    "return_token_ids": True,
    **rest,
  }


async def ask(http: httpx.AsyncClient, asked: dict[str, Any], seen: Seen) -> None:
  """One request, read to its end."""
  start = last = time.monotonic()
  tokens, begun, done = 0, False, False
  try:
    async with http.stream("POST", "/v1/chat/completions", json=asked) as answer:
      if answer.status_code != 200:
        return seen.error(f"status {answer.status_code}: {(await answer.aread()).decode()}")
      async for line in answer.aiter_lines():
        if not line.startswith("data: "):
          continue
        now = time.monotonic()
        if not begun:
          seen.first_byte.append(now - start)
          begun = True
        if line == "data: [DONE]":
          done = True
          continue
        event = json.loads(line[6:])
        if "error" in event:
          return seen.error(str(event["error"]))
        count = sum(len(choice.get("token_ids") or ()) for choice in event["choices"])
        if count and not tokens:
          seen.first_token.append(now - start)
        elif count:
          seen.intervals.append((now - last, count))
        if count:
          tokens, last = tokens + count, now
    if not done or not 1 <= tokens <= asked["max_tokens"]:
      return seen.error(f"a stream ended with {'' if done else 'no '}[DONE], wrong or cut")
    seen.requests += 1
    seen.tokens += tokens
  except httpx.TimeoutException:
    seen.stuck += 1
  except httpx.HTTPError as error:
    seen.error(f"{type(error).__name__}: {error}")


async def client(http: httpx.AsyncClient, index: int, end: float, seen: Seen) -> None:
  rng = random.Random(f"{_SEED.value}/{index}")
  while time.monotonic() < end:
    failed = sum(seen.errors.values())
    await ask(http, body(rng, rng.randint(16, 64)), seen)
    if sum(seen.errors.values()) > failed:
      await asyncio.sleep(1)  # a server that refuses everything is not to be flooded


async def gauges(http: httpx.AsyncClient) -> dict[str, float]:
  """The engine's figures, as /metrics shows them."""
  text = (await http.get("/metrics")).text
  found = re.findall(r"^rome_serve_(\w+?)(?:_total)? ([0-9.e+]+)$", text, re.MULTILINE)
  return {name: float(value) for name, value in found}


async def until(http: httpx.AsyncClient, running: int, seconds: float) -> tuple[dict, float]:
  """Waits until so many requests run: the gauges then, and after how long; inf if they never do."""
  start = time.monotonic()
  while True:
    now = await gauges(http)
    passed = time.monotonic() - start
    if now["running"] == running and not now["waiting"]:
      return now, passed
    if passed > seconds:
      return now, float("inf")
    await asyncio.sleep(0.05)


async def kill_clients(http: httpx.AsyncClient, url: str, violations: list[str]) -> dict[str, Any]:
  """Kills clients in the middle of their streams, and looks at what that leaves."""
  rng, kills = random.Random(f"{_SEED.value}/kills"), min(_KILLS.value, _SLOTS.value)
  before, waited = await until(http, 0, _FREE)
  if waited == float("inf"):
    violations.append(f"{before['running']:.0f} requests still run when all clients are done")
  command = ["curl", "--silent", "--no-buffer", "--max-time", "300", "--json", "@-"]
  curls = []
  try:
    for _ in range(kills):
      curl = subprocess.Popen(
        [*command, f"{url}/v1/chat/completions"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
      )
      curls.append(curl)
      assert curl.stdin is not None
      with curl.stdin as pipe:
        pipe.write(json.dumps(body(rng, _LONG, ignore_eos=True)).encode())
    during, waited = await until(http, kills, 30)
    if waited == float("inf"):
      violations.append(f"of {kills} clients that should be killed {during['running']:.0f} run")
  finally:
    for curl in curls:
      curl.kill()
      curl.wait()
  after, seconds = await until(http, 0, _FREE)
  if seconds == float("inf"):
    violations.append(f"{after['running']:.0f} killed clients keep their slots")
  # Pages with computed tokens stay, as cache; those for the rest of the replies come back.
  sampled = after["sampled_tokens"] - before["sampled_tokens"]
  back, due = during["pages_used"] - after["pages_used"], kills * (_LONG // _PAGE - 1)
  due -= sampled // _PAGE
  if back < due:
    violations.append(f"of the killed clients' pages {back:.0f} came back, not {due:.0f}")
  again = Seen()
  await asyncio.gather(*(ask(http, body(rng, 16), again) for _ in range(_SLOTS.value)))
  if again.requests != _SLOTS.value:
    violations.append(f"afterwards {again.requests} of {_SLOTS.value} requests were answered")
  return {
    "killed": kills,
    "tokens_sampled": int(sampled),
    "slots_free_after_s": round(seconds, 3) if seconds < float("inf") else None,
    "pages_back": int(back),
    "pages_due_at_least": int(due),
  }


def quantiles(values: Sequence[float], counts: Sequence[int] | None = None) -> dict[str, float]:
  """Median and 99th percentile, each value counted so often."""
  all_values = np.repeat(values, counts) if counts is not None else np.asarray(values)
  if not len(all_values):
    return {}
  p50, p99 = np.percentile(all_values, (50, 99))
  return {"p50": round(float(p50), 4), "p99": round(float(p99), 4)}


async def load(log: pathlib.Path) -> dict[str, Any]:
  """Runs it all; `violations` of the result is empty where everything held."""
  seen, violations = Seen(), []
  async with running(log) as server:
    timeout = httpx.Timeout(_STUCK.value)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=_CLIENTS.value)
    async with httpx.AsyncClient(
      base_url=server.url, timeout=timeout, limits=limits, trust_env=False
    ) as http:
      start = time.monotonic()
      end = start + _MINUTES.value * 60
      watch = asyncio.ensure_future(server.watch())
      clients = [client(http, i, end, seen) for i in range(_CLIENTS.value)]
      await asyncio.gather(*clients)
      seconds = time.monotonic() - start
      samples = server.memory[1:]
      killed = await kill_clients(http, server.url, violations)
      watch.cancel()
  count = len(samples)
  warm = statistics.median(samples[int(0.3 * count) : max(int(0.5 * count), 1)] or samples)
  last = statistics.median(samples[int(0.8 * count) :])
  if last - warm > _GROWTH.value:
    violations.append(f"the server grew by {last - warm:.1f} MiB")
  if seen.errors:
    violations.append(f"errors: {sum(seen.errors.values())}")
  if seen.stuck:
    violations.append(f"stuck streams: {seen.stuck}")
  if not seen.requests:
    violations.append("no request was answered")
  between, tokens = zip(*seen.intervals, strict=True) if seen.intervals else ((), ())
  return {
    "benchmark": "serve_load",
    "requests": seen.requests,
    "errors": seen.errors,
    "stuck": seen.stuck,
    "seconds": round(seconds, 1),
    "requests_per_s": round(seen.requests / seconds, 2),
    "tokens_per_s": round(seen.tokens / seconds, 1),
    "first_byte_seconds": quantiles(seen.first_byte),
    "first_token_seconds": quantiles(seen.first_token),
    "inter_token_seconds": quantiles([s / n for s, n in seen.intervals], tokens),
    "event_seconds": quantiles(between),
    "server_mib": {
      "start": round(server.memory[0], 1),
      "warm": round(warm, 1),
      "end": round(last, 1),
      "most": round(max(server.memory), 1),
      "tenths": [round(samples[count * i // 10]) for i in range(10)],  # of the time, at their start
    },
    "growth_mib": round(last - warm, 1),
    "kills": killed,
    "violations": violations,
    "settings": {flag.name: flag.value for flag in _SETTINGS},
  }


def allow_descriptors(needed: int) -> None:
  """Raises this process's limit of open files, and so the server's, if that is too low."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if soft != resource.RLIM_INFINITY and soft < needed:
    if hard != resource.RLIM_INFINITY and hard < needed:
      raise app.UsageError(f"--clients needs {needed} open files, ulimit -n allows {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every request
  allow_descriptors(_CLIENTS.value + _OTHER_FILES)
  with tempfile.TemporaryDirectory(prefix="rome-serve-load-") as directory:
    figures = asyncio.run(load(pathlib.Path(directory) / "server.log"))
  print(json.dumps(figures | summary.provenance()), flush=True)
  sys.exit(1 if figures["violations"] else 0)


if __name__ == "__main__":
  app.run(main)
