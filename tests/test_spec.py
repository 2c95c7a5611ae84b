from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress.errors import CompressError
from compress.spec import BITS, PER_ROW, LayerSpec, Plan, Scheme, Sparsity

LAYERS = {"a.q_proj": 256, "a.down_proj": 320}
SHAPES = {name: (96, K) for name, K in LAYERS.items()}


@pytest.mark.parametrize("bits", [0, 1, 5, 6, 7, 9, 16, -4])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(CompressError, match=rf"bits is {bits}; choose one of 2, 3, 4, 8"):
        Scheme(bits)


@pytest.mark.parametrize("group_size", [0, -2, -128])
def test_group_size_out_of_range(group_size: int) -> None:
    with pytest.raises(CompressError, match=rf"group size is {group_size}"):
        Scheme(4, group_size)


@pytest.mark.parametrize("bits", BITS)
def test_levels(bits: int) -> None:
    assert Scheme(bits).levels == 2**bits


@pytest.mark.parametrize(
    ("group_size", "K", "fitted"),
    [
        (128, 256, 128),
        (128, 320, 64),  # not 80, which runtimes have no kernels for
        (128, 64, 64),  # K itself
        (128, 96, 32),
        (128, 576, 64),
        (32, 48, 16),
        (96, 96, 96),  # asked for and dividing: kept
        (96, 160, 32),
        (128, 127, PER_ROW),
        (128, 40, PER_ROW),  # only 8 would divide it
        (128, 2 * 131, PER_ROW),  # only 2 would divide it
        (16, 8, PER_ROW),
        (PER_ROW, 127, PER_ROW),
        (1, 4, 1),  # asked for and dividing: kept
    ],
)
def test_fit_gives_the_largest_usual_group_that_divides(group_size: int, K: int, fitted: int) -> None:
    scheme = Scheme(3, group_size, symmetric=False).fit(K)
    assert scheme == Scheme(3, fitted, symmetric=False)
    assert K % scheme.group(K) == 0
    assert scheme.groups(K) * scheme.group(K) == K


def test_scheme_in_words() -> None:
    assert [str(Scheme()), str(Scheme(2, PER_ROW, False))] == ["int4 g128", "int2 row asym"]


def test_uniform_fits_each_layer() -> None:
    plan = Plan.uniform(LAYERS, Scheme(4, 128))
    assert plan.layers == {"a.q_proj": LayerSpec(Scheme(4, 128)), "a.down_proj": LayerSpec(Scheme(4, 64))}
    plan.check(SHAPES)


def test_check_names_unknown_layers() -> None:
    plan = Plan.uniform({**LAYERS, **{f"z{i}": 64 for i in range(5)}}, Scheme())
    with pytest.raises(CompressError, match=r"names z0, z1, z2 and 2 more, which the model does not have"):
        plan.check(SHAPES)


def test_check_names_missing_layers() -> None:
    with pytest.raises(CompressError, match=r"misses a\.down_proj\. Give each a scheme, a sparsity, or null"):
        Plan({"a.q_proj": LayerSpec(None)}).check(SHAPES)


def test_check_says_which_group_size_would_divide() -> None:
    plan = Plan({"a.q_proj": LayerSpec(None), "a.down_proj": LayerSpec(Scheme(4, 128))})
    with pytest.raises(CompressError, match=r"a\.down_proj group size 128, which does not divide its 320 inputs; 64 would"):
        plan.check(SHAPES)


def test_json_round_trip(tmp_path: Path) -> None:
    plan = Plan({"a": LayerSpec(Scheme(2, PER_ROW, False)), "b": LayerSpec(None), "c": LayerSpec(Scheme(8, 32))})
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert Plan.load(tmp_path / "plan.json") == plan
    assert json.loads(plan.to_json())["layers"]["c"] == {"scheme": {"bits": 8, "group_size": 32, "symmetric": True}}


def test_a_scheme_in_a_file_may_leave_out_defaults() -> None:
    plan = Plan.from_json('{"version": 1, "layers": {"a": {"scheme": {"bits": 3}}, "b": {}}}')
    assert plan.layers == {"a": LayerSpec(Scheme(3)), "b": LayerSpec(None)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"p\.json is not JSON"),
        ("[]", r"p\.json is not a plan: expected"),
        ('{"layers": {}}', "is not a plan"),
        ('{"version": 2, "layers": {}}', "is not a plan"),
        ('{"version": 1, "layers": []}', "is not a plan"),
        ('{"version": 1, "layers": {"a": 4}}', r"layer a should be \{\"scheme\""),
        ('{"version": 1, "layers": {"a": {"bits": 4}}}', "layer a should be"),
        (
            '{"version": 1, "layers": {"a": {"scheme": {"bitz": 4}}}}',
            "its keys are bits and group_size, integers, symmetric, true or false, and grid",
        ),
        ('{"version": 1, "layers": {"a": {"scheme": 4}}}', "layer a has scheme 4"),
        ('{"version": 1, "layers": {"a": {"scheme": {"bits": 5}}}}', r"p\.json: layer a: bits is 5"),
        ('{"version": 1, "layers": {"a": {"scheme": {"bits": 4, "group_size": 0}}}}', "layer a: group size is 0"),
        ('{"version": 1, "layers": {"a": {"scheme": {"bits": "4"}}}}', "bits and group_size, integers"),
        ('{"version": 1, "layers": {"a": {"scheme": {"bits": true}}}}', "bits and group_size, integers"),
        ('{"version": 1, "layers": {"a": {"scheme": {"symmetric": "no"}}}}', "symmetric, true or false"),
    ],
)
def test_bad_plans(text: str, message: str) -> None:
    with pytest.raises(CompressError, match=message):
        Plan.from_json(text, "p.json")


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_unreadable_plan_file(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "p.json").write_bytes(content)
    with pytest.raises(CompressError, match=r"Cannot read the plan .*p\.json"):
        Plan.load(tmp_path / "p.json")


@pytest.mark.parametrize(
    ("sparsity", "units", "pruned", "zeros"),
    [
        (Sparsity(0.3), 6 * 20, 36, 36),
        (Sparsity(0.5, "2:4"), 120, 60, 60),
        (Sparsity(0.25, "block:2x5"), 12, 3, 30),
        (Sparsity(0.0), 120, 0, 0),
    ],
)
def test_how_many_units_and_zeros(sparsity: Sparsity, units: int, pruned: int, zeros: int) -> None:
    assert (sparsity.units(6, 20), sparsity.pruned(6, 20), sparsity.zeros(6, 20)) == (units, pruned, zeros)
    assert sparsity.misfit(6, 20) is None


def test_an_nm_pattern_brings_its_fraction() -> None:
    assert Sparsity.of("1:4", None) == Sparsity(0.75, "1:4")
    assert Sparsity.of("unstructured", None) == Sparsity(0.5)
    assert Sparsity.of("unstructured", 0.9) == Sparsity(0.9)


def test_specs_in_words() -> None:
    assert str(LayerSpec(Scheme(), Sparsity.of("2:4", None))) == "int4 g128, 0.5 2:4"
    assert str(LayerSpec()) == "dense"


def test_a_sparse_plan_survives_json() -> None:
    plan = Plan({"a": LayerSpec(Scheme(), Sparsity(0.37)), "b": LayerSpec(None, Sparsity(0.5, "block:1x4")), "c": LayerSpec()})
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.changed == ["a", "b"]


@pytest.mark.parametrize("entry", ['{"fraction": "half"}', '{"fraction": true}', '{"pattern": "2:4"}', "4"])
def test_a_sparsity_that_is_none(entry: str) -> None:
    with pytest.raises(CompressError, match=r"its keys are fraction, a number, and pattern, a string"):
        Plan.from_json(f'{{"version": 1, "layers": {{"a": {{"scheme": null, "sparsity": {entry}}}}}}}')
