from __future__ import annotations

import itertools
import math

import pytest
import torch

from benchmarks import defaults, efforts, parts, record, train_small
from benchmarks.judge import Judge
from compress import evaluate, models
from compress.solvers import coupled
from compress.spec import Scheme
from tests import tiny as tiny_models
from tests.tiny import FAMILIES


def tiny(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    architecture, config = FAMILIES["llama"]
    return architecture(config).eval()


def test_the_judge_agrees_with_evaluate():
    dense, other = tiny(0), tiny(1)
    windows = torch.randint(128, (19, 24), generator=torch.Generator().manual_seed(0))
    found, wanted = Judge(dense, windows)(other), evaluate.compare(other, dense, windows)
    assert found.loss == pytest.approx(math.log(wanted.perplexity), rel=1e-5)
    assert found.kl == pytest.approx(wanted.kl, rel=1e-4)
    assert Judge(dense, windows)(dense).kl == 0


def test_every_part_that_is_left_out_changes_the_weights(monkeypatch):
    monkeypatch.setattr(coupled, "BLOCKS", 2)
    monkeypatch.setattr("compress.linalg._multiplies_bfloat16", lambda: True)
    dense = tiny_models.build("llama")
    dense.config.use_cache = False
    anatomy, inputs = models.anatomy(dense), tiny_models.inputs("llama")
    variants = {variant.name: variant for variant in defaults.variants()}
    solved = {part: defaults.solve(dense, anatomy, variants[part], Scheme(3, 32), inputs) for part in parts.PARTS}
    flat = {part: torch.nn.utils.parameters_to_vector(model.parameters()) for part, model in solved.items()}
    for one, other in itertools.combinations(flat, 2):
        assert not torch.equal(flat[one], flat[other]), (one, other)


def found(default: list[float], peer: list[float]) -> efforts.Found:
    return {
        (efforts.LOSS, efforts.DEFAULT, "Llama int2 g32"): default,
        (efforts.LOSS, efforts.AUTO_ROUND, "Llama int2 g32"): peer,
        (efforts.LOSS, efforts.DEFAULT, "OPT int2 g32"): [3.0, 3.0],
        (efforts.LOSS, efforts.AUTO_ROUND, "OPT int2 g32"): [2.0, 2.0],
    }


def test_ratios_are_those_of_means():
    measured = {(m.subject, m.setting, m.metric): m for m in efforts.measurements(found([1.0, 2.0], [2.0, 8.0]))}
    mean = measured[efforts.DEFAULT, "Llama int2 g32", efforts.LOSS]
    assert (mean.value, mean.spread, mean.runs) == (1.5, 1.0, 2)
    ratio = measured["default / auto-round", "Llama int2 g32", efforts.RATIO]
    assert ratio.value == pytest.approx(0.3)
    assert (ratio.spread, ratio.runs) == (0.25, 2)
    assert measured["default / auto-round", "mean of the models, int2 g32", efforts.RATIO].value == pytest.approx(0.9)
    assert not [key for key in measured if key[0].startswith("best")]


def test_results_are_read_from_the_notes_and_ours_only_at_a_clean_commit(tmp_path, monkeypatch, capsys):
    bench = object.__new__(efforts.Bench)
    bench.name, bench.work = "Llama", tmp_path
    calls = []

    def measured(subject, seed):
        calls.append(subject.name)
        assert seed == 0
        by_scheme = dict.fromkeys(map(str, efforts.SCHEMES), 1.0)
        return {efforts.LOSS: by_scheme, efforts.KL: by_scheme, efforts.TIME: by_scheme, efforts.MEMORY: 2.0}

    monkeypatch.setattr(bench, "_measure", measured)
    ours, *_, peer = efforts.subjects("python", None, None)
    for commit, expected in (("a", 2), ("a", 2), ("b", 3), ("b+", 4), ("b+", 5)):
        monkeypatch.setattr(record, "commit", lambda commit=commit: commit)
        for subject in (ours, peer):
            assert bench.measured(subject, 0)[efforts.MEMORY] == 2
        assert len(calls) == expected
    assert calls.count(peer.name) == 1
    assert "compress rtn" in capsys.readouterr().out


@pytest.mark.parametrize(("family", "layers"), [("opt", 24), ("qwen3", 28), ("gpt_neox", 16)])
def test_groups_of_128_fit_every_layer_of_the_small_models(family, layers):
    anatomy = models.anatomy(train_small.FAMILIES[family]().eval())
    assert len(anatomy.layers) == layers
    assert all(Scheme(4, 128).groups(K) * 128 == K for K in anatomy.in_features.values())
