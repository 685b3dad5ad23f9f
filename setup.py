"""Packaging. Exact versions are pinned in constraints.txt; here stand only lower bounds."""

import pathlib
import re

from setuptools import find_namespace_packages, setup

ROOT = pathlib.Path(__file__).parent

INSTALL = [
  "absl-py",
  "chex",
  "flax",
  "gymnasium>=1.0",
  "h11",  # HTTP of the sandboxes' proxy; imported where a network policy is set
  "jax>=0.10.2",
  "jinja2>=3.1.6",  # older sandboxes have known ways out
  "ml_collections",
  "numpy",
  "optax",
  "orbax-checkpoint",
  "podman>=5.8",
  "rich",
  "safetensors",
  "tensorboardX",
  "tokenizers",
  "tqdm",
]

SERVE = ["fastapi", "httpx", "prometheus_client", "uvicorn"]
FLEET = [*SERVE, "ray"]
AGENT = ["bm25s", "jsonschema", "mcp", "openai", "prompt_toolkit", "pyyaml"]
WANDB = ["wandb"]
# The client without the server; the other two are for a store in a local file, mlflow's default.
MLFLOW = ["alembic", "mlflow-skinny", "sqlalchemy"]

EXTRAS = {
  # What `make lint test` needs; the notebooks need nbclient, ipykernel and matplotlib.
  "dev": [
    *AGENT,
    *FLEET,
    *MLFLOW,
    *WANDB,
    "gguf",  # writes the files that the reader of rome.models.gguf is tested with
    "hypothesis",
    "import-linter",
    "ipykernel",
    "matplotlib",
    "mcp-server-git",  # servers of others, which the client is tested with
    "mcp-server-time",
    "mypy",
    "nbclient",
    "nbformat",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
    "schemathesis",
    "types-jsonschema",
    "types-PyYAML",
    "types-tqdm",
  ],
  # `rome agent`, and the scaffold in training.
  "agent": AGENT,
  # seqio brings tensorflow (about 3 GB), so it is never a default.
  "data": ["seqio"],
  # `rome sandbox serve`, its client, and workers on many hosts.
  "fleet": FLEET,
  # `rome serve`, and the policy that asks such a server.
  "serve": SERVE,
  # What config.trackers may name.
  "mlflow": MLFLOW,
  "wandb": WANDB,
  # xmanager needs protobuf < 7, which orbax does not: give it an environment of its own.
  "xm": ["xmanager"],
  # Brings libtpu (684 MB), with which `rome plan` compiles for TPUs on any machine. Not in dev: on
  # a machine without a TPU it makes every jax process complain on standard error.
  "tpu": ["jax[tpu]>=0.10.2"],
  "gpu": ["jax[cuda13]>=0.10.2"],
}


def version() -> str:
  text = (ROOT / "rome" / "__init__.py").read_text()
  found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
  if not found:
    raise RuntimeError('rome/__init__.py has no line __version__ = "..."')
  return found.group(1)


setup(
  name="rome",
  version=version(),
  description="JAX-native agentic reinforcement learning: IPA, sandboxes and a small agent",
  long_description=(ROOT / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_namespace_packages(
    include=["rome", "rome.*", "experiments", "experiments.*", "launch", "launch.*"]
  ),
  package_data={
    "rome.envs": ["recipes/*/*"],
    "rome.envs.rocklet": ["*.c", "*.h"],
    "rome.models.native": ["*.c", "*.h"],
    "experiments.configs": ["*.toml", "*.txt"],
  },
  install_requires=INSTALL,
  extras_require=EXTRAS,
  entry_points={"console_scripts": ["rome = rome.cli:main"]},
)
