"""What the kernels compile to for Hopper, in a process of its own because this one may define them for the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.compiled import main_loop

ROOT = Path(__file__).parents[2]


MACHINE = """
.L_x_1:
        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0030*/                   LOP3.LUT R32, R8, 0xf000f, R46, 0xea, !PT ;
        /*0040*/                   HGMMA.64x16x16.F32.BF16 R24, R36, gdesc[UR20], R24, gsb0 ;
        /*0050*/              @!P1 BRA `(.L_x_3) ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/               @P1 BRA `(.L_x_2) ;
.L_x_3:
        /*0080*/                   EXIT ;
.L_x_4:
        /*0090*/                   BRA `(.L_x_4);
"""


def test_the_main_loop_is_the_one_that_multiplies():
    loop = main_loop(MACHINE)
    assert loop == ["LOP3.LUT", "HGMMA.64x16x16.F32.BF16", "BRA", "WARPGROUP.DEPBAR.LE", "BRA"]
    assert not main_loop(MACHINE.replace("HGMMA", "FFMA"))


@pytest.mark.slow
def test_weights_stay_in_registers_and_nothing_spills():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compiled"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    assert run.stdout.count("mma") > 60
    assert run.stdout.count("wgmma") > 35  # few rows may take the older instruction, from registers too
