"""`rome sandbox images`: the recipes of a hub and their images; build one; remove old ones."""

import argparse
import time

from rome.envs import hub


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
  """Adds `images` to the commands of `rome sandbox`."""
  images = commands.add_parser("images", help="environment images: list, build, gc")
  actions = images.add_subparsers(required=True, metavar="ACTION")
  listing = actions.add_parser("list", help="every recipe, and whether its image is built")
  listing.set_defaults(run=_list)
  build = actions.add_parser("build", help="build the image of a recipe, unless it is here")
  build.add_argument("name", metavar="NAME")
  build.set_defaults(run=_build)
  for parser in (listing, build):
    parser.add_argument(
      "--source", help="directory or git URL of recipes; those that come with rome by default"
    )
  gc = actions.add_parser("gc", help="remove the images used longest ago, until the rest fits")
  gc.add_argument("--max_gb", type=float, required=True, help="of all hub images, 10^9 bytes")
  gc.set_defaults(run=_gc)


def _list(arguments: argparse.Namespace) -> int:
  row = "{:16} {:>9} {:17} {}"
  print(row.format("RECIPE", "SIZE", "USED", "IMAGE"))
  for one in hub.EnvHub(arguments.source).list():
    size = f"{one.size / 1e6:.0f} MB" if one.built else "not built"
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.used)) if one.used else "never"
    print(row.format(one.name, size, used, one.tag))
  return 0


def _build(arguments: argparse.Namespace) -> int:
  print(hub.EnvHub(arguments.source).ensure(arguments.name))
  return 0


def _gc(arguments: argparse.Namespace) -> int:
  if arguments.max_gb < 0:
    raise ValueError(f"--max_gb must not be negative, not {arguments.max_gb:g}")
  removed = hub.evict(int(arguments.max_gb * 1e9))
  print("\n".join([*removed, f"{len(removed)} removed"]))
  return 0
