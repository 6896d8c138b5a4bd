"""ResidualVQ against stages of VectorQuantizer written out, and its own options."""

import copy

import pytest
import torch

from fastgen import nn


def rvq(*args, **options):
    return nn.ResidualVQ(*args, **{"dtype": torch.float64, **options})


def written_out(stages, x):
    """The stages one after another, each as a VectorQuantizer of its own."""
    residual, indices, loss = x, [], 0
    for stage in stages:
        quantized, index, stage_loss = stage(residual)
        residual = residual - quantized.detach()
        indices.append(index)
        loss = loss + stage_loss
    return x + (x - residual - x).detach(), torch.stack(indices, -1), loss


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_training_equals_the_stages_written_out(codebook):
    options = {"codebook": codebook, "decay": 0.8}
    layer = rvq(3, 8, 4, **options)
    stages = [nn.VectorQuantizer(8, 4, dtype=torch.float64, **options) for _ in range(3)]
    for stage, ours in zip(stages, layer.quantizers, strict=True):
        stage.load_state_dict(ours.state_dict())
    for _ in range(10):
        x = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True)
        got, expected = layer(x), written_out(stages, x)
        torch.testing.assert_close(tuple(got), expected)
        cotangent = torch.randn_like(x)
        grads = [
            torch.autograd.grad((q * cotangent).sum() + loss, x, retain_graph=True)
            for q, _, loss in (got, expected)
        ]
        torch.testing.assert_close(grads[0], grads[1])
        for stage, ours in zip(stages, layer.quantizers, strict=True):
            for key, value in stage.state_dict().items():
                torch.testing.assert_close(ours.state_dict()[key], value)
        if codebook == "gradient":
            ours = torch.autograd.grad(got.loss, layer.parameters())
            theirs = torch.autograd.grad(expected[2], [stage.codebook for stage in stages])
            torch.testing.assert_close(ours, theirs)


def test_gradient_passes_straight_through_once():
    layer = rvq(5, 8, 4)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn_like(x)
    (grad,) = torch.autograd.grad(layer(x).quantized, x, cotangent)
    torch.testing.assert_close(grad, cotangent)


def test_encode_and_decode_agree_with_forward_for_any_number_of_stages():
    layer = rvq(4, 16, 3).eval()
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    for stages in (1, 2, 4):
        quantized, indices, _ = layer(x, num_stages=stages)
        assert indices.shape == (2, 7, stages)
        assert torch.equal(layer.encode(x, num_stages=stages), indices)
        torch.testing.assert_close(layer.decode(indices), quantized)
    assert torch.equal(layer.encode(x), indices)


def test_each_stage_brings_the_output_closer():
    layer = rvq(4, 32, 3, kmeans_init=True, kmeans_iters=20)
    x = torch.randn(500, 3, dtype=torch.float64)
    layer(x)
    layer.eval()
    errors = [(layer(x, num_stages=n).quantized - x).square().mean() for n in (1, 2, 3, 4)]
    assert all(later < 0.6 * earlier for earlier, later in zip(errors, errors[1:], strict=False))


def test_half_inputs_keep_small_residuals():
    layer = nn.ResidualVQ(6, 64, 2, kmeans_init=True)
    wide = copy.deepcopy(layer)
    x = torch.randn(400, 2, dtype=torch.bfloat16)
    torch.manual_seed(1)
    got = layer(x)
    torch.manual_seed(1)
    expected = wide(x.float())
    assert got.quantized.dtype == torch.bfloat16 and got.loss.dtype == torch.float32
    assert torch.equal(got.indices, expected.indices) and torch.equal(got.loss, expected.loss)


def test_masked_vectors_count_in_no_stage():
    layer = rvq(3, 8, 4)
    alone = copy.deepcopy(layer)
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    mask = torch.rand(3, 5) < 0.6
    x[~mask] = float("nan")
    got, expected = layer(x, mask), alone(x[mask])
    torch.testing.assert_close((got.loss, got.quantized[mask]), (expected.loss, expected.quantized))
    assert torch.equal(got.indices[mask], expected.indices) and (got.indices[~mask] == -1).all()
    assert (got.quantized[~mask] == 0).all()
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[key], value)


def test_channel_first():
    last, first = rvq(3, 8, 4), rvq(3, 8, 4, channel_first=True)
    first.load_state_dict(last.state_dict())
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    first.eval(), last.eval()
    got, expected = first(x), last(x.movedim(1, -1))
    assert torch.equal(got.quantized, expected.quantized.movedim(-1, 1))
    assert torch.equal(got.indices, expected.indices) and got.indices.shape == (2, 3, 5, 3)
    torch.testing.assert_close(first.decode(got.indices), got.quantized)
    assert torch.equal(first.encode(x), got.indices)


def test_quantize_dropout_cuts_whole_samples_in_training():
    layer = rvq(4, 8, 3, quantize_dropout=0.5)
    x = torch.randn(400, 6, 3, dtype=torch.float64)
    before = copy.deepcopy(layer)
    quantized, indices, loss = layer(x)
    used = indices >= 0
    assert torch.equal(used, used[:, :1].expand_as(used)), "a sample's vectors use other stages"
    count = used[:, 0].sum(-1)
    assert torch.equal(used[:, 0], torch.arange(4) < count[:, None])
    share = torch.bincount(count, minlength=5) / 400
    # n is uniform in 1..4 for the half that drops, and 4 for the rest.
    expected = torch.tensor([0, 0.125, 0.125, 0.125, 0.625])
    assert (share - expected).abs().max() < 4 * (0.25 / 400) ** 0.5
    torch.testing.assert_close(before.decode(indices), quantized)
    stage_counts = torch.stack([stage.usage_counts.sum() for stage in layer.quantizers])
    assert torch.equal(stage_counts, used.sum((0, 1)))
    residual, total = x, 0
    for i, stage in enumerate(before.quantizers):
        e = stage.lookup(indices[..., i])
        uses = used[..., i]
        total = total + 0.25 * (residual[uses] - e[uses]).square().mean()
        residual = residual - e
    torch.testing.assert_close(loss, total)
    assert (layer.eval()(x).indices >= 0).all()


def test_usage_is_given_for_each_stage():
    layer = nn.ResidualVQ(2, 4, 3)
    layer(torch.randn(50, 3), num_stages=1)
    assert layer.usage().shape == layer.perplexity().shape == (2,)
    assert layer.usage()[0] > 0 and layer.usage()[1] == 0
    layer.reset_usage()
    assert (layer.usage() == 0).all() and (layer.perplexity() == 0).all()


def test_eval_changes_no_buffer():
    layer = nn.ResidualVQ(2, 4, 3, kmeans_init=True, revive_after=1, quantize_dropout=1.0).eval()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer(torch.randn(50, 3))
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


def test_shapes_down_to_none():
    layer = nn.ResidualVQ(2, 5, 3, quantize_dropout=0.5)
    for shape in [(3,), (1, 3), (0, 3), (2, 0, 3), (2, 1, 4, 3)]:
        quantized, indices, loss = layer(torch.randn(shape))
        assert quantized.shape == shape and indices.shape == (*shape[:-1], 2) and loss.shape == ()
    assert all(value.isfinite().all() for value in layer.state_dict().values())


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compiled_training_equals_eager(compiler):
    torch._dynamo.reset()
    eager = rvq(3, 6, 4, quantize_dropout=0.5, revive_after=2)
    layer = copy.deepcopy(eager)
    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(layer, fullgraph=True, backend=compiler)
        for step, samples in enumerate((6, 6, 9)):
            x = torch.randn(samples, 5, 4, dtype=torch.float64, requires_grad=True)
            results = []
            for each in (eager, compiled):
                torch.manual_seed(step)
                result = each(x)
                loss = result.quantized.square().sum() + result.loss
                results.append((*result, *torch.autograd.grad(loss, x)))
            torch.testing.assert_close(results[0], results[1])
            for key, value in eager.state_dict().items():
                torch.testing.assert_close(layer.state_dict()[key], value)


def test_state_dict_continues_bit_for_bit():
    options = {"kmeans_init": True, "revive_after": 1, "quantize_dropout": 0.5}
    layer = nn.ResidualVQ(2, 6, 3, **options)
    keys = {"codebook", "ema_counts", "ema_sums", "usage_counts", "idle_steps", "initialized"}
    assert set(layer.state_dict()) == {f"quantizers.{i}.{key}" for i in (0, 1) for key in keys}
    batches = torch.randn(6, 20, 3)
    for x in batches[:3]:
        layer(x)
    resumed = nn.ResidualVQ(2, 6, 3, **options)
    resumed.load_state_dict(layer.state_dict())
    for each in (layer, resumed):
        torch.manual_seed(5)
        for x in batches[3:]:
            each(x)
    for key, value in layer.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="num_quantizers: expected a positive int, got 0"):
        nn.ResidualVQ(0, 4, 3)
    with pytest.raises(ValueError, match=r"quantize_dropout: expected a number in \[0, 1\], got 2"):
        nn.ResidualVQ(2, 4, 3, quantize_dropout=2)
    with pytest.raises(ValueError, match="metric: expected one of euclidean, got 'cosine'"):
        nn.ResidualVQ(2, 4, 3, metric="cosine")
    with pytest.raises(ValueError, match="num_codes"):
        nn.ResidualVQ(2, -4, 3)
    layer = nn.ResidualVQ(2, 4, 3)
    with pytest.raises(ValueError, match=r"x: expected shape \(..., 3\), got \(2, 5\)"):
        layer(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="num_stages: expected 1 to 2 stages, got 3"):
        layer(torch.zeros(2, 3), num_stages=3)
    with pytest.raises(ValueError, match="indices: expected 1 to 2 stages, got 3"):
        layer.decode(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="indices: expected dtype int64, got float32"):
        layer.decode(torch.zeros(2, 2))
