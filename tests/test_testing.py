"""The assertions of fastgen.testing fail when they should."""

import pytest
import torch

from fastgen import backends, ops, testing
from fastgen.testing import CASES, Maker, Sample, assert_accurate, assert_matches_reference

CASE = next(case for case in CASES if case.id == "affine_coupling-tanh-forward")
SHAPE = (4, 6)


def accurate(actual, plain=None, exact=None, **options):
    exact = torch.linspace(-3, 3, 64, dtype=torch.float64) if exact is None else exact
    plain = exact.float() if plain is None else plain
    assert_accurate(actual, plain, exact, **options)


VALUES = torch.linspace(-3, 3, 64, dtype=torch.float64).float()


def changed(index, value):
    result = VALUES.clone()
    result[index] = value
    return result


def test_equal_values_pass():
    accurate(VALUES)


@pytest.mark.parametrize(
    "actual, message",
    [
        (changed(7, VALUES[7] * (1 + 1e-5)), "error .* times the allowed one"),
        (changed(7, float("nan")), "NaN in other places"),
        (changed(7, float("inf")), "error|infinities"),
        (VALUES.double(), "dtype"),
        (VALUES.half(), "dtype"),
        (VALUES.view(8, 8), "shape"),
        (VALUES[:-1], "shape"),
        (-VALUES, "error .* times the allowed one"),
        (torch.zeros_like(VALUES), "error .* times the allowed one"),
    ],
)
def test_wrong_values_fail(actual, message):
    with pytest.raises(AssertionError, match=f"loss: .*({message})"):
        accurate(actual, what="loss")


def test_a_finite_value_where_plain_pytorch_has_none_fails():
    for special in float("nan"), float("inf"), float("-inf"):
        plain = changed(3, special)
        exact = plain.double()
        accurate(plain.clone(), plain, exact)
        with pytest.raises(AssertionError, match="in other places"):
            accurate(changed(3, 1.0), plain, exact)


def test_the_sign_of_an_infinity_matters():
    plain = changed(3, float("inf"))
    with pytest.raises(AssertionError, match="infinities in other places"):
        accurate(changed(3, float("-inf")), plain, plain.double())


def test_the_allowed_error_is_a_multiple_of_that_of_plain_pytorch():
    exact = torch.full((8,), 1.0, dtype=torch.float64)
    plain = exact.float() + 1e-3
    accurate(exact.float() - 1.9e-3, plain, exact)
    with pytest.raises(AssertionError, match="times the allowed one"):
        accurate(exact.float() - 2.1e-3, plain, exact)
    with pytest.raises(AssertionError, match="times the allowed one"):
        accurate(exact.float() - 1.9e-3, plain, exact, factor=1.0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_the_floor_is_in_units_in_the_last_place(dtype):
    exact = torch.full((8,), 1.0, dtype=torch.float64)
    step = torch.finfo(dtype).eps
    accurate((exact + 4 * step).to(dtype), exact.to(dtype), exact, ulps=4)
    with pytest.raises(AssertionError, match="times the allowed one"):
        accurate((exact + 5 * step).to(dtype), exact.to(dtype), exact, ulps=4)


def test_float64_is_held_to_its_own_precision():
    exact = torch.linspace(1, 2, 16, dtype=torch.float64)
    accurate(exact * (1 + 1e-14), exact, exact)
    with pytest.raises(AssertionError, match="times the allowed one"):
        accurate(exact * (1 + 1e-12), exact, exact)


def test_integers_must_be_equal():
    indices = torch.arange(5)
    assert_accurate(indices, indices, indices)
    with pytest.raises(AssertionError, match="integer results differ"):
        assert_accurate(indices + 1, indices, indices)


def test_empty_results_pass():
    empty = torch.empty(0, 3)
    assert_accurate(empty, empty, empty.double())


# --- assert_matches_reference ------------------------------------------------------------------


@pytest.fixture
def wrong():
    """Puts the reference, spoilt by `spoil(reference, *args)`, in place of the op's "cpu"."""
    op = backends.ops()[CASE.op]
    original = op.implementations["cpu"]
    reference = op.implementations["reference"].function

    def install(spoil):
        op.implement("cpu", lambda *args: spoil(reference, *args))

    yield install
    op.implementations["cpu"] = original


def check(dtype=torch.float32):
    assert_matches_reference(CASE, "cpu", dtype, SHAPE)


def test_the_reference_itself_passes(wrong):
    wrong(lambda reference, *args: reference(*args))
    check()


class _ZeroGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.zeros_like(grad)


def _wrong_value(reference, *args):
    y, log_det = reference(*args)
    return y + 1e-4, log_det


def _wrong_dtype(reference, *args):
    y, log_det = reference(*args)
    return y, log_det.double()


def _wrong_gradient(reference, x, *args):
    return reference(_ZeroGradient.apply(x), *args)


def _modified_input(reference, x, *args):
    results = reference(x.clone(), *args)
    x.detach().mul_(2)
    return results


def _input_written_and_restored(reference, x, *args):
    results = reference(x.clone(), *args)
    x.detach().mul_(1)
    return results


def _one_output_missing(reference, *args):
    return reference(*args)[:1]


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (_wrong_value, AssertionError, "output 0: error"),
        (_wrong_dtype, AssertionError, "output 1: dtype"),
        (_wrong_gradient, AssertionError, "gradient of argument 0: error"),
        (_modified_input, AssertionError, "."),
        (_input_written_and_restored, AssertionError, "input 0 was modified"),
        (_one_output_missing, ValueError, "zip"),
    ],
)
def test_spoilt_backends_fail(wrong, spoil, error, message):
    wrong(spoil)
    with pytest.raises(error, match=message):
        check()


def test_an_unwritten_output_fails(wrong):
    """Fresh memory is NaN under the test configuration, so forgetting to write shows."""
    wrong(lambda reference, x, *args: (torch.empty_like(x), reference(x, *args)[1]))
    with pytest.raises(AssertionError, match="output 0: NaN in other places"):
        check()


# --- samples and layouts -----------------------------------------------------------------------


def test_every_dtype_gets_the_same_values_rounded():
    base = Maker(torch.float64, seed=3).randn(5, 4)
    for dtype in torch.float32, torch.float16, torch.bfloat16:
        assert torch.equal(Maker(dtype, seed=3).randn(5, 4), base.to(dtype))
    assert not torch.equal(Maker(torch.float64, seed=4).randn(5, 4), base)


def test_double_leaves_integers_alone():
    sample = Sample((torch.ones(2), torch.ones(2, dtype=torch.long), "exp"), {"eps": torch.ones(1)})
    doubled = sample.double()
    assert [a.dtype for a in doubled.args[:2]] == [torch.float64, torch.int64]
    assert doubled.args[2] == "exp"
    assert doubled.kwargs["eps"].dtype == torch.float64


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4, 5), (2, 3, 2, 2, 2)])
def test_relayouts_keep_the_values_and_change_the_layout(shape):
    t = torch.randn(shape)
    seen = {}
    for name, other in testing.relayouts(t):
        assert torch.equal(other, t)
        seen[name] = other
    assert seen["offset"].storage_offset() == 3
    assert not seen["strided"].is_contiguous()
    assert len(shape) < 2 or not seen["sliced"].is_contiguous()
    assert ("channels_last" in seen) == (len(shape) == 4)
    assert ("channels_last_3d" in seen) == (len(shape) == 5)


def test_gradients_are_those_of_random_cotangents():
    sample = CASE.sample((2, 3), torch.float64)
    first, again = (testing.gradients(CASE, sample, "reference", seed=1) for _ in range(2))
    other = testing.gradients(CASE, sample, "reference", seed=2)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_outputs_are_flat():
    x = torch.ones(2, 3)
    assert [type(t) for t in testing.outputs(x)] == [torch.Tensor]
    assert len(testing.outputs(ops.affine_coupling(x, x, x))) == 2
