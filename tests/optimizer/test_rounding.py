"""The definitions of low precision: random words, roundings, codes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch import Tensor

from cm_fused import rounding
from cm_fused.philox import ShardLayout, philox, random_words
from cm_fused.rounding import HALF_DTYPES
from tests.support.cases import generator

SCALED = (torch.int8, torch.float8_e4m3fn, rounding.PACKED)


def _words(values: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([value]) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ],
)
def test_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    """Philox-4x32-7 as its authors' library, Random123, lists it in its known answers."""
    words = philox(_words(counter), key)
    assert [int(word) for word in words] == list(expected)


def test_words_have_keys_of_their_own() -> None:
    """Another seed, parameter or step gives other words; the same ones give the same."""

    def words(seed: int = 2**62, index: int = 3, step: int = 7) -> list[int]:
        values: list[int] = random_words(seed, index, torch.tensor(step), 9).tolist()
        return values

    others = [words(seed=0), words(index=4), words(step=8)]
    assert words() == words()
    assert len({tuple(some) for some in [words(), *others]}) == 4
    # A tensor's words are those of its elements, however many there are.
    assert random_words(5, 1, torch.tensor(2.0), 4).tolist() == (
        random_words(5, 1, torch.tensor(2.0), 11)[:4].tolist()
    )


@pytest.mark.parametrize("numbers", [(), (4,), (7,), (5, 3, 10), (2**34 - 7,), (8, 1, 3)])
def test_words_are_those_of_the_layout(numbers: tuple[int, ...]) -> None:
    """An element that lies somewhere in a larger parameter has the word of that place."""
    layout = ShardLayout(*numbers)
    words = random_words(5, 1, torch.tensor(2.0), 25, layout).tolist()
    for element, word in enumerate(words):
        run, within = divmod(element, layout.length)
        place = layout.offset + run * layout.stride + within
        quad, part = divmod(place, 4)
        counter = _words((quad % 2**32, quad // 2**32, 1, 2))
        assert word == int(philox(counter, (5, 0))[part])


@pytest.mark.parametrize("half", [0, 1, 0x8000, 0xABCD, 0xFFFF])
def test_bits_of_parameters_are_independent_of_each_half_of_a_word(half: int) -> None:
    """Whatever one half of a word is, the other one gives each of the 2^16 bits once."""
    others = torch.arange(2**16)
    for words in (others << 16 | half, half << 16 | others):
        assert torch.equal(rounding.param_bits(words).sort().values, others)


def _codes(dtype: torch.dtype) -> Tensor:
    """Return every number a scaled dtype holds, ascending, as float64."""
    if dtype in (torch.int8, rounding.PACKED):
        largest = int(rounding.LARGEST[dtype])
        return torch.arange(-largest, largest + 1, dtype=torch.float64)
    values = torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float64)
    return values[values.isfinite()].sort().values


def _restored(stored: Tensor, scales: Tensor | None, numel: int) -> Tensor:
    return rounding.dequantize(rounding.unpack(stored, numel), scales)


@pytest.mark.parametrize("dtype", SCALED)
@given(
    values=npst.arrays(
        np.float32,
        st.integers(1, 600),
        elements=st.floats(-(2.0**40), 2.0**40, width=32, allow_subnormal=True),
    )
)
def test_slots_are_rounded_to_the_nearest_code(
    dtype: torch.dtype, values: np.typing.NDArray[np.float32]
) -> None:
    """By a search over all codes in float64, in each block of 256 by its own scale."""
    tensor = torch.from_numpy(values)
    stored, scales = rounding.quantize(tensor, dtype)
    assert scales is not None
    assert scales.shape == (-(-len(values) // 256),)
    restored = _restored(stored, scales, len(values)).double()
    codes = _codes(dtype)
    for block, scale in enumerate(scales.double()):
        part = slice(256 * block, 256 * (block + 1))
        exact = tensor[part].double()
        if exact.abs().max() < rounding.SMALLEST_SCALED:
            assert not restored[part].any()
            continue
        nearest = (codes[:, None] * scale - exact).abs().amin(0)
        # The scale and two products are rounded.
        slack = 4 * 2.0**-24 * exact.abs().max()
        assert ((restored[part] - exact).abs() <= nearest + slack).all()


def _largest_values() -> Tensor:
    """Return largest values of blocks, from those too small for a scale to nearly the greatest."""
    mantissas = 1 + torch.arange(0, 2**23, 2**9 + 1) / 2**23
    powers = [2.0**-149, 2.0**-101, *(2.0**n for n in range(-100, 120, 20)), 2.0**127]
    parts = [power * mantissas[i :: len(powers)] for i, power in enumerate(powers)]
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", SCALED)
def test_slots_are_restored_when_quantized_again(dtype: torch.dtype) -> None:
    """Values that every code stands for are quantized to those codes, and restored as the same.

    So a sharded checkpoint, which has values, loses nothing where blocks stay what they were.
    """
    largest = _largest_values()
    codes = _codes(dtype)
    blocks = (codes / rounding.LARGEST[dtype]).float()
    blocks = torch.nn.functional.pad(blocks, (0, rounding.BLOCK_SIZE - len(blocks)))
    stored, scales = rounding.quantize((blocks * largest[:, None]).flatten(), dtype)
    values = _restored(stored, scales, blocks.numel() * len(largest))
    again, new_scales = rounding.quantize(values, dtype)
    assert torch.equal(_bytes(again), _bytes(stored))
    assert torch.equal(_restored(again, new_scales, len(values)), values)


@pytest.mark.parametrize("dtype", SCALED)
@pytest.mark.parametrize("power", [2.0**-100, 1.0, 2.0**118])
def test_every_scale_is_found_again(dtype: torch.dtype, power: float) -> None:
    """All scales, of 16 bits: a block whose largest value is restored by one has it again."""
    scales = (1 + torch.arange(2**15) / 2**15) * power
    largest = scales * rounding.LARGEST[dtype]
    blocks = torch.nn.functional.pad(largest[:, None], (0, rounding.BLOCK_SIZE - 1)).flatten()
    stored, found = rounding.quantize(blocks, dtype)
    assert found is not None
    assert torch.equal(found, scales)
    assert torch.equal(_restored(stored, found, len(blocks)), blocks)


@pytest.mark.parametrize("dtype", SCALED)
def test_a_code_times_its_scale_is_exact(dtype: torch.dtype) -> None:
    """So one instruction, which multiplies and adds, gives a sum the bits that two give it."""
    blocks = torch.nn.functional.pad(_largest_values()[:, None], (0, rounding.BLOCK_SIZE - 1))
    _, scales = rounding.quantize(blocks.flatten(), dtype)
    assert scales is not None
    usable = scales[scales >= rounding.SMALLEST_SCALED]
    exact = _codes(dtype) * usable.double()[:, None]
    assert torch.equal((_codes(dtype).float() * usable[:, None]).double(), exact)


def _moment_numbers(signed: bool) -> Tensor:
    """Return every number an int8 moment holds beside its scale, by its code, as float64.

    By the definition of a float: a sign, an exponent and 3 bits of mantissa.
    """
    code = torch.arange(256 if signed else 248)
    magnitude = code & 127 if signed else code
    exponent, mantissa = magnitude >> 3, magnitude & 7
    significand = torch.where(exponent > 0, 8 + mantissa, mantissa).double()
    unit = 2.0 ** (exponent.clamp(min=1) - (7 if signed else 15) - 3)
    sign = 1 - 2 * (code >> 7) if signed else 1
    return sign * significand * unit


@pytest.mark.parametrize("signed", [True, False])
def test_moment_codes_are_floats(signed: bool) -> None:
    """Each of the 256 codes, or of the 248 without a sign, is the number its bits say."""
    numbers = _moment_numbers(signed)
    codes = torch.arange(len(numbers)).to(torch.uint8).view(torch.int8)
    restored = rounding.dequantize_moment(codes, torch.ones(1), signed=signed)
    assert torch.equal(restored.double(), numbers)


@pytest.mark.parametrize("bits", [0, 2**19, 2**20 - 1, None])
@pytest.mark.parametrize("signed", [True, False])
def test_moments_are_restored_when_quantized_again(signed: bool, bits: int | None) -> None:
    """Values that every code stands for, beside any largest one, are restored with any bits."""
    numbers = _moment_numbers(signed).float()
    numbers = torch.nn.functional.pad(numbers, (0, rounding.BLOCK_SIZE - len(numbers)))
    scales = 2.0 ** torch.arange(-100, 127 - 15, 7)
    values = (numbers * scales[:, None]).flatten()
    # And blocks without their upper numbers, whose scales are smaller.
    largest = torch.tensor([480.0, 60.0, 1.0, 2.0**-9 if signed else 2.0**-17])
    blocks = torch.where(numbers.abs() <= largest[:, None], numbers, 0.0)
    values = torch.cat([values, blocks.flatten()])
    random = None if bits is None else torch.full(values.shape, bits)
    stored, found = rounding.quantize_moment(values, random, signed=signed)
    assert torch.equal(rounding.dequantize_moment(stored, found, signed=signed), values)
    assert torch.equal(found.frexp().mantissa, torch.full(found.shape, 0.5))


@pytest.mark.parametrize("signed", [True, False])
def test_largest_moments_use_the_largest_codes(signed: bool) -> None:
    """A block's largest value takes one of the last eight codes, or the one before, never more."""
    largest = _largest_values()
    # The largest number of an exponent, and the one after it, which has the next one's scale.
    edges = torch.tensor([1.875, 1.875 + 2.0**-23]) * 2.0 ** torch.arange(-99, 127)[:, None]
    largest = torch.cat([largest, edges.flatten()])
    largest = largest[(largest >= 2.0**-100) & (largest <= 1.875 * 2.0**127)]
    last = 127 if signed else 247
    found = set()
    for bits in (0, 2**20 - 1):
        drawn = largest.repeat_interleave(rounding.BLOCK_SIZE)
        random = torch.full(drawn.shape, bits)
        stored, scales = rounding.quantize_moment(drawn, random, signed=signed)
        found |= set(stored.view(torch.uint8).tolist())
        restored = rounding.dequantize_moment(stored, scales, signed=signed)
        assert ((restored - drawn).abs() <= drawn / 8).all()
    assert found == set(range(last - 8, last + 1))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1.9 * 2.0**127])
def test_moments_that_are_not_finite_spoil_their_block_alone(value: float, signed: bool) -> None:
    """It comes back as NaN in every place of the block, whatever the sign of a NaN."""
    values = torch.ones(3 * rounding.BLOCK_SIZE)
    values[300] = value
    stored, scales = rounding.quantize_moment(values, None, signed=signed)
    restored = rounding.dequantize_moment(stored, scales, signed=signed).reshape(3, -1)
    assert restored[1].isnan().all()
    assert torch.equal(restored[::2], torch.ones(2, rounding.BLOCK_SIZE))
    assert not stored.reshape(3, -1)[1].any()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", SCALED)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_spoils_its_block_alone(dtype: torch.dtype, bad: float) -> None:
    """It comes back as NaN, in every place of the block: a scale has no value for it."""
    values = torch.randn(700, generator=generator(0))
    values[300] = bad
    restored = _restored(*rounding.quantize(values, dtype), len(values))
    assert restored[256:512].isnan().all()
    assert restored[:256].isfinite().all()
    assert restored[512:].isfinite().all()


@pytest.mark.parametrize("numel", [0, 1, 127, 128, 129, 255, 256, 257, 384, 385, 512, 775])
def test_two_elements_share_a_byte(numel: int) -> None:
    """The element i of a block is in its byte i % 128: in the lower half for i < 128."""
    codes = (torch.arange(2 * numel).reshape(2, numel) * 5 % 15 - 7).to(torch.float32)
    # Whatever the block, its largest code is 7.
    codes[:, ::256] = 7
    stored, scales = rounding.quantize(codes, rounding.PACKED)
    assert scales is not None
    assert scales.eq(1).all()
    assert stored.shape == (2, sum(min(numel - i, 128) for i in range(0, numel, 256)))
    assert torch.equal(rounding.unpack(stored, numel), codes.to(torch.int8))
    for i in range(numel):
        block, within = divmod(i, 256)
        byte = int(stored[1, 128 * block + within % 128])
        bits = byte >> (4 if within >= 128 else 0) & 15
        assert bits == int(codes[1, i]) % 16


VALUES = torch.tensor([1.0, -1.001, 3.14159e-3, 1e-7, -2.5e-6, 65000.0, 0.0, 1.0 + 2**-9, 6e-8])


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_half_rounding_has_no_bias(dtype: torch.dtype) -> None:
    """Over all 2^16 random numbers the mean is the value, to 2^-14 of a subnormal's spacing."""
    bits = torch.arange(2**16).unsqueeze(1)
    rounded = rounding.round_stochastically(
        VALUES.expand(2**16, -1).contiguous(), dtype, bits.expand(-1, len(VALUES))
    )
    torch.testing.assert_close(rounded.to(dtype).float(), rounded, rtol=0, atol=0)
    lower, upper = rounded.amin(0).double(), rounded.amax(0).double()
    off = (rounded.double().mean(0) - VALUES.double()).abs()
    is_subnormal = VALUES.abs() < torch.finfo(dtype).smallest_normal
    assert (off <= torch.where(is_subnormal, 2.0**-14 * (upper - lower), 0)).all()
    # Its neighbours, no others.
    assert ((lower <= VALUES) & (upper >= VALUES)).all()
    between = torch.nextafter(lower.to(dtype), torch.tensor(torch.inf, dtype=dtype))
    assert (upper <= between.double()).all()


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_half_rounding_keeps_what_is_not_finite(dtype: torch.dtype, value: float) -> None:
    """Random bits carry out of no exponent, and into no other NaN."""
    bits = torch.tensor([0, 1, 2**16 - 1])
    rounded = rounding.round_stochastically(torch.full((3,), value), dtype, bits).to(dtype)
    torch.testing.assert_close(
        rounded, torch.full((3,), value, dtype=dtype), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("signed", [True, False])
def test_moment_rounding_has_no_bias(signed: bool) -> None:
    """Over random numbers spread evenly, the mean of every value is the value."""
    values = torch.cat([torch.logspace(-12, 0, 199), torch.tensor([0.0, 1.0])])
    if signed:
        values = values * torch.tensor([1.0, -1.0]).repeat(101)[: len(values)]
    total = torch.zeros(len(values), dtype=torch.float64)
    draws = range(0, 2**20, 1024)
    for draw in draws:
        bits = torch.full((len(values),), draw + 512)
        codes, scales = rounding.quantize_moment(values, bits, signed=signed)
        total += rounding.dequantize_moment(codes, scales, signed=signed)
    mean = total / len(draws)
    # The distance of neighbours: an eighth of the power of two below, or of the smallest such.
    power = 2.0 ** values.double().abs().log2().floor()
    gap = power.clamp(min=2.0**-14 if signed else 2.0**-29) / 8
    within = (mean - values).abs() <= gap / len(draws) + 1e-6 * values.abs()
    if not signed:
        # What is positive and below the first code is not unbiased but positive.
        within |= (values < 2.0**-32) & (mean >= values)
        assert (mean[values > 0] > 0).all()
    assert within.all()


def test_moment_codes_keep_small_values() -> None:
    """A value of 2^-14 of its block's largest is known to a sixteenth, where int8 gives 0."""
    values = torch.linspace(1, 2, 256) * 2.0**-14
    values[0] = 1.0
    codes, scales = rounding.quantize_moment(values, None, signed=True)
    restored = rounding.dequantize_moment(codes, scales, signed=True)
    assert restored[0] == 1.0
    assert (restored / values - 1).abs().max() <= 1 / 16
    linear = rounding.dequantize(*rounding.quantize(values, torch.int8))
    assert not linear[1:].any()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_flat_is_memory_order(memory_format: torch.memory_format) -> None:
    """Blocks and words run through memory, not through the shape."""
    tensor = torch.arange(120.0).reshape(2, 3, 4, 5).to(memory_format=memory_format)
    flat = rounding.as_flat(tensor)
    assert flat.data_ptr() == tensor.data_ptr()
    assert torch.equal(rounding.shaped_as(flat, tensor), tensor)
    assert torch.equal(rounding.flat_as(tensor.contiguous(), tensor), flat)
