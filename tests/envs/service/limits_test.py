"""Rates, and the bound on work."""

import asyncio
import threading

import pytest

from rome.envs.sandbox import ImageError, Limits
from rome.envs.service import auth, core, errors, limits


def test_a_bucket_gives_its_burst_then_its_rate():
  now = [100.0]
  bucket = limits.Bucket(rate=2.0, burst=4.0, clock=lambda: now[0])
  assert [bucket.take() for _ in range(5)] == [0, 0, 0, 0, 0.5]
  now[0] += 0.5
  assert bucket.take() == 0 and bucket.take() == 0.5
  now[0] += 1000
  assert [bucket.take() for _ in range(5)] == [0, 0, 0, 0, 0.5]  # no more than the burst is saved


def test_a_debt_is_paid_at_the_rate():
  now = [0.0]
  bucket = limits.Bucket(rate=10.0, burst=10.0, clock=lambda: now[0])
  assert bucket.owe(10) == 0 and bucket.owe(30) == 3.0
  now[0] += 2
  assert bucket.owe(0) == 1.0


def test_too_many_requests_are_told_when_to_come_back():
  rates, tenant = limits.Rates(), auth.Tenant("a", auth.Quotas(requests_per_second=1.0))
  rates.request(tenant)
  rates.request(tenant)
  with pytest.raises(errors.ApiError) as error:
    rates.request(tenant)
  assert error.value.status == 429 and error.value.headers() == {"Retry-After": "1"}
  rates.request(auth.Tenant("b", tenant.quotas))  # nobody else's business


def test_work_has_slots_by_tenant_and_they_come_back_when_the_thread_ends(monkeypatch):
  monkeypatch.setattr(limits, "SLOT_WAIT", 0.2)
  release = threading.Event()

  async def scenario():
    workers = limits.Workers(3)
    greedy, other = auth.Tenant("g", auth.Quotas(calls=2)), auth.Tenant("o", auth.Quotas(calls=9))
    stuck = [asyncio.ensure_future(workers.run(greedy, release.wait, 0.1)) for _ in range(2)]
    assert await workers.run(other, lambda: 7, 5.0) == 7
    for task in stuck:  # their clients stop waiting; the threads do not
      with pytest.raises(errors.ApiError) as error:
        await task
      assert error.value.status == 504
    with pytest.raises(errors.ApiError) as error:
      await workers.run(greedy, lambda: 1, 5.0)
    assert error.value.status == 429
    third = asyncio.ensure_future(workers.run(other, release.wait, 5.0))
    await asyncio.sleep(0.05)
    with pytest.raises(errors.ApiError) as error:
      await workers.run(other, lambda: 1, 5.0)
    assert error.value.status == 503 and error.value.retry_after
    release.set()
    assert await third
    assert await workers.run(greedy, lambda: 8, 5.0) == 8
    with pytest.raises(ZeroDivisionError):
      await workers.run(greedy, lambda: 1 // 0, 5.0)
    workers.close()

  asyncio.run(scenario())


@pytest.mark.parametrize(
  "live, wanted, status",
  [
    ([], Limits(), None),
    ([Limits()], Limits(), None),
    ([Limits(), Limits()], Limits(), 429),
    ([Limits(cpus=0.5)], Limits(cpus=1.6), 429),
    ([Limits(memory_mb=400)], Limits(memory_mb=201), 429),
    ([], Limits(cpus=2.01), 422),
    ([], Limits(memory_mb=601), 422),
  ],
)
def test_quotas_tell_never_from_not_now(live, wanted, status):
  tenant = auth.Tenant("a", auth.Quotas(sandboxes=2, cpus=2.0, memory_mb=600))
  if status is None:
    core.check_quotas(tenant, live, wanted)
  else:
    with pytest.raises(errors.ApiError) as error:
      core.check_quotas(tenant, live, wanted)
    assert error.value.status == status


@pytest.mark.parametrize(
  "image, mine",
  [
    (None, True),
    ("localhost/rome-base", True),
    ("localhost/rome-tenant.a.x", True),
    ("rome-tenant.a.x:latest", True),
    ("localhost/rome-tenant.ab.x", False),
    ("localhost/rome-tenant.b.x", False),
    ("rome-tenant.b.x", False),
    ("3f", False),
    ("sha256:3f", False),
    ("example.org:5000/team/image:v1.2", True),
    ("containers-storage:@3f5", False),
    ("containers-storage:rome-tenant.b.x", False),
    ("localhost/rome-base@sha256:" + 64 * "0", False),
    ("localhost/rome-tenant.a.x/../rome-base", False),
  ],
)
def test_images_of_other_tenants_do_not_exist(image, mine):
  if mine:
    core.check_image(auth.Tenant("a"), image)
  else:
    with pytest.raises(ImageError):
      core.check_image(auth.Tenant("a"), image)
