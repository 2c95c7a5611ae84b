"""Module names as the few regular expressions that configs carry, and the sets of layers that runtimes fuse."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

FUSED = {  # what vLLM merges into one matrix under one parent: every part must have the same scheme
    "qkv_proj": (("q_proj", "k_proj", "v_proj"), ("query", "key", "value")),
    "gate_up_proj": (("gate_proj", "up_proj"),),
    "fused_qkv_a_proj": (("q_a_proj", "kv_a_proj_with_mqa"),),  # latent attention: DeepSeek V2 and V3, Kimi, GLM
    "in_proj_qkvz": (("in_proj_qkv", "in_proj_z"),),  # linear attention: Qwen 3.5
    "in_proj_ba": (("in_proj_b", "in_proj_a"),),
    "in_proj_qkvgfab": (("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj"),),  # linear attention: Kimi
}


EXPERT = re.compile(r"(.+\.experts)\.\d+\.")
EVERY = ".*"  # after the name of a layer's experts: all their matrices


def with_whole_experts(members: Iterable[str], everyone: Iterable[str]) -> list[str]:
    """The names of `members`, with one name in place of all matrices of a layer's experts where all of `everyone` are in it."""
    members, matrices = set(members), dict[str, set[str]]()
    for name in everyone:
        if found := EXPERT.match(name):
            matrices.setdefault(found[1], set()).add(name)
    whole = {experts: named for experts, named in matrices.items() if named <= members}
    return sorted(members.difference(*whole.values()) | {experts + EVERY for experts in whole})


def shared_root(names: Iterable[str]) -> str:
    """The first component with its dot when all dotted names share it and it is no list of blocks, else an empty string.

    A base model (`AutoModel`) is loaded from the same file without that component, so patterns leave it out.
    """
    dotted = [name.split(".") for name in names if "." in name]
    roots = {parts[0] for parts in dotted}
    return roots.pop() + "." if len(roots) == 1 and not any(parts[1].isdecimal() for parts in dotted) else ""


def patterns(names: Iterable[str], root: str = "") -> list[str]:
    """Regular expressions, sorted, that match exactly `names` under any prefix; blocks that differ by number share one.

    Runtimes put modules under other prefixes, so each begins with `(.*\\.)?` in place of `root`. A name from
    `with_whole_experts` stands for what it replaced.
    """
    blocks: dict[tuple[str, str], set[int]] = {}
    plain: list[str] = []
    for name in names:
        head, number, tail = _split(name.removeprefix(root) if name.count(".") > 1 else name)
        if number is None:
            plain.append(_pattern(re.escape(head)))
        else:
            blocks.setdefault((head, tail), set()).add(number)
    numbered = [
        _pattern(f"{re.escape(head)}{_alternatives(sorted(numbers))}{_tail(tail)}") for (head, tail), numbers in blocks.items()
    ]
    return sorted(plain + numbered)


def fused_sets(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """{fused name: its parts}, for the sets whose parts are all among `names`."""
    known = set(names)
    found = {}
    for parent in sorted({name.rpartition(".")[0] for name in known}):
        for fused, choices in FUSED.items():
            for parts in choices:
                members = tuple(f"{parent}.{part}" for part in parts)
                if known.issuperset(members):
                    found[f"{parent}.{fused}"] = members
    return found


def block_number(name: str) -> int | None:
    """The first component that is a number: which block of a list a module is in."""
    return _split(name)[1]


def block_list(name: str) -> str:
    """What comes before the block number, such as `model.layers`; the whole name when there is none."""
    return _split(name)[0].removesuffix(".")


def _split(name: str) -> tuple[str, int | None, str]:
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            return "".join(p + "." for p in parts[:i]), int(part), "".join("." + p for p in parts[i + 1 :])
    return name, None, ""


def _alternatives(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"({'|'.join(map(str, numbers))})"


def _tail(tail: str) -> str:
    """A regular expression for what follows a block's number; what experts lie in has several names, theirs are free too."""
    if not tail.endswith(".experts" + EVERY):
        return re.escape(tail)
    return re.escape(tail.removesuffix(".experts" + EVERY).rpartition(".")[0]) + r"\.[^.]+\.experts\..+"


def _pattern(body: str) -> str:
    return rf"(.*\.)?{body}$"
