"""Images in Podman's store: import, commit, list and remove, through the private service.

Every name here is REPOSITORY:TAG. Podman's errors (`podman.errors.APIError`) become ImageError.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from rome.envs.backends.podman_service import message, service
from rome.envs.common import ImageError

if TYPE_CHECKING:
  import podman

_TIMEOUT = 600.0  # seconds to import, commit or remove a large image

T = TypeVar("T")


def image_exists(name: str) -> bool:
  """Whether Podman has an image of this name."""
  return bool(service.call(lambda client: client.images.exists(name)))


def import_image(archive: pathlib.Path, tag: str) -> None:
  """Makes an image of a tar archive of a root file system."""

  def action(client: "podman.PodmanClient") -> None:
    with open(archive, "rb") as data:
      client.api.post(
        "/images/import",
        params={"reference": tag},
        data=data,
        headers={"Content-Type": "application/x-tar"},
        timeout=_TIMEOUT,
      ).raise_for_status()

  _call(f"import {tag}", action)


def commit(container: str, tag: str, changes: Sequence[str] = ()) -> None:
  """Makes an image of a container's root file system; tmpfs and volumes are left out.

  Args:
    container: its name.
    tag: REPOSITORY:TAG.
    changes: lines of a Containerfile, which change the image's settings.
  """
  repository, _, name = tag.rpartition(":")
  parameters: dict[str, str | list[str]] = {
    "container": container,
    "repo": repository,
    "tag": name,
    "pause": "false",
    "changes": list(changes),
  }

  def action(client: "podman.PodmanClient") -> None:
    client.api.post("/commit", params=parameters, timeout=_TIMEOUT).raise_for_status()

  _call(f"commit {container} as {tag}", action)


def tag_image(name: str, tag: str) -> None:
  """Gives an image a second name."""
  repository, _, last = tag.rpartition(":")
  _call(f"tag {name}", lambda client: client.images.get(name).tag(repository, last))


def untag_image(name: str) -> None:
  """Takes a name away; an image that others are based on stays in the store without it."""
  repository, _, last = name.rpartition(":")
  parameters = {"repo": repository, "tag": last}

  def action(client: "podman.PodmanClient") -> None:
    client.api.post(f"/images/{name}/untag", params=parameters).raise_for_status()

  _call(f"untag {name}", action)


def remove_image(name: str) -> bool:
  """Removes an image. Returns False where a container or another image needs it."""

  def action(client: "podman.PodmanClient") -> bool:
    answer = client.api.delete(f"/images/{name}", timeout=_TIMEOUT)
    if answer.status_code != 409:
      answer.raise_for_status()
    return bool(answer.ok)

  return _call(f"remove {name}", action)


def list_images(prefix: str) -> dict[str, int]:
  """Sizes in bytes, layers below included, of the images whose names begin with `prefix`."""
  found = _call("list images", lambda client: client.images.list())
  return {
    tag: int(image.attrs["Size"])
    for image in found
    for tag in image.attrs.get("RepoTags") or []
    if tag.startswith(prefix)
  }


def images_in_use() -> set[str]:
  """The names by which the images of all containers, running or not, are known."""

  def action(client: "podman.PodmanClient") -> set[str]:
    answer = client.api.get("/containers/json", params={"all": "true"})
    answer.raise_for_status()
    ids = {row["ImageID"] for row in answer.json()}
    images = [image for image in client.images.list() if image.attrs["Id"] in ids]
    return {tag for image in images for tag in image.attrs.get("RepoTags") or []}

  return _call("list containers", action)


def _call(what: str, action: "Callable[[podman.PodmanClient], T]") -> T:
  try:
    return service.call(action)
  except OSError as error:
    raise ImageError(f"podman cannot {what}: {message(error)}") from error
