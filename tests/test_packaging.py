"""What a wheel ships."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD = "from setuptools import build_meta; build_meta.build_wheel('wheels')"


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel built from a copy of the package."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "pie_async", source / "pie_async")
    for path in (*ROOT.glob("README.md"), ROOT / "LICENSE", ROOT / "pyproject.toml"):
        shutil.copy(path, source)
    done = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (source / "wheels").glob("pie_async-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_built_in_model_is_shipped_whole(names: set[str]) -> None:
    files = {path.name for path in (ROOT / "pie_async/model/builtin").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= files
    assert {f"pie_async/model/builtin/{name}" for name in files} <= names


def test_types_and_licence_are_shipped(names: set[str]) -> None:
    assert "pie_async/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_every_module_is_shipped_and_nothing_else_is_installed(names: set[str]) -> None:
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "pie_async").rglob("*.py")}
    assert modules <= names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"pie_async"}
