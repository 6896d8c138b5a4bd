"""VectorQuantizer against a plain PyTorch re-implementation, and each of its options alone."""

import copy
import functools
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize, one_hot
from torch.utils._python_dispatch import TorchDispatchMode

import fastgen
from fastgen import nn, ops
from fastgen.nn import _kmeans

BUFFERS = ("ema_counts", "usage_counts", "idle_steps", "initialized")


def state(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def vq(*args, **options):
    return nn.VectorQuantizer(*args, **{"dtype": torch.float64, **options})


class Plain:
    """The quantizer written with one-hot matrices, from the paper."""

    def __init__(self, codes, codebook, metric, decay=0.9, epsilon=1e-3, beta=0.4, weight=0.7):
        self.metric, self.ema = metric, codebook == "ema"
        self.decay, self.epsilon, self.beta, self.weight = decay, epsilon, beta, weight
        self.codes = codes.clone().requires_grad_(not self.ema)
        self.n, self.m = torch.ones_like(codes[:, 0]), codes.clone()

    def __call__(self, x):
        e = self.codes
        if self.metric == "cosine":
            x, e = x / x.norm(dim=1, keepdim=True), e / e.norm(dim=1, keepdim=True)
        hot = one_hot(torch.cdist(x.detach(), e.detach()).argmin(1), e.shape[0]).to(x.dtype)
        q = hot @ e
        loss = self.beta * (x - q.detach()).square().mean()
        if self.ema:
            self.n = self.decay * self.n + (1 - self.decay) * hot.sum(0)
            self.m = self.decay * self.m + (1 - self.decay) * hot.T @ x.detach()
            total = self.n.sum()
            smooth = (self.n + self.epsilon) / (total + len(self.n) * self.epsilon) * total
            self.codes = self.m / smooth[:, None]
            if self.metric == "cosine":
                self.codes = self.codes / self.codes.norm(dim=1, keepdim=True)
        else:
            loss = loss + self.weight * (x.detach() - q).square().mean()
        return x + (q - x).detach(), loss


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_twenty_training_steps_equal_plain_pytorch(codebook, metric):
    options = {"decay": 0.9, "epsilon": 1e-3, "commitment_weight": 0.4, "codebook_weight": 0.7}
    layer = vq(12, 5, codebook=codebook, metric=metric, **options)
    plain = Plain(layer.codebook.detach(), codebook, metric)
    ours = torch.nn.Linear(6, 5).double()
    theirs = copy.deepcopy(ours)
    learned = [] if layer.ema else [layer.codebook], [] if layer.ema else [plain.codes]
    optimizers = [
        torch.optim.Adam([*encoder.parameters(), *codes], lr=0.03)
        for encoder, codes in zip((ours, theirs), learned, strict=True)
    ]
    target = torch.randn(40, 5, dtype=torch.float64)
    for step in range(20):
        data = torch.randn(40, 6, dtype=torch.float64)
        q1, _, loss1 = layer(ours(data).view(8, 5, 5))
        q2, loss2 = plain(theirs(data))
        torch.testing.assert_close(loss1, loss2)
        torch.testing.assert_close(q1.reshape(40, 5), q2)
        for optimizer, q, loss in zip(optimizers, (q1, q2), (loss1, loss2), strict=True):
            optimizer.zero_grad()
            ((q.reshape(40, 5) - target).square().mean() + loss).backward()
            optimizer.step()
        codes = plain.codes.detach()
        torch.testing.assert_close(layer.codebook.detach(), codes, msg=f"codes, step {step}")
        torch.testing.assert_close(ours.weight, theirs.weight, msg=f"encoder, step {step}")
    if codebook == "ema":
        torch.testing.assert_close(layer.ema_counts, plain.n)
        torch.testing.assert_close(layer.ema_sums, plain.m)


def test_codes_without_vectors_stay_where_they_start():
    layer = nn.VectorQuantizer(8, 3, epsilon=1e-9)
    with torch.no_grad():
        layer._set_codes(
            layer.codebook + torch.tensor([0.0, 50.0, 0.0]) * (torch.arange(8) > 0)[:, None]
        )
    before = layer.codebook.clone()
    for _ in range(10):
        layer(torch.randn(20, 3))
    torch.testing.assert_close(layer.codebook[1:], before[1:])
    assert not torch.equal(layer.codebook[0], before[0])


def test_gradient_is_straight_through_and_loss_is_equation_three():
    layer = vq(6, 4, codebook="gradient", commitment_weight=0.3, codebook_weight=2.0)
    x = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    quantized, indices, loss = layer(x)
    e = layer.codebook[indices]
    torch.testing.assert_close(quantized, e)
    torch.testing.assert_close(loss, 2.3 * (x - e).square().mean())
    cotangent = torch.randn_like(x)
    (grad,) = torch.autograd.grad(quantized, x, cotangent, retain_graph=True)
    torch.testing.assert_close(grad, cotangent)
    grad_x, grad_codes = torch.autograd.grad(loss, (x, layer.codebook))
    torch.testing.assert_close(grad_x, 0.3 * 2 * (x - e).detach() / x.numel())
    expected = torch.zeros_like(grad_codes)
    expected.index_put_((indices,), 2.0 * 2 * (e - x).detach() / x.numel(), accumulate=True)
    torch.testing.assert_close(grad_codes, expected)


@pytest.mark.parametrize("revive_after", [None, 2], ids=["plain", "revived"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("make", [nn.VectorQuantizer, functools.partial(nn.ResidualVQ, 2)])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_adamw_leaves_codes_that_no_loss_reaches(make, metric, backend, revive_after):
    """Their gradient is None; with zeros the optimizer's weight decay would move them."""
    if make is not nn.VectorQuantizer and metric == "cosine":
        pytest.skip("residual stages are Euclidean")
    for options, reached in (
        ({}, lambda result: result.quantized.square().sum()),
        ({"codebook_weight": 0.0}, lambda result: result.quantized.square().sum() + result.loss),
    ):
        layer = make(8, 3, codebook="gradient", metric=metric, revive_after=revive_after, **options)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
        before = [p.detach().clone() for p in layer.parameters()]
        with fastgen.use_backend(backend):
            result = layer(torch.randn(50, 3, requires_grad=True), torch.rand(50) < 0.8)
            reached(result).backward()
        optimizer.step()
        for parameter, old in zip(layer.parameters(), before, strict=True):
            assert parameter.grad is None and torch.equal(parameter, old)


@pytest.mark.parametrize("options", [{}, {"codebook": "gradient"}, {"metric": "cosine"}])
def test_eval_changes_no_buffer_and_agrees_with_encode_and_decode(options):
    layer = vq(9, 4, kmeans_init=True, revive_after=1, **options).eval()
    before = state(layer)
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    quantized, indices, _ = layer(x)
    assert_same_state(before, state(layer))
    assert torch.equal(layer.encode(x), indices)
    torch.testing.assert_close(layer.decode(indices), quantized)


def test_cosine_ignores_the_length_of_vectors_and_codes():
    layer = vq(7, 4, codebook="gradient", metric="cosine").eval()
    x = torch.randn(11, 4, dtype=torch.float64)
    quantized, indices, loss = layer(x)
    with torch.no_grad():
        layer.codebook.mul_(torch.rand(7, 1) + 0.5)
    other = layer(x * (torch.rand(11, 1) + 0.5))
    assert torch.equal(indices, other.indices)
    assert torch.equal(indices, (normalize(x) @ normalize(layer.codebook).T).argmax(1))
    torch.testing.assert_close((quantized, loss), (other.quantized, other.loss))
    torch.testing.assert_close(quantized.norm(dim=1), torch.ones(11, dtype=torch.float64))


def test_cosine_codes_stay_at_unit_length_when_their_statistics_die_out():
    layer = nn.VectorQuantizer(4, 2, metric="cosine", decay=0.0)
    for _ in range(3):
        layer(torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(layer.codebook.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_masked_vectors_count_nowhere(codebook, metric):
    layer = vq(6, 4, codebook=codebook, metric=metric)
    alone = copy.deepcopy(layer)
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    mask = torch.rand(3, 5) < 0.6
    x[~mask] = math.nan
    x.requires_grad_()
    valid = x[mask].detach().requires_grad_()
    quantized, indices, loss = layer(x, mask)
    expected = alone(valid)
    torch.testing.assert_close(loss, expected.loss)
    assert torch.equal(indices[mask], expected.indices) and (indices[~mask] == -1).all()
    assert torch.equal(quantized[mask], expected.quantized) and (quantized[~mask] == 0).all()
    assert torch.equal(layer.decode(indices)[~mask], torch.zeros_like(quantized[~mask]))
    for key in state(layer):
        torch.testing.assert_close(state(layer)[key], state(alone)[key])
    (quantized.square().sum() + loss).backward()
    (expected.quantized.square().sum() + expected.loss).backward()
    torch.testing.assert_close(x.grad[mask], valid.grad)
    assert metric == "cosine" or (x.grad[~mask] == 0).all()
    if codebook == "gradient":
        torch.testing.assert_close(layer.codebook.grad, alone.codebook.grad)


def test_a_batch_of_padding_alone_has_no_loss_and_keeps_the_codes():
    layer = vq(6, 4, revive_after=1, epsilon=1e-12)
    before = state(layer)
    result = layer(torch.randn(2, 3, 4, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.bool))
    assert result.loss == 0
    assert_same_state(state(layer), before)
    layer.ema_counts[3] = 0
    layer.idle_steps[3] = 5
    code = layer.ema_sums[3].clone()
    layer(torch.randn(2, 3, 4, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.bool))
    assert layer.idle_steps[3] == 6, "a code was revived from padding"
    assert torch.equal(layer.ema_sums[3], code)


def batch_of(kind):
    """x (20, 3), its mask, and which rows count."""
    x, mask, valid = torch.randn(20, 3, dtype=torch.float64), None, torch.zeros(20).bool()
    if kind == "empty":
        x, valid = x[:0], valid[:0]
    elif kind == "masked":
        mask = valid
    elif kind == "NaN":
        x[:, 1] = math.nan
    elif kind == "infinite":
        x[:, 0], x[::2, 2] = math.inf, -math.inf
    elif kind == "masked or NaN":
        mask = torch.arange(20) < 11
        x[:11, 2] = math.nan
    else:
        x[[0, 4, 11]] = torch.tensor([math.nan, math.inf, -math.inf], dtype=x.dtype)[:, None]
        valid = x.isfinite().all(1)
        if kind == "some masked, some not finite":
            mask = torch.arange(20) > 2
            valid = valid & mask
    return x, mask, valid


NOTHING_COUNTS = ["empty", "masked", "NaN", "infinite", "masked or NaN"]
SOME_COUNT = ["some not finite", "some masked, some not finite"]
STATES = [
    {"decay": 0.0},
    {"decay": 0.5, "revive_after": 1, "revive_threshold": 1.0},
    {"decay": 0.0, "metric": "cosine"},
    {"decay": 0.99, "metric": "cosine", "revive_after": 1, "revive_threshold": 1.0},
    {"decay": 0.0, "codebook": "gradient", "revive_after": 1, "revive_threshold": 1.0},
]


@pytest.mark.parametrize("kind", NOTHING_COUNTS)
@pytest.mark.parametrize("options", STATES)
def test_a_batch_in_which_nothing_counts_changes_nothing(options, kind):
    """Not after any number of them: averages that decay to nothing would take the codes along."""
    layer = vq(5, 3, **options)
    layer(torch.randn(50, 3, dtype=torch.float64))
    before = state(layer)
    for _ in range(20):
        layer(*batch_of(kind)[:2])
    after = state(layer)
    del before["idle_steps"], after["idle_steps"]
    assert_same_state(after, before)


@pytest.mark.parametrize("kind", SOME_COUNT)
@pytest.mark.parametrize("options", STATES)
def test_rows_that_are_not_finite_count_no_more_than_padding(options, kind):
    layer = vq(5, 3, **options)
    alone = copy.deepcopy(layer)
    for step in range(5):
        x, mask, valid = batch_of(kind)
        for each, arguments in ((layer, (x, mask)), (alone, (x[valid],))):
            torch.manual_seed(step)
            each(*arguments)
        for key, value in state(alone).items():
            torch.testing.assert_close(state(layer)[key], value)
    assert all(value.isfinite().all() for value in state(layer).values())


@pytest.mark.parametrize("make", [nn.VectorQuantizer, functools.partial(nn.ResidualVQ, 2)])
def test_rows_that_overflow_leave_the_codebook_finite(make):
    layer = make(4, 3, decay=0.0, revive_after=1, kmeans_init=True)
    for scale in (3e38, 1e38, 1e20, 1.0):
        layer(scale * torch.randn(200, 3).clamp(-1, 1))
        assert all(value.isfinite().all() for value in layer.state_dict().values()), scale


@pytest.mark.parametrize("kind", NOTHING_COUNTS)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_kmeans_starts_from_the_first_batch_in_which_something_counts(metric, kind):
    layer = vq(4, 3, kmeans_init=True, metric=metric)
    other = copy.deepcopy(layer)
    for _ in range(2):
        layer(*batch_of(kind)[:2])
        layer.init_from(*batch_of(kind)[:2])
        assert not layer.initialized
    x, mask, valid = batch_of("some masked, some not finite")
    for each, arguments in ((layer, (x, mask)), (other, (x[valid],))):
        torch.manual_seed(1)
        each(*arguments)
        assert each.initialized
    for key, value in state(other).items():
        torch.testing.assert_close(state(layer)[key], value)


def test_residual_stages_start_from_a_batch_in_which_something_counts():
    layer = nn.ResidualVQ(3, 4, 3, kmeans_init=True, revive_after=1, dtype=torch.float64)
    for kind in (*NOTHING_COUNTS, *SOME_COUNT):
        x, mask, _ = batch_of(kind)
        layer(x, mask)
        assert all(stage.initialized == (kind in SOME_COUNT) for stage in layer.quantizers)
        assert all(value.isfinite().all() for value in state(layer).values())


def test_a_code_that_gets_none_stays_until_its_count_is_as_small_as_epsilon():
    """As the class says: it has shrunk by N_i / (N_i + epsilon), and at last is zero."""
    layer = vq(2, 3, decay=0.99)
    with torch.no_grad():
        layer._set_codes(torch.tensor([[-5.0, 0, 0], [50, 0, 0]], dtype=torch.float64))
    x = torch.tensor([[-5.0, 0, 0]], dtype=torch.float64).expand(20, 3)
    for step in range(1, 3001):
        layer(x)
        if step in (1, 100, 1000, 1150, 1500, 3000):
            count = 0.99**step
            shrunk = count / (count + 1e-5) * (1 + 2e-5 / float(layer.ema_counts.sum()))
            torch.testing.assert_close(layer.ema_counts[1], torch.tensor(count).double())
            torch.testing.assert_close(float(layer.codebook[1, 0]), 50 * shrunk)
    assert layer.codebook[1, 0] < 1e-6


def test_channel_first_is_a_view_of_the_same_thing():
    last, first = vq(6, 4), vq(6, 4, channel_first=True)
    first.load_state_dict(last.state_dict())
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    mask = torch.rand(2, 3, 5) < 0.7
    got, expected = first(x, mask), last(x.movedim(1, -1), mask)
    assert torch.equal(got.quantized, expected.quantized.movedim(-1, 1))
    assert torch.equal(got.indices, expected.indices) and torch.equal(got.loss, expected.loss)
    assert first.decode(got.indices).shape == x.shape
    assert torch.equal(first.decode(got.indices).movedim(1, -1), last.decode(got.indices))
    assert torch.equal(first.eval().encode(x), last.eval().encode(x.movedim(1, -1)))


def test_shapes_down_to_none():
    layer = nn.VectorQuantizer(5, 3)
    for shape in [(3,), (1, 3), (0, 3), (2, 0, 3), (2, 1, 4, 3)]:
        quantized, indices, loss = layer(torch.randn(shape))
        assert quantized.shape == shape and indices.shape == shape[:-1] and loss.shape == ()
    assert all(value.isfinite().all() for value in state(layer).values())


def blobs(centres, each, spread=0.05):
    noise = spread * torch.randn(each, *centres.shape, dtype=centres.dtype)
    return (centres + noise).flatten(0, 1)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_kmeans_start_is_a_fixed_point_of_lloyd_and_seeded(codebook, metric):
    x = torch.randn(200, 3, dtype=torch.float64) + 1
    options = {"codebook": codebook, "metric": metric, "kmeans_iters": 100}
    layer = vq(10, 3, kmeans_init=True, **options)
    other = copy.deepcopy(layer)
    for each in (layer, other):
        torch.manual_seed(7)
        each.init_from(x)
    assert_same_state(state(layer), state(other))
    rows = normalize(x) if metric == "cosine" else x
    counts, sums = ops.vq_codebook_stats(rows, layer.eval().encode(x), 10)
    means = sums / counts[:, None]
    if metric == "cosine":
        means = normalize(means)
    assert counts.min() > 0 and layer.initialized
    torch.testing.assert_close(layer.codes().detach(), means)
    torch.testing.assert_close(layer.ema_counts, counts)
    if codebook == "ema":
        torch.testing.assert_close(layer.ema_sums, means * counts[:, None])


def test_kmeans_runs_in_the_first_training_batch_only():
    layer = nn.VectorQuantizer(4, 2, codebook="gradient", kmeans_init=True)
    far = torch.randn(30, 2) + 100
    layer.eval()(far)
    assert not layer.initialized and layer.codebook.abs().max() < 10
    layer.train()
    assert layer(torch.empty(0, 2)).loss == 0 and not layer.initialized
    layer(far)
    codes = layer.codebook.detach().clone()
    assert layer.initialized and (codes - 100).abs().max() < 10
    layer(far - 200)
    assert torch.equal(layer.codebook, codes)


def test_kmeans_takes_masked_batches_and_batches_smaller_than_the_codebook():
    layer = nn.VectorQuantizer(16, 2, kmeans_init=True)
    x = torch.randn(9, 2)
    mask = torch.arange(9) % 2 == 0
    x[~mask] = math.nan
    layer.init_from(x, mask)
    assert (layer.codebook[:, None] == x[mask]).all(-1).any(1).all(), "a code left the batch"
    result = layer(x, mask)
    assert torch.equal(result.quantized[mask], x[mask])


def test_kmeans_start_survives_the_state_dict():
    trained = nn.VectorQuantizer(4, 2, kmeans_init=True)
    fresh, loaded = copy.deepcopy(trained), copy.deepcopy(trained)
    trained(torch.randn(30, 2))
    loaded.load_state_dict(trained.state_dict())
    x = torch.randn(30, 2) + 100
    assert torch.equal(loaded(x).indices, trained(x).indices)
    assert_same_state(state(loaded), state(trained))
    loaded.load_state_dict(fresh.state_dict())
    loaded(x)
    assert loaded.codebook.min() > 50
    plain = nn.VectorQuantizer(4, 2)
    plain.load_state_dict(fresh.state_dict())
    assert plain.initialized, "codes that no k-means will replace are the start"


def far_code(codebook="ema", **options):
    """A layer whose code 2 gets no vector of randn's size."""
    layer = vq(4, 3, codebook=codebook, decay=0.5, revive_threshold=0.2, **options)
    codes = layer.codebook.detach().clone()
    codes[2] = 1e3
    layer._set_codes = torch.no_grad()(layer._set_codes)
    layer._set_codes(codes)
    return layer


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_an_unused_code_is_replaced_by_a_vector_of_the_batch(codebook):
    layer = far_code(codebook, revive_after=3)
    plain = far_code(codebook)
    plain.load_state_dict(layer.state_dict())
    idle = 0
    for _ in range(20):
        x = torch.randn(50, 3, dtype=torch.float64, requires_grad=True)
        result = layer(x)
        plain(x.detach())
        (result.quantized.square().sum() + result.loss).backward()
        floor = 0.2 * plain.ema_counts.mean()
        idle = idle + 1 if plain.ema_counts[2] < floor else 0
        if idle == 3:
            break
        assert_same_state(
            {k: v for k, v in state(layer).items() if k != "idle_steps"},
            {k: v for k, v in state(plain).items() if k != "idle_steps"},
        )
        assert layer.idle_steps[2] == idle
    assert idle == 3
    chosen = (x == layer.codebook[2]).all(1)
    assert chosen.any(), "code 2 is no vector of the batch"
    torch.testing.assert_close(layer.ema_counts[2], floor)
    others = torch.arange(4) != 2
    assert torch.equal(layer.codebook[others], plain.codebook[others])
    assert torch.equal(layer.ema_counts[others], plain.ema_counts[others])
    assert (layer.idle_steps == 0).all()
    if codebook == "ema":
        torch.testing.assert_close(layer.ema_sums[2], floor * layer.codebook[2])
        layer(torch.randn(50, 3, dtype=torch.float64))
        assert layer.codebook[2].abs().max() < 10


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_revival_leaves_the_gradients_of_its_step_alone(metric):
    plain = vq(8, 3, codebook="gradient", metric=metric)
    revived = vq(8, 3, codebook="gradient", metric=metric, revive_after=1, revive_threshold=1.0)
    revived.load_state_dict(plain.state_dict())
    x = torch.randn(5, 3, dtype=torch.float64)
    for layer in (plain, revived):
        layer(x).loss.backward()
    assert not torch.equal(revived.codebook, plain.codebook), "no code was revived"
    torch.testing.assert_close(revived.codebook.grad, plain.codebook.grad, rtol=0, atol=0)


def test_revival_is_seeded_and_takes_no_padding():
    x = torch.randn(5, 3, dtype=torch.float64)
    mask = torch.tensor([False, True, False, True, False])
    layers = [far_code(revive_after=1) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer in layers:
        torch.manual_seed(3)
        for _ in range(6):
            layer(x, mask)
    assert_same_state(state(layers[0]), state(layers[1]))
    assert layers[0].codebook.abs().max() < 10


def test_revival_brings_the_whole_codebook_into_use():
    centres = 10 * torch.randn(32, 8)
    layer = nn.VectorQuantizer(32, 8, decay=0.8, revive_after=5)
    dead = copy.deepcopy(layer)
    dead.revive_after = None
    for _ in range(150):
        x = blobs(centres, 8)
        layer(x)
        dead(x)
    for each in (layer, dead):
        each.reset_usage()
        each(blobs(centres, 8))
    assert layer.usage() > 0.9 > 0.7 > dead.usage()


def sample_rows(rows, mask, count):
    valid = _kmeans.finite_rows(rows, mask)
    found = _kmeans.candidates(rows, valid, _kmeans.agree(valid.sum(), count, sync=False))
    assert (found[:, -1] == 1).all()
    return found[:, :-1]


def test_random_rows_are_distinct_valid_and_cover_the_batch():
    rows = torch.arange(23.0)[:, None]
    mask = torch.rand(23) < 0.6
    valid = set(rows[mask].flatten().tolist())
    seen = set()
    for _ in range(200):
        assert len(set(sample_rows(rows, None, 23).flatten().tolist())) == 23
        picked = sample_rows(rows, mask, 5).flatten().tolist()
        assert len(set(picked)) == 5
        seen |= set(picked)
    assert seen == valid
    assert set(sample_rows(rows[:2], None, 9).flatten().tolist()) == {0.0, 1.0}


def test_usage_and_perplexity_of_an_interval():
    layer = nn.VectorQuantizer(4, 2, codebook="gradient")
    assert layer.usage() == 0 and layer.perplexity() == 0
    with torch.no_grad():
        layer.codebook.copy_(torch.tensor([[0.0, 0], [9, 0], [0, 9], [9, 9]]))
    layer(torch.tensor([[0.1, 0], [9, 0.2], [0, 9.1], [8, 9]]))
    torch.testing.assert_close(
        (layer.usage(), layer.perplexity()), (torch.tensor(1.0), torch.tensor(4.0))
    )
    layer.reset_usage()
    layer(torch.zeros(8, 2))
    layer(torch.tensor([[9.0, 0]] * 4))
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    torch.testing.assert_close(layer.usage(), torch.tensor(0.5))
    torch.testing.assert_close(layer.perplexity(), torch.tensor(math.exp(entropy)))
    assert layer.usage_counts.tolist() == [8, 4, 0, 0]


def test_a_vector_that_is_not_finite_shows_in_the_loss_and_spares_the_codes():
    layer = nn.VectorQuantizer(4, 3, revive_after=1)
    x = torch.randn(20, 3)
    x[4, 1] = math.nan
    x[9, 2] = math.inf
    for _ in range(5):
        assert not layer(x).loss.isfinite()
    assert layer.codebook.isfinite().all() and layer.ema_sums.isfinite().all()


class NoReadBack(TorchDispatchMode):
    """Fails on what makes the host wait for the device, or has a shape that depends on values."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "bincount")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        assert not name.startswith(self.FORBIDDEN), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"codebook": "gradient"}, {"metric": "cosine"}])
def test_no_step_reads_back_from_the_device(options):
    layer = nn.VectorQuantizer(8, 4, kmeans_init=True, revive_after=2, **options)
    mask = torch.rand(6, 5) < 0.8
    chosen = fastgen.explain("vq_codebook_stats", torch.ones(1, 4), torch.zeros(1).long(), 8).chosen
    if chosen == "reference":
        pytest.skip("the reference looks at the indices on the host, to check their range")
    layer(torch.randn(6, 5, 4), mask)  # the start asks once whether there was a vector
    with NoReadBack():
        for _ in range(3):
            x = torch.randn(6, 5, 4, requires_grad=True)
            result = layer(x, mask)
            (result.quantized.sum() + result.loss).backward()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReadBack():
        float(torch.ones(()))


COMPILED = [
    {},
    {"codebook": "gradient", "revive_after": 2},
    {"metric": "cosine", "kmeans_init": True, "kmeans_iters": 2, "revive_after": 2},
]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("options", COMPILED, ids=["ema", "gradient", "cosine"])
def test_compiled_training_equals_eager(options, compiler):
    torch._dynamo.reset()
    eager = vq(6, 4, **options)
    layer = copy.deepcopy(eager)
    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(layer, fullgraph=True, backend=compiler)
        for step, tokens in enumerate((10, 10, 13)):
            x = torch.randn(2, tokens, 4, dtype=torch.float64, requires_grad=True)
            mask = torch.rand(2, tokens) < 0.8
            grads = []
            for each in (eager, compiled):
                torch.manual_seed(step)
                result = each(x, mask)
                loss = result.quantized.square().sum() + result.loss
                grads.append((result, torch.autograd.grad(loss, x)))
            torch.testing.assert_close(grads[0], grads[1])
            for key, value in state(eager).items():
                torch.testing.assert_close(
                    state(layer)[key], value, msg=lambda m, k=key: f"{k}: {m}"
                )
        eager.eval(), layer.eval()
        torch.testing.assert_close(compiled(x), eager(x))


def test_state_dict_is_as_documented():
    keys = {"codebook", "ema_counts", "ema_sums", "usage_counts", "idle_steps", "initialized"}
    for options in ({}, {"kmeans_init": True, "revive_after": 3, "metric": "cosine"}):
        assert set(nn.VectorQuantizer(4, 3, **options).state_dict()) == keys
    gradient = nn.VectorQuantizer(4, 3, codebook="gradient")
    assert set(gradient.state_dict()) == keys - {"ema_sums"}
    assert [name for name, _ in gradient.named_parameters()] == ["codebook"]
    assert not list(nn.VectorQuantizer(4, 3).parameters())
    assert gradient.state_dict()._metadata[""]["version"] == 1
    assert "codebook='gradient'" in repr(gradient) and "4, 3" in repr(gradient)


def test_state_dict_and_deepcopy_continue_bit_for_bit(tmp_path):
    layer = nn.VectorQuantizer(6, 4, kmeans_init=True, revive_after=2)
    batches = torch.randn(6, 20, 4)
    for x in batches[:3]:
        layer(x)
    torch.save(layer.state_dict(), tmp_path / "vq.pt")
    resumed = nn.VectorQuantizer(6, 4, kmeans_init=True, revive_after=2)
    resumed.load_state_dict(torch.load(tmp_path / "vq.pt", weights_only=True))
    copied = copy.deepcopy(layer)
    for each in (layer, resumed, copied):
        torch.manual_seed(5)
        for x in batches[3:]:
            each(x)
    assert_same_state(state(layer), state(resumed))
    assert_same_state(state(layer), state(copied))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_quantized_at_the_precision_of_the_codebook(dtype):
    layer = nn.VectorQuantizer(16, 4)
    wide = copy.deepcopy(layer)
    x = torch.randn(64, 4).to(dtype)
    result, expected = layer(x), wide(x.float())
    assert result.quantized.dtype == dtype and result.loss.dtype == torch.float32
    assert torch.equal(result.indices, expected.indices)
    assert torch.equal(result.quantized, expected.quantized.to(dtype))
    assert_same_state(state(layer), state(wide))


def test_autocast_keeps_the_statistics_in_float32():
    encoder = torch.nn.Linear(4, 4)
    layer, plain = nn.VectorQuantizer(16, 4), nn.VectorQuantizer(16, 4)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(64, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = encoder(x)
        result = layer(hidden)
        (encoder(result.quantized).square().mean() + result.loss).backward()
    assert hidden.dtype == torch.bfloat16 and result.loss.dtype == torch.float32
    plain(hidden.detach())
    assert_same_state(state(layer), state(plain))
    assert layer.ema_sums.dtype == torch.float32 and x.grad.isfinite().all()


def test_half_modules_keep_their_statistics_wide():
    for options in ({}, {"codebook": "gradient"}):
        layer = nn.VectorQuantizer(8, 4, **options)
        layer(torch.randn(9, 4)).loss.backward() if not layer.ema else None
        before = state(layer)
        layer.bfloat16()
        assert layer.ema_counts.dtype == torch.float32
        assert layer.codebook.dtype == (torch.float32 if layer.ema else torch.bfloat16)
        assert torch.equal(layer.ema_counts, before["ema_counts"])
        result = layer(torch.randn(9, 4, dtype=torch.bfloat16))
        assert result.quantized.dtype == torch.bfloat16 and result.loss.isfinite()
        built = nn.VectorQuantizer(8, 4, dtype=torch.bfloat16, **options)
        assert built.ema_counts.dtype == torch.float32
        assert layer.double().ema_counts.dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_codes": 0}, ValueError, "num_codes: expected a positive int, got 0"),
        ({"num_codes": 2.0}, TypeError, "num_codes: expected a positive int, got float"),
        ({"dim": -1}, ValueError, "dim: expected a positive int, got -1"),
        ({"codebook": "EMA"}, ValueError, "codebook: expected one of ema, gradient, got 'EMA'"),
        ({"metric": "dot"}, ValueError, "metric: expected one of euclidean, cosine, got 'dot'"),
        ({"decay": 1.5}, ValueError, r"decay: expected a number in \[0, 1\], got 1.5"),
        ({"decay": math.nan}, ValueError, r"decay: expected a number in \[0, 1\], got nan"),
        ({"decay": "1"}, TypeError, "decay: expected a number, got str"),
        ({"epsilon": 0}, ValueError, "epsilon: expected a positive number, got 0"),
        ({"commitment_weight": -1}, ValueError, "commitment_weight: .* got -1"),
        ({"codebook_weight": math.inf}, ValueError, "codebook_weight: .* got inf"),
        ({"kmeans_iters": 0}, ValueError, "kmeans_iters: expected a positive int, got 0"),
        ({"revive_after": 0}, ValueError, "revive_after: expected a positive int, got 0"),
        ({"revive_threshold": 2}, ValueError, r"revive_threshold: expected a number in \[0, 1\]"),
    ],
)
def test_bad_options_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        nn.VectorQuantizer(**{"num_codes": 4, "dim": 3, **arguments})


def test_bad_inputs_are_named():
    layer, first = nn.VectorQuantizer(4, 3), nn.VectorQuantizer(4, 3, channel_first=True)
    before = state(layer)
    with pytest.raises(TypeError, match="x: expected a Tensor, got list"):
        layer([1.0])
    with pytest.raises(TypeError, match="x: expected dtype float32.* got int64"):
        layer(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x: expected shape \(..., 3\), got \(3, 2\)"):
        layer(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"x: expected \(B, 3, ...\), got shape \(3,\)"):
        first(torch.zeros(3))
    with pytest.raises(ValueError, match=r"x: expected shape \(B, 3, ...\), got \(2, 4, 3\)"):
        first.encode(torch.zeros(2, 4, 3))
    with pytest.raises(TypeError, match="mask: expected dtype bool, got float32"):
        layer(torch.zeros(2, 3), torch.ones(2))
    with pytest.raises(ValueError, match=r"mask: expected shape \(2,\).* got \(2, 3\)"):
        layer(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="indices: expected dtype int64, got int32"):
        layer.decode(torch.zeros(2, dtype=torch.int32))
    with pytest.raises(IndexError):
        layer.decode(torch.tensor([4]))
    assert_same_state(before, state(layer))


def test_two_ranks_hold_the_codebook_of_one_process(two_ranks):
    for output in two_ranks(Path(__file__).with_name("two_ranks.py"), timeout=120):
        assert "all checks ran" in output, output
