import pytest
import torch
from torch import Tensor

from compress.errors import CompressError
from compress.formats import FORMATS, PACKED, dense, packed_format
from compress.kernels import minifloat, packing
from compress.models import Layer
from compress.qtensor import QTensor, dequantize
from compress.solvers.grid import Storage
from compress.spec import BITS, FIXED, PER_ROW, LayerSpec, Plan, Scheme

SHAPES = [(32, (7, 96)), (128, (33, 256)), (PER_ROW, (5, 37)), (PER_ROW, (1, 1))]
FLOATS = [Scheme.of(grid) for grid, fixed in FIXED.items() if fixed.form != "int"]
SCHEMES = [
    pytest.param(Scheme(bits, group, symmetric), shape, id=f"{Scheme(bits, group, symmetric)} {shape}")
    for bits in BITS
    for symmetric in (True, False)
    for group, shape in SHAPES
]
FLOAT_SCHEMES = [
    pytest.param(scheme, shape, id=f"{scheme} {shape}") for scheme in FLOATS for shape in ((7, 96), (33, 256), (1, 32))
]


def random_qtensor(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype = torch.float16) -> QTensor:
    N, K = shape
    draw = torch.Generator().manual_seed(N * K)
    G = scheme.groups(K)
    scales = torch.randn(N, G, generator=draw).to(dtype)
    if scheme.form != "int":
        return random_floats(scheme, scales, torch.randn(N, K, generator=draw))
    zeros = torch.randint(0, scheme.levels, (N, G), generator=draw, dtype=torch.uint8)
    codes = torch.randint(0, scheme.levels, (N, K), generator=draw, dtype=torch.uint8)
    return QTensor(codes, scales, torch.full_like(zeros, scheme.levels // 2) if scheme.symmetric else zeros, scheme)


def random_floats(scheme: Scheme, scales: Tensor, weights: Tensor) -> QTensor:
    largest = minifloat.FORMS[scheme.form].largest
    codes = minifloat.codes_of(minifloat.rounded(weights * (largest / 3), scheme.form), scheme.form)
    storage = Storage.of(scheme, weights, scales.dtype)
    stored = storage.of_rounded(storage.rounded(scales.float()))
    zeros = torch.zeros_like(scales, dtype=torch.uint8)
    return QTensor(codes, stored, zeros, scheme, global_scale=storage.global_scale)


def copies(q: QTensor) -> list[Tensor]:
    return [q.codes.clone(), q.scales.clone(), q.zeros.clone()]


HELD = [*((name, *scheme.values) for name in PACKED for scheme in SCHEMES)]
HELD += [("compressed-tensors", *scheme.values) for scheme in FLOAT_SCHEMES]


@pytest.mark.parametrize(("name", "scheme", "shape"), HELD, ids=str)
def test_decode_inverts_encode_bit_for_bit(name: str, scheme: Scheme, shape: tuple[int, int]) -> None:
    q = random_qtensor(scheme, shape)
    before = copies(q)
    tensors = PACKED[name].encode(q)
    again = PACKED[name].decode(tensors, scheme, shape)
    assert (again.scheme, again.g_idx, again.global_scale) == (scheme, None, q.global_scale)
    for ours, theirs in zip(before, copies(again), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(before, copies(q), strict=True))


@pytest.mark.parametrize(("name", "scheme", "shape"), HELD, ids=str)
def test_decode_works_where_the_tensors_are(name: str, scheme: Scheme, shape: tuple[int, int]) -> None:
    """What is made without a device has no data here, and cannot meet what has."""
    q = random_qtensor(scheme, shape)
    tensors = PACKED[name].encode(q)
    with torch.device("meta"):
        again = PACKED[name].decode(tensors, scheme, shape)
    assert {tensor.device.type for tensor in copies(again)} == {"cpu"}
    assert torch.equal(again.codes, q.codes)


@pytest.mark.parametrize(("name", "scheme", "shape"), [*HELD, *(("dense", *scheme.values) for scheme in SCHEMES)], ids=str)
def test_layout_is_what_encode_yields(name: str, scheme: Scheme, shape: tuple[int, int]) -> None:
    tensors = FORMATS[name].encode(random_qtensor(scheme, shape))
    found = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    assert found == FORMATS[name].layout(scheme, shape, torch.float16)
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@pytest.mark.parametrize("name", FORMATS)
def test_encode_shares_no_memory_with_the_input(name: str) -> None:
    q = random_qtensor(Scheme(8, 32), (4, 64))
    inputs = {tensor.untyped_storage().data_ptr() for tensor in (q.codes, q.scales, q.zeros)}
    assert inputs.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in FORMATS[name].encode(q).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressed_tensors_keeps_the_scales_dtype(dtype: torch.dtype) -> None:
    form = PACKED["compressed-tensors"]
    q = random_qtensor(Scheme(4, 32), (4, 64), form.scale_dtype(dtype))
    assert form.decode(form.encode(q), q.scheme, q.shape).scales.dtype == dtype


def test_dense_is_the_dequantized_weight() -> None:
    q = random_qtensor(Scheme(4, 32), (4, 64))
    assert torch.equal(dense.encode(q)["weight"], dequantize(q, torch.float16))
    assert dense.scale_dtype(torch.bfloat16) == torch.bfloat16


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(CompressError, match="awq"):
        packed_format({"quant_method": "awq"})


# Words worked out by hand from codes (5k + 3n + n k^2) mod 2^bits and zeros 2^(bits-1) + n + 1, for N = 2, K = 11.
GOLDEN = {  # bits: (rows of packed codes, zero points packed along N, GPTQ's zero points of a symmetric layer)
    2: ([[0x0024E4E4], [0x0017D7D7]], 0x00000003, 0x00000005),
    3: ([[0xA878CEA8, 0x00000000], [0x4BF6F64B, 0x00000000]], 0x00000035, 0x0000001B),
    4: ([[0x3E94FA50, 0x000002D8], [0x7557B193, 0x0000091B]], 0x000000A9, 0x00000077),
    8: ([[0x0F0A0500, 0x231E1914, 0x00322D28], [0x1B110903, 0x57453527, 0x0099816B]], 0x00008281, 0x00007F7F),
}


def golden_qtensor(bits: int, symmetric: bool) -> QTensor:
    n, k = torch.arange(2)[:, None], torch.arange(11)[None]
    levels = 2**bits
    zeros = torch.full((2, 1), levels // 2) if symmetric else (levels // 2 + n + 1) % levels
    codes = (5 * k + 3 * n + n * k * k) % levels
    scales = torch.tensor([[0.5], [-0.25]], dtype=torch.float16)
    return QTensor(codes.to(torch.uint8), scales, zeros.to(torch.uint8), Scheme(bits, PER_ROW, symmetric))


def unsigned(words: Tensor) -> list[list[int]]:
    return [[word & 0xFFFFFFFF for word in row] for row in words.tolist()]


@pytest.mark.parametrize("bits", BITS)
def test_golden_words_of_compressed_tensors(bits: int) -> None:
    rows, zeros, _ = GOLDEN[bits]
    tensors = PACKED["compressed-tensors"].encode(golden_qtensor(bits, symmetric=False))
    assert unsigned(tensors["weight_packed"]) == rows
    assert unsigned(tensors["weight_zero_point"]) == [[zeros]]
    assert tensors["weight_scale"].tolist() == [[0.5], [-0.25]]
    assert tensors["weight_shape"].tolist() == [2, 11]
    assert "weight_zero_point" not in PACKED["compressed-tensors"].encode(golden_qtensor(bits, symmetric=True))


@pytest.mark.parametrize("bits", BITS)
def test_golden_words_of_gptq(bits: int) -> None:
    rows, v2, v1 = GOLDEN[bits]
    tensors = PACKED["gptq"].encode(golden_qtensor(bits, symmetric=False))
    assert unsigned(tensors["qweight"].T) == rows
    assert unsigned(tensors["qzeros"]) == [[v2]]
    assert tensors["scales"].tolist() == [[0.5, -0.25]]
    assert tensors["g_idx"].tolist() == [0] * 11
    assert unsigned(PACKED["gptq"].encode(golden_qtensor(bits, symmetric=True))["qzeros"]) == [[v1]]


@pytest.mark.parametrize("bits", BITS)
def test_gptq_words_are_those_of_compressed_tensors_transposed(bits: int) -> None:
    q = random_qtensor(Scheme(bits, 32), (7, 96))
    packed = PACKED["compressed-tensors"].encode(q)["weight_packed"]
    assert torch.equal(PACKED["gptq"].encode(q)["qweight"], packed.T)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, PER_ROW])
@pytest.mark.parametrize("bits", BITS)
def test_compressed_tensors_itself_reads_our_codes_and_weights(bits: int, group: int, symmetric: bool) -> None:
    reader = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.quantization import QuantizationScheme

    form, shape = PACKED["compressed-tensors"], (6, 64)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        q = random_qtensor(Scheme(bits, group, symmetric), shape, dtype)
        tensors = form.encode(q)
        signed = unpack_from_int32(tensors["weight_packed"], bits, torch.Size(shape))
        assert torch.equal(signed.int() + 2 ** (bits - 1), q.codes.int())
        strategy = {"strategy": "channel"} if group == PER_ROW else {"strategy": "group", "group_size": group}
        scheme = QuantizationScheme(targets=["Linear"], weights={"num_bits": bits, "symmetric": symmetric, **strategy})
        theirs = reader.PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
        assert torch.equal(theirs, dequantize(q, dtype))


@pytest.mark.parametrize("scheme", FLOATS, ids=str)
def test_compressed_tensors_itself_reads_our_numbers(scheme: Scheme) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    form = PACKED["compressed-tensors"]
    layer = Layer("model.layers.0.up_proj", "linear", 6, 96)
    (group,) = form.config(Plan({layer.name: LayerSpec(scheme)}), [layer], [])["config_groups"].values()
    written = QuantizationScheme(**group)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        q = random_qtensor(scheme, (6, 96), dtype)
        theirs = BaseCompressor.get_value_from_registry(written.format).decompress(form.encode(q), written)["weight"]
        assert torch.equal(theirs.to(dtype), dequantize(q, dtype))


@pytest.mark.parametrize("grid", ["fp8", "mxfp4", "nvfp4"])
def test_what_compressed_tensors_writes_is_read_exactly(grid: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    form, scheme, shape = PACKED["compressed-tensors"], Scheme.of(grid), (6, 96)
    layer = Layer("model.layers.0.up_proj", "linear", *shape)
    config = form.config(Plan({layer.name: LayerSpec(scheme)}), [layer], [])
    written = QuantizationScheme(**config["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(written.format)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale = weight.view(6, scheme.groups(96), -1).abs().amax(-1) / minifloat.FORMS[scheme.form].largest
    if grid == "mxfp4":
        scale = torch.exp2(scale.float().log2().ceil()).bfloat16()
    state = {"weight": weight, "weight_scale": scale}
    if grid == "nvfp4":  # theirs is no power of two
        state["weight_global_scale"] = (448 * 6 / weight.abs().max().float()).view(1)
        state["weight_scale"] = (scale * state["weight_global_scale"]).to(torch.float8_e4m3fn).bfloat16()
    tensors = compressor.compress(state, written)
    q = form.decode(tensors, scheme, shape)
    assert torch.equal(dequantize(q, torch.bfloat16), compressor.decompress(tensors, written)["weight"])
    assert (dequantize(q) - weight.float()).norm() < 0.2 * weight.float().norm()
    again = form.encode(q)
    assert all(torch.equal(again[key].view(torch.uint8), tensor.view(torch.uint8)) for key, tensor in tensors.items())


@pytest.mark.parametrize("scheme", FLOATS, ids=str)
def test_gptq_refuses_what_is_not_whole_numbers(scheme: Scheme) -> None:
    layer = Layer("model.layers.0.up_proj", "linear", 6, 96)
    with pytest.raises(CompressError, match=f"The gptq format cannot hold grid {scheme.grid}; use --format compressed-tensors"):
        PACKED["gptq"].config(Plan({layer.name: LayerSpec(scheme)}), [layer], [])


@pytest.mark.parametrize("name", PACKED)
def test_decode_says_which_tensor_does_not_fit(name: str) -> None:
    q = random_qtensor(Scheme(4, 32), (8, 64))
    tensors = PACKED[name].encode(q)
    packed = next(iter(tensors))
    with pytest.raises(CompressError, match=rf"{packed} of an int4 g32 layer \[8, 64\] should be .* but is"):
        PACKED[name].decode({**tensors, packed: tensors[packed][:-1]}, q.scheme, q.shape)
    del tensors[packed]
    with pytest.raises(CompressError, match=f"{packed} .* absent"):
        PACKED[name].decode(tensors, q.scheme, q.shape)


def test_old_three_bit_words_are_refused() -> None:
    q = random_qtensor(Scheme(3, 32), (8, 64))
    tensors = PACKED["compressed-tensors"].encode(q)
    tensors["weight_packed"] = torch.zeros(8, 7, dtype=torch.int32)  # ten codes to a word
    with pytest.raises(CompressError, match=r"before compressed-tensors 0\.18|Before compressed-tensors 0\.18"):
        PACKED["compressed-tensors"].decode(tensors, q.scheme, q.shape)


def test_packed_words_hold_no_stray_bits() -> None:
    q = random_qtensor(Scheme(3, PER_ROW), (4, 11))
    words = PACKED["compressed-tensors"].encode(q)["weight_packed"]
    assert torch.equal(packing.unpack(words, 3, 21)[:, 11:], torch.zeros(4, 10, dtype=torch.uint8))
