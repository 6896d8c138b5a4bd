"""Keys, the integer stream, and the scalar cores of csrc/common that CPU and CUDA share."""

import importlib.util
import os
import random as python_random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgen import ops, random

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location(
    "philox_by_hand", ROOT / "tests" / "philox_by_hand.py"
)
by_hand = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(by_hand)

INSTRUCTION_SETS = ("portable", "avx2", "avx512")
#: Offsets whose counters carry into the second word or wrap around; keys with the top bits set.
KEYS = [
    (0, 0),
    (1, 2**32 - 5),
    (2**63 + 12345, 2**32 * 7 - 1),
    (-1, -9),
    (2**64 - 1, 2**64 - 3),
    (0x299F31D0A4093822, 2**63 - 2),
]


@pytest.fixture(scope="session")
def cores(native):
    """The scalar cores of csrc/common."""
    return native("noise_cores")


# --- the integer stream ------------------------------------------------------------------------


@pytest.mark.parametrize("counter,key,answer", by_hand.KNOWN_ANSWERS)
def test_known_answers(counter, key, answer, cores):
    assert by_hand.philox4x32_10(counter, key) == answer
    assert cores.philox(counter, key) == answer
    as_tensors = random._philox(
        tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key)
    )
    assert [int(w) for w in as_tensors] == answer


def test_known_answer_through_the_kernels(isa):
    for name in filter(isa, INSTRUCTION_SETS):
        words = torch.ops.fastgen.philox_words(random.make_key(0), 4).tolist()
        assert words == by_hand.KNOWN_ANSWERS[0][2], name


@pytest.mark.parametrize("seed,offset", KEYS)
def test_words_equal_the_paper(seed, offset, isa, cores):
    expected = by_hand.words(seed, offset, 803)
    key = random.make_key(seed, offset)
    assert random.philox_words(key, 803).tolist() == expected
    for index in range(8):
        block = cores.block(seed % 2**64, offset % 2**64, index)
        assert block == expected[4 * index : 4 * index + 4]
    for name in filter(isa, INSTRUCTION_SETS):
        assert torch.ops.fastgen.philox_words(key, 803).tolist() == expected, name


def test_words_of_random_keys():
    draw = python_random.Random(0)
    for _ in range(20):
        seed, offset, count = draw.getrandbits(64), draw.getrandbits(64), draw.randrange(1, 300)
        key = random.make_key(seed, offset)
        words = torch.ops.fastgen.philox_words(key, count)
        assert torch.equal(words, random.philox_words(key, count))
        assert words.tolist() == by_hand.words(seed, offset, count)


@pytest.mark.skipif(
    not hasattr(torch.func, "_random") or not hasattr(torch.func._random, "bits"),
    reason="this torch has no torch.func._random.bits",
)
def test_words_equal_those_of_torch():
    for seed, offset in KEYS:
        key = random.make_key(seed, offset)
        theirs = torch.func._random.bits(key.view(torch.uint64), 803)
        ours = random.philox_words(key, 803)
        assert torch.equal(theirs.to(torch.int64) & 0xFFFFFFFF, ours)


def test_a_shift_of_the_offset_shifts_the_stream():
    for offset in (0, 2**32 - 60, -60):
        long = torch.ops.fastgen.philox_words(random.make_key(9, offset), 1000)
        for shift in (1, 17, 100):
            later = torch.ops.fastgen.philox_words(random.make_key(9, offset + shift), 500)
            assert torch.equal(later, long[4 * shift : 4 * shift + 500])


def test_words_are_uniform():
    """Every bit is set half of the time, and bytes are uniform, over 2^20 words."""
    words = torch.ops.fastgen.philox_words(random.make_key(1), 2**20)
    assert words.min() >= 0 and words.max() < 2**32
    for bit in range(32):
        ones = (words >> bit & 1).sum().item()
        assert abs(ones - 2**19) < 5 * 2**9, f"bit {bit}: {ones} of 2^20"
    for shift in (0, 8, 16, 24):
        counts = torch.bincount(words >> shift & 255, minlength=256).double()
        chi_square = ((counts - 4096).square() / 4096).sum().item()
        assert 140 < chi_square < 390, f"byte {shift // 8}: {chi_square}"


# --- keys --------------------------------------------------------------------------------------


def test_make_key_keeps_all_64_bits():
    assert random.make_key(2**64 - 1, 2**63).tolist() == [-1, -(2**63)]
    assert random.make_key(-1, -(2**63)).tolist() == [-1, -(2**63)]
    for bad in (2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match=r"seed: expected a number in \[-2\^63, 2\^64\), got"):
            random.make_key(bad)


def test_drawn_keys_follow_the_seed_and_the_generator():
    torch.manual_seed(3)
    a, b = random.draw_key(), random.draw_key()
    torch.manual_seed(3)
    assert torch.equal(random.draw_key(), a) and not torch.equal(a, b)
    state = torch.get_rng_state()
    c, d = (random.draw_key(generator=torch.Generator().manual_seed(4)) for _ in "cd")
    assert torch.equal(c, d) and torch.equal(torch.get_rng_state(), state)


def test_fold_in_is_the_block_with_data_in_the_upper_counter_words():
    key, data = random.make_key(123, 2**40 + 5), 2**35 + 6
    w = by_hand.philox4x32_10([5, 2**8, 7, 8], [123, 0])
    expected = random.make_key(w[0] + (w[1] << 32), w[2] + (w[3] << 32))
    assert torch.equal(random.fold_in(key, data), expected)


def test_fold_in_gives_distinct_keys_and_takes_tensors():
    keys = [random.make_key(s, o) for s in (0, 1) for o in (0, 1, 2**32)]
    folded = torch.cat([random.fold_in(key, torch.arange(50)) for key in keys])
    assert folded.shape == (300, 2) and folded.unique(dim=0).shape[0] == 300
    assert torch.equal(random.fold_in(keys[1], 7), random.fold_in(keys[1], torch.arange(50))[7])
    assert random.fold_in(keys[0], torch.zeros(2, 3, dtype=torch.int64)).shape == (2, 3, 2)


@pytest.mark.parametrize("seed", (0, -5, 2**64 - 1))
def test_derived_keys_are_folded(seed):
    folded = random.fold_in(random.fold_in(random.make_key(seed), 3), 2**62)
    assert torch.equal(random.derive_key(seed, 3, 2**62), folded)
    assert torch.equal(random.derive_key(seed), random.make_key(seed))
    for bad in (-1, 2**63):
        with pytest.raises(ValueError, match=r"data: expected numbers in \[0, 2\^63\), got"):
            random.derive_key(seed, 0, bad)


@pytest.mark.parametrize("offset", (0, 2**63 - 2, -9))
def test_skipped_blocks(offset):
    key = random.make_key(7, offset)
    expected = random.philox_words(key, 40)[12:]
    for count in (3, torch.tensor(3)):
        assert torch.equal(random.philox_words(random.skip_blocks(key, count), 28), expected)
    with pytest.raises(TypeError, match="key: expected an int64 Tensor"):
        random.skip_blocks([1, 2], 3)


def test_bad_keys_are_named():
    for function in (lambda k: random.fold_in(k, 1), lambda k: random.philox_words(k, 4)):
        with pytest.raises(TypeError, match="key: expected an int64 Tensor .* got list"):
            function([1, 2])
        with pytest.raises(TypeError, match="key: expected dtype int64, got float32"):
            function(torch.zeros(2))
        with pytest.raises(ValueError, match=r"key: expected shape \(2,\), .* got \(3,\)"):
            function(torch.zeros(3, dtype=torch.int64))
        with pytest.raises(TypeError, match="key: expected a dense Tensor, got .*sparse"):
            function(torch.ones(2, dtype=torch.int64).to_sparse())


@pytest.mark.parametrize(
    "data, error, message",
    (
        (-1, ValueError, r"data: expected a number in \[0, 2\^63\), got -1"),
        (2**63, ValueError, r"data: expected a number in \[0, 2\^63\), got 9223372036854775808"),
        (1.5, TypeError, "data: expected an int, got float"),
        (True, TypeError, "data: expected an int, got bool"),
        ("1", TypeError, "data: expected an int, got str"),
        ([1], TypeError, "data: expected an int, got list"),
        (torch.tensor(-1), ValueError, r"data: expected numbers in \[0, 2\^63\), got -1"),
        (torch.tensor([3, -7]), ValueError, r"data: expected numbers in \[0, 2\^63\), got -7"),
        (torch.ones(2), TypeError, "data: expected an int or int64, got torch.float32"),
        (torch.ones(2).int(), TypeError, "data: expected an int or int64, got torch.int32"),
        (torch.ones(2).bool(), TypeError, "data: expected an int or int64, got torch.bool"),
        (torch.ones(2).long().to_sparse(), TypeError, "data: expected a dense Tensor, got .*spars"),
        (torch.ones(2).long().to("meta"), ValueError, "data: expected the device of key, cpu, got"),
    ),
)
def test_bad_data_is_named(data, error, message):
    with pytest.raises(error, match=f"^{message}"):
        random.fold_in(random.make_key(0), data)


@pytest.mark.parametrize(
    "function, message",
    (
        (lambda: random.make_key(1.5), "seed: expected an int, got float"),
        (lambda: random.make_key("7"), "seed: expected an int, got str"),
        (lambda: random.make_key(1, None), "offset: expected an int, got NoneType"),
        (lambda: random.derive_key(1, 2.0), "data: expected ints, got float"),
        (
            lambda: random.skip_blocks(random.make_key(1), 1.5),
            "count: expected an int, got float",
        ),
        (
            lambda: random.skip_blocks(random.make_key(1), torch.tensor(1.5)),
            "count: expected an int or int64, got torch.float32",
        ),
        (lambda: random.draw_key(generator=7), "generator: expected a torch.Generator, got int"),
        (lambda: random.philox_words(random.make_key(1), 2.0), "count: expected an int, got float"),
        (lambda: ops.normal(random.make_key(1), 5), "size: expected a sequence of ints, got int"),
        (lambda: ops.normal(random.make_key(1), "5"), "size: expected a sequence of ints, got str"),
        (
            lambda: ops.normal(random.make_key(1), (2, 1.5)),
            r"size: expected a sequence of ints, got \(2, 1.5\)",
        ),
        (
            lambda: ops.reparam_kl(torch.ones(2, 3), torch.ones(2, 3), generator=7),
            "generator: expected a torch.Generator, got int",
        ),
    ),
)
def test_wrong_types_are_named(function, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        function()


def test_no_data_gives_the_noise_of_the_key_itself():
    """Where a negative number cannot be refused, its key is still apart from the noise."""
    key, data = random.make_key(5, 9), torch.tensor([-1, -2, 0, 1, 2**63 - 1])
    folded = torch.vmap(lambda d: random.fold_in(key, d))(data)
    assert torch.equal(folded[2:], random.fold_in(key, data[2:]))
    words = random.philox_words(key, 4)
    own = torch.stack((words[0] | words[1] << 32, words[2] | words[3] << 32))
    every = torch.cat((folded, own[None]))
    assert len(every.unique(dim=0)) == len(every)


def test_numbers_of_numpy_are_numbers():
    key = random.make_key(np.int64(3), np.uint8(4))
    assert torch.equal(key, random.make_key(3, 4))
    assert torch.equal(random.fold_in(key, np.int64(2)), random.fold_in(key, 2))
    assert torch.equal(random.make_key(np.uint64(2**64 - 1)), random.make_key(-1))
    assert ops.normal(key, [np.int64(3), 2]).shape == (3, 2)


# --- Box-Muller, scalar ------------------------------------------------------------------------


def exact(radius, angle):
    """The definition in extended precision: whole eighths of a turn are taken off in integers."""
    r = np.sqrt(-2 * np.log((radius.astype(np.longdouble) + 0.5) / 2**32))
    eighth, rest = angle >> 29, (angle & (2**29 - 1)).astype(np.longdouble) + 0.5
    x = rest * (np.arctan(np.longdouble(1)) / 2**29)
    sin, cos, root = np.sin(x), np.cos(x), np.sqrt(np.longdouble(0.5))
    for k in range(1, 8):
        turned = eighth >= k
        sin, cos = (
            np.where(turned, (sin + cos) * root, sin),
            np.where(turned, (cos - sin) * root, cos),
        )
    return r * cos, r * sin


def words_to_sweep():
    """All exponents, both ends densely, and random ones."""
    generator = np.random.default_rng(0)
    ends = np.arange(4096)
    powers = np.concatenate([2**k + np.arange(-3, 4) for k in range(3, 32)])
    thirds = np.concatenate([2**k // 3 + np.arange(-3, 4) for k in range(4, 34)])
    every = np.concatenate(
        [ends, 2**32 - 1 - ends, powers, thirds, generator.integers(0, 2**32, 200_000)]
    )
    return every[(every >= 0) & (every < 2**32)].astype(np.uint32)


def test_scalar_transform_is_accurate_everywhere(cores):
    radius = words_to_sweep()
    angle = np.random.default_rng(1).permutation(words_to_sweep())
    for values, wanted in zip(cores.box_muller(radius, angle), exact(radius, angle), strict=True):
        spacing = np.spacing(np.abs(wanted).astype(np.float32)).astype(np.float64)
        # Cancellation in the oracle's angle addition is absolute, far below float32's last place.
        oracle = 1e-18
        assert (np.abs(values - wanted) <= 4 * spacing + oracle).all()
        assert np.isfinite(values).all() and (values != 0).all()
    doubles = zip(cores.box_muller_double(radius, angle), exact(radius, angle), strict=True)
    for values, wanted in doubles:
        assert (np.abs(values - wanted) <= 8 * np.spacing(np.abs(values)) + 1e-17).all()


def test_extremes_of_the_transform(cores):
    largest = np.sqrt(66 * np.log(2))
    even, odd = cores.box_muller(np.uint32([0, 2**32 - 1]), np.uint32([0, 0]))
    assert even[0] == np.float32(largest) and largest > 6.76
    assert 0 < even[1] < 2e-5 and 0 < odd[1] < odd[0] < 1e-8
    for angle, signs in ((0, "++"), (2**30, "-+"), (2**31, "--"), (3 * 2**30, "+-")):
        even, odd = cores.box_muller(np.uint32([5]), np.uint32([angle]))
        assert ("+" if even[0] > 0 else "-") + ("+" if odd[0] > 0 else "-") == signs


def test_transform_is_symmetric(cores):
    """Half a turn negates the values bit for bit; mirrored angle words mirror them."""
    radius, angle = words_to_sweep(), np.random.default_rng(2).permutation(words_to_sweep())
    even, odd = cores.box_muller(radius, angle)
    mirrored_even, mirrored_odd = cores.box_muller(radius, ~angle)
    np.testing.assert_allclose(even, mirrored_even, rtol=1e-6)
    np.testing.assert_allclose(odd, -mirrored_odd, rtol=1e-6)
    turned_even, turned_odd = cores.box_muller(radius, angle + np.uint32(2**31))
    assert np.array_equal(even, -turned_even) and np.array_equal(odd, -turned_odd)


@pytest.mark.slow
def test_every_radius_word(cores):
    edges = range(0, 2**32 + 1, 2**27)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(cores.sweep_radius, edges[:-1], edges[1:]))
    error, smallest, largest, increase = (np.array(column) for column in zip(*parts, strict=True))
    assert error.max() <= 2 and increase.max() <= 1
    assert smallest.min() > 1e-5 and largest.max() == np.float32(np.sqrt(66 * np.log(2)))


# --- consistency of the package ----------------------------------------------------------------


def test_reference_equals_the_scalar_core(cores):
    key = random.make_key(77, 5)
    words = random.philox_words(key, 4096).numpy().astype(np.uint32).reshape(-1, 2)
    pairs = np.stack(cores.box_muller_double(words[:, 0].copy(), words[:, 1].copy()), -1)
    values = ops.normal(key, (4096,), dtype=torch.float64, backend="reference").numpy()
    np.testing.assert_allclose(values, pairs.reshape(-1), rtol=1e-14)
