"""Nothing that this package reads can name code to run."""

from __future__ import annotations

import ast
import contextlib
import pickle
import shutil
from pathlib import Path

import pytest

from pie_async.config import EngineConfig
from pie_async.errors import ModelError
from pie_async.model.checkpoint import _builtin

ROOT = Path(__file__).parent.parent / "pie_async"
RUNS_CODE = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
MULTIPROCESSING = {"multiprocessing", "concurrent.futures.process"}
"""Whose queues, pipes and pools pickle what they carry."""
LOADS = {("torch", "load"), ("numpy", "load"), ("np", "load"), ("yaml", "load")}
SOURCES = sorted(ROOT.rglob("*.py"))


def imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def called(tree: ast.AST) -> set[tuple[str, str] | str]:
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    attributes = {
        (func.value.id, func.attr)
        for func in calls
        if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name)
    }
    return attributes | {func.id for func in calls if isinstance(func, ast.Name)}


def found_in(source: str) -> set[object]:
    tree = ast.parse(source)
    names = imported(tree)
    running = {name for name in names if name.split(".")[0] in RUNS_CODE}
    return running | (names & MULTIPROCESSING) | (called(tree) & (LOADS | {"eval", "exec"}))


def test_no_module_imports_or_calls_what_unpickles_or_runs_data() -> None:
    assert len(SOURCES) > 100
    found = {path.name: hits for path in SOURCES if (hits := found_in(path.read_text()))}
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from multiprocessing import Queue",
        "exec('1')",
    ],
)
def test_the_search_finds_them(source: str) -> None:
    assert found_in(source)


class Bomb:
    """Unpickled, it touches a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "model.pt",
        "model.pth",
        "model.ckpt",
        "model.safetensors",
        "adapter.pkl",
    ],
)
def test_a_pickled_checkpoint_is_refused_and_never_unpickled(name: str, tmp_path: Path) -> None:
    from pie_async.assembly import assemble

    model = tmp_path / "model"
    shutil.copytree(_builtin(), model)
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(ModelError, match=name):
        assemble(EngineConfig(model=str(model)))
    assert not (tmp_path / "exploded").exists()
    pickle.loads((model / name).read_bytes())  # or the test would prove nothing
    assert (tmp_path / "exploded").exists()


def test_code_that_a_model_brings_is_never_imported(tmp_path: Path) -> None:
    from pie_async.assembly.loading import read_files

    model = tmp_path / "model"
    shutil.copytree(_builtin(), model)
    (model / "modeling_evil.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')")
    config = (model / "config.json").read_text().rstrip().removesuffix("}")
    (model / "config.json").write_text(
        config + ', "auto_map": {"AutoModelForCausalLM": "modeling_evil.Model"}}'
    )
    with contextlib.suppress(ModelError):
        read_files(EngineConfig(model=str(model)))
    assert not (tmp_path / "exploded").exists()


def test_a_tokenizer_with_more_ids_than_the_model_is_refused_when_it_is_loaded(
    tmp_path: Path,
) -> None:
    from tokenizers import Tokenizer

    from pie_async.assembly.loading import read_files

    model = tmp_path / "model"
    shutil.copytree(_builtin(), model)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_tokens([f"extra {number}" for number in range(5000)])
    tokenizer.save(str(model / "tokenizer.json"))
    with pytest.raises(ModelError, match="different models"):
        read_files(EngineConfig(model=str(model)))
