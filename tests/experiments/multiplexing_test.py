"""The simulator of multiplexing against cases done by hand, bounds, and its own ledger."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.multiplexing import report, workload
from experiments.multiplexing.simulator import Policy, Simulation, policies, simulate
from experiments.multiplexing.workload import Draws, Stages, Workload

# Ten tokens a second whatever the rows, of replies and contexts alike; nothing else takes time.
PLAIN = Stages(
  rows=(1.0,),
  rates=(10.0,),
  prefill_rate=10.0,
  train_rate=10.0,
  publish=0.0,
  latencies=dict.fromkeys(("reset", "step", "tests"), (0.0, 0.0)),
)
# One turn of 10 + 20 tokens: alone on a device it takes 3 s.
ALIKE = Workload(
  devices=1,
  slots=2,
  batch=2,
  turns=1.0,
  tail=0.0,
  reply=20.0,
  reply_sigma=0.0,
  prompt=10,
  rollout_share=None,
  env_share=None,
)


def draws(work=ALIKE, stages=PLAIN, seed=0, **changes):
  return Draws(dataclasses.replace(work, **changes), stages, seed)


def test_a_synchronous_update_by_hand():
  """Reset 1 s, 60 tokens at 10 a second 6 s, tests 1 s, training on them 6 s, new weights 1 s."""
  latencies = dict.fromkeys(("reset", "step", "tests"), (1.0, 1.0))
  stages = dataclasses.replace(PLAIN, latencies=latencies, publish=1.0)
  outcome = simulate(draws(stages=stages), Policy(1, True, 0), updates=3)
  assert outcome.seconds == pytest.approx(15)
  assert outcome.idle == pytest.approx(2 / 15)
  assert outcome.trained == pytest.approx(60 / 15)
  assert outcome.dropped == outcome.redone == 0


def test_turns_by_hand():
  """Three turns: 30 tokens, then twice 5 + 20, whose beginning is known."""
  outcome = simulate(
    draws(turns=3.0, observation=5, batch=1), Policy(1, True, 0), warmup=1, updates=2
  )
  # 80 tokens are generated, 80 trained on.
  assert outcome.seconds == pytest.approx(8 + 8)


def test_a_static_split_and_a_subset_that_turns_by_hand():
  """A sample takes 3 s to generate and 2 s to train; what is under way begins anew with an update.

  Split: the sample begun at 0 is trained from 3 to 5, when the next one, of 3, begins anew: every
  update takes 5 s. Turning: two samples at 0, trained from 3 to 5 and from 5 to 7; the one that
  began at 5 begins anew at 7, beside another: two updates take 7 s.
  """
  stages = dataclasses.replace(PLAIN, train_rate=15.0)
  cell = draws(stages=stages, devices=2, slots=1, batch=1)
  split = simulate(cell, Policy(1, False, 1), updates=4)
  assert split.seconds == pytest.approx(5)
  assert split.idle == pytest.approx(3 / 10)
  assert split.redone == pytest.approx(2 / 5)
  turning = simulate(cell, Policy(1, True, 1), updates=4)
  assert turning.seconds == pytest.approx(3.5)
  # Busy: 2 x 3 s of generation, 4 s of training, 2 s that are done again; idle 2 of 14.
  assert turning.idle == pytest.approx(2 / 14)


def test_requests_of_a_device_that_turns_begin_anew_elsewhere():
  """Lengths 30 and 60 s of one row each; the short one is trained from 3 s on for 3 s.

  The long one lies on the device that turns, with 3 of 6 s done: it begins anew on the other at 3,
  and again at 6 with the new weights: it ends at 12, and is trained until 18.
  """
  cell = draws(devices=2, slots=1, batch=1)
  long = workload.Plan((50,), 0.0, (0.0,))
  cell._plans = {0: cell.plan(0), 1: long} | {n: cell.plan(n) for n in range(2, 9)}
  run = Simulation(cell, Policy(1, True, 1))
  run.run(2)
  assert run.ended == pytest.approx([6, 18])
  # The long one twice 3 s; the third sample, begun at 6, ends before the next update.
  assert run.redone == pytest.approx(30 + 30)


def test_samples_too_old_are_dropped_where_that_is_the_rule():
  """One sample in eight is far longer than an update: waited for, or dropped."""
  cell = draws(devices=2, slots=4, batch=4)
  long = workload.Plan((2000,), 0.0, (0.0,))
  cell._plans = {n: long if n % 8 == 0 else cell.plan(n) for n in range(300)}
  waiting = simulate(cell, Policy(1, True, 1), updates=8)
  dropping = simulate(cell, Policy(1, True, 1, drop=True), updates=8)
  assert waiting.dropped == 0 and dropping.dropped > 0.05
  assert waiting.seconds > 100 > 30 > dropping.seconds


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_no_sample_is_lost_or_doubled_and_none_is_too_old(seed, drop):
  cell = Draws(Workload(tail=1.0, batch=16, devices=4, slots=4), Stages.measured(), seed)
  for policy in policies(4, 1 + seed % 2, drop):
    run, trained = Simulation(cell, policy), []
    train = run._train

    def noting(run=run, trained=trained, train=train, policy=policy):
      train()
      assert all(run.version - sample.version <= policy.alpha for sample in run._trained)
      trained += run._trained

    run._train = noting
    run.run(10)
    assert len(trained) == len(set(trained)) == 16 * 10 + len(run._trained)
    assert len(trained) + run.dropped + len(run._open) + len(run._buffer) == run.begun
    assert (run.dropped > 0) <= drop
    asked = [*run._queue, *(sample for device in run.devices for sample in device.rows)]
    asked = [sample for sample in asked if not sample.gone]
    assert len(asked) == len(set(asked)) and set(asked) <= run._open.keys()


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [1, 2])
def test_no_policy_beats_the_bounds(alpha):
  """Device time is conserved, and an update is never faster than its training."""
  work, stages = Workload(), Stages.measured()
  cell = Draws(work, stages, 0)
  generation, training = workload._work(work, stages)
  training /= workload.training_speed(work, stages)
  assert generation / (generation + training) == pytest.approx(0.7)
  for policy in policies(8, alpha, False):
    outcome = simulate(cell, policy, updates=12)
    tokens = outcome.trained * outcome.seconds  # an update
    sample = work.prompt + work.observation * 7 + 8 * work.reply
    trained = tokens / sample * training
    assert outcome.seconds >= trained / policy.trainers + stages.publish - 1e-9
    # Full rows are the fastest, and a prefix may be computed again, never less than once.
    busy = 8 * outcome.seconds * (1 - outcome.idle)
    useful = tokens / sample * generation + trained
    assert useful <= 1.1 * busy  # the window's ends may belong to neighbours


def test_where_training_is_all_the_time_is_training():
  work, stages = Workload(rollout_share=0.02, tail=0.25), Stages.measured()
  outcome = simulate(Draws(work, stages, 0), Policy(1, False, 1), updates=6)
  speed = workload.training_speed(work, stages) * stages.train_rate
  tokens = outcome.trained * outcome.seconds
  assert outcome.seconds == pytest.approx(tokens / speed + stages.publish)
  # Seven devices wait for one nearly always.
  assert outcome.idle == pytest.approx(7 / 8, abs=0.05)


def test_full_rows_generate_at_the_measured_rate():
  """With many samples under way and hardly any training, the rate is the engine's at full rows."""
  work = Workload(rollout_share=0.999, tail=0.0, reply_sigma=0.0, env_share=None, batch=1024)
  stages = dataclasses.replace(Stages.measured(), publish=0.0)
  outcome = simulate(Draws(work, stages, 0), Policy(8, True, 0), warmup=0, updates=2)
  generation, _ = workload._work(work, stages)
  assert outcome.seconds == pytest.approx(1024 * generation / 8, rel=0.1)


@pytest.mark.parametrize(
  ("policy", "message"),
  [
    (Policy(8, False, 1), "leave none"),
    (Policy(0, True, 1), "leave none"),
    (Policy(8, True, 1), "keep a device"),
    (Policy(2, True, 1, threshold=3.0), "threshold=3.0 is not in 1..2"),
  ],
)
def test_impossible_policies_are_refused(policy, message):
  with pytest.raises(ValueError, match=message):
    simulate(Draws(Workload(), Stages.measured(), 0), policy)


def test_draws_have_the_stated_means_and_shares():
  work, stages = Workload(tail=0.75), Stages.measured()
  cell = Draws(work, stages, 3)
  plans = [cell.plan(n) for n in range(4000)]
  assert plans[7] is cell.plan(7) and Draws(work, stages, 3).plan(7) == plans[7]
  assert np.mean([len(plan.replies) for plan in plans]) == pytest.approx(work.turns, rel=0.05)
  replies = np.concatenate([plan.replies for plan in plans])
  assert replies.mean() == pytest.approx(work.reply, rel=0.02)
  waited = np.mean([plan.reset + sum(plan.steps) for plan in plans])
  generating = work.turns * work.reply * work.slots / stages.rate(work.slots)
  assert waited / (waited + generating) == pytest.approx(work.env_share, rel=0.1)


def test_latencies_come_from_a_timeline(tmp_path):
  path = tmp_path / "timeline.json"
  spans = [("reset", 2, 1e6), ("step", 2, 2e6), ("step", 3, 4e6), ("tests", 3, 5e5)]
  lines = [json.dumps({"ph": "X", "name": n, "tid": t, "dur": d, "ts": 0}) for n, t, d in spans]
  lines.append(json.dumps({"ph": "X", "name": "step", "tid": 1, "dur": 9e6, "ts": 0}))  # engine's
  path.write_text("[" + "\n,".join(lines) + "\n")  # as a run under way leaves it
  found = workload.latencies_of(path)
  assert found["spans"] == {"reset": 1, "step": 2, "tests": 1}
  assert found["quantiles"]["step"][::50] == [2.0, 3.0, 4.0]


@pytest.mark.slow
def test_a_report_names_the_best_of_each_kind(tmp_path):
  work = Workload(devices=3, batch=8, slots=4)
  stages = Stages.measured()
  runs = {
    policy: [simulate(Draws(work, stages, seed), policy, updates=3) for seed in range(2)]
    for policy in policies(3, 1, False)
  }
  cell = report.Cell(work, 1, False, runs)
  best = cell.best(True)
  assert best.shared and cell.mean(best, "trained") == max(
    cell.mean(p, "trained") for p in runs if p.shared and p.alpha
  )
  text = report.tables(stages, [cell], {"as it is": cell})
  assert f"({best.trainers})" in text and "as it is" in text
  report.draw(tmp_path / "report.png", stages, [cell])
  assert (tmp_path / "report.png").stat().st_size > 10_000
  json.dumps(report.as_json(stages, [cell], {"as it is": cell}), allow_nan=False)
