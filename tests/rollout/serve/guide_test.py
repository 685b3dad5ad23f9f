"""The lines of the guide run as they stand."""

import pathlib
import re
import subprocess

import pytest

from tests.rollout.serve.conftest import KEY

GUIDE = pathlib.Path(__file__).parents[3] / "docs" / "guides" / "serving.md"


@pytest.mark.slow
def test_the_guides_curl_lines_run(micro, tmp_path):
  (script,) = re.findall(r"^```bash\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
  assert script.count("json ") > 5
  environ = {"URL": micro.url, "KEY": KEY, "MODEL": micro.model, "PATH": "/usr/bin:/bin"}
  done = subprocess.run(
    ["bash", "-euo", "pipefail", "-c", script],
    cwd=tmp_path,
    env=environ | {"no_proxy": "*"},
    capture_output=True,
    text=True,
    timeout=200,
  )
  assert done.returncode == 0, (done.stdout, done.stderr)
  for shown in ('"object":"chat.completion"', "data: [DONE]", '"param":"frequency_penalty"'):
    assert shown in done.stdout


@pytest.mark.slow
def test_the_guides_python_runs(micro, capsys):
  blocks = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
  assert len(blocks) == 2
  names = {"url": micro.url, "key": KEY, "model": micro.model}
  for i, block in enumerate(blocks):
    exec(compile(block, f"block {i} of the guide", "exec"), names)
  assert capsys.readouterr().out and names["reply"].version == 0
