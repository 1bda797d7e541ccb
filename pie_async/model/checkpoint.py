"""Where a model's files are: the built-in one, a directory, or the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from pie_async.config import BUILTIN_MODEL
from pie_async.errors import ModelError

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja")
# Mistral's repositories hold the weights twice; folders hold other formats.
_NOT_FROM_HUB = ("consolidated*", "*/*")


def resolve_model(name: str) -> Path:
    """The directory that holds a model.

    Args:
        name: "builtin", a directory, or a hub id ("org/name"), which is downloaded to
            huggingface_hub's cache unless it is there already.

    Raises:
        ModelError: there is no such model, or it cannot be fetched.
    """
    if name == BUILTIN_MODEL:
        return _builtin()
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if name and path.exists():
        raise ModelError(f"{name} is a file; give the model's directory")
    if name.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(name):
        raise ModelError(f"no model directory at {name!r}")
    return _from_hub(name)


def _builtin() -> Path:
    path = Path(__file__).parent / "builtin"
    if not (path / "config.json").is_file():
        raise ModelError(
            "the built-in model is not part of this installation; give a model directory"
        )
    return path


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModelError(
            f"there is no directory {name!r}, and models from the Hugging Face hub need "
            "the extra 'hub': pip install 'pie_async[hub]'"
        ) from None
    try:
        return Path(
            snapshot_download(
                name, allow_patterns=list(_HUB_FILES), ignore_patterns=list(_NOT_FROM_HUB)
            )
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"there is no directory {name!r}, and it cannot be had from the Hugging Face hub: "
            f"{reason[0]}"
        ) from error
