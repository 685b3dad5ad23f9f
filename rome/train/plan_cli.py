"""`rome plan`: does a model fit on a slice, and how fast could it be.

Examples:
  rome plan --preset=qwen3_30b_a3b --topology=v5p:4x4x4 --batch=64 --length=32768
  rome plan --config=experiments/configs/rl_30b_a3b.py --topology=v5p:4x4x4

The settings of a run give the model and both shapes: a micro-batch of its last stage is the train
step (rl.micro_rows, or sft.micro_rows where rl.steps=0, by row_length), engine.slots rows with
caches of agent.context the decode step.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax

from rome import models
from rome.models.config import COMPUTE_TYPES, REMAT
from rome.models.sharding import AXES
from rome.train import chips, plan, start
from rome.train.config import RunConfig, from_config_dict

# What is planned, and which steps of it.
Requests = list[tuple[plan.Request, Sequence[str]]]


def main(argv: Sequence[str] | None = None) -> int:
  """Runs `rome plan ...` and returns the exit status.

  0: planned, whether it fits or not. 2: bad input, with one line on standard error. 130: Ctrl-C.
  """
  arguments = _parser().parse_args(argv)
  try:
    name, requests = _requests(arguments)
    topology = requests[0][0].topology
    chips.require_libtpu(topology)
    chips.isolate(topology)
    report = _interruptible(lambda: _plan(requests))
  except ValueError as error:
    print(f"rome plan: {error}", file=sys.stderr)
    return 2
  report = {"preset": name, "versions": _versions()} | report
  print(json.dumps(report) if arguments.json else _text(report))
  return 0


def _plan(requests: Requests) -> dict[str, Any]:
  """One report of requests that share all but their shapes."""
  for request, _ in requests:
    plan.make_mesh(request)  # before the first of them is compiled
  first, *others = [plan.plan(request, steps, _say) for request, steps in requests]
  for other in others:
    for part in ("steps", "compute"):
      first[part] |= other[part]
  return first


def _say(line: str) -> None:
  print(f"rome plan: {line}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="rome plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--topology", required=True, help="v5p:4x4x4, v6e:8x8, v5e:16x16, ... or cpu:8")
  add("--config", help="settings of a run, a Python file: instead of the next three")
  add("--preset", help=f"one of {', '.join(models.PRESETS)}")
  add("--batch", type=int, help="rows of a micro-batch; rows that generate at once")
  add("--length", type=int, help="tokens of a row; places of a cache")
  add("--mesh", default="", help=f"sizes of {', '.join(AXES)}, as fsdp=16,expert=4")
  add("--remat", default="layer", choices=REMAT, help="what is computed again (%(default)s)")
  add("--dtype", default="bfloat16", choices=COMPUTE_TYPES, help="of activations (%(default)s)")
  add("--offload_optimizer", action="store_true", help="moments in host memory")
  add("--steps", nargs="+", default=plan.STEPS, choices=plan.STEPS, help="what to compile (all)")
  add("--json", action="store_true", help="print one line of JSON")
  return parser


def _requests(arguments: argparse.Namespace) -> tuple[str, Requests]:
  """The model's name, and what to plan of it."""
  topology = chips.parse_topology(arguments.topology)
  config = _settings(arguments) if arguments.config else None
  if config is None:
    _check_shape(arguments)
    name, model = arguments.preset, models.PRESETS[arguments.preset]
    shapes = [(arguments.batch, arguments.length, arguments.steps)]
    offload = arguments.offload_optimizer
  else:
    name, model = config.model, start.model_of(config)
    offload = config.offload_optimizer or arguments.offload_optimizer
    stage = config.rl if config.rl.steps else config.sft
    shapes = [(stage.micro_rows, config.row_length, ["train"])]
    if config.rl.steps:
      shapes += [(config.engine.slots, config.agent.context, ["decode"])]
    shapes = [shape for shape in shapes if shape[2][0] in arguments.steps]
    if not shapes:
      raise ValueError(f"{arguments.config} has rl.steps=0, so it never decodes; leave out --steps")
  mesh = _mesh(arguments.mesh)
  return name, [
    (
      plan.Request(
        model,
        topology,
        mesh or plan.default_mesh(topology.count, batch),
        batch,
        length,
        arguments.dtype,
        arguments.remat,
        offload,
      ),
      steps,
    )
    for batch, length, steps in shapes
  ]


def _check_shape(arguments: argparse.Namespace) -> None:
  missing = [n for n in ("preset", "batch", "length") if getattr(arguments, n) is None]
  if missing:
    raise ValueError(f"give --config, or --preset, --batch and --length; --{missing[0]} is missing")
  if arguments.preset not in models.PRESETS:
    raise ValueError(f"no preset {arguments.preset!r}; known are {', '.join(models.PRESETS)}")
  for name in ("batch", "length"):
    if getattr(arguments, name) < 1:
      raise ValueError(f"--{name} must be 1 or more, got {getattr(arguments, name)}")


def _settings(arguments: argparse.Namespace) -> RunConfig:
  """The settings in the file --config; raises ValueError in one line."""
  for name in ("preset", "batch", "length"):
    if getattr(arguments, name) is not None:
      raise ValueError(f"--{name} is the settings' to say with --config; leave one of them out")
  path = pathlib.Path(arguments.config)
  try:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
      raise OSError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    values = module.get_config()
  except Exception as error:  # whatever the user's file raises
    words = " ".join(f"{type(error).__name__}: {error}".split())
    raise ValueError(f"--config={path} gives no settings ({words})") from None
  return from_config_dict(values)


def _mesh(text: str) -> dict[str, int]:
  mesh = {}
  for part in filter(None, text.split(",")):
    name, _, size = part.partition("=")
    if name not in AXES or not size.removeprefix("-").isdecimal() or name in mesh:
      raise ValueError(f"--mesh: {part!r} is not one of {', '.join(f'{a}=N' for a in AXES)}")
    mesh[name] = int(size)
  return mesh


def _interruptible(run: Callable[[], dict]) -> dict:
  """Runs in a thread: the compiler cannot be interrupted, waiting for it can."""
  outcome: list[Any] = []

  def work() -> None:
    try:
      outcome.append(run())
    except BaseException as error:  # raised again below
      outcome.append(error)

  thread = threading.Thread(target=work, daemon=True)
  thread.start()
  try:
    while thread.is_alive():
      thread.join(0.1)
  except KeyboardInterrupt:
    print("rome plan: interrupted", file=sys.stderr, flush=True)
    os._exit(130)  # An orderly exit would wait for the compiler.
  if isinstance(outcome[0], BaseException):
    raise outcome[0]
  return outcome[0]


def _versions() -> dict[str, str]:
  versions = {"jax": jax.__version__}
  named = os.environ.get("TPU_LIBRARY_PATH")
  path = [str(pathlib.Path(named).parents[1])] if named else sys.path
  for found in importlib.metadata.distributions(name="libtpu", path=path):
    versions["libtpu"] = found.version
  return versions


# --- for people ----------------------------------------------------------------------------------


def _text(report: dict[str, Any]) -> str:
  mesh = " ".join(f"{k}={v}" for k, v in report["mesh"].items()) or "one device"
  total, active = (report[k] / 1e6 for k in ("parameters", "active_parameters"))
  lines = [
    f"{report['preset']}: {total:,.2f} M parameters, {active:,.2f} M multiply a token",
    f"{report['topology']}: {report['devices']} devices, {mesh}",
  ]
  for step, found in report["steps"].items():
    compute = ", ".join(f"{k} {v}" for k, v in report["compute"][step].items())
    shape = f"{found['rows']} rows of {found['length']} tokens"
    lines += ["", f"{step} step, {shape} ({compute}; compiled in {found['compile_seconds']} s)"]
    lines += [f"  {line}" for line in _step_lines(found)]
  if any(s.get("roofline") for s in report["steps"].values()):
    lines += ["", "Times are bounds off the data sheet. Nothing was run."]
  return "\n".join(lines)


def _step_lines(found: dict[str, Any]) -> list[str]:
  memory = found["memory"]
  held = ", ".join(f"{k} {_gib(v)}" for k, v in memory["held"].items())
  if "host" in memory:
    held += f"; in host memory optimizer {_gib(memory['host'])}, update {_gib(memory['update'])}"
  limit = f" of {_gib(memory['limit'])}" if memory["limit"] else ""
  verdict = "" if not memory["limit"] else "  FITS" if found["fits"] else "  DOES NOT FIT"
  lines = [f"memory/device  {_gib(memory['peak'])}{limit}{verdict}  ({held})"]
  if not found["fits"]:
    return lines
  names = {
    "argument": "arguments",
    "output": "outputs",
    "alias": "shared by both",
    "temp": "temporaries",
    "generated_code": "code",
  }
  lines.append("               " + ", ".join(f"{v} {_gib(memory[k])}" for k, v in names.items()))
  flops, traffic = found["flops"], found["traffic"]
  again = flops["machine"] / flops["model"]
  lines.append(
    f"operations     {flops['model']:.3g} FLOPs of the model, {again:.2f}x of that computed; "
    f"XLA counts {flops['xla_per_device'] or 0:.3g} a device (loops once, no kernels)"
  )
  lines.append(
    f"traffic/device {_gib(traffic['memory'])} of memory, {_gib(traffic['network'])} sent"
  )
  for kind, one in found["collectives"].items():
    lines.append(
      f"  {kind:18} {one['count']:5} times, {_gib(one['bytes'])}, {_gib(one['sent'])} sent"
    )
  if roofline := found["roofline"]:
    times = ", ".join(f"{k} {v:.3g} s" for k, v in roofline["seconds"].items())
    lines.append(f"at best        {times}: bound by {roofline['bound']}")
    lines.append(
      f"               {roofline['tokens_per_second']:,.0f} tokens/s, MFU {roofline['mfu']:.1%}"
    )
  return lines


def _gib(size: float) -> str:
  for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
    if size >= scale:
      return f"{size / scale:.2f} {unit}"
  return f"{size:.0f} B"
