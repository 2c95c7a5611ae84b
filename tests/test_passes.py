"""Passes through blocks with experts stop twice for all of them; whatever memory there is, what comes out is the same."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from compress import experts, models, passes, sequential, solvers
from compress.calib.capture import hooks
from compress.calib.replay import Replay, Runner
from compress.calib.stats import rows_of
from compress.experts import SplitExperts
from compress.qtensor import dequantize
from compress.sequential import Settings, SolvedLayer
from compress.solvers.options import Options
from compress.spec import LayerSpec, Plan, Scheme, Sparsity
from tests import tiny

SETTINGS = Settings("gptq", "alps", Options(), torch.device("cpu"), torch.float32, torch.float32)
FOUR_BITS = LayerSpec(Scheme(4, 32))
EFFORTS = [Options(), Options.of("default")]
NO_MEMORY, LITTLE = 0, 1_700_000  # the first two of three batches, and the layers of some experts


@pytest.fixture(autouse=True)
def several_batches(monkeypatch):
    monkeypatch.setattr(sequential, "TOKENS_AT_A_TIME", 144)


def built(family: str) -> nn.Module:
    model = tiny.build(family)
    model.config.use_cache = False
    experts.split(model, every=True)
    return model


def lopsided() -> nn.Module:
    """A model whose third and fourth experts of every block get no tokens."""
    model, generator = built("qwen3_moe"), torch.Generator().manual_seed(0)
    direction = torch.tensor([1, 0.9, 0.1, -0.1, -0.9, -1])
    for i in (0, 1):
        model.get_parameter(f"model.layers.{i}.mlp.gate.weight").data = direction[:, None] * torch.randn(64, generator=generator)
    return model


def padded() -> dict[str, torch.Tensor]:
    """Sequences of many lengths."""
    ids = tiny.inputs("mixtral")["input_ids"]
    return {"input_ids": ids, "attention_mask": (torch.arange(24) < 24 - torch.arange(16)[:, None] // 2).long()}


def solve(
    model: nn.Module, inputs: dict[str, torch.Tensor], spec: LayerSpec = FOUR_BITS, options: Options = SETTINGS.options
) -> dict[str, SolvedLayer]:
    anatomy = models.anatomy(model)
    plan = Plan(dict.fromkeys(anatomy.in_features, spec))
    settings = replace(SETTINGS, options=options)
    return {one.layer.name: one for block in sequential.run(model, anatomy, plan, inputs, settings) for one in block.layers}


def assert_same(found: dict[str, SolvedLayer], expected: dict[str, SolvedLayer]) -> None:
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        other = found[name]
        assert (other.output_error, other.weight_error) == (one.output_error, one.weight_error), name
        assert other.solved.notes == one.solved.notes
        for part, value in vars(one.solved).items():
            assert not isinstance(value, torch.Tensor) or torch.equal(getattr(other.solved, part), value), (name, part)


@pytest.fixture
def alike(monkeypatch):
    """How many layers were solved at once, each time."""
    counts: list[int] = []
    together = sequential.solve_alike

    def counting(weights, *rest):
        counts.append(len(weights))
        return together(weights, *rest)

    monkeypatch.setattr(sequential, "solve_alike", counting)
    return counts


@pytest.mark.parametrize(("family", "number"), [("mixtral", 4), ("qwen3_moe", 6)])
def test_passes_stop_twice_at_the_experts_of_a_block(family, number, monkeypatch, alike):
    stops: Counter[Replay] = Counter()
    advance = Runner.advance

    def counting(self, one):
        seen = advance(self, one)
        stops[one] += one.at is not None
        return seen

    monkeypatch.setattr(Runner, "advance", counting)
    solve(built(family), tiny.inputs(family))
    assert list(stops.values()) == 2 * 3 * [4]  # blocks and batches: queries, what comes after attention, experts twice
    assert alike == 2 * [1, 1, number, number]


@pytest.mark.parametrize(("memory", "turns"), [(NO_MEMORY, 12 * [1]), (LITTLE, [3, 3, 6])])
def test_as_many_experts_as_fit_are_taken_at_once(memory, turns, monkeypatch, alike):
    monkeypatch.setattr(passes, "free_memory", lambda _device: memory)
    solve(built("qwen3_moe"), tiny.inputs("qwen3_moe"))
    assert alike == 2 * [1, 1, *turns]


@pytest.mark.parametrize(
    ("spec", "options", "memory"),
    [
        (FOUR_BITS, EFFORTS[1], LITTLE),
        pytest.param(FOUR_BITS, EFFORTS[1], NO_MEMORY, marks=pytest.mark.slow),
        pytest.param(FOUR_BITS, EFFORTS[0], NO_MEMORY, marks=pytest.mark.slow),
        pytest.param(LayerSpec(None, Sparsity(0.5)), EFFORTS[1], LITTLE, marks=pytest.mark.slow),
    ],
    ids=["default, little", "default, none", "fast, none", "pruned, little"],
)
def test_experts_in_turns_for_want_of_memory_come_out_the_same(spec, options, memory, monkeypatch, alike):
    model = lopsided()
    expected = solve(model, padded(), spec, options)
    turns = len(alike)
    alike.clear()
    monkeypatch.setattr(passes, "free_memory", lambda _device: memory)
    assert_same(solve(model, padded(), spec, options), expected)
    assert len(alike) > turns
    without = {name for name, one in expected.items() if any("no calibration token" in note for note in one.solved.notes)}
    assert without == {name for name in expected if ".experts.2." in name or ".experts.3." in name}


def test_experts_at_once_come_out_as_one_by_one(monkeypatch):
    model, inputs, options = lopsided(), padded(), EFFORTS[1]
    together = solve(model, inputs, options=options)

    def one_by_one(weights, stats, *rest):
        *how, keeps = rest
        return [solvers.solve(W, known, *how, keep) for W, known, keep in zip(weights, stats, keeps, strict=True)]

    monkeypatch.setattr(sequential, "solve_alike", one_by_one)
    assert_same(solve(model, inputs, options=options), together)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("options", EFFORTS, ids=["fast", "default"])
def test_an_experts_layers_are_solved_on_what_they_will_see_in_the_compressed_model(options):
    model, inputs = built("mixtral"), tiny.inputs("mixtral", samples=32)  # enough for every expert
    solved = solve(model, inputs, options=options)
    finished, seen = copy.deepcopy(model), {}
    for name, one in solved.items():
        finished.get_parameter(f"{name}.weight").data = dequantize(one.solved)

    def note(name):
        def hook(module, args):
            seen[name] = rows_of(args[0], module).double()

        return hook

    with hooks([finished.get_submodule(n).register_forward_pre_hook(note(n)) for n in solved]), torch.no_grad():
        finished(**inputs)
    for name, one in solved.items():
        W, x = models.matrix(model.get_submodule(name)).detach().double(), seen[name]
        error = ((W - dequantize(one.solved).double()) @ x.t()).square().sum() / (W @ x.t()).square().sum()
        assert one.output_error == pytest.approx(float(error), rel=1e-3), name


def test_experts_that_see_all_tokens_are_corrected_for_drift():
    model = built("mixtral")
    for block in model.model.layers:
        block.mlp.gate.top_k = 4
    plain, corrected = (solve(model, tiny.inputs("mixtral"), options=Options(corrected=c)) for c in (False, True))
    layers = [name for name in plain if ".experts." in name]
    assert not any("drift" in note for name in layers for note in corrected[name].solved.notes)
    assert not all(torch.equal(plain[name].solved.codes, corrected[name].solved.codes) for name in layers)


def test_what_reaches_experts_is_named_for_them_one_by_one():
    model = built("mixtral")
    anatomy, inputs = models.anatomy(model), tiny.inputs("mixtral")
    seen: dict[str, list[torch.Tensor]] = {}

    def note(name):
        def hook(_module, args):
            seen.setdefault(name, []).append(args[0].double())

        return hook

    with hooks([model.get_submodule(n).register_forward_pre_hook(note(n)) for n in anatomy.in_features]), torch.no_grad():
        model(**inputs)
    found = {layer.name: stats for layer, _, stats in sequential.dense_stats(model, anatomy, inputs, SETTINGS)}
    assert found.keys() == anatomy.in_features.keys()
    for name, stats in found.items():
        x = torch.cat(seen[name]).flatten(0, -2)
        assert stats.tokens == len(x)
        torch.testing.assert_close(stats.H.double(), x.t() @ x / len(x), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("every", [False, True])
def test_tokens_reach_the_experts_that_they_chose_in_order(every):
    model = tiny.build("qwen3_moe")
    experts.split(model, every)
    block = next(module for module in model.modules() if isinstance(module, SplitExperts))
    generator = torch.Generator().manual_seed(0)
    hidden, weights = torch.randn(50, 64, generator=generator), torch.rand(50, 2, generator=generator)
    index = torch.rand(50, 5, generator=generator).topk(2).indices  # nobody goes to the last
    block.kept = (torch.arange(50) % 7 > 0)[None]
    expected = torch.zeros_like(hidden)
    with torch.no_grad():
        for number, expert in enumerate(block):
            token, choice = torch.where((index == number) & block.kept.t())
            if len(token):
                expected.index_add_(0, token, expert(hidden[token]) * weights[token, choice, None])
        assert torch.equal(block(hidden, index, weights), expected)
