"""`rome convert`: what it writes, what it copies, and one line where it cannot."""

import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from rome import cli, models
from rome.models import sharding
from rome.text.tokenizer import Tokenizer
from tests.pretrained import smollm2_gguf

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "moe_theta"


@pytest.fixture
def source(tmp_path):
  path = shutil.copytree(GOLDEN, tmp_path / "source")
  (path / "tokenizer.json").write_text('{"a": 1}')
  (path / "chat_template.jinja").write_text("{{ messages }}")
  raw = json.loads((path / "config.json").read_text())
  (path / "config.json").write_text(json.dumps(raw | {"eos_token_id": [7, 9]}))
  return path


def test_the_same_model_and_its_tokenizer(source, tmp_path, capsys):
  target = tmp_path / "target"
  assert cli.main(["convert", str(source), str(target)]) == 0
  config, params = models.load(source)
  again, loaded = models.load(target)
  assert again == config
  flat, found = (traverse_util.flatten_dict(p) for p in (params, loaded))
  assert all(np.array_equal(found[k], x) for k, x in flat.items())
  assert sorted(file.name for file in target.iterdir()) == [
    "chat_template.jinja",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
  ]
  assert (target / "tokenizer.json").read_text() == '{"a": 1}'
  assert json.loads((target / "config.json").read_text())["eos_token_id"] == [7, 9]
  assert capsys.readouterr().out == f"{target}: 0.2 MB of float32 weights\n"


def test_dtype_and_shards(source, tmp_path):
  target = tmp_path / "target"
  argv = ["convert", str(source), str(target), "--dtype=bfloat16", "--shard_gb=4e-5"]
  assert cli.main(argv) == 0
  files = sorted(target.glob("*.safetensors"))
  assert len(files) == 2
  assert all(
    x.dtype == jnp.bfloat16 for f in files for x in safetensors.numpy.load_file(f).values()
  )
  assert json.loads((target / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda path: shutil.rmtree(path), "cannot read .*config.json"),
    (lambda path: (path / "model-00002-of-00003.safetensors").unlink(), "missing file .*00002"),
    (lambda path: (path / "config.json").write_text("{"), "config.json is no JSON"),
  ],
)
def test_one_line_where_it_cannot(source, tmp_path, capsys, change, message):
  change(source)
  assert cli.main(["convert", str(source), str(tmp_path / "target")]) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("rome convert: ")
  assert re.search(message, line)
  assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["{}", "{}"], "is the source: name another directory"),
    (["{}", "{}x", "--shard_gb=0"], "--shard_gb must be a positive number, got 0.0"),
    (["{}.gguf", "{}x"], "source.gguf"),
  ],
)
def test_wrong_arguments(source, capsys, argv, message):
  assert cli.main(["convert", *(a.format(source) for a in argv)]) == 1
  assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_gguf_file_with_its_tokenizer(tmp_path):
  source = smollm2_gguf()
  assert cli.main(["convert", str(source), str(tmp_path), "--shard_gb=0.2"]) == 0
  config, params = models.load(tmp_path, stacked=True)
  again, want = models.load(source, sharding.make_mesh(devices=jax.devices()[:1]), stacked=True)
  assert config == again == models.PRESETS["smollm2_135m"]
  assert isinstance(want["norm"]["scale"].sharding, jax.sharding.NamedSharding)
  assert jax.tree.structure(params) == jax.tree.structure(want)
  same = jax.tree.map(lambda a, b: np.array_equal(a, b), params, want)
  assert all(jax.tree.leaves(same))
  texts = "Über 3 Dinge:\n\tx = 1.5\n"
  ids = Tokenizer.from_dir(source).encode(texts)
  assert Tokenizer.from_dir(tmp_path).encode(texts) == ids
  raw = json.loads((tmp_path / "config.json").read_text())
  assert (raw["bos_token_id"], raw["eos_token_id"]) == (1, 2)


def test_a_file_in_the_way(source, tmp_path, capsys):
  (tmp_path / "target").write_text("")
  assert cli.main(["convert", str(source), str(tmp_path / "target")]) == 1
  assert "target" in capsys.readouterr().err
