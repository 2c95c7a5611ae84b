"""What a user asked for, as every verb hands it on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.calib.files import Source
from compress.errors import refuse
from compress.progress import Track, silent
from compress.solvers.options import Options
from compress.spec import Scheme


@dataclass(frozen=True)
class Job:
    """What the user asked for, but for the plan; `arguments` are the same as the report shows them."""

    source: Path
    out: Path
    arguments: Mapping[str, Any] = field(default_factory=dict)
    quantizer: str = "gptq"
    pruner: str = "alps"
    options: Options = field(default_factory=Options)
    scheme: Scheme | None = None  # asked for every layer; None where a plan says or there is no grid
    group_size: int | None = None  # asked for every layer; None where a plan says
    format: str = "compressed-tensors"
    skip: Sequence[str] = ()
    calibrated: bool = True  # whether anything looks at activations
    labelled: bool = False  # whether a loss wants classes, where the data has them
    judged: bool = False  # whether more samples are wanted, for a search to judge plans on
    rotate: bool = False  # whether to try a rotation, and to keep it where it helps
    calib: Source | None = None
    samples: int = 128
    seq_len: int | None = None
    seed: int = 0
    device: str | None = None
    dtype: str | None = None
    eval: bool = False
    overwrite: bool = False
    track: Track = silent

    def __post_init__(self) -> None:
        if not self.calibrated:
            unread = {"--calib": self.calib is not None, "--samples": self.samples != Job.samples}
            unread |= {"--seq-len": self.seq_len is not None and not self.eval}
            refuse(unread, "Nothing that was asked for looks at calibration data")
