"""The ablations: their task, their learner, their programs."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.ablations import cells, chain, container, estimators, figures, learn, policy
from experiments.ablations import resample as resample_lib
from rome import envs, ipa, models

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
TINY = learn.Settings(
  groups=2,
  group_size=4,
  epochs=2,
  iterations=4,
  eval_every=2,
  eval_episodes=8,
  warm_updates=2,
  warm_rows=4,
)
HORIZON = 3


@pytest.fixture(scope="module")
def params():
  return models.init_params(policy.MODEL, jax.random.key(5))


def _words(text: str) -> jnp.ndarray:
  return jnp.array([chain.TEXT.index(c) for c in text], jnp.int32).reshape(-1, 2)


# --- the task ------------------------------------------------------------------------------------


def test_words_answer_the_symbol_now_and_the_one_before():
  words = chain.right_words(jnp.array([[0, 1, 0], [7, 7, 2]]))
  texts = [["".join(chain.TEXT[t] for t in word) for word in row] for row in np.asarray(words)]
  # NOW: A d, B g, C b, H a. BEFORE: start a, A f, B c, H a.
  assert texts == [["da", "gf", "dc"], ["aa", "aa", "ba"]]


def test_a_chain_rewards_the_last_right_word_only():
  symbols, alive = jnp.array([[0, 1]]), jnp.array([True])
  alive, shown, reward = chain.transition(symbols, 0, alive, _words("da"))
  assert (bool(alive[0]), chain.TEXT[shown[0]], float(reward[0])) == (True, "B", 0.0)
  alive, shown, reward = chain.transition(symbols, 1, alive, _words("gf"))
  assert (bool(alive[0]), chain.TEXT[shown[0]], float(reward[0])) == (True, "^", 1.0)


@pytest.mark.parametrize("wrong", ["aa", "dd", "^!"])
def test_a_wrong_word_is_a_dead_end_for_good(wrong):
  symbols = jnp.array([[0, 1]])
  alive, shown, reward = chain.transition(symbols, 0, jnp.array([True]), _words(wrong))
  assert (bool(alive[0]), chain.TEXT[shown[0]], float(reward[0])) == (False, "!", 0.0)
  alive, shown, reward = chain.transition(symbols, 1, alive, _words("gf"))
  assert (bool(alive[0]), chain.TEXT[shown[0]], float(reward[0])) == (False, "!", 0.0)


@pytest.mark.parametrize("horizon", [1, 2])
def test_the_split_covers_every_instance_and_shares_none(horizon):
  drawn = [
    {tuple(map(int, row)) for row in chain.draw_instances(jax.random.key(0), 3000, horizon, side)}
    for side in (False, True)
  ]
  assert not drawn[0] & drawn[1]
  assert [len(side) for side in drawn] == [8**horizon * 3 // 4, 8**horizon // 4]


def test_the_teacher_is_right_as_often_as_it_should_be():
  symbols = jnp.tile(jnp.array([[2, 5]]), (4000, 1))
  teacher = chain.Teacher((1, 1, 0.25, 1, 1, 0, 1, 1))
  words = chain.taught_words(jax.random.key(0), symbols, teacher)
  right = chain.right_words(symbols)
  share = np.asarray((words[..., 0] == right[..., 0]).mean(axis=0))
  np.testing.assert_allclose(share, [0.25, 0.0], atol=0.03)
  assert (words[..., 1] == right[..., 1]).all()
  with pytest.raises(ValueError, match="rightness"):
    chain.Teacher((0.5,))


def test_chunks_are_the_two_letters_of_a_word():
  ids = chain.chunk_layout(jnp.array([[False, True, True], [True, False, False]]))
  assert ids.tolist() == [[-1, -1, -1, -1, -1, 1, 1, -1, 2, 2], [-1, -1, 0, 0] + [-1] * 6]


# --- policy --------------------------------------------------------------------------------------


def test_rollouts_score_alike_in_sampler_and_trainer(params):
  settings = dataclasses.replace(TINY, engine="float32")
  symbols = chain.draw_instances(jax.random.key(1), 64, HORIZON, held_out=False)
  starts = jnp.arange(64) % HORIZON
  rollout = learn.play(settings, params, jax.random.key(2), symbols, starts)
  inside = np.asarray(chain.chunk_layout(rollout.taken)) >= 0
  old = np.asarray(learn.score(params, rollout))
  behavior = np.asarray(rollout.behavior_logp)
  np.testing.assert_allclose(behavior[inside], old[inside], atol=1e-4)
  assert np.isnan(behavior[~inside]).all()
  # Not so with the weights of the other engine.
  rollout = learn.play(TINY, params, jax.random.key(2), symbols, starts)
  inside = np.asarray(chain.chunk_layout(rollout.taken)) >= 0
  gap = np.asarray(rollout.behavior_logp - learn.score(params, rollout))[inside]
  assert 1e-3 < np.abs(gap).mean() < 1


def test_rollouts_start_behind_the_right_words(params):
  symbols = chain.draw_instances(jax.random.key(1), 9, HORIZON, held_out=False)
  starts = jnp.array([0, 1, 2] * 3)
  rollout = learn.play(TINY, params, jax.random.key(2), symbols, starts)
  words = np.asarray(rollout.tokens)[:, 1:].reshape(9, HORIZON, 3)
  np.testing.assert_array_equal(words[..., 0], chain.FIRST_SYMBOL + np.asarray(symbols))
  right = np.asarray(chain.right_words(symbols))
  for row, start in enumerate(starts.tolist()):
    np.testing.assert_array_equal(words[row, :start, 1:], right[row, :start])
    same = (words[row, :, 1:] == right[row]).all(axis=-1)
    played = [k == 0 or bool(same[:k].all()) for k in range(HORIZON)]
    assert rollout.played[row].tolist() == played
    assert rollout.taken[row].tolist() == [p and k >= start for k, p in enumerate(played)]
    assert bool(rollout.success[row]) == bool(same.all())
  assert (starts > 0).sum() == 6 and rollout.played[starts == 2].all()


# --- learning ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def episodes(params):
  """A rollout near the goal, so that some episodes succeed."""
  warm = dataclasses.replace(TINY, warm_updates=150, warm_rows=32)
  params = learn.warm_start(warm, HORIZON, 0)
  symbols = jnp.repeat(
    chain.draw_instances(jax.random.key(3), TINY.groups, HORIZON, False), TINY.group_size, axis=0
  )
  starts = jnp.zeros(TINY.batch, jnp.int32)
  rollout = learn.play(TINY, params, jax.random.key(4), symbols, starts)
  assert 0 < rollout.success.mean() < 1
  return params, rollout


@pytest.mark.parametrize("name", ["ipa_neg", "gspo", "gigpo"])
def test_update_is_the_gradient_through_the_model(episodes, name):
  params, rollout = episodes
  estimator = estimators.ESTIMATORS[name]
  groups = jnp.repeat(jnp.arange(TINY.groups), TINY.group_size)
  batch = learn.make_batch(estimator, rollout, learn.score(params, rollout), groups, 0)
  ipa.validate(batch)
  once = dataclasses.replace(TINY, epochs=1)
  _, metrics = learn.update_on(once, estimator, learn.init_state(once, params), batch, 1e-3)

  def loss(params):
    dense = models.Compute(experts="dense")
    logits = models.forward(
      policy.MODEL, params, batch.tokens, batch.segment_ids, batch.positions, dense
    )
    logp = models.token_logps(logits, batch.tokens, policy.SAMPLING)[0]
    return estimator.loss(logp, batch, ipa.loss_totals(batch))[0]

  norm = optax.tree.norm(jax.jit(jax.grad(loss))(params))
  assert norm > 0
  np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-3)


def test_estimators_differ_in_what_defines_them(episodes):
  _, rollout = episodes
  groups = jnp.repeat(jnp.arange(TINY.groups), TINY.group_size)

  def returns(name):
    return np.asarray(estimators.ESTIMATORS[name].returns(rollout, groups, 0)[0])

  won = np.asarray(rollout.success)
  np.testing.assert_allclose(returns("ipa")[won], [[0.95**2, 0.95, 1.0]] * won.sum(), rtol=1e-6)
  assert (returns("ipa")[~won] == 0).all() and (returns("token")[won] == 1).all()
  last = np.asarray(rollout.played).sum(axis=1) - 1
  assert (returns("ipa_neg")[~won, last[~won]] == -1).all()
  assert estimators.ESTIMATORS["sequence"].config.mask_upper == np.inf
  # Within a group GiGPO rewards a step that all but one got right; GRPO's is one a trajectory.
  assert np.ptp(returns("grpo")[won], axis=1).max() == 0
  assert np.ptp(returns("gigpo")[won], axis=1).max() > 0


def test_a_rate_of_zero_changes_nothing(params):
  estimator = estimators.ESTIMATORS["grpo"]
  after, curves = learn.reinforce(TINY, estimator, HORIZON, params, 0, 0.0)
  jax.tree.map(np.testing.assert_array_equal, after, params)
  assert curves["test_success"].shape == (3,) and curves["grad_norm"].shape == (4,)
  again = learn.reinforce(TINY, estimator, HORIZON, params, 0, 0.0)[1]
  jax.tree.map(np.testing.assert_array_equal, again, curves)


def test_learning_solves_a_short_chain():
  settings = learn.Settings(iterations=40, eval_every=40)
  warm = learn.warm_start(settings, 2, 0)
  _, curves = learn.reinforce(settings, estimators.ESTIMATORS["ipa"], 2, warm, 0, 3e-3)
  before, after = curves["test_success"]
  assert before < 0.75 < 0.85 < after


def test_settings_are_checked():
  with pytest.raises(ValueError, match="iterations"):
    learn.Settings(iterations=5, eval_every=2)
  with pytest.raises(ValueError, match="engine"):
    learn.Settings(engine="float3")
  with pytest.raises(ValueError, match="starts"):
    resample_lib.Arm("middle", "nothing", "")


# --- resampling ----------------------------------------------------------------------------------


def test_experts_enter_once_with_their_own_returns(episodes):
  params, rollout = episodes
  estimator = estimators.ESTIMATORS["ipa"]
  groups = jnp.repeat(jnp.arange(TINY.groups), TINY.group_size)
  batch = learn.make_batch(estimator, rollout, learn.score(params, rollout), groups, 0)
  tasks = jnp.array([[0, 1, 2], [3, 4, 5]])
  mask = jnp.array([[True, False, False], [True, True, False]])
  config = dataclasses.replace(estimator.config, lambda_il=0.1)
  both = resample_lib._with_experts(config, batch, tasks, mask)
  ipa.validate(both)
  n = TINY.batch
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[:n], y), both, batch)
  np.testing.assert_allclose(both.returns[n:], [[0.95**2, 0.95, 1.0]] * 2, rtol=1e-6)
  assert (both.chunk_ids[n] >= 0).sum() == 2 and (both.chunk_ids[n + 1] >= 0).sum() == 4
  assert both.il_mask[n:].all() and both.trajectory_ids[n:, 0].tolist() == [n, n + 1]


@pytest.mark.parametrize(
  ("name", "starts"), [("naive", 0.0), ("rollback", 2.0), ("parallel_il", 0.75)]
)
def test_arms_start_where_they_should(params, name, starts):
  config = ipa.ResamplingConfig(anchors=4)
  _, curves = resample_lib.reinforce(TINY, config, resample_lib.ARMS[name], 3, params, 0, 1e-3)
  # Rollback begins at the last chunk; four anchors over three chunks are starts 0, 0, 1 and 2.
  assert curves["start"][0] == pytest.approx(starts)
  assert curves["task_success"].shape == (3,)
  assert (curves["min_task_success"] <= curves["task_success"]).all()


def test_rollback_walks_back_when_it_masters():
  settings = dataclasses.replace(TINY, iterations=6, warm_updates=200, warm_rows=64)
  settings = dataclasses.replace(settings, rightness=(1.0,) * 8)
  warm = learn.warm_start(settings, 3, 0)
  config = ipa.ResamplingConfig()
  arm = resample_lib.ARMS["rollback"]
  _, curves = resample_lib.reinforce(settings, config, arm, 3, warm, 0, 0.0)
  assert curves["start"].tolist()[:3] == [2.0, 1.0, 0.0]


# --- the real form -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sandbox():
  with envs.make_sandbox(backend="process", accept_no_isolation=True) as sandbox:
    yield sandbox


def test_real_task_is_admitted(sandbox):
  task = container.make_task([0, 1, 0, 7])
  assert task.solution == ("./step da", "./step gf", "./step dc", "./step af")
  assert envs.check_task(task, sandbox) == []


def test_real_and_vectorised_form_agree(sandbox):
  instances = np.asarray(chain.draw_instances(jax.random.key(0), 12, 3, held_out=True))
  played = container.play(sandbox, instances, container.random_actor(0, instances))
  assert 0 < played.rewards.sum() < 12 and len(set(played.lengths.tolist())) > 1
  assert container.disagreements(instances, played) == 0
  # And a difference would be seen, of either kind.
  for name in ("observations", "rewards"):
    changed = getattr(played, name).copy()
    changed[3] = 1 - changed[3] if name == "rewards" else chain.FIRST_SYMBOL
    other = dataclasses.replace(played, **{name: changed})
    assert container.disagreements(instances, other) == 1


def test_a_policy_plays_for_real(sandbox, episodes):
  params, _ = episodes
  instances = np.asarray(chain.draw_instances(jax.random.key(0), 6, HORIZON, held_out=True))
  actor = container.policy_actor(params, TINY.engine, HORIZON, jax.random.key(1))
  played = container.play(sandbox, instances, actor)
  assert played.lengths.max() > 1
  assert container.disagreements(instances, played) == 0


# --- cells and figures ---------------------------------------------------------------------------


def test_cells_are_kept(tmp_path):
  first = cells.Cells(tmp_path, {"a": 1})
  assert first.get(seed=0) is None
  assert first.put({"x": [1.5]}, seed=0) == {"x": [1.5]}
  first.put({"x": []}, seed=1)
  file = tmp_path / "cells.jsonl"
  file.write_text(file.read_text()[:-5])  # cut off while it was written
  second = cells.Cells(tmp_path, {"a": 1})
  assert second.get(seed=0) == {"x": [1.5]} and second.get(seed=1) is None
  second.put({"x": [2]}, seed=1)
  assert cells.Cells(tmp_path, {"a": 1}).get(seed=1) == {"x": [2]}
  with pytest.raises(cells.CellsError, match=r"another a \(1, not 2\)"):
    cells.Cells(tmp_path, {"a": 2})
  file.write_text("nonsense\n")
  with pytest.raises(cells.CellsError, match="damaged"):
    cells.Cells(tmp_path, {"a": 1})


def test_intervals_are_students():
  mean, low, high = figures.mean_interval(np.array([0.0, 1.0]))
  # Deviation sqrt(1/2), t(0.975, 1) = 12.7062.
  np.testing.assert_allclose([mean, low, high], [0.5, 0.5 - 6.3531, 0.5 + 6.3531], atol=1e-3)
  assert figures.show([0.0, 1.0], 0, 1) == "0.500 [0.000, 1.000]"
  assert figures.show([0.25]) == "0.250"


def test_samples_count_seeds_that_never_get_there():
  assert figures.samples_to([0.1, 0.5, 0.8, 0.2], 64) == 128
  assert figures.samples_to([0.1, 0.79], 64) is None
  assert figures.show_samples([64, 128, 32]) == "64 [32 to 128] (3/3)"
  assert figures.show_samples([64, None, 32]) == "64 [32 to never] (2/3)"
  assert figures.show_samples([None, None, 32]) == "never [32 to never] (1/3)"
  assert figures.show_samples([None]) == "never (0/1)"


# --- programs ------------------------------------------------------------------------------------


def _run(module: str, workdir: pathlib.Path, *flags: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, "-m", f"experiments.{module}", f"--workdir={workdir}", *flags],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=280,
  )


PROGRAMS = {
  "ablate_credit": (
    "--seeds=2", "--horizons=2", "--estimators=ipa,gspo", "--iterations=4", "--warm_updates=2",
    "--rates=1e-3,1e-2", "--select_horizon=2", "--select_seeds=1", "--container_episodes=2",
    "--sandbox=process", "--i_accept_no_isolation",
  ),
  "ablate_resampling": (
    "--seeds=2", "--horizon=2", "--arms=naive,rollback_il", "--iterations=4", "--warm_updates=2",
  ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("module", "count"), [("ablate_credit", 9), ("ablate_resampling", 4)])
def test_program_runs_and_resumes(tmp_path, module, count):
  done = _run(module, tmp_path, *PROGRAMS[module])
  assert done.returncode == 0, done.stderr
  assert done.stdout == (tmp_path / "report.md").read_text() + "\n"
  assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
  results = json.loads((tmp_path / "results.json").read_text())
  assert {"settings", "cells", "commit", "date", "device"} <= set(results)
  file = tmp_path / "cells.jsonl"
  lines = file.read_text().splitlines(True)
  assert len(lines) == count

  # Finished cells are read, not run: a mark in one survives, and only the missing one is made.
  marked = json.loads(lines[0])
  marked["result"]["seconds"] = 12345
  file.write_text(json.dumps(marked) + "\n" + "".join(lines[1:-1]))
  done = _run(module, tmp_path, *PROGRAMS[module])
  assert done.returncode == 0, done.stderr
  again = file.read_text().splitlines(True)
  assert json.loads(again[0]) == marked and again[1:-1] == lines[1:-1] and len(again) == count
  fresh, old = json.loads(again[-1]), json.loads(lines[-1])
  assert fresh["cell"] == old["cell"]
  for name in set(old["result"]) - {"seconds"}:
    assert fresh["result"][name] == old["result"][name], name

  other = [flag.replace("iterations=4", "iterations=8") for flag in PROGRAMS[module]]
  refused = _run(module, tmp_path, *other)
  assert refused.returncode == 1 and "another iterations" in refused.stderr
  assert "Traceback" not in refused.stderr
