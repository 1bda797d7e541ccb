"""The documents: links lead somewhere, what they name exists, Python compiles, tables are fresh."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from pie_async.cli.app import COMMANDS, build
from pie_async.cli.config_command import settings_table

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "ARCHITECTURE.md", *(ROOT / "docs").glob("*.md")])
GUIDES = ("index", "swapping", "deciding", "embedding", "operating", "tuning", "configuration")
NEW = [ROOT / "docs" / f"{name}.md" for name in GUIDES]
INCLUDED = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)


@functools.cache
def text_of(path: Path) -> str:
    """The document with what it includes."""
    return INCLUDED.sub(lambda match: (ROOT / match[1]).read_text(), path.read_text())


def prose_of(path: Path) -> str:
    return re.sub(r"^```.*?^```|^    .*?$", "", text_of(path), flags=re.DOTALL | re.MULTILINE)


@functools.cache
def anchors_of(path: Path) -> frozenset[str]:
    heads = re.findall(r"^#+ (.+)$", prose_of(path), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", head)) for head in heads)
    return frozenset(re.sub(r"[ \-]+", "-", each.strip().lower()) for each in plain)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_anchors_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(path)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors_of(linked), target


def test_every_document_is_in_the_contents() -> None:
    contents = set(re.findall(r": (\w+\.md)", (ROOT / "mkdocs.yml").read_text()))
    assert contents == {path.name for path in (ROOT / "docs").glob("*.md")}


@functools.cache
def flags_of(command: str) -> frozenset[str]:
    (found,) = (each for each in build([command]).registered_commands if each.name == command)
    made = typer.main.get_command_from_info(
        found, pretty_exceptions_short=False, rich_markup_mode=None
    )
    options = {name for each in made.params for name in (*each.opts, *each.secondary_opts)}
    return frozenset(options | {"--help", "-h"})


@pytest.mark.parametrize("path", NEW, ids=lambda path: path.name)
def test_commands_and_flags_that_documents_name_exist(path: Path) -> None:
    text = text_of(path)
    for command, rest in re.findall(r"pie-async ([a-z]+)([^\n`|#>]*)", text):
        assert command in COMMANDS, command
        assert set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", rest)) <= flags_of(command), rest
    known = frozenset().union(*map(flags_of, COMMANDS), {"--install-completion"})
    for flag in re.findall(r"`(--[a-z-]+)", text):
        assert flag in known, flag


@pytest.mark.parametrize("path", NEW, ids=lambda path: path.name)
def test_python_in_documents_compiles_and_imports_what_there_is(path: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", text_of(path), re.DOTALL | re.MULTILINE):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for each in node.names:
                    if not hasattr(module, each.name):
                        importlib.import_module(f"{node.module}.{each.name}")


def test_what_the_api_page_names_exists() -> None:
    for name in re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_the_table_of_settings_is_as_the_code_has_it() -> None:
    assert settings_table() in text_of(ROOT / "docs/configuration.md"), (
        "run: pie-async config --markdown"
    )


def test_figures_are_drawings_that_load_nothing_and_say_what_they_show() -> None:
    for path in (ROOT / "docs/figures").glob("*.svg"):
        text = path.read_text()
        assert "<title" in text and "<desc" in text
        assert "prefers-color-scheme: dark" in text
        assert set(re.findall(r"https?://[^\"]+", text)) == {"http://www.w3.org/2000/svg"}


def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    if shutil.which("mkdocs", path=Path(sys.executable).parent) is None:
        pytest.skip("building the documentation needs the extra docs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, env={"NO_MKDOCS_2_WARNING": "1", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = {path.parent.name for path in tmp_path.rglob("index.html")}
    assert {"swapping", "api", "architecture"} <= pages
    for page in tmp_path.rglob("*.html"):
        tags = re.findall(r"<(?:script|img|link rel=.stylesheet.)[^>]*>", page.read_text())
        assert tags and not [tag for tag in tags if re.search(r"(?:src|href)=.https?:", tag)]


@functools.cache
def sources_of_tests() -> tuple[frozenset[str], str]:
    paths = [each for room in ("tests", "examples") for each in (ROOT / room).rglob("test_*.py")]
    return frozenset(path.name for path in paths), "\n".join(path.read_text() for path in paths)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_that_is_named_exists(path: Path) -> None:
    files, text = sources_of_tests()
    for name, is_file in re.findall(r"`(?:[\w/]*/)?(test_\w+)(\.py)?`", text_of(path)):
        assert f"{name}.py" in files if is_file else f"def {name}(" in text, name
