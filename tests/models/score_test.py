"""`rome score`: the numbers of `forward`, in pieces and whole, and one line for every mistake."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome import cli
from rome.models import PRESETS, Sampling, forward, init_params, save, score_cli, token_logps

CONFIG = PRESETS["micro"]
IDS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 11))


@pytest.fixture(name="model", scope="module")
def _model(tmp_path_factory):
  path = tmp_path_factory.mktemp("model")
  random = np.random.default_rng(1)
  shapes = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))
  params = jax.tree.map(lambda x: random.normal(0, 0.3, x.shape).astype(np.float32), shapes)
  save(path, CONFIG, params)
  return path, params


@pytest.fixture(name="want", scope="module")
def _want(model):
  """Logits [3, 11, V] and log-probs [3, 11] of IDS."""
  ones = jnp.ones(IDS.shape, jnp.int32)
  places = jnp.broadcast_to(jnp.arange(IDS.shape[1])[None], IDS.shape)
  logits = jax.jit(forward, static_argnums=0)(CONFIG, model[1], IDS, ones, places)
  logps, _ = jax.jit(token_logps, static_argnums=2)(logits, IDS, Sampling())
  return np.asarray(logits), np.asarray(logps)


def score(model, tmp_path, ids, *flags):
  np.save(tmp_path / "ids.npy", ids)
  files = ["--input", tmp_path / "ids.npy", "--output", tmp_path / "out.npy"]
  status = cli.main(["score", "--model", *map(str, [model, *files]), *flags])
  left = [f.name for f in tmp_path.iterdir() if ".part" in f.name]
  assert not left
  return status


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.int32])
def test_logits_of_rows(dtype, model, want, tmp_path, capsys):
  assert score(model[0], tmp_path, IDS.astype(dtype)) == 0
  got = np.load(tmp_path / "out.npy")
  assert got.dtype == np.float32 and got.shape == (3, 11, 264)
  np.testing.assert_allclose(got, want[0], atol=1e-5)
  assert capsys.readouterr().out == f"{tmp_path}/out.npy: float32 [3, 11, 264]\n"


def test_one_row_has_no_batch_axis(model, want, tmp_path):
  assert score(model[0], tmp_path, IDS[1]) == 0
  np.testing.assert_allclose(np.load(tmp_path / "out.npy"), want[0][1], atol=1e-5)
  assert score(model[0], tmp_path, IDS[1], "--logprobs") == 0
  np.testing.assert_allclose(np.load(tmp_path / "out.npy"), want[1][1], atol=1e-5)


def test_log_probs(model, want, tmp_path):
  assert score(model[0], tmp_path, IDS, "--logprobs") == 0
  got = np.load(tmp_path / "out.npy")
  assert got.dtype == np.float32 and (got[:, 0] == 0).all() and (got[:, 1:] < 0).all()
  np.testing.assert_allclose(got, want[1], atol=1e-5)


@pytest.mark.parametrize("places", [1, 4, 10])
@pytest.mark.parametrize("flags", [(), ("--logprobs",)])
def test_pieces_change_nothing(places, flags, model, want, tmp_path, monkeypatch):
  """Widths that do not divide 11, so that the last piece overlaps the one in front of it."""
  monkeypatch.setattr(score_cli, "PIECE", places * CONFIG.vocab_size)
  assert score(model[0], tmp_path, IDS, *flags) == 0
  np.testing.assert_allclose(np.load(tmp_path / "out.npy"), want[bool(flags)], atol=1e-5)


@pytest.mark.parametrize("count, width", [(1, 1), (5, 5), (11, 4), (11, 10), (12, 4)])
def test_pieces_cover_every_place_with_one_width(count, width):
  pieces = list(score_cli._pieces(count, width))
  assert {i for p in pieces for i in range(count)[p]} == set(range(count))
  assert {p.stop - p.start for p in pieces} == {width}


@pytest.mark.parametrize(
  "ids, message",
  [
    (IDS.astype(np.float32), "must hold integers, got float32"),
    (IDS > 3, "must hold integers, got bool"),
    (IDS[None], r"must have shape [T] or [B, T] and tokens, got [1, 3, 11]"),
    (IDS[:0], "and tokens, got [0, 11]"),
    (np.int64(3), "and tokens, got []"),
    (IDS + 253, "is outside the vocabulary of 264"),
    (-IDS, "is outside the vocabulary of 264"),
    (np.array([2**32 + 5]), "id 4294967301 is outside the vocabulary of 264"),
  ],
)
def test_bad_ids_are_one_line(ids, message, model, tmp_path, capsys):
  assert score(model[0], tmp_path, ids) == 1
  error = capsys.readouterr().err
  assert error.startswith(f"rome score: {tmp_path}/ids.npy") and error.count("\n") == 1
  assert message in error and not (tmp_path / "out.npy").exists()


def test_bad_files_are_one_line(model, tmp_path, capsys):
  good, bad = tmp_path / "ids.npy", tmp_path / "bad.npy"
  np.save(good, IDS)
  np.save(bad, np.array([{}], object))
  np.savez(tmp_path / "many.npz", a=IDS)
  (tmp_path / "text.npy").write_text("1 2 3")
  (tmp_path / "empty.npy").touch()
  for name, message in {
    "none.npy": "No such file",
    "bad.npy": "no readable .npy file",
    "text.npy": "no readable .npy file",
    "empty.npy": "no readable .npy file",
    "many.npz": "must hold integers, got an archive",
  }.items():
    argv = ["--model", model[0], "--input", tmp_path / name, "--output", tmp_path / "out.npy"]
    assert score_cli.main(list(map(str, argv))) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"rome score: {tmp_path}/{name}") and message in error
    assert error.count("\n") == 1
  for argv, message in [
    ((tmp_path / "none", tmp_path / "out.npy"), "none"),
    ((tmp_path / "none.gguf", tmp_path / "out.npy"), "none.gguf: no usable GGUF file"),
    ((model[0], tmp_path / "no" / "out.npy"), "--output: there is no directory"),
  ]:
    argv = ["--model", argv[0], "--input", good, "--output", argv[1]]
    assert score_cli.main(list(map(str, argv))) == 1
    error = capsys.readouterr().err
    assert error.startswith("rome score: ") and message in error and error.count("\n") == 1


def test_never_more_logits_at_once_than_a_piece(model, tmp_path, monkeypatch):
  widths, head = [], score_cli._logits
  monkeypatch.setattr(score_cli, "PIECE", 4 * CONFIG.vocab_size + 7)
  monkeypatch.setattr(score_cli, "_logits", lambda c, p, h: widths.append(len(h)) or head(c, p, h))
  assert score(model[0], tmp_path, IDS) == 0
  assert widths == [4, 4, 4] * len(IDS)
