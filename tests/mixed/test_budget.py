"""What every option costs, by hand and against folders that were written; and budgets that cannot be."""

from __future__ import annotations

import random

import pytest
import torch

import compress
from compress import checkpoint, latency, models
from compress.errors import CompressError
from compress.formats import FORMATS
from compress.latency import LatencyTable, Machine, Timing
from compress.mixed.budget import Target, costs, megabytes
from compress.mixed.limits import Budget, parse_fraction, parse_size
from compress.mixed.request import request
from compress.mixed.units import Space, space
from compress.spec import PER_ROW, LayerSpec, Scheme, Sparsity
from tests import tiny

CPU = torch.device("cpu")
OPTIONS = tuple(LayerSpec(Scheme(bits, 32)) for bits in (2, 3, 4, 8))
MIXED = tuple(LayerSpec(Scheme(bits, group)) for bits in (8, 3, 2) for group in (16, 64, PER_ROW))
ASYMMETRIC = tuple(LayerSpec(Scheme(bits, group, False)) for bits in (2, 3, 4, 8) for group in (64, 32))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Model folders by family, made when they are first asked for."""
    folder = tmp_path_factory.mktemp("budget")

    def source(family: str, dtype: torch.dtype = torch.bfloat16):
        there = folder / f"{family}-{dtype}"
        return there if there.is_dir() else tiny.save(family, there, dtype)

    return source


def opened(source, options, form="compressed-tensors", pins=()):
    model = models.load(source)
    anatomy, stored = models.anatomy(model), checkpoint.index(source)
    names = models.weight_names(model, anatomy.in_features, stored)
    return space(anatomy, options, pins), Target(stored, names, form, FORMATS[form].scale_dtype(model.dtype))


def currencies(choices: Space, target: Target, times=None, **limits):
    return {cost.name: cost for cost in costs(choices, Budget(**limits), target, times)}


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "dense"])
@pytest.mark.parametrize(("name", "options"), [("mixed", MIXED), ("asymmetric", ASYMMETRIC)])
def test_the_size_is_that_of_the_files(sources, tmp_path, form, name, options):
    source = sources("llama")
    choices, target = opened(source, options, form)
    size = currencies(choices, target, size=1)["size"]
    draw = random.Random(name)
    draws = [[draw.randrange(len(options)) for _ in choices.units] for _ in range(2)]
    for number, choice in enumerate([*draws, [0] * len(choices.units), [len(options) - 1] * len(choices.units)]):
        out = tmp_path / str(number)
        compress.quantize(source, out=out, plan=choices.plan(choice), method="rtn", format=form)
        real = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        assert real <= size.of(choice) <= 1.005 * real


@pytest.mark.parametrize(("family", "dtype"), [("gpt2", torch.float32), ("mixtral", torch.bfloat16), ("resnet", torch.float16)])
def test_so_it_is_for_other_layers_and_types(sources, tmp_path, family, dtype):
    source = sources(family, dtype)
    choices, target = opened(source, OPTIONS, pins=["[02].*=8"])
    size = currencies(choices, target, size=1)["size"]
    choice = [u % len(options) for u, options in enumerate(choices.options)]
    compress.quantize(source, out=tmp_path / "out", plan=choices.plan(choice), method="rtn")
    real = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert real <= size.of(choice) <= 1.005 * real


def test_average_bits_by_hand(sources):
    """A block of the tiny Llama has 64 x 128, 64 x 64, 64 x 192 and 96 x 64 weights."""
    choices, target = opened(
        sources("llama"), (LayerSpec(Scheme(2, 32)), LayerSpec(Scheme(8, PER_ROW, False))), pins=["1.*=dense"]
    )
    bits = currencies(choices, target, avg_bits=4.0)["avg_bits"]
    first = [64 * 128, 64 * 64, 64 * 192, 96 * 64]
    weights = 2 * sum(first)
    assert bits.limit == 4 * weights
    grouped = sum(first) * (2 + 16 / 32)
    dense = 16 * sum(first)
    assert bits.of([0] * 8) == grouped + dense
    rows = [128, 64, 192, 64]  # of outputs, each with a scale of 16 and a zero point of 8 bits
    assert bits.of([1] * 4 + [0] * 4) == sum(first) * 8 + sum(rows) * (16 + 8) + dense
    assert bits.shown(bits.of([0] * 8)) == "9.25"


def test_zeros_are_counted_as_the_pattern_makes_them(sources):
    options = (LayerSpec(), LayerSpec(None, Sparsity(0.3)), LayerSpec(None, Sparsity.of("2:4", None)))
    choices, target = opened(sources("llama"), options, "dense")
    found = currencies(choices, target, avg_sparsity=0.4)
    weights = 2 * 64 * (128 + 64 + 192 + 96)
    assert found["avg_sparsity"].limit == int(0.6 * weights)
    assert found["avg_sparsity"].of([0] * 8) == weights
    assert found["avg_sparsity"].of([2] * 8) == weights // 2
    layers = choices.units[0].layers
    assert found["avg_sparsity"].table[0][1] == sum(one.N * one.K - round(0.3 * one.N * one.K) for one in layers)
    assert found["avg_sparsity"].shown(weights // 4) == "0.75"


def table(choices: Space, seconds: float = 1e-6) -> LatencyTable:
    """Every layer takes a time per weight and bit, the dense one 16 of these."""
    shapes = {(layer.N, layer.K) for unit in choices.units for layer in unit.layers}
    schemes = [None, *(option.scheme for option in choices.options[0])]
    timings = [
        Timing(1, N, K, s.fit(K) if s else None, seconds * N * K * (s.bits if s else 16), 0.0) for N, K in shapes for s in schemes
    ]
    return LatencyTable(Machine.here(CPU), "bfloat16", "2026-11-21", {"torch": "2"}, tuple(timings))


def test_latency_is_a_part_of_the_dense_layers_time(sources):
    choices, target = opened(sources("llama"), OPTIONS)
    found = currencies(choices, target, table(choices), latency=0.25)["latency"]
    assert found.of([2] * 8) == pytest.approx(found.limit, abs=len(choices.units))
    assert found.of([3] * 8) == pytest.approx(2 * found.limit, abs=len(choices.units))
    assert found.shown(found.of([0] * 8)) == "0.125x"


def test_a_latency_needs_times_of_this_machine(sources, tmp_path, monkeypatch):
    choices, target = opened(sources("llama"), OPTIONS)
    with pytest.raises(CompressError, match="--latency needs times of this machine"):
        currencies(choices, target, latency=0.5)
    table(choices).save(tmp_path / "times.json")
    given = dict(latency="0.7x", latency_table=tmp_path / "times.json", on="cpu")
    assert request(tmp_path, **given).times == table(choices)
    monkeypatch.setattr(latency.launch, "processor", lambda: "another one")
    with pytest.raises(CompressError, match=r"was measured on .*, and this is another one"):
        request(tmp_path, **given)
    with pytest.raises(CompressError, match="has no time for 1 rows, 64 x 64 weights, int2 g32"):
        currencies(choices, target, LatencyTable(Machine.here(CPU), "", "", {}, (Timing(1, 1, 1, None, 1.0, 0.0),)), latency=0.5)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (dict(avg_bits=2.0), "--avg-bits 2 is out of reach: plans range from 2.5 to 8.5 with these options."),
        (dict(avg_bits=9.0), "--avg-bits 9 limits nothing: plans range from 2.5 to 8.5 with these options."),
        (dict(size=1000), "--size 0.001 MB is out of reach: plans range from 0.0"),
        (dict(size=10**9), "--size 1 GB limits nothing: plans range from 0.0"),
        (dict(latency=0.1), "--latency 0.1x is out of reach: plans range from 0.125x to 0.5x"),
        (dict(avg_sparsity=0.5), "--avg-sparsity 0.5 is out of reach: plans range from 0 to 0"),
    ],
)
def test_both_bounds_are_said(sources, limits, said):
    choices, target = opened(sources("llama"), OPTIONS)
    cost = currencies(choices, target, table(choices), **limits)[next(iter(limits))]
    with pytest.raises(CompressError) as error:
        cost.check((), None)
    assert str(error.value).startswith(said)


def test_the_bounds_are_within_reach(sources):
    choices, target = opened(sources("llama"), OPTIONS)
    for bits in (2.5, 8.5):
        currencies(choices, target, avg_bits=bits)["avg_bits"].check((), None)
    smallest = currencies(choices, target, size=1)["size"].of([0] * 8)
    currencies(choices, target, size=smallest)["size"].check((), None)
    with pytest.raises(CompressError, match="out of reach"):
        currencies(choices, target, size=smallest - 1)["size"].check((), None)


def test_pins_that_make_it_infeasible_are_named(sources):
    pins = ["mlp=8", "0.*o_proj=dense"]
    choices, target = opened(sources("llama"), OPTIONS, pins=pins)
    free, _ = opened(sources("llama"), OPTIONS)
    cost, unpinned = (currencies(one, target, avg_bits=3.0)["avg_bits"] for one in (choices, free))
    with pytest.raises(
        CompressError, match=r"--avg-bits 3 cannot be kept with --pin 'mlp=8', --pin '0\.\*o_proj=dense': plans range"
    ):
        cost.check(pins, unpinned)
    cost, unpinned = (currencies(one, target, avg_bits=2.0)["avg_bits"] for one in (choices, free))
    with pytest.raises(CompressError, match="out of reach"):  # with or without them
        cost.check(pins, unpinned)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2.1GB", 2_100_000_000),
        ("700 MB", 700_000_000),
        ("1KiB", 1024),
        (" 12345 ", 12345),
        ("12 B", 12),
        ("1.5mib", 1_572_864),
        (".5kB", 500),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "2.1.1GB", "-1GB", "2 TBs", "1e9", "nan", ".", "2GB 3MB"])
def test_no_sizes(text):
    with pytest.raises(CompressError, match=r"is no size; write 2\.1GB"):
        parse_size(text)


@pytest.mark.parametrize("text", ["2.1", "700", "20000.5", "1", "9999"])
def test_a_size_without_a_unit_says_what_was_probably_meant(text):
    with pytest.raises(CompressError, match=f"'{text}' has no unit and would be bytes. Did you mean {text}GB or {text}MB"):
        parse_size(text)


def test_a_sparsity_of_percents_says_what_was_probably_meant():
    with pytest.raises(
        CompressError, match=r"--avg-sparsity is 50; it is a fraction of the weights, below 1\. Did you mean 0\.5\?"
    ):
        Budget(avg_sparsity=50.0)
    with pytest.raises(CompressError, match=r"below 1\.$"):
        Budget(avg_sparsity=1.0)


@pytest.mark.parametrize(("text", "value"), [("0.7x", 0.7), ("70%", 0.7), ("0.7", 0.7), ("1 %", 0.01), (".5x", 0.5)])
def test_fractions(text, value):
    assert parse_fraction(text, "latency") == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "x", "-1%", "0.7xx", "1.2.3", "half", "nan"])
def test_no_fractions(text):
    with pytest.raises(CompressError, match=r"--max-ppl-increase .* is no fraction"):
        parse_fraction(text, "max_ppl_increase")


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({}, "There is no budget"),
        (dict(avg_bits=0.0), "--avg-bits is 0; it must be a number above 0"),
        (dict(avg_bits=-1.0), "--avg-bits is -1"),
        (dict(avg_bits=float("inf")), "--avg-bits is inf"),
        (dict(max_kl=float("nan")), "--max-kl is nan"),
        (dict(size=0), "--size is 0"),
        (dict(max_kl=0.1, max_ppl_increase=0.01), "both targets of quality"),
    ],
)
def test_no_budgets(limits, said):
    with pytest.raises(CompressError, match=said):
        Budget(**limits)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(bits="2,five"), "--bits '2,five' is not a list of whole numbers"),
        (dict(bits="2,5"), "bits is 5; choose one of 2, 3, 4, 8"),
        (dict(bits="4"), "There is nothing to choose from but int4 g128"),
        (dict(bits=4), "nothing to choose from"),
        (dict(group_size="128,x"), "--group-size '128,x' is not a list"),
        (dict(group_size="0"), "group size is 0"),
        (dict(sparsity="half"), "--sparsity 'half' is not a fraction such as 0.5, or a pattern such as 2:4"),
        (dict(sparsity="0"), "nothing to choose from but dense"),
        (dict(sparsity="1.5,0"), "sparsity is 1.5"),
        (dict(sparsity="0,0.5 row"), "pattern row makes layers smaller and cannot be searched"),
        (dict(refine=-1), "--refine is -1"),
        (dict(refine=3, avg_bits=None, max_kl=0.1), "--refine lowers the loss within a limit of size"),
    ],
)
def test_requests_that_make_no_sense(tmp_path, arguments, said):
    with pytest.raises(CompressError, match=said):
        request(tmp_path, **{"avg_bits": 3.0, **arguments})


def test_what_users_write_becomes_options(tmp_path):
    def options(**given):
        return [str(option) for option in request(tmp_path, avg_bits=3.0, **given).options]

    assert options() == ["int2 g128", "int3 g128", "int4 g128", "int8 g128"]
    assert options(bits="4,8", group_size="64,-1") == ["int4 g64", "int4 row", "int8 g64", "int8 row"]
    assert options(bits=[2, 3], group_size=32, symmetric=False) == ["int2 g32 asym", "int3 g32 asym"]
    assert options(sparsity="0, 0.5, 2:4, 0.25 block:1x4") == ["dense", "0.5 unstructured", "0.5 2:4", "0.25 block:1x4"]
    assert options(sparsity=[0.0, 0.5], bits=4) == ["int4 g128", "int4 g128, 0.5 unstructured"]


def test_bytes_in_words():
    assert [megabytes(amount) for amount in (1234, 2_100_000, 3 * 10**9)] == ["0.001234 MB", "2.1 MB", "3 GB"]
