"""Mistakes in arguments are answered before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys

WRONG = {
    "quantize --bits 5": "bits is 5; choose one of 2, 3, 4, 8",
    "quantize --bits four": "--bits is four; it is one number",
    "quantize --group-size 0": "group size is 0",
    "quantize --grid fp8 --asymmetric": "Grid fp8 has no zero points",
    "quantize --grid mxfp4 --bits 8": "bits is 8, but grid mxfp4 has 4",
    "quantize --skip (": "is not a regular expression",
    "quantize --size 2.1": "Did you mean 2.1GB or 2.1MB?",
    "quantize --avg-bits -1": "--avg-bits is -1; it must be a number above 0",
    "quantize --avg-bits 3 --bits 4": "nothing to choose from but int4 g128",
    "quantize --avg-bits 3 --rotate": "--rotate is judged at the bits of a plan",
    "quantize --max-kl 1 --max-ppl-increase 1%": "both targets of quality",
    "quantize --max-ppl-increase lots": "--max-ppl-increase 'lots' is no fraction",
    "quantize --pin q_proj=8": "--pin and --library are for a search",
    "quantize --plan nowhere.json": "Cannot read the plan nowhere.json",
    "quantize --plan nowhere.json --bits 4": "leave out --bits",
    "quantize --no-act-order --static-groups": "leave out --static-groups",
    "quantize --grid int5": "'int5' is not one of",
    "search": "There is no budget",
    "search --avg-bits 3 --bits 4": "nothing to choose from",
    "search --avg-bits 3 --bits 4,5": "bits is 5",
    "search --avg-bits 3 --group-size big": "is not a list of whole numbers",
    "search --avg-sparsity 50 --sparsity 0,0.5": "fraction of the weights, below 1. Did you mean 0.5?",
    "search --avg-bits 3 --sparsity 50": "sparsity is 50; it is a fraction of the weights, from 0 to below 1. Did you mean 0.5?",
    "search --latency fast": "--latency 'fast' is no fraction",
    "search --avg-bits 3 --proxy a.json": "--proxy is for method emq",
    "search --avg-bits 3 --skip [": "is not a regular expression",
    "prune --sparsity 50": "Did you mean 0.5?",
    "prune --sparsity 1": "from 0 to below 1.\n",
    "prune --pattern 4:2": "nothing would be pruned",
    "prune --pattern diagonal": "use unstructured, N:M",
    "prune --bits 5": "bits is 5",
    "prune --skip (": "is not a regular expression",
    "eval --seq-len 1": "1 is not in the range",
    "eval --dtype int8": "'int8' is not one of",
    "eval --tasks a --seq-len 8": "--tasks brings its own text",
    "quantize file.txt": "file.txt is a file; give the folder",
    "quantize empty": "empty has no config.json",
    "quantize -o full": "full exists and is not empty. Choose another -o, or give --overwrite",
    "quantize -o full --overwrite": "full does not look like a model folder",
    "search empty --avg-bits 3": "empty has no config.json",
    "prune empty": "empty has no config.json",
    "prune -o full": "full exists and is not empty",
    "eval file.txt": "file.txt is a file",
    "eval --against empty": "empty has no config.json",
    "quantise": "Did you mean quantize?",
}
RUNS = """
import contextlib, io, json, sys
from compress.cli import main
found = {}
for line in json.load(sys.stdin):
    sys.argv = ["compress", *line.split()]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main.run()
    found[line] = code, said.getvalue(), sorted({"torch", "transformers", "numpy"} & sys.modules.keys())
print(json.dumps(found))
"""


def test_no_mistake_waits_for_torch(tmp_path):
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    run = [sys.executable, "-c", RUNS]
    done = subprocess.run(run, input=json.dumps(list(WRONG)), cwd=tmp_path, text=True, capture_output=True, check=True)
    found = json.loads(done.stdout)
    assert {line: (code, imported) for line, (code, _, imported) in found.items()} == dict.fromkeys(WRONG, (2, []))
    assert [(line, said) for line, (_, said, _) in found.items() if WRONG[line] not in said] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file.txt", "full"]
