"""What the GPU kernels compile to, which needs no GPU: instructions, registers, spills and shared memory of every variant.

    python -m benchmarks.compiled [--capability 90] [--all]

Ends with an error where a product on Hopper does not take its decoded weights from registers, a kernel spills, its shared memory
does not suffice, or a multiprocessor has room for fewer `programs`, by registers, shared memory and threads, than the rule for
launches counts on. `issued` and `integer` are the instructions of the main loop, and those of the integer pipe, for every weight
that a thread decodes: with 4 bits, groups of 64 or more and few rows of x, more than the budget are an error as well. `waits` are
for the matrix unit.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compress.kernels import columns, decode, descent, launch, planar, routing, wna16
from compress.kernels.launch import Device, Launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
DEVICES = {90: Device("NVIDIA H200", 132, 232448), 80: Device("NVIDIA A100", 108, 166912)}
REGISTERS, THREADS = 65536, 2048
UNBOUNDED = (math.inf, math.inf)
K = 4096
SIXTEEN = [["tt.divisibility", 16]]
UNALIGNED = ("M", "per_part", "per_token", "first", "R", "E", "T")
ROWS = (1, 16, 32, 64, 128)
BUDGET = (3.0, 1.5)  # issued and integer: at 4.8 TB/s an H200's multiprocessor has 41 elements of 4 bits to decode a cycle, by
FEW_ROWS = 16  # 128 lanes, 64 of them for integers
INTEGER = re.compile(r"(LOP3|SHF|IADD3|VIADD|VIADDMNMX|IMNMX|ISETP|SEL|LEA|PRMT|SGXT|PLOP3|R2UR)\b")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)(?:.*`\((\.L_\w+)\))?")
LABEL = re.compile(r"(\.L_\w+):")


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: how it multiplies, and what it takes."""

    name: str
    matrix: frozenset[str]
    from_registers: bool
    registers: int
    shared: int
    spilled: int
    casts: int
    programs: int
    issued: float
    integer: float
    waits: int
    wanted: int
    budget: tuple[float, float]

    def faults(self, capability: int) -> Iterator[str]:
        """What should not be so."""
        if self.spilled:
            yield f"{self.spilled} loads and stores of spilled registers"
        if self.shared > DEVICES[capability].shared:
            yield f"{self.shared} bytes of shared memory"
        if capability == 90 and self.matrix and not self.from_registers:
            yield "decoded weights go through shared memory"
        if capability == 90 and self.programs < self.wanted:
            yield f"not the {self.wanted} programs that the rule counts on"
        if capability == 90 and (self.issued > self.budget[0] or self.integer > self.budget[1]):
            yield f"more instructions than {self.budget} a weight"


def compiled(
    kernel: Any,
    name: str,
    types: dict[str, str],
    constants: dict[str, Any],
    how: Launch,
    capability: int,
    wanted: int = 1,
    budget: tuple[float, float] = UNBOUNDED,
    fusion: bool = True,
) -> Kernel:
    """Compile one variant; pointers and sizes are multiples of 16, as for every layer of a large model.

    Its main loop decodes how.BN rows of one block at a time.
    """
    attributes = {(kernel.arg_names.index(argument),): SIXTEEN for argument in types if argument not in UNALIGNED}
    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants, attributes)
    options = {"num_warps": how.warps, "num_stages": how.stages, "enable_fp_fusion": fusion}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage, machine = _read(made.asm["cubin"])
    registers, shared = int(usage["REG"]), made.metadata.shared
    wgmma = re.findall(r"wgmma\.mma_async[^;]*;", made.asm["ptx"])
    threads = 32 * how.warps
    loop, elements = main_loop(machine), how.BN * planar.SLICE * constants.get("SLICES", 1) / threads
    room = (
        REGISTERS // (registers * threads),
        (DEVICES[capability].shared + launch.RESERVED) // (shared + launch.RESERVED),
        THREADS // threads,
    )
    return Kernel(
        name,
        frozenset(re.findall(r"(wgmma\.mma_async|mma\.sync)\b", made.asm["ptx"])),
        all(re.search(r"\{[^}]*\},\s*\{", line) for line in wgmma),  # mma.sync always does
        registers,
        shared,
        len(re.findall(r"\b(?:LDL|STL)\b", machine)),
        len(re.findall(r"\bI2F", machine)),
        min(room),
        len(loop) / elements,
        sum(bool(INTEGER.match(one)) for one in loop) / elements,
        sum(one.startswith("WARPGROUP.DEPBAR") for one in loop),
        wanted,
        budget,
    )


def main_loop(machine: str) -> list[str]:
    """The instructions between a label and the jump back to it, of the shortest such loop that multiplies matrices."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in machine.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.match(line):
            instructions.append(found[1])
            if found[1].startswith("BRA") and found[2] in labels:
                loops.append(instructions[labels[found[2]] :])
    return min((one for one in loops if any(re.match("HG?MMA", each) for each in one)), key=len, default=[])


def _read(binary: bytes) -> tuple[dict[str, str], str]:
    """What ptxas says a kernel takes, and its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        commands = (["cuobjdump", "--dump-resource-usage"], ["nvdisasm", "-c"])
        usage, code = (_output([str(TOOLS / tool[0]), *tool[1:], file.name]) for tool in commands)
    return dict(re.findall(r"(\w+):(\d+)", usage)), code


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True)
class Case:
    """A layer's scheme, its activations' dtype, and numbers of rows of these; 0 stands for dequantization."""

    bits: int
    symmetric: bool
    group: int
    dtype: torch.dtype
    rows: tuple[int, ...]
    experts: bool = False

    def __str__(self) -> str:
        group = "row" if self.group == K else f"g{self.group}"
        return (
            f"int{self.bits} {group}{'' if self.symmetric else ' asym'} {NAMES[self.dtype]}{' experts' if self.experts else ''}"
        )


def cases(everything: bool) -> Iterator[Case]:
    """Every width with every symmetry at every size of tile, and every group and dtype; all combinations where asked for."""
    for bits, symmetric, group, dtype in itertools.product((2, 3, 4, 8), (True, False), (128, 32, 64, K), NAMES):
        if everything or (group == 128 and dtype == torch.bfloat16):
            yield Case(bits, symmetric, group, dtype, (0, *ROWS))
        elif symmetric and (group == 128 or dtype == torch.bfloat16):
            yield Case(bits, symmetric, group, dtype, (0, 1, 128))
    yield Case(4, True, 128, torch.bfloat16, (1, 16, 64), experts=True)


def variants(case: Case, capability: int) -> Iterator[Kernel]:
    """A case's kernels, compiled one by one."""
    bits, x = case.bits, "*" + NAMES[case.dtype]
    code = decode.assembly(bits, case.dtype)
    shared = wna16.constants(K, K // case.group, bits, case.symmetric, case.dtype, code)
    weight = {"low": "*i16", "high": "*u8" if bits == 3 else "*i16", "scales": "*bf16"}
    weight |= {"zeros": "*bf16" if case.symmetric else "*u8"}
    for M in case.rows:
        if not M:
            types = weight | {"out": x} | dict.fromkeys(("first", "last", "K", "padded_N", "B"), "i32")
            how = Launch(planar.TILE, 0, 1, wna16.EXPANDED_WARPS, 3)
            yield compiled(wna16._expand, f"{case}, dequantized", types, shared, how, capability)
            continue
        how = launch.rule(M, 8192, K, bits, DEVICES[capability])
        types = weight | {"x": x, "bias": x, "out": "*fp32" if how.parts > 1 else x}
        types |= dict.fromkeys(("M", "N", "K", "padded_N", "B", "per_part", "per_token"), "i32")
        types |= {"order": "*i32", "routes": "*i32"}
        constants = shared | dict(EXPERTS=case.experts, HAS_BIAS=False, WHOLE=True, PARTIAL=how.parts > 1, BN=how.BN, BM=how.BM)
        counted = (
            case.group == 128 and not case.experts
        )  # 3.6.0 takes 133 registers, of 128 for two, of a tall tile's groups of 64
        wanted = next(tile.programs for tile in launch.TILES[bits] if tile.BM == how.BM) if counted else 1
        budget = BUDGET if bits == 4 and case.group >= 64 and how.BM <= FEW_ROWS else UNBOUNDED
        yield compiled(wna16._multiply, f"{case}, {_size(how)}", types, constants, how, capability, wanted, budget)


def solver(capability: int) -> Iterator[Kernel]:
    """The loops over columns, for one warp a program: with scales that are there, and fitted or moved on the way."""
    how, pointers = Launch(1, 0, 1, 1, 1), dict.fromkeys(("scales", "zeros"), "*fp32")
    common = {"TINY": 1e-38, "DTYPE": tl.bfloat16, "HAS_KEEP": False, "COLUMNS": columns.BLOCK, "ROWS": columns.ROWS}
    sizes = dict.fromkeys(("K", "N", "start", "C", "group"), "i32")
    types = pointers | dict.fromkeys(("E", "T", "Ut", "D", "loss", "factors", "shrinks"), "*fp32") | sizes
    types |= {"group_of": "*i32", "keep": "*u8", "codes": "*u8", "G": "i32", "levels": "fp32"}
    for fit, symmetric in ((False, True), (True, True), (True, False)):
        constants = common | {"FIT": fit, "CANDIDATES": 16 if symmetric else 8, "SYMMETRIC": symmetric}
        name = f"column loop{', fitting' if fit else ''}{'' if symmetric else ' asym'}"
        yield compiled(columns._round_columns, name, types, constants, how, capability, fusion=False)
    types = pointers | dict.fromkeys(("L", "G", "S", "H", "diagonal", "recips", "objective"), "*fp32") | sizes
    types |= {"keep": "*u8", "groups": "i32", "top": "fp32"}
    for moved in (False, True):
        name = f"descent{' with scales' if moved else ''}"
        yield compiled(descent._descend, name, types, common | {"SCALES": moved}, how, capability, fusion=False)


def routes(capability: int) -> Iterator[Kernel]:
    """What sorts the rows of few tokens by expert."""
    types = dict.fromkeys(("experts", "order", "routes"), "*i32") | dict.fromkeys(("R", "E", "T"), "i32")
    for R, E in ((64, 128), (routing.FEW, 256)):
        constants = {"BM": 16, "ROWS": R, "EXPERTS": E, "TILES": triton.next_power_of_2(routing.most_tiles(R, E, 16))}
        yield compiled(routing._count, f"{R} rows to {E} experts", types, constants, Launch(1, 0, 1, 4, 1), capability)


def _size(how: Launch) -> str:
    return f"{how.BN}x{how.BM}, {how.parts} parts, {how.warps} warps, {how.stages} stages"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, choices=sorted(DEVICES), default=90)
    parser.add_argument("--all", action="store_true", help="every combination, which takes minutes")
    args = parser.parse_args()
    capability, faults = args.capability, 0
    print(f"triton {triton.__version__}, compute capability {capability / 10}")
    products = (variants(case, capability) for case in cases(args.all))
    for kernel in itertools.chain(solver(capability), routes(capability), *products):
        wrong = list(kernel.faults(capability))
        faults += bool(wrong)
        instruction = ", ".join(sorted(kernel.matrix)) or "-"
        print(
            f"{kernel.name:62} {instruction:16} registers {kernel.registers:3}, shared {kernel.shared:6}, "
            f"casts {kernel.casts:2}, programs {kernel.programs:2}, issued {kernel.issued:.2f}/weight, "
            f"integer {kernel.integer:.2f}, waits {kernel.waits} {'; '.join(wrong)}",
            flush=True,
        )
    if faults:
        sys.exit(f"{faults} variants are not as they should be")


if __name__ == "__main__":
    main()
