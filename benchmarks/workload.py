"""What the benchmarks run on: models of random weights, files of token ids, and whole processes that are timed and watched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.peer import Job
from compress.cli.main import WAITING

ROOT = Path(__file__).resolve().parents[1]
PEER_PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers")
PEER = "benchmarks.peer"
SAMPLED_EVERY = 0.02  # seconds between looks at a process's memory


@dataclass(frozen=True)
class Process:
    """A finished process: wall seconds, the most anonymous memory (RssAnon, bytes) it was seen to hold, and its output."""

    seconds: float
    anonymous: int
    output: str


@contextmanager
def folder() -> Iterator[Path]:
    """A temporary folder."""
    with tempfile.TemporaryDirectory(prefix="compress-benchmark-") as path:
        yield Path(path)


def random_llama(path: Path, *, hidden: int, intermediate: int, layers: int, heads: int, vocabulary: int) -> Path:
    """Save a Llama of random bfloat16 weights, with a tokenizer of numbers for words, to `path`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    words = models.WordLevel({str(i): i for i in range(vocabulary)}, unk_token="0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="0").save_pretrained(path)
    return path


def random_tokens(path: Path, *, samples: int, seq_len: int, vocabulary: int) -> Path:
    """Write rows of random token ids to `path`."""
    return write_tokens(path, torch.randint(vocabulary, (samples, seq_len), generator=torch.Generator().manual_seed(0)))


def write_tokens(path: Path, ids: torch.Tensor) -> Path:
    """Write token ids as .jsonl rows, which both sides read."""
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids.tolist()), encoding="utf-8")
    return path


def quantize(model: Path, calib: Path, out: Path, *, samples: int, seq_len: int, effort: str = "default") -> list[str]:
    """The command line of our 4-bit quantization as a user would type it."""
    options = ["--bits", "4", "--effort", effort, "--calib", calib, "--samples", samples, "--seq-len", seq_len, "-o", out]
    return [sys.executable, "-m", "compress", "quantize", str(model), *map(str, options)]


def peers(python: str, model: Path, jobs: Sequence[Job], scratch: Path, script: str = PEER) -> list[str]:
    """The command line that runs jobs through llm-compressor or another solver, under the Python where that is installed."""
    listed = scratch / "jobs.json"
    listed.write_text(json.dumps([asdict(job) for job in jobs]), encoding="utf-8")
    return [python, "-m", script, str(model), str(listed)]


def last_line(process: Process) -> list[float]:
    """What the peer's script reports: seconds, one number per job."""
    seconds: list[float] = json.loads(process.output.splitlines()[-1])
    return seconds


def peer_versions(python: str, packages: Sequence[str] = PEER_PACKAGES) -> str:
    """Name and version of what matters in the peer's environment."""
    code = f"from importlib.metadata import version; print(', '.join(f'{{n}} {{version(n)}}' for n in {tuple(packages)!r}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def run(command: Sequence[str]) -> Process:
    """Run a command to its end, watching its memory; raises RuntimeError with the end of its output when it fails."""
    environment = {**os.environ, **WAITING, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        start, most = time.perf_counter(), 0
        process = subprocess.Popen(list(command), stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
        while process.poll() is None:
            most = max(most, anonymous_memory(process.pid))
            time.sleep(SAMPLED_EVERY)
        seconds = time.perf_counter() - start
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise RuntimeError(f"{command[:3]} ended with {process.returncode}:\n{text[-3000:]}")
    return Process(seconds, most, text)


def anonymous_memory(pid: int) -> int:
    """RssAnon of a process in bytes; 0 where it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)
