"""What a wheel ships."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD = "from setuptools import build_meta; build_meta.build_wheel('wheels')"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the package."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "pie_async", source / "pie_async")
    for path in (*ROOT.glob("README.md"), ROOT / "LICENSE", ROOT / "pyproject.toml"):
        shutil.copy(path, source)
    done = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (built,) = (source / "wheels").glob("pie_async-*-py3-none-any.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    """Names of the files in it."""
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


def test_everything_beside_the_modules_is_shipped_too(names: set[str]) -> None:
    kept = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "pie_async").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".pyc", ".so")
    }
    assert "pie_async/api/assets/page.html" in kept
    assert kept - names == set()


def installer(python: Path) -> list[str | Path]:
    """The command that installs for another interpreter; environments made by uv have no pip."""
    if find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "--python", python, "install"]
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("neither pip nor uv is here to install a wheel with")
    return [uv, "pip", "install", "--python", python]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has the wheel, and its dependencies from this one."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False)
    python = place / "bin/python"
    done = subprocess.run(
        [*installer(python), "--no-deps", "--no-index", "--quiet", wheel],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (packages,) = place.glob("lib/python3*/site-packages")
    # A path file of a directory that is itself named in a path file is not read: so what is
    # installed here for editing is not found there.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place / "bin"


def run(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, executable=installed / arguments[0], cwd=cwd, capture_output=True, text=True,
        check=False, env={"PATH": str(installed), "HOME": str(cwd), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_the_wheel_alone_runs_a_model_that_swaps(installed: Path, tmp_path: Path) -> None:
    where = run(installed, tmp_path, "python", "-c", "import pie_async; print(pie_async.__file__)")
    assert where.stdout.startswith(str(installed.parent)), where.stderr
    flags = ["--device-kv", "512KiB", "--host-pool", "16MiB", "--ignore-eos", "-n", "120"]
    told = run(installed, tmp_path, "pie-async", "generate", "-p", "ROMEO:", *flags)
    assert told.returncode == 0, told.stderr
    assert len(told.stdout.split()) > 20


def test_the_wheel_alone_has_the_page(installed: Path, tmp_path: Path) -> None:
    script = "from pie_async.api.page import Page; print(Page().response().content_length)"
    told = run(installed, tmp_path, "python", "-c", script)
    assert int(told.stdout or 0) > 10_000, told.stderr
