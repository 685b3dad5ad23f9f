"""The lines of the guide run as they stand."""

import pathlib
import re
import subprocess

import pytest

from tests.envs.service.conftest import ALICE

GUIDE = pathlib.Path(__file__).parents[3] / "docs" / "guides" / "sandbox-service.md"


@pytest.mark.slow
def test_the_guides_curl_lines_run(service, tmp_path):
  (script,) = re.findall(r"^```bash\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
  assert script.count("call ") > 10
  environ = {"URL": service.url, "TOKEN": ALICE, "PATH": "/usr/bin:/bin", "no_proxy": "*"}
  done = subprocess.run(
    ["bash", "-euo", "pipefail", "-c", script],
    cwd=tmp_path,
    env=environ,
    capture_output=True,
    text=True,
    timeout=200,
  )
  assert done.returncode == 0, (done.stdout, done.stderr)
  assert '"output":"hi\\n"' in done.stdout and "got word" in done.stdout
  assert '"observation":"How many lines' in done.stdout
