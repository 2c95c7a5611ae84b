"""Who may import whom, read from the source, and the links that put three top-level folders into the package."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("kernels", "cli", "calib")
ROWS = (  # a module imports only from rows above its own, and from its siblings in the same sub-package
    ("errors", "exchange", "linalg", "progress", "experts", "machine", "weight_reads"),
    ("skips", "folders", "integrity", "left_dense", "side_files", "turns"),
    ("spec", "models", "kernels", "calib"),
    ("passes", "qtensor", "nn"),
    ("solvers", "formats"),
    ("checkpoint", "fingerprint", "placeholder"),
    ("sequential", "evaluate", "hf", "latency"),
    ("adapters", "allocate", "finetune", "fisher", "rotate", "structured", "tune"),
    ("mixed",),
    ("proxies", "arguments"),
    ("report",),
    ("resume",),
    ("job",),
    ("opening",),
    ("pipeline",),
    ("api", "evolving", "pruning"),
    ("cli",),
    ("__main__",),
)
ROW_OF = {part: row for row, parts in enumerate(ROWS) for part in parts}
KERNELS_MAY_IMPORT = {"torch", "triton", "jaxtyping", *sys.stdlib_module_names}
LAZY = "compress"  # the package's __init__ offers everything, lazily; test_promises holds what it imports


def modules() -> dict[str, Path]:
    files = [path for path in (ROOT / "compress").rglob("*.py") if not set(path.relative_to(ROOT).parts) & set(LINKED)]
    files += [path for folder in LINKED for path in (ROOT / "compress" / folder).rglob("*.py")]
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files)
    return dict(zip(names, files, strict=True))


MODULES = modules()


def imported(source: str) -> Iterator[str]:
    """Full names of what a module imports; `from compress import x` names x where x is a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "." * node.level
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else str(node.module)


def violations(name: str, source: str) -> list[str]:
    part = name.split(".")[1]
    found = []
    for target in imported(source):
        top, _, rest = target.partition(".")
        other = rest.split(".")[0]
        if target.startswith("."):
            found.append(f"{name}: relative import")
        elif top in LINKED:
            found.append(f"{name}: {target} is compress.{target}")
        elif top == "compress" and rest and other not in ROW_OF:
            found.append(f"{name}: {target} is in no row")
        elif top == "compress" and rest and other != part and ROW_OF[other] >= ROW_OF[part]:
            found.append(f"{name}: imports {target}, which is not above it")
        elif part == "kernels" and top not in KERNELS_MAY_IMPORT and other != "kernels":
            found.append(f"{name}: kernels import {target}")
    return found


def test_the_table_in_contributing_is_this_one() -> None:
    cells = re.findall(r"^\| \d+ \| (.+) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert tuple(tuple(name.strip("/") for name in re.findall(r"`([^`]+)`", cell)) for cell in cells) == ROWS


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {LAZY}))
def test_imports_point_upwards(name: str) -> None:
    assert name.split(".")[1] in ROW_OF, f"{name} is in no row: add it to ROWS"
    assert violations(name, MODULES[name].read_text()) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("compress.spec", "from compress.qtensor import QTensor"),
        ("compress.spec", "def f():\n    from compress import api"),
        ("compress.spec", "import compress.models"),
        ("compress.checkpoint", "from compress.cli import progress"),
        ("compress.solvers.gptq", "from compress.formats import names"),
        ("compress.solvers.gptq", "from compress.surprise import thing"),
        ("compress.solvers.gptq", "from . import grid"),
        ("compress.nn", "from kernels import dispatch"),
        ("compress.kernels.cpu", "from compress.errors import CompressError"),
        ("compress.kernels.cpu", "import transformers"),
        ("compress.kernels.cpu", "import numpy.linalg"),
    ],
)
def test_a_planted_import_is_caught(name: str, source: str) -> None:
    assert len(violations(name, source)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("compress.kernels.cpu", "import math\nimport torch\nfrom compress.kernels import packing"),
        ("compress.solvers.gptq", "from compress.solvers import grid\nfrom compress.spec import Scheme"),
        ("compress.cli.main", "from compress import __version__, api\nimport click"),
    ],
)
def test_an_allowed_import_is_not(name: str, source: str) -> None:
    assert violations(name, source) == []


def test_the_walk_sees_every_file() -> None:
    on_disk = {path.resolve() for top in ("compress", *LINKED) for path in (ROOT / top).rglob("*.py")}
    assert {path.resolve() for path in MODULES.values()} == on_disk


@pytest.mark.parametrize("folder", LINKED)
def test_links(folder: str) -> None:
    link = ROOT / "compress" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..", folder)
    assert not list((ROOT / folder).rglob("__init__.py")), "a root folder kernels/ with an __init__.py breaks transformers"


def test_no_public_function_has_the_name_of_a_module() -> None:
    lasts = {name.rpartition(".")[2] for name in MODULES}
    package = ast.parse((ROOT / "compress" / "__init__.py").read_text())
    exported = {
        str(element.value)
        for node in package.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" and isinstance(node.value, ast.List)
        for element in node.value.elts
        if isinstance(element, ast.Constant)
    }
    assert exported
    assert not exported & {name.rpartition(".")[2] for name in MODULES if name.count(".") == 1}
    for name, path in MODULES.items():
        if path.name == "__init__.py":
            defined = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
            assert not defined & lasts, name
