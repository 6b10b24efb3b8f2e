"""The codec, against compressed-tensors bit for bit, and against the definition of the formats, written out number by number."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch.utils._python_dispatch import TorchDispatchMode

from hf_elastic import CheckpointError, ElasticConfigError
from hf_elastic.quantization import codec
from hf_elastic.quantization.codec import decode, encode, global_scale_of, rounded

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = [m / 8 * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][
    :-1
]
"""Numbers of a sign bit of 0 in the order of their codes; the last code of E4M3 is no number."""


def random_weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Blocks of very different sizes, so that scales from subnormal to the largest occur; a block and a row of 0."""
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** (-6 * torch.rand(*shape[:-1], shape[-1] // 16, 1, generator=generator))
    weight = torch.randn(*shape[:-1], shape[-1] // 16, 16, generator=generator) * size
    weight[..., 1, 0, :] = 0
    weight[..., 2, :, :] = 0
    return weight.flatten(-2).to(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """To the last bit, the sign of a 0 included."""
    return found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(bits(found), bits(expected))


# -- compressed-tensors ------------------------------------------------------------------------------------------------


def theirs(weight: torch.Tensor, format: str, scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """What compressed-tensors makes of a matrix in float32: its scales (unless given), its codes, and the weight they stand for."""
    scheme = preset_name_to_scheme({"nvfp4": "NVFP4A16", "fp8": "FP8_DYNAMIC"}[format], ["Linear"])
    state = {"weight": weight}
    if format == "nvfp4":
        state["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
    if scale is None:
        groups = weight.unflatten(-1, (-1, 16)) if format == "nvfp4" else weight[:, None]
        scale, _ = calculate_qparams(
            groups.amin(-1), groups.amax(-1), scheme.weights, state.get("weight_global_scale")
        )
    state["weight_scale"] = scale
    compressor = BaseCompressor.get_value_from_registry(
        {"nvfp4": "nvfp4-pack-quantized", "fp8": "float-quantized"}[format]
    )
    stored = compressor.compress(state, scheme)
    return {**stored, "decoded": compressor.decompress(stored, scheme)["weight"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nvfp4_is_that_of_compressed_tensors(dtype):
    weight = random_weight(40, 160, dtype=dtype)
    expected = theirs(weight.float(), "nvfp4")
    packed, scale, last = encode(weight, "nvfp4", choose=False)
    assert same(last, expected["weight_global_scale"])
    assert same(scale, expected["weight_scale"])
    assert len(scale.float().unique()) > 60
    assert 0 < scale.float()[scale.float() > 0].min() < 2**-6  # subnormal
    assert same(packed, expected["weight_packed"])
    assert len((packed % 16).unique()) == 16
    assert same(decode((packed, scale, last), "nvfp4", torch.bfloat16), expected["decoded"])


def test_stacks_are_their_experts():
    weight = random_weight(3, 24, 64) * torch.tensor([1.0, 30.0, 0.01]).view(3, 1, 1)
    packed, scale, last = encode(weight, "nvfp4", choose=False)
    codes, scales = encode(weight, "fp8")
    assert packed.shape == (3, 24, 32)
    assert scale.shape == (3, 24, 4)
    assert last.shape == (3, 1)
    assert codes.shape == weight.shape
    assert scales.shape == (3, 24, 1)
    for expert in range(3):
        expected = theirs(weight[expert], "nvfp4")
        assert same(packed[expert], expected["weight_packed"])
        assert same(scale[expert], expected["weight_scale"])
        assert same(last[expert], expected["weight_global_scale"])
        assert same(codes[expert], encode(weight[expert], "fp8")[0])
    for parts, name in (((packed, scale, last), "nvfp4"), ((codes, scales), "fp8")):
        singly = [decode([part[expert] for part in parts], name, torch.float32) for expert in range(3)]
        assert same(decode(parts, name, torch.float32), torch.stack(singly))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_is_that_of_compressed_tensors(dtype):
    weight = random_weight(40, 160, dtype=dtype)
    codes, scale = encode(weight, "fp8")
    expected = theirs(weight.float(), "fp8", scale)
    assert same(codes, expected["weight"])
    assert len(bits(codes).unique()) > 240
    assert same(decode((codes, scale), "fp8", torch.float32), expected["decoded"])
    exact = theirs(weight.float(), "fp8")["weight_scale"]
    down = (bits(exact).view(torch.int32) & ~0xFFFF).view(torch.float32)
    step = torch.where(down == exact, 0, 2.0 ** (exact.log2().floor() - 7))  # bfloat16 has seven digits
    assert same(scale, down + step)
    assert (scale > exact).any()
    assert same(scale.bfloat16().float(), scale)


# -- the definition ----------------------------------------------------------------------------------------------------


def nearest(value: float, numbers: list[float]) -> int:
    """Code of the nearest number; of two as near, the even code."""
    size = Fraction(abs(value))
    return min(range(len(numbers)), key=lambda code: (abs(Fraction(numbers[code]) - size), code % 2))


def single(value: float | torch.Tensor) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def quotient(a: float, b: float) -> float:
    """In float32."""
    return (torch.tensor(a, dtype=torch.float32) / torch.tensor(b, dtype=torch.float32)).item()


def defined_block(block: list[float], last: float, becomes: float) -> tuple[list[int], int, list[float]]:
    """Codes, code of the scale, and values of 16 elements."""
    scale = nearest(min(single(last * quotient(max(map(abs, block)), becomes)), 448.0), E4M3)
    scale = scale or E4M3.index(0.125)
    step = quotient(E4M3[scale], last)
    codes = [nearest(quotient(w, step), E2M1) + 8 * (w < 0) for w in block]
    return codes, scale, [single(E2M1[code % 8] * (-1 if code > 7 else 1) * step) for code in codes]


@pytest.mark.parametrize("choose", [True, False], ids=["better", "six"])
def test_nvfp4_by_its_definition(choose):
    weight = random_weight(6, 48, dtype=torch.bfloat16, seed=1)
    last = single((256 if choose else 448) * 6 * quotient(1.0, weight.abs().max().item()))  # as torch divides a number
    last = 2.0 ** math.floor(math.log2(last)) if choose else last
    packed, scale, found = encode(weight, "nvfp4", choose=choose)
    assert found.item() == last
    values = decode((packed, scale, found), "nvfp4", torch.float32)
    fours = 0
    for row in range(6):
        for at in range(3):
            block = weight[row, 16 * at : 16 * at + 16].tolist()
            options = [defined_block(block, last, becomes) for becomes in ((6.0, 4.0) if choose else (6.0,))]
            errors = [
                sum((Fraction(w) - Fraction(v)) ** 2 for w, v in zip(block, option[2], strict=True))
                for option in options
            ]
            codes, at_scale, expected = options[errors.index(min(errors))]
            fours += errors[0] > min(errors)
            pairs = [low + 16 * high for low, high in zip(codes[::2], codes[1::2], strict=True)]
            assert packed[row, 8 * at : 8 * at + 8].tolist() == pairs
            assert bits(scale)[row, at].item() == at_scale
            assert values[row, 16 * at : 16 * at + 16].tolist() == expected
    assert 2 < fours < 12 if choose else fours == 0


def test_nvfp4_is_exact_in_bfloat16():
    """A scale of 4 bits and a code of 3 make 7, and the global scale is a power of 2: nothing is rounded, whoever multiplies in which order."""
    weight = random_weight(64, 96, seed=5) * torch.logspace(-5, 2, 64)[:, None]
    packed, scale, last = encode(weight, "nvfp4")
    assert math.frexp(last.item())[0] == 0.5
    exact = decode((packed, scale, last), "nvfp4", torch.float32)
    assert torch.equal(decode((packed, scale, last), "nvfp4", torch.bfloat16).float(), exact)
    assert torch.equal(decode((packed, scale, 1 / last), "nvfp4-modelopt", torch.float32), exact)


def test_fp8_by_its_definition():
    weight = random_weight(4, 48, dtype=torch.bfloat16, seed=2)
    codes, scale = encode(weight, "fp8")
    values = decode((codes, scale), "fp8", torch.float32)
    for row, step in enumerate(scale.flatten().tolist()):
        for column, w in enumerate(weight[row].tolist()):
            code = nearest(quotient(w, step), E4M3)
            assert bits(codes)[row, column].item() == code + 128 * (w < 0 or str(w) == "-0.0")
            assert values[row, column].item() == single(E4M3[code] * step * (-1 if w < 0 else 1))


def test_every_code():
    pairs = torch.arange(256, dtype=torch.uint8).view(1, 256)
    found = decode((pairs, torch.ones(1, 32).to(torch.float8_e4m3fn), torch.ones(1)), "nvfp4", torch.float32)
    numbers = E2M1 + [-number for number in E2M1]
    assert found[0].tolist() == [numbers[code] for byte in range(256) for code in (byte % 16, byte // 16)]
    bytes_ = torch.tensor([[*range(127), *range(128, 255)]], dtype=torch.uint8)
    found = decode((bytes_.view(torch.float8_e4m3fn), torch.ones(1, 1)), "fp8", torch.float32)
    assert found[0].tolist() == E4M3 + [-number for number in E4M3]


def test_ties_go_to_the_even_code():
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    even = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    weight = torch.tensor([[*ties, 6.0, *(-tie for tie in ties), -6.0]])
    assert rounded(weight, "nvfp4", global_scale=torch.ones(1), choose=False).tolist() == [
        [*even, 6.0, *(-v for v in even), -6.0]
    ]
    for off in (-(2.0**-23), 2.0**-23):  # the next numbers in float32 are no ties
        near = torch.tensor([[*(tie * (1 + off) for tie in ties), *[6.0] * 9]])
        below = [*[number for number in E2M1 if number < 6.0]]
        expected = below if off < 0 else E2M1[1:]
        found = rounded(near, "nvfp4", global_scale=torch.ones(1), choose=False)
        assert found[0, :7].tolist() == expected
    weight = torch.tensor([[1.0625, 1.1875, 2.0**-10, 3 * 2.0**-10, 448.0]])  # subnormals are 2**-9 apart
    assert rounded(weight, "fp8").tolist() == [[1.0, 1.25, 0.0, 2 * 2.0**-9, 448.0]]


# -- choices -----------------------------------------------------------------------------------------------------------


def test_blocks_take_the_scale_with_the_smaller_error():
    weight = random_weight(64, 256, seed=3)
    last = global_scale_of(weight)

    def errors(found: torch.Tensor) -> torch.Tensor:
        return (found - weight).double().square().unflatten(-1, (-1, 16)).sum(-1)

    six, found = (errors(rounded(weight, "nvfp4", global_scale=last, choose=choose)) for choose in (False, True))
    assert (found <= six * (1 + 1e-6)).all()
    assert 0.2 < (found < six).float().mean() < 0.8
    assert encode(weight, "nvfp4")[1].float().max() > 448 / 2
    assert encode(weight, "nvfp4")[1].float().isfinite().all()


@pytest.mark.parametrize("format", ["nvfp4", "fp8"])
def test_a_slice_chooses_what_the_whole_chose(format):
    """Sums in another order would now and then choose otherwise: 15 of 131,072 blocks of a matrix in bfloat16."""
    weight = random_weight(256, 512, dtype=torch.bfloat16, seed=4)
    last = global_scale_of(weight)
    whole = encode(weight, format, global_scale=last)
    rows = torch.tensor([3, 200, 7])
    for index in ((slice(0, 1),), (rows,), (slice(5, 90, 3),)):
        part = encode(weight[index], format, global_scale=last)
        assert all(same(found, all_[index]) for found, all_ in zip(part[:2], whole[:2], strict=True))
    if format == "nvfp4":
        for stop in (32, 48, 496):
            packed, scale, _ = encode(weight[:, 16:stop], format, global_scale=last)
            assert same(packed, whole[0][:, 8 : stop // 2])
            assert same(scale, whole[1][:, 1 : stop // 16])


def test_weights_share_a_global_scale():
    q, k = random_weight(32, 64), 3 * random_weight(16, 64, seed=1)
    assert same(global_scale_of(q, k), global_scale_of(torch.cat([q, k])))
    assert same(global_scale_of(q, -k), global_scale_of(k))
    assert not same(global_scale_of(q, k), global_scale_of(q))
    stacks = torch.stack([q, 2 * q]), torch.stack([5 * q, q])
    assert same(global_scale_of(*stacks), torch.stack([global_scale_of(5 * q), global_scale_of(2 * q)]))


def test_segments_have_global_scales_of_their_own():
    gate_up = random_weight(2, 24, 32, seed=5)
    last = global_scale_of(gate_up)[:, [0, 0]] * torch.tensor([[1.0, 0.5], [0.75, 0.25]])
    parts = encode(gate_up, "nvfp4", global_scale=last, segments=(8, 16))
    assert parts[2] is last
    for expert in range(2):
        for segment, rows in enumerate((slice(0, 8), slice(8, 24))):
            alone = encode(gate_up[expert, rows], "nvfp4", global_scale=last[expert, segment : segment + 1])
            assert same(parts[0][expert, rows], alone[0])
            assert same(parts[1][expert, rows], alone[1])
            found = decode(parts, "nvfp4", torch.float32, segments=(8, 16))
            assert same(found[expert, rows], decode(alone, "nvfp4", torch.float32))
    both = encode(gate_up, "nvfp4", segments=(8, 16))
    assert both[2].shape == (2, 2)
    assert same(both[0], encode(gate_up, "nvfp4")[0])
    assert same(rounded(gate_up, "nvfp4", segments=(8, 16)), rounded(gate_up, "nvfp4"))


# -- other layouts, bands, types ---------------------------------------------------------------------------------------


def test_one_scale_for_all_and_factors():
    weight = random_weight(2, 24, 32, seed=6)
    scale = weight.abs().amax((1, 2)).view(2, 1) / 448
    codes = (weight / scale[..., None]).to(torch.float8_e4m3fn)
    expected = codes.float() * scale[..., None]
    assert same(decode((codes, scale), "fp8-tensor", torch.float32), expected)
    assert same(decode((codes[1], scale[1].reshape(())), "fp8-tensor", torch.float32), expected[1])
    halves = torch.stack([scale[:, 0], 2 * scale[:, 0]], -1)
    found = decode((codes, halves), "fp8-tensor", torch.float32, segments=(16, 8))
    assert same(found[:, :16], expected[:, :16])
    assert same(found[:, 16:], 2 * expected[:, 16:])
    assert same(decode((codes, scale.bfloat16()), "fp8-tensor", torch.float32), codes.float() * scale.bfloat16().float()[..., None])  # fmt: skip
    packed, scales, last = encode(weight, "nvfp4")
    factor = 1 / last
    steps = scales.float() * factor[..., None]
    values = decode((packed, torch.ones_like(scales.float()).to(scales.dtype), torch.ones_like(last)), "nvfp4", torch.float32)  # fmt: skip
    expected = (values.unflatten(-1, (-1, 16)) * steps[..., None]).flatten(-2)
    assert same(decode((packed, scales, factor), "nvfp4-modelopt", torch.float32), expected)
    assert same(expected, decode((packed, scales, last), "nvfp4", torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", ["nvfp4", "fp8"])
def test_rounding_is_encoding_and_decoding(format, dtype):
    for weight in (random_weight(40, 160, dtype=dtype), random_weight(3, 24, 64, dtype=dtype).transpose(0, 1)):
        for choose in (True, False):
            found = rounded(weight, format, choose=choose)
            assert same(found, decode(encode(weight, format, choose=choose), format, dtype))
            assert not torch.equal(found, weight)
            assert not found.requires_grad
            largest = weight.abs().max().item()
            assert (found - weight).abs().max() < (0.2 if format == "nvfp4" else 0.04) * largest


@pytest.mark.parametrize("format", ["nvfp4", "fp8"])
def test_bands_change_nothing(format, monkeypatch):
    weight = random_weight(3, 20, 64, dtype=torch.bfloat16)
    parts = encode(weight, format)
    expected = decode(parts, format, torch.float32)
    out = torch.full((3, 20, 64), float("nan"))
    monkeypatch.setattr(codec, "_BAND", 7 * 64)
    assert all(same(found, part) for found, part in zip(encode(weight, format), parts, strict=True))
    assert same(rounded(weight, format).float(), expected.bfloat16().float())
    assert decode(parts, format, torch.float32, out=out) is out
    assert same(out, expected)
    narrow = decode([part[:, 2:5] if part.dim() == 3 else part for part in parts], format, torch.float32)
    assert same(narrow, expected[:, 2:5])
    monkeypatch.setattr(codec, "_BAND", 1)  # a row at least
    assert same(decode(parts, format, torch.float32), expected)


class Largest(TorchDispatchMode):
    """The largest tensor that was made, in bytes."""

    bytes_ = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and not func.is_view:
            self.bytes_ = max(self.bytes_, found.nbytes)
        return found


@pytest.mark.parametrize("format", ["nvfp4", "fp8"])
def test_bands_are_all_that_is_in_memory_beside(format, monkeypatch):
    weight = random_weight(512, 256, dtype=torch.bfloat16)
    parts, out = encode(weight, format), torch.empty_like(weight)
    monkeypatch.setattr(codec, "_BAND", 2048)
    with Largest() as largest:
        encode(weight, format)
        rounded(weight, format)
    assert largest.bytes_ == weight.nbytes  # the result of `rounded`
    with Largest() as largest:
        decode(parts, format, weight.dtype, out=out)
    assert largest.bytes_ <= 4 * 2048 or largest.bytes_ == out.nbytes  # `out` itself, which is written to


def test_zeros_and_what_is_too_small():
    for shape in ((4, 32), (2, 4, 32)):
        for format in ("nvfp4", "fp8"):
            parts = encode(torch.zeros(shape), format)
            assert all(part.float().isfinite().all() for part in parts)
            assert (parts[1].float() > 0).all()
            assert not decode(parts, format, torch.float32).any()
    assert encode(torch.zeros(4, 32), "nvfp4")[2].item() == 1.0  # as compressed-tensors has it
    tiny = torch.full((1, 16), 1e-35)
    assert rounded(tiny, "nvfp4").sum() > 0
    assert rounded(tiny, "fp8").allclose(tiny, rtol=0.1)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("format", ["nvfp4", "fp8"])
def test_weights_that_no_code_stands_for(format, bad):
    weight = random_weight(8, 48, dtype=torch.bfloat16)
    weight[5, 40] = bad
    for given in (None, torch.ones(1)):
        for function in (encode, rounded):
            with pytest.raises(ElasticConfigError, match="NaN or infinite"):
                function(weight, format, global_scale=given)
    with pytest.raises(ElasticConfigError, match="NaN or infinite"):
        global_scale_of(weight)


@pytest.mark.parametrize(
    ("weight", "format", "given", "message"),
    [
        (torch.ones(2, 40), "nvfp4", {}, r"\(2, 40\) has 40 columns, NVFP4 takes multiples of 16"),
        (torch.ones(2, 16), "fp4", {}, "format='fp4' must be 'nvfp4' or 'fp8'"),
        (torch.ones(16), "fp8", {}, r"\(16,\) and type float32 cannot be quantised"),
        (torch.ones(2, 16, dtype=torch.uint8), "fp8", {}, "uint8 cannot be quantised"),
        (torch.ones(2, 16), "nvfp4", {"global_scale": torch.zeros(1)}, "positive and finite"),
        (torch.ones(2, 16), "nvfp4", {"global_scale": torch.tensor([float("nan")])}, "positive and finite"),
        (torch.ones(2, 2, 16), "nvfp4", {"global_scale": torch.ones(1)}, r"shape \(1,\) and segments \(2,\) do not"),
        (torch.ones(4, 16), "nvfp4", {"segments": (1, 2)}, r"segments \(1, 2\) do not fit"),
    ],
)
def test_weights_that_have_no_codes(weight, format, given, message):
    for function in (encode, rounded):
        with pytest.raises(ElasticConfigError, match=message):
            function(weight, format, **given)


def damaged(format: str, part: int, value: float, at: int = 3) -> list[torch.Tensor]:
    parts = [part.clone() for part in encode(random_weight(8, 48, seed=7)[4:], format)]
    flat = parts[part].view(-1)
    flat[min(at, flat.numel() - 1)] = value
    return parts


@pytest.mark.parametrize(
    ("format", "part", "value"),
    [
        (format, part, value)
        for format, part in (("nvfp4", 1), ("nvfp4", 2), ("fp8", 1))
        for value in (0.0, -1.0, float("nan"), *([] if (format, part) == ("nvfp4", 1) else [float("inf")]))
    ],
)
def test_damaged_scales(format, part, value):
    message = "NaN or infinite" if value else "are 0 where codes are not|negative, NaN or infinite"
    with pytest.raises(CheckpointError, match=message):
        decode(damaged(format, part, value), format, torch.bfloat16)


def test_damaged_factors():
    packed, scale, last = encode(random_weight(8, 48), "nvfp4")
    for bad in (0.0, float("nan"), float("inf"), -1.0):
        with pytest.raises(CheckpointError, match="damaged"):
            decode((packed, scale, torch.full_like(last, bad)), "nvfp4-modelopt", torch.bfloat16)


def test_a_scale_of_0_belongs_to_codes_of_0():
    parts = damaged("nvfp4", 1, 0.0)
    parts[0].view(-1, 8)[3] = 0x80  # 0 and the 0 with a sign
    assert not decode(parts, "nvfp4", torch.float32).view(-1, 16)[3].any()
    codes, scale = damaged("fp8", 1, 0.0)
    codes[3] = 0
    assert not decode((codes, scale), "fp8", torch.float32)[3].any()


def test_codes_that_are_nan():
    codes, scale = encode(random_weight(8, 48), "fp8")
    bits(codes)[5, 7] = 0x7F
    with pytest.raises(CheckpointError, match="codes are NaN"):
        decode((codes, scale), "fp8", torch.bfloat16)


def test_companions_that_do_not_belong_together():
    packed, scale, last = encode(random_weight(8, 48), "nvfp4")
    codes, scales = encode(random_weight(8, 48), "fp8")
    for parts, name in (
        ((packed, scale[:, :2], last), "nvfp4"),
        ((packed, scale[:4], last), "nvfp4"),
        ((packed, scale, last.repeat(2)), "nvfp4"),
        ((codes, scales[:7]), "fp8"),
        ((codes, scales.repeat(1, 2)), "fp8"),
        ((codes, scales), "fp8-tensor"),
    ):
        with pytest.raises(CheckpointError, match=r"do not belong together|not one for each"):
            decode(parts, name, torch.bfloat16)
    with pytest.raises(CheckpointError, match="not one for each"):
        decode((packed, scale, last.repeat(2)), "nvfp4", torch.bfloat16, segments=(3, 4))
