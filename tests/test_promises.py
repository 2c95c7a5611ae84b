"""What the package promises to people who install it, read its README, or only ask for help."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import click
import pytest

import compress
from compress.cli import main

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "rich", "numpy", "datasets", "scipy")
INSTALL_AND_RUN = "pip install -c constraints.txt . && compress quantize --bits 4 -o small"
INSTALL_AND_TEST = "pip install -c constraints.txt -e '.[test]' && python -m pytest"
NOT_SOURCE = (".git", "__pycache__", "build", "dist", "*.egg-info", ".venv", ".*_cache")


def python(*arguments: str, interpreter: str | Path = sys.executable, cwd: Path = ROOT) -> str:
    done = subprocess.run([str(interpreter), *arguments], capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules_after(statement: str) -> set[str]:
    return set(python("-c", f"{statement}\nimport sys; print(chr(10).join(sys.modules))").splitlines())


def test_importing_the_package_imports_nothing_heavy() -> None:
    loaded = modules_after("import compress")
    assert "compress.spec" in loaded
    assert not loaded & set(HEAVY)


def test_help_imports_nothing_heavy_and_no_command() -> None:
    loaded = modules_after(
        "import contextlib, io, sys, compress.cli.main as main\n"
        "sys.argv = ['compress', '--help']\n"
        "with contextlib.redirect_stdout(io.StringIO()): assert main.run() == 0"
    )
    assert not loaded & set(HEAVY)
    assert {name for name in loaded if name.startswith("compress.cli.")} == {"compress.cli.main"}


def test_exported_names() -> None:
    types = ["CompressError", "LayerSpec", "Plan", "Scheme", "Sparsity"]
    names = [*types, "enable_transformers", "evolve", "load", "make_bench", "perplexity", "prune", "quantize", "search"]
    assert compress.__all__ == names
    assert set(names) <= set(dir(compress))
    for name in names:
        assert getattr(compress, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = compress.nothing


def test_pyproject_and_the_package_agree_on_the_version() -> None:
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared
    assert declared[1] == compress.__version__


def test_transformers_loads_from_the_root_of_a_checkout() -> None:
    """A folder `kernels` with an __init__.py here would be taken for the package of that name, and break this."""
    python("-W", "error", "-c", "import transformers; from transformers import LlamaForCausalLM")


@pytest.fixture(name="built", scope="module")
def _built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel made from it."""
    folder = tmp_path_factory.mktemp("build")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    python("-m", "build", "--no-isolation", "--outdir", str(folder), cwd=folder / "source")
    return folder


def package_files() -> set[str]:
    found = {path for path in (ROOT / "compress").rglob("*") if path.is_file()}
    for link in ("kernels", "cli", "calib"):  # rglob does not follow links before Python 3.13
        found |= {path for path in (ROOT / "compress" / link).rglob("*") if path.is_file()}
    return {path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts}


def test_the_wheel_has_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == package_files()
    assert "compress/kernels/packing.py" in names
    assert wheel.stat().st_size < 12_000_000


def test_the_sdist_can_be_built_and_read(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert package_files() <= names
    assert {"README.md", "LICENSE", "pyproject.toml"} <= names


def test_the_wheel_in_an_empty_environment(built: Path) -> None:
    """With click, and nothing else, the package imports and the command answers."""
    (wheel,) = built.glob("*.whl")
    empty = built / "empty"
    python("-m", "venv", "--without-pip", str(empty))
    interpreter = empty / "bin" / "python"
    python("-m", "pip", "--python", str(interpreter), "install", "-q", "--no-deps", "--no-index", str(wheel))
    site = python("-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", interpreter=interpreter).strip()
    shutil.copytree(Path(click.__file__).parent, Path(site) / "click")

    assert python("-c", "import compress; print(compress.__file__)", interpreter=interpreter, cwd=built).startswith(site)
    helped = subprocess.run([empty / "bin" / "compress", "--help"], capture_output=True, text=True, check=True, cwd=built)
    assert "quantize" in helped.stdout
    assert python("-m", "compress", "--version", interpreter=interpreter, cwd=built).startswith("compress, version ")


def readme_commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_readme_has_the_two_commands() -> None:
    assert [line for line in readme_commands() if line.startswith("pip ")] == [INSTALL_AND_RUN, INSTALL_AND_TEST]


def test_commands_in_the_readme_parse() -> None:
    parts = [shlex.split(part) for line in readme_commands() for part in line.split("&&")]
    ours = [part[1:] for part in parts if part[0] == "compress"]
    assert len(ours) >= 2
    for name, *arguments in ours:
        command = main.cli.get_command(click.Context(main.cli), name)
        assert command is not None
        command.make_context(name, arguments)


def test_ci_runs_the_readmes_second_command() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    pattern = re.search(r'grep -m 1 -xE "(.+)" README\.md', script.read_text())
    assert pattern
    matching = [line for line in (ROOT / "README.md").read_text().splitlines() if re.fullmatch(pattern[1], line)]
    assert matching == [INSTALL_AND_TEST]


def test_constraints_pin_every_dependency() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^(?:dependencies|test) = \[\n(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    assert len(lists) == 2
    asked = {re.split(r"[<>=;\[]", line.strip(' ",'))[0].lower() for group in lists for line in group.splitlines()}
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert asked <= pinned
