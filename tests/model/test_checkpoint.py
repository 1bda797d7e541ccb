"""A model's name leads to its files, or to one clear line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pie_async.errors import ModelError
from pie_async.model import checkpoint
from pie_async.model.checkpoint import resolve_model


def test_directory_is_itself(tmp_path):
    assert resolve_model(str(tmp_path)) == tmp_path


def test_builtin_is_in_the_package():
    path = resolve_model("builtin")
    assert path.parent == Path(checkpoint.__file__).parent
    assert (path / "config.json").is_file()


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/no-such-model", "a/b/c", "", "a b"])
def test_path_that_is_not_there_is_named(name):
    with pytest.raises(ModelError, match="no model directory") as caught:
        resolve_model(name)
    assert repr(name) in str(caught.value)


def test_file_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ModelError, match="is a file"):
        resolve_model(str(file))


def test_hub_id_without_the_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelError, match=r"pie_async\[hub\]"):
        resolve_model("org/model")


def test_hub_download_takes_no_pickles_and_no_code(monkeypatch, tmp_path):
    import huggingface_hub

    asked = {}

    def download(name, *, allow_patterns, ignore_patterns):
        asked.update(name=name, allow=allow_patterns, ignore=ignore_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("org/model") == tmp_path
    assert asked["name"] == "org/model"
    assert set(asked["allow"]) == {"*.safetensors", "*.json", "*.jinja"}


def test_hub_without_network_is_one_line(monkeypatch):
    import huggingface_hub

    def download(name, **kwargs):
        raise OSError("cannot reach the hub\nTraceback and so on")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelError, match="cannot reach the hub") as caught:
        resolve_model("org/model")
    assert "\n" not in str(caught.value)
