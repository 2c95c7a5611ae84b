"""Which layers take one option together, what pins allow them, and group sizes fitted to every layer."""

from __future__ import annotations

import pytest

from compress import experts, models
from compress.errors import CompressError
from compress.mixed.units import Space, fitted, space
from compress.models import Anatomy, Layer
from compress.spec import PER_ROW, LayerSpec, Scheme, Sparsity
from tests import tiny

OPTIONS = tuple(LayerSpec(Scheme(bits, 32)) for bits in (2, 3, 4, 8))
HALF = Sparsity(0.5)


def anatomy_of(family: str) -> Anatomy:
    model = tiny.build(family)
    experts.split(model, every=True)
    return models.anatomy(model)


@pytest.fixture(scope="module")
def llama() -> Anatomy:
    return anatomy_of("llama")


def members(found: Space) -> dict[str, set[str]]:
    return {unit.name: {layer.name.rpartition(".")[2] for layer in unit.layers} for unit in found.units}


def test_fused_projections_are_one_unit(llama):
    found = space(llama, OPTIONS)
    assert members(found) == {
        f"model.layers.{i}.{name}": parts
        for i in (0, 1)
        for name, parts in {
            "self_attn.qkv_proj": {"q_proj", "k_proj", "v_proj"},
            "self_attn.o_proj": {"o_proj"},
            "mlp.gate_up_proj": {"gate_proj", "up_proj"},
            "mlp.down_proj": {"down_proj"},
        }.items()
    }
    assert [unit.block for unit in found.units] == [0] * 4 + [1] * 4
    assert [unit.weights for unit in found.units[:4]] == [64 * (64 + 32 + 32), 64 * 64, 2 * 96 * 64, 96 * 64]


def test_encoders_tie_query_key_and_value():
    found = members(space(anatomy_of("bert"), OPTIONS))
    assert found["bert.encoder.layer.0.attention.self.qkv_proj"] == {"query", "key", "value"}
    assert found["bert.encoder.layer.0.intermediate.dense"] == {"dense"}


@pytest.mark.parametrize(("family", "count"), [("mixtral", 4), ("qwen3_moe", 6)])
def test_all_experts_of_a_layer_are_one_unit(family, count):
    found = {unit.name: unit for unit in space(anatomy_of(family), OPTIONS).units if "expert" in unit.name}
    assert len(found) == 2
    for unit in found.values():
        assert len(unit.layers) == 3 * count
        assert unit.name.endswith(".experts")
        assert len({layer.name.rpartition(".experts.")[0] for layer in unit.layers}) == 1
        assert len({layer.K for layer in unit.layers}) == 2  # and yet the group size is each layer's own


def test_convolutions_are_units_of_their_own():
    anatomy = anatomy_of("resnet")
    assert [unit.name for unit in space(anatomy, OPTIONS).units] == [layer.name for layer in anatomy.layers]


@pytest.mark.parametrize("family", ["llama", "mixtral", "bert", "gpt2", "phi3", "mobilenet"])
def test_every_layer_is_in_exactly_one_unit(family):
    anatomy = anatomy_of(family)
    found = [layer.name for unit in space(anatomy, OPTIONS).units for layer in unit.layers]
    assert sorted(found) == sorted(anatomy.in_features)


def test_group_sizes_are_fitted_layer_by_layer(llama):
    found = space(llama, (LayerSpec(Scheme(4, 64)), LayerSpec(Scheme(4, 128), HALF)))
    specs = found.specs([0] * 8)
    assert specs["model.layers.0.mlp.up_proj"] == LayerSpec(Scheme(4, 64))
    assert specs["model.layers.0.mlp.down_proj"] == LayerSpec(Scheme(4, 32))  # of 96 inputs
    assert found.specs([1] * 8)["model.layers.0.mlp.down_proj"] == LayerSpec(Scheme(4, 32), HALF)
    assert found.with_options({3: LayerSpec(Scheme(2, 64))}) == {"model.layers.0.mlp.down_proj": LayerSpec(Scheme(2, 32))}
    assert fitted(Layer("odd", "linear", 8, 34), LayerSpec(Scheme(4, 32))).scheme == Scheme(4, PER_ROW)
    assert fitted(Layer("prime", "linear", 8, 37), LayerSpec(Scheme(4, 32))).scheme == Scheme(4, PER_ROW)


def test_options_that_fit_alike_are_solved_once(llama):
    wanted = space(llama, (LayerSpec(Scheme(4, 64)), LayerSpec(Scheme(4, 128)))).wanted
    assert wanted["model.layers.0.mlp.up_proj"] == (LayerSpec(Scheme(4, 64)),)
    assert wanted["model.layers.0.mlp.down_proj"] == (LayerSpec(Scheme(4, 32)),)


def options_of(found: Space, unit: str) -> tuple[LayerSpec, ...]:
    return next(options for one, options in zip(found.units, found.options, strict=True) if one.name.endswith(unit))


@pytest.mark.parametrize(
    ("pin", "expected"),
    [
        ("0.mlp.down_proj=8", (LayerSpec(Scheme(8, 32)),)),
        ("0.mlp.down_proj=dense", (LayerSpec(),)),
        (r"layers\.0\.mlp\.(up|down)_proj=2", (LayerSpec(Scheme(2, 32)),)),
        ("(?=.*down)=4", (LayerSpec(Scheme(4, 32)),)),  # an expression may have equals signs itself
    ],
)
def test_pins_fix_what_they_match(llama, pin, expected):
    found = space(llama, OPTIONS, [pin])
    assert options_of(found, "0.mlp.down_proj") == expected
    assert options_of(found, "1.self_attn.o_proj") == OPTIONS


def test_a_pin_of_a_part_pins_the_unit(llama):
    found = space(llama, OPTIONS, [r"layers.1.*k_proj=8"])
    assert options_of(found, "1.self_attn.qkv_proj") == (LayerSpec(Scheme(8, 32)),)
    assert options_of(found, "0.self_attn.qkv_proj") == OPTIONS


def test_pinned_bits_may_be_no_option_and_leave_the_rest_open(llama):
    options = tuple(LayerSpec(Scheme(bits, group, False)) for bits in (2, 4) for group in (32, 16))
    assert options_of(space(llama, options, ["down=8"]), "0.mlp.down_proj") == (LayerSpec(Scheme(8, 32, False)),)
    assert options_of(space(llama, options, ["down=4"]), "0.mlp.down_proj") == options[2:]
    both = (LayerSpec(Scheme(4, 32)), LayerSpec(Scheme(4, 32), HALF), LayerSpec(Scheme(8, 32)))
    assert options_of(space(llama, both, ["down=4"]), "0.mlp.down_proj") == both[:2]
    zeros = (LayerSpec(), LayerSpec(None, HALF))
    assert options_of(space(llama, zeros, ["down=8"]), "0.mlp.down_proj") == (LayerSpec(Scheme(8, 128)),)


@pytest.mark.parametrize(
    ("pins", "said"),
    [
        (["down_proj"], "--pin 'down_proj' is not REGEX=BITS with BITS one of 2, 3, 4, 8 or dense"),
        (["down_proj=5"], "--pin 'down_proj=5' is not REGEX=BITS"),
        (["down_proj=int4"], "is not REGEX=BITS"),
        (["=8"], "is not REGEX=BITS"),
        (["(=8"], "--pin '(' is not a regular expression"),
        (["lm_head=8"], "--pin 'lm_head=8' matches no layer that can be compressed"),
        (["down=8", "layers.0=4"], "--pin 'down=8' and --pin 'layers.0=4' both name model.layers.0.mlp.down_proj"),
        (["q_proj=8", "v_proj=4"], "both name model.layers.0.self_attn.qkv_proj, and ask for different things"),
        (["down=8", "down=dense"], "ask for different things"),
    ],
)
def test_bad_pins_are_named(llama, pins, said):
    with pytest.raises(CompressError) as error:
        space(llama, OPTIONS, pins)
    assert said in str(error.value)


def test_pins_that_agree_do_not_contradict(llama):
    found = space(llama, OPTIONS, ["q_proj=8", "v_proj=8", "layers.0=8"])
    assert options_of(found, "1.self_attn.qkv_proj") == (LayerSpec(Scheme(8, 32)),)
