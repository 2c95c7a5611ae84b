"""The folders that a verb reads and writes, as far as they can be checked without torch."""

from __future__ import annotations

from pathlib import Path

from compress.errors import CompressError

REFERENCE = Path(__file__).parent / "reference_llama"


def local(model: str | Path | None) -> Path | None:
    """Find the folder of a model on this machine: the embedded reference for None; None for what may be a hub id."""
    if model is None:
        return REFERENCE
    folder = Path(model)
    if folder.is_file():
        raise CompressError(f"{model} is a file; give the folder that holds it, with its config.json.")
    return folder if folder.is_dir() else None


def config_file(folder: Path) -> Path:
    """The config.json of a model folder; raises where there is none."""
    if not (folder / "config.json").is_file():
        raise CompressError(f"{folder} has no config.json; it is not a saved transformers model.")
    return folder / "config.json"


def check_target(source: Path, out: Path, overwrite: bool) -> None:
    """Raise where `out` may not be written: in the source, over a folder without `overwrite`, or over no model."""
    if out.resolve() == source.resolve() or source.resolve() in out.resolve().parents:
        raise CompressError(f"-o {out} lies in the source model {source}; choose another folder.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise CompressError(f"{out} exists and is not empty. Choose another -o, or give --overwrite to replace it.")
    if not (out / "config.json").is_file():
        raise CompressError(f"{out} does not look like a model folder (no config.json), so --overwrite will not replace it.")


def check(model: str | Path | None, out: str | Path | None, overwrite: bool) -> None:
    """Raise for a local model folder without a config, and for an `out` that is named and may not be written."""
    source = local(model)
    if source is not None:
        config_file(source)
        if out is not None:
            check_target(source, Path(out), overwrite)
