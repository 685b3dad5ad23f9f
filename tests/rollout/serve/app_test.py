"""The application in this process: new weights, and an engine that fails."""

import asyncio
import json

import httpx
import jax
import pytest

from rome import models
from rome.envs.service.auth import Tokens
from rome.rollout.serve import app, core, load

pytestmark = pytest.mark.slow  # the engine has to be compiled first

BODY = {"model": "micro", "prompt": "a", "max_tokens": 4, "ignore_eos": True, "seed": 1}


def with_service(test):
  """Runs a coroutine function with a service that is up, and a client of it."""

  async def whole():
    served = load.prepare(load.LoadConfig(model="micro", slots=2, max_length=2048))
    service = core.Service(served, Tokens(), core.ServeConfig())
    await service.loop.start()
    transport = httpx.ASGITransport(app.create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
      await test(service, http)
    assert await service.close()

  asyncio.run(whole())


def test_new_weights_are_named_in_what_is_answered_with_them():
  async def test(service, http):
    asked = BODY | {"return_token_ids": True}
    before = (await http.post("/v1/completions", json=asked)).json()
    params = models.init_params(models.PRESETS["micro"], jax.random.key(9))
    await service.loop.publish(params, 3)
    after = (await http.post("/v1/completions", json=asked)).json()
    assert [a["system_fingerprint"] for a in (before, after)] == ["rome-v0", "rome-v3"]
    assert [a["choices"][0]["weight_version"] for a in (before, after)] == [0, 3]
    assert (await http.get("/health")).json() == {"status": "ok", "version": 3}

  with_service(test)


def test_when_the_engine_fails_everybody_is_told_and_health_says_so():
  async def test(service, http):
    def broken():
      raise FloatingPointError("weights that are not numbers")

    await service.loop.call(lambda engine: setattr(engine, "step", broken))
    whole = await http.post("/v1/completions", json=BODY)
    assert whole.status_code == 500
    assert whole.json()["error"]["code"] == "engine_failed"
    assert "weights that are not numbers" in whole.json()["error"]["message"]
    later = await http.post("/v1/completions", json=BODY | {"stream": True})
    assert later.status_code == 500 and later.json()["error"]["type"] == "server_error"
    health = await http.get("/health")
    assert health.status_code == 503 and "FloatingPointError" in health.text
    assert (await http.get("/ready")).status_code == 503
    assert (await http.get("/metrics")).status_code == 200

  with_service(test)


def test_a_stream_that_the_engine_fails_ends_with_the_error():
  async def test(service, http):
    async def fail_later():
      while not service.loop.stats.running:
        await asyncio.sleep(0.001)
      await service.loop.call(lambda engine: setattr(engine, "step", lambda: 1 / 0))

    failing = asyncio.ensure_future(fail_later())
    answer = await http.post("/v1/completions", json=BODY | {"stream": True, "max_tokens": 2000})
    await failing
    assert answer.status_code == 200
    last = [line for line in answer.text.splitlines() if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_failed"

  with_service(test)
