"""fastgen.patch on vector-quantize-pytorch: every option against the library itself."""

import copy
import functools
import io
import itertools
import logging
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastgen
from fastgen.integrations import _library

library = pytest.importorskip("vector_quantize_pytorch")
from vector_quantize_pytorch import (  # noqa: E402
    GroupedResidualVQ,
    ResidualVQ,
    VectorQuantize,
)

from fastgen.integrations import _vq_rows  # noqa: E402
from fastgen.integrations import vector_quantize_pytorch as fused  # noqa: E402

SGD = functools.partial(torch.optim.SGD, lr=0.1)
LEARNABLE = {"learnable_codebook": True, "ema_update": False}
#: Float32 rounding through 20 steps, over one plus the largest value of a tensor. Rows nearly
#: opposite to their code amplify it: the rotation's reflection divides by |u + q|.
CLOSE = 5e-5

MASK = torch.arange(9) < torch.tensor([9, 4])[:, None]
TARGETS = torch.arange(18).view(2, 9) % 14 - 1

#: Options of VectorQuantize(dim=8, codebook_size=13) and of its call on (2, 9, 8).
OPTIONS = [
    ({}, {}),
    ({"rotation_trick": False}, {}),
    ({"commitment_weight": 0.0}, {}),
    ({"use_cosine_sim": True}, {}),
    ({"use_cosine_sim": True}, {"mask": MASK}),
    ({"kmeans_init": True}, {}),
    ({"kmeans_init": True, "use_cosine_sim": True}, {"mask": MASK}),
    ({"threshold_ema_dead_code": 1}, {}),
    ({"threshold_ema_dead_code": 1, "use_cosine_sim": True}, {"mask": MASK}),
    ({"heads": 2, "codebook_dim": 4}, {}),
    ({"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True}, {}),
    ({"heads": 2, "separate_codebook_per_head": True, "commitment_weight": 0.0}, {"mask": MASK}),
    ({"heads": 2, "kmeans_init": True, "commitment_weight": 0.0}, {"mask": MASK}),
    ({"codebook_dim": 4}, {}),
    ({"codebook_dim": 4, "layernorm_after_project_in": True}, {}),
    (LEARNABLE, {}),
    ({**LEARNABLE, "rotation_trick": False}, {"mask": MASK}),
    ({**LEARNABLE, "sync_update_v": 0.3}, {}),
    ({**LEARNABLE, "route_gradients_to_input": False}, {}),
    ({**LEARNABLE, "in_place_codebook_optimizer": SGD}, {}),
    ({**LEARNABLE, "in_place_codebook_optimizer": SGD}, {"mask": MASK}),
    ({"orthogonal_reg_weight": 10, "orthogonal_reg_max_codes": 5}, {}),
    ({"orthogonal_reg_weight": 10, "orthogonal_reg_active_codes_only": True}, {}),
    ({**LEARNABLE, "codebook_diversity_loss_weight": 0.3}, {}),
    ({"freeze_codebook": True, "codebook_diversity_loss_weight": 0.3, "heads": 2}, {}),
    ({**LEARNABLE, "commitment_use_cross_entropy_loss": True, "heads": 2}, {"mask": MASK}),
    ({**LEARNABLE}, {"indices": TARGETS}),
    ({"heads": 2, "separate_codebook_per_head": True, **LEARNABLE}, {"indices": TARGETS, "h": 2}),
    ({"affine_param": True}, {}),
    ({"affine_param": True, **LEARNABLE}, {"mask": MASK}),
    ({"directional_reparam": True, "threshold_ema_dead_code": 1}, {}),
    ({"vq_bridge": nn.Linear(8, 8)}, {}),
    ({"return_zeros_for_masked_padding": False}, {"mask": MASK}),
    ({"manual_ema_update": True}, {}),
    ({}, {"lens": torch.tensor([3, 9])}),
    ({}, {"freeze_codebook": True}),
    ({}, {"ema_update": False}),
    ({}, {"accum_ema_update": True}),
    ({}, {"ema_update_weight": torch.linspace(0, 1, 13)}),
    ({}, {"ema_update_weight": lambda sums, counts: torch.sigmoid(counts)}),
    ({}, {"return_loss_breakdown": True}),
]

#: Options of a residual quantizer with 3 stages and of its call.
RESIDUAL = [
    (ResidualVQ, {}, {}),
    (ResidualVQ, {}, {"mask": MASK, "return_all_codes": True}),
    (ResidualVQ, {"codebook_dim": 4}, {}),
    (ResidualVQ, {"codebook_size": (7, 5, 9), "use_cosine_sim": True}, {}),
    (ResidualVQ, {"shared_codebook": True}, {"mask": MASK}),
    (ResidualVQ, {"shared_codebook": True, **LEARNABLE, "threshold_ema_dead_code": 0.1}, {}),
    (ResidualVQ, {"quantize_dropout": True}, {"return_all_codes": True}),
    (ResidualVQ, {"num_quantizers": 6, "quantize_dropout_multiple_of": 2}, {"dropout": True}),
    (ResidualVQ, {"diveq": True, "threshold_ema_dead_code": 1}, {}),
    (ResidualVQ, {**LEARNABLE, "quant_grad_frac": 0.3}, {}),
    (ResidualVQ, {"beam_size": 2}, {"mask": MASK}),
    (ResidualVQ, {"implicit_neural_codebook": True}, {}),
    (GroupedResidualVQ, {"groups": 2}, {"return_all_codes": True}),
    (GroupedResidualVQ, {"groups": 2, "quantize_dropout": True}, {"mask": MASK}),
]


def name_of(value):
    if isinstance(value, dict):
        return "-".join(value) or "plain"
    return getattr(value, "__name__", None)


def pair(cls, seed=0, **options):
    """The library's module, and its patched twin."""
    torch.manual_seed(seed)
    plain = cls(**{"dim": 8, "codebook_size": 13, **options})
    patched = copy.deepcopy(plain)
    assert fastgen.patch(patched).replaced
    return plain, patched


def tensors(results):
    for result in results:
        if isinstance(result, torch.Tensor):
            yield result.detach().clone()
        else:
            yield from tensors(result)


def run(module, shape=(2, 9, 8), steps=20, seed=1, dtype=torch.float32, rate=0.01, **call):
    """All that `steps` steps give: results, gradients, and the state and random state after."""
    torch.manual_seed(seed)
    weights = list(module.parameters())
    optimizer = torch.optim.SGD(weights, rate) if weights else None
    seen = []
    for _ in range(steps):
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        module.zero_grad()
        results = module(x, **call)
        seen += tensors(results)
        if module.training:
            loss = results[2] if len(results) > 2 else results[1]
            ((results[0] * torch.randn_like(results[0])).sum() + loss.sum()).backward()
            seen += [t.grad.clone() for t in (x, *weights) if t.grad is not None]
            if optimizer is not None:
                optimizer.step()
    return [*seen, *tensors(module.state_dict().values()), torch.get_rng_state()]


def assert_close(seen, expected, tolerance=CLOSE):
    assert len(seen) == len(expected)
    for a, b in zip(seen, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if a.is_floating_point():
            least = tolerance * (1 + b.abs().max().item()) if b.numel() else 0
            torch.testing.assert_close(a, b, rtol=0, atol=least, equal_nan=True)
        else:
            assert torch.equal(a, b)


def arguments(call):
    call = dict(call)
    if call.pop("h", None):
        call["indices"] = torch.stack((call["indices"], call["indices"].flip(0)), -1)
    return call


@pytest.mark.parametrize("call_options", OPTIONS, ids=lambda o: "-".join(map(name_of, o)))
def test_a_layer_trains_as_before(call_options):
    options, call = call_options
    plain, patched = pair(VectorQuantize, **options)
    assert fastgen.explain(patched, torch.ones(2, 9, 8), **arguments(call)).chosen == "fastgen"
    assert_close(run(patched, **arguments(call)), run(plain, **arguments(call)))
    plain.eval()
    patched.eval()
    assert_close(run(patched, steps=1, **arguments(call)), run(plain, steps=1, **arguments(call)))


@pytest.mark.parametrize("cls, options, call", RESIDUAL, ids=name_of)
def test_residual_quantizers_train_as_before(cls, options, call):
    call = dict(call)
    if call.pop("dropout", False):
        options = {**options, "quantize_dropout": True}
        call["rand_quantize_dropout_fixed_seed"] = 3
    plain, patched = pair(cls, **{"num_quantizers": 3, **options})
    assert_close(run(patched, **call), run(plain, **call))
    plain.eval()
    patched.eval()
    assert_close(run(patched, steps=1, **call), run(plain, steps=1, **call))


LAYOUTS = {
    "channels last": ({}, (2, 12, 8)),
    "channels first": ({"channel_last": False}, (2, 8, 12)),
    "image": ({"accept_image_fmap": True}, (2, 8, 3, 4)),
    "volume": ({"accept_3d_fmap": True}, (2, 8, 3, 2, 2)),
    "vectors": ({}, (5, 8)),
}
HEADS = [
    {},
    {"codebook_dim": 3},
    {"heads": 2, "codebook_dim": 4},
    {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True},
]


@pytest.mark.parametrize("rotation", [True, False], ids=["rotation", "straight-through"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, rotation):
    options, shape = LAYOUTS[layout]
    for heads, training, grad, turned in itertools.product(HEADS, *[(True, False)] * 3):
        plain, patched = pair(VectorQuantize, rotation_trick=rotation, **options, **heads)
        x = torch.randn(shape)
        x = x.mT.contiguous().mT if turned else x
        seen = []
        for module in (plain, patched):
            y = x.detach().requires_grad_(grad)
            results = module.train(training)(y)
            if training:
                (results[0].square().sum() + results[2]).backward()
            seen.append((results, y.grad))
        for a, b in zip(seen[0][0], seen[1][0], strict=True):
            assert a.requires_grad == b.requires_grad and a.stride() == b.stride()
        assert (seen[0][1] is None) == (seen[1][1] is None)
        assert_close(*[list(tensors([*r, *([] if g is None else [g])])) for r, g in seen])


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-6), (torch.bfloat16, 0.02), (torch.float16, 0.003)]
)
@pytest.mark.parametrize(
    "options", [{}, {"rotation_trick": False}, LEARNABLE, HEADS[2], {"use_cosine_sim": True}]
)
def test_other_dtypes(options, dtype, tolerance):
    plain, patched = (module.to(dtype) for module in pair(VectorQuantize, **options))
    # The library compares in float32 whatever the dtype.
    seen, expected = (run(m, steps=1, dtype=dtype) for m in (patched, plain))
    assert_close(seen, expected, tolerance)


def test_under_autocast():
    plain, patched = pair(VectorQuantize, codebook_dim=4)
    x = torch.randn(2, 9, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected, seen = plain(x), patched(x)
    assert [t.dtype for t in seen] == [t.dtype for t in expected]
    # On CPUs autocast reaches into the library's codebook, so that its codes are rounded.
    torch.testing.assert_close(seen[0], expected[0], rtol=0.05, atol=0.05)
    seen[2].backward()
    assert x.grad is not None


def nearest_in_float64(rows, codes):
    return torch.cdist(rows.double(), codes.double(), compute_mode="donot_use_mm_for_euclid_dist")


@pytest.mark.parametrize("offset, wrong", [(0.0, 0.001), (1000.0, 1.0)])
def test_indices_are_the_nearest(offset, wrong):
    plain, patched = pair(VectorQuantize, dim=16, codebook_size=256)
    x = 0.5 * torch.randn(1, 4000, 16) + offset
    for module in (plain, patched):
        module.codebook = 0.5 * torch.randn(256, 16, generator=torch.manual_seed(2)) + offset
    _, expected, _ = plain.eval()(x)
    _, seen, _ = patched.eval()(x)
    distances = nearest_in_float64(x[0], patched.codebook)
    assert torch.equal(seen[0], distances.argmin(1))
    differ = (seen != expected)[0]
    assert differ.float().mean() <= wrong
    chosen = distances.gather(1, torch.stack((seen[0], expected[0]), 1))[differ].square()
    # What the library's x^2 + y^2 - 2xy can tell apart in float32.
    rounding = 8 * torch.finfo(torch.float32).eps * x.square().sum(-1).max()
    assert (chosen[:, 1] - chosen[:, 0] <= rounding).all()
    if offset:
        assert differ.float().mean() > 0.1, "the library should fail here"


def test_cosine_follows_the_inner_product_where_codes_are_not_unit_vectors():
    plain, patched = pair(VectorQuantize, use_cosine_sim=True, dim=3)
    codes = torch.randn(13, 3) * torch.logspace(-3, 1, 13)[:, None]
    codes[4] = 0
    x = torch.cat((torch.randn(1, 200, 3), torch.zeros(1, 3, 3)), 1)
    for module in (plain, patched):
        module.codebook = codes
    expected, seen = plain.eval()(x), patched.eval()(x)
    assert torch.equal(seen[1], expected[1]) and len(seen[1].unique()) > 3


def hard_rows():
    """Rows without a direction by the library's measure, opposite to their code, or not finite."""
    x = torch.randn(1, 40, 8)
    x[0, :4] = 0
    x[0, 4:8] *= 1e-8
    x[0, 8:12] = -torch.linspace(0.1, 4, 4)[:, None] * torch.ones(8) / 8**0.5
    x[0, 12, 3] = float("nan")
    x[0, 13] = float("inf")
    return x


@pytest.mark.parametrize("rotation", [True, False])
@pytest.mark.parametrize("codebook_size", [1, 13])
def test_hard_rows(codebook_size, rotation):
    plain, patched = pair(
        VectorQuantize, codebook_size=codebook_size, rotation_trick=rotation, freeze_codebook=True
    )
    codes = torch.randn(codebook_size, 8)
    codes[-1] = torch.ones(8) / 8**0.5
    codes[0] *= 1e-8 if codebook_size > 1 else 1
    x, seen = hard_rows(), []
    weights = torch.randn_like(x)
    for module in (plain, patched):
        module.codebook = codes
        y = x.clone().requires_grad_()
        quantized, _, _ = module(y)
        (quantized * weights).nan_to_num().sum().backward()
        seen.append((quantized.detach(), y.grad))
    (expected, expected_grad), (quantized, grad) = seen
    opposite, others, finite = (
        slice(8, 12),
        [*range(8), *range(12, 40)],
        [*range(8), *range(14, 40)],
    )
    close = {"rtol": 1e-5, "atol": 2e-6, "equal_nan": True}
    torch.testing.assert_close(quantized[0, others], expected[0, others], **close)
    torch.testing.assert_close(grad[0, finite], expected_grad[0, finite], rtol=1e-4, atol=1e-4)
    if codebook_size == 1:
        # u + q is nothing but rounding there, and the library's rotation misses the code by it.
        torch.testing.assert_close(quantized[0, opposite], codes.expand(4, 8), **close)
        assert rotation == ((expected[0, opposite] - codes).abs().max() > 1e-3)


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}], ids=name_of)
def test_what_is_not_finite_does_not_spread(options):
    plain, patched = pair(VectorQuantize, **options)
    x = torch.randn(1, 50, 8)
    x[0, 7, 1] = float("nan")
    for module in (plain, patched):
        module(x)
    assert plain.codebook.isnan().any(1).all()
    assert not patched.codebook[1:].isnan().any()
    _, seen, _ = patched(x.nan_to_num())
    # code 0 holds NaN by now
    assert not (seen == 0).any() and len(seen.unique()) > 1


@pytest.mark.parametrize("rotation", [True, False])
def test_results_may_be_changed_in_place(rotation):
    grads = []
    for module in pair(VectorQuantize, rotation_trick=rotation):
        x = torch.randn(1, 50, 8, generator=torch.manual_seed(1), requires_grad=True)
        quantized, _, loss = module(x)
        quantized.mul_(2).relu_()
        (quantized.sum() + loss).backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_gradients_are_no_less_exact_than_the_librarys():
    torch.manual_seed(0)
    x, codes, g = (torch.randn(3000, 8) for _ in range(3))
    flat = torch.arange(3000)
    grads = []
    for dtype, function in (
        (torch.float64, _vq_rows._composed),
        (torch.float32, _vq_rows._composed),
        (torch.float32, _vq_rows.assign),
    ):
        rows = x.clone().to(dtype).requires_grad_()
        quantized, squares = function(
            rows, codes.to(dtype), flat, None, _vq_rows.ROTATION, pull_codes=False
        )
        ((quantized * g.to(dtype)).sum() + squares).backward()
        grads.append(rows.grad.double())
    theirs, ours = ((grad - grads[0]).abs().mean() for grad in grads[1:])
    assert ours <= 1.2 * theirs


@pytest.mark.parametrize("route", [_vq_rows.PLAIN, _vq_rows.STRAIGHT_THROUGH, _vq_rows.ROTATION])
@pytest.mark.parametrize("pull", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_gradients_of_both_orders(route, pull, masked, monkeypatch):
    monkeypatch.setattr(_vq_rows, "CPU_ELEMENTS", 12)
    torch.manual_seed(0)
    flat, mask = torch.tensor([3, 0, 3, 1, 1]), torch.tensor([1, 1, 0, 1, 0]) > 0
    values = [torch.randn(5, 4).double(), torch.randn(6, 4).double(), torch.randn(5, 4).double()]
    results = []
    for function in (_vq_rows._composed, _vq_rows.assign):
        rows, table, g = (v.clone().requires_grad_() for v in values)
        out, squares = function(rows, table, flat, mask if masked else None, route, pull)
        loss = (out * g).sum() + squares.square()
        once = torch.autograd.grad(loss, (rows, table), retain_graph=True, allow_unused=True)
        again = torch.autograd.grad(loss, (rows, table), create_graph=True, allow_unused=True)
        total = sum(t.square().sum() for t in again if t is not None)
        twice = torch.autograd.grad(total, (rows, table, g), allow_unused=True)
        inputs = (rows, table, rows, table, rows, table, g)
        grads = [
            torch.zeros_like(v) if t is None else t.detach().clone()
            for t, v in zip((*once, *again, *twice), inputs, strict=True)
        ]
        results.append([out.detach(), squares.detach(), *grads])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(
    "options, call",
    [
        ({"commitment_use_cross_entropy_loss": True}, {}),
        ({"codebook_diversity_loss_weight": 1.0, "codebook_diversity_temperature": 2.0}, {}),
        ({}, {"indices": TARGETS}),
    ],
    ids=name_of,
)
def test_losses_over_all_codes_have_the_gradient_of_the_codes_they_used(options, call):
    x = torch.randn(2, 9, 8)

    def grad(module, **frozen):
        y = x.clone().requires_grad_()
        *_, loss = module(y, **call, **frozen)
        loss.backward()
        return y.grad

    plain, patched = pair(VectorQuantize, decay=0.1, **options)
    right = grad(copy.deepcopy(plain), freeze_codebook=True)
    torch.testing.assert_close(grad(patched), right, rtol=1e-4, atol=1e-6)
    # The library's averages overwrite the codes before backward reads them.
    assert (grad(plain) - right).abs().max() > 1e-2 * right.abs().max()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.itemsize)
        return result


@pytest.mark.parametrize(
    "options, call",
    [
        ({}, {}),
        (LEARNABLE, {}),
        ({"kmeans_init": True, "use_cosine_sim": True}, {}),
        ({"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True}, {}),
        ({"codebook_diversity_loss_weight": 1.0}, {}),
        ({"commitment_use_cross_entropy_loss": True}, {}),
    ],
    ids=name_of,
)
def test_no_matrix_of_rows_and_codes(options, call, monkeypatch):
    monkeypatch.setattr(_vq_rows, "SCORES", 1 << 12)
    rows, codes = 512, 256
    plain, patched = pair(VectorQuantize, codebook_size=codes, **options)
    sizes = []
    for module in (plain, patched):
        x = torch.randn(2, rows // 2, 8, requires_grad=True)
        with Largest() as largest:
            quantized, _, loss = module(x, **call)
            (quantized.sum() + loss).backward()
        sizes.append(largest.elements)
    assert sizes[0] >= rows * codes
    # The rows with a coordinate more, or the codes so.
    assert sizes[1] <= max(rows, 2 * codes) * 9


def test_beam_search_updates_without_a_one_hot_matrix():
    plain, patched = pair(VectorQuantize, codebook_size=256)
    x, indices = torch.randn(2, 256, 8), torch.randint(0, 256, (2, 256))
    for mask in (None, torch.rand(2, 256) < 0.5):
        with Largest() as largest:
            patched.update_indices(x, indices, mask=mask)
        plain.update_indices(x, indices, mask=mask)
        assert largest.elements <= 512 * 9
    assert_close(list(patched.buffers()), list(plain.buffers()))


def test_quantizers_that_are_made_of_these():
    options = {"dim": 8, "codebook_size": 13, "num_codebooks": 3, "codebook_dim": 4}
    torch.manual_seed(0)
    plain = library.RandomProjectionQuantizer(**options)
    patched = copy.deepcopy(plain)
    fastgen.patch(patched)
    x = torch.randn(2, 9, 8)
    assert torch.equal(patched(x), plain(x))
    targets = torch.arange(54).view(2, 9, 3) % 13
    torch.testing.assert_close(patched(x, indices=targets), plain(x, indices=targets))
    levels = {"scales": (2, 4, 9), "channel_first": False, "kmeans_init": False}
    levels["threshold_ema_dead_code"] = 0
    assert_close(*map(run, reversed(pair(library.HierarchicalVQ, **levels))))
    grouped = GroupedResidualVQ(dim=8, codebook_size=13, num_quantizers=2, groups=2)
    fastgen.patch(grouped)
    assert "rvqs.0" in fastgen.explain(grouped, x).rejected["fastgen"]


def test_residual_feature_maps_of_any_size():
    plain, patched = pair(ResidualVQ, num_quantizers=2, accept_image_fmap=True)
    x = torch.randn(2, 8, 4, 6)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        plain(x)
    quantized, indices, losses, codes = patched.eval()(x, return_all_codes=True)
    assert quantized.shape == x.shape and indices.shape == (2, 4, 6, 2) and losses.shape == (2,)
    torch.testing.assert_close(codes.sum(0).movedim(-1, 1), quantized)


OWN_CODE = [
    (VectorQuantize, {"stochastic_sample_codes": True}, {}, "each score has its Gumbel noise"),
    (VectorQuantize, {"straight_through": True, "rotation_trick": False}, {}, "straight_through"),
    (VectorQuantize, {}, {"topk": 2}, "topk"),
    (ResidualVQ, {"num_quantizers": 2, "beam_size": 2}, {}, "beam search"),
    (ResidualVQ, {"num_quantizers": 2, "stochastic_sample_codes": True}, {}, "Gumbel"),
    (ResidualVQ, {"num_quantizers": 2, "implicit_neural_codebook": True}, {}, "codes of its own"),
]


@pytest.mark.parametrize("cls, options, call, reason", OWN_CODE, ids=name_of)
def test_runs_the_librarys_own_code(cls, options, call, reason, caplog):
    plain, patched = pair(cls, **options)
    explanation = fastgen.explain(patched, torch.ones(2, 9, 8), **call)
    assert explanation.chosen == "vector_quantize_pytorch"
    assert reason in explanation.rejected["fastgen"]
    _library.run_own_code.cache_clear()
    with caplog.at_level(logging.DEBUG, "fastgen"):
        seen = run(patched, steps=2, **call)
    assert any(reason in record.getMessage() for record in caplog.records)
    assert_close(seen, run(plain, steps=2, **call))


def test_sampling_is_the_librarys_only_in_training():
    _, patched = pair(VectorQuantize, stochastic_sample_codes=True)
    x = torch.ones(2, 9, 8)
    assert fastgen.explain(patched, x).chosen == "vector_quantize_pytorch"
    assert fastgen.explain(patched, x, sample_codebook_temp=0.0).chosen == "fastgen"
    assert fastgen.explain(patched.eval(), x).chosen == "fastgen"


WRONG = [
    ({"heads": 2, "codebook_dim": 4}, (2, 9, 8), {"mask": MASK}),
    ({"codebook_dim": 4}, (2, 9, 8), {"mask": MASK}),
    ({"accept_image_fmap": True}, (2, 8, 3, 3), {"mask": MASK}),
    ({"accept_image_fmap": True}, (2, 9, 8), {}),
    ({"accept_image_fmap": True, "commitment_use_cross_entropy_loss": True}, (2, 8, 3, 3), {}),
    ({}, (2, 9, 8), {"mask": MASK, "lens": torch.tensor([1, 2])}),
    ({}, (5, 8), {"mask": MASK}),
    ({}, (2, 3, 9, 8), {}),
    ({}, (2, 9, 8), {"indices": TARGETS[:, :3]}),
    ({"channel_last": False}, (2, 8, 9), {"lens": torch.tensor([1, 2])}),
]


@pytest.mark.parametrize("options, shape, call", WRONG, ids=name_of)
def test_what_is_an_error_stays_that_error(options, shape, call):
    plain, patched = pair(VectorQuantize, **options)
    errors = []
    for module in (plain, patched):
        with pytest.raises(Exception) as error:  # noqa: B017, PT011
            module(torch.randn(shape), **call)
        errors.append(error)
    assert errors[0].type is errors[1].type and str(errors[0].value) == str(errors[1].value)


def test_left_alone_with_a_reason():
    class Mine(VectorQuantize):
        pass

    def sampler(*args, **kwargs):
        return library.vector_quantize_pytorch.gumbel_sample(*args, **kwargs)

    options = {"dim": 8, "codebook_size": 13}
    model = nn.ModuleList([Mine(**options), VectorQuantize(**options), VectorQuantize(**options)])
    model[1]._codebook.gumbel_sample = sampler
    model[2]._codebook.register_forward_hook(lambda *_: None)
    report = fastgen.patch(model)
    assert [piece.path for piece in report.left] == ["0"]
    assert "a subclass of vector_quantize_pytorch" in report.left[0].reason
    x = torch.ones(2, 9, 8)
    for module, reason in ((model[1], "not the library's"), (model[2], "hooks")):
        assert reason in fastgen.explain(module, x).rejected["fastgen"]
    assert "scores of all codes" in fastgen.explain(model[1]._codebook, x).rejected["fastgen"]
    model[1]._codebook.__class__ = fused.Codebook
    assert "not a patched one" in fastgen.explain(model[1], x).rejected["fastgen"]
    fastgen.unpatch(model)
    assert [type(m) for m in model] == [Mine, VectorQuantize, VectorQuantize]
    assert type(model[2]._codebook) is fused.Codebook


def test_state_and_copies():
    plain, patched = pair(ResidualVQ, num_quantizers=2, shared_codebook=True)
    run(patched, steps=2)
    file = io.BytesIO()
    torch.save(patched.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))
    twin = copy.deepcopy(patched)
    assert type(twin) is fused.FusedResidualVQ
    assert twin.layers[0]._codebook is twin.layers[1]._codebook
    assert_close(run(twin, steps=3), run(plain, steps=3))
    patched.load_state_dict(plain.state_dict())
    fastgen.unpatch(patched)
    kinds = {type(module) for module in patched.modules()}
    assert fused.Codebook in kinds and not any(k.__name__.startswith("Fused") for k in kinds)
    assert_close(run(patched, steps=1), run(plain, steps=1))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_under_compile():
    plain, patched = pair(VectorQuantize, threshold_ema_dead_code=1)
    with pytest.raises(Exception, match="[Dd]ata.dependent"):
        torch.compile(plain, fullgraph=True, backend="eager")(torch.randn(2, 9, 8))
    torch._dynamo.reset()
    compiled = torch.compile(patched, backend="aot_eager")
    results = []
    for call, module in ((compiled, patched), (plain, plain)):
        torch.manual_seed(3)
        x = torch.randn(2, 9, 8, requires_grad=True)
        quantized, indices, loss = call(x)
        (quantized.square().sum() + loss).backward()
        results.append([quantized.detach(), indices, loss.detach(), x.grad, *module.buffers()])
    assert_close(*[list(tensors(r)) for r in results])


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_with_synchronized_codebooks(process_group):
    plain, patched = pair(
        VectorQuantize, sync_codebook=True, kmeans_init=True, threshold_ema_dead_code=1
    )
    assert_close(run(patched, steps=5), run(plain, steps=5))
    plain, patched = pair(
        VectorQuantize, sync_codebook=True, in_place_codebook_optimizer=SGD, **LEARNABLE
    )
    wrapped = nn.parallel.DistributedDataParallel(patched)
    assert fastgen.explain(wrapped).replaced
    assert_close(run(wrapped.module, steps=5), run(plain, steps=5))


def test_the_readmes_examples_run(readme_examples):
    names = re.compile(r"\b(VectorQuantize|ResidualVQ|GroupedResidualVQ)\b")
    examples = list(filter(names.search, readme_examples("vector-quantize-pytorch")))
    assert len(examples) == 13
    with fastgen.patch("vector_quantize_pytorch") as report:
        assert not report.left
        for code in examples:
            if "directional_reparam = True" in code:
                continue  # without threshold_ema_dead_code, which the library insists on
            scope = {}
            exec(code, scope)  # noqa: S102
            made = [m for m in scope.values() if isinstance(m, nn.Module)]
            assert made and all(fastgen.explain(module).replaced for module in made)
    assert type(VectorQuantize(dim=8, codebook_size=2)) is VectorQuantize


@pytest.mark.parametrize("swap", fused.LIBRARY.swaps, ids=lambda s: s.original.__name__)
def test_fingerprints(swap):
    if fused.LIBRARY.version != fused.LIBRARY.tested[-1]:
        pytest.skip(f"they are those of {fused.LIBRARY.tested[-1]}")
    assert _library.fingerprint(swap.original, *swap.relies_on) == swap.fingerprint
