"""fastgen.nn.InstanceNorm1d, 2d, 3d against torch.nn's."""

import pytest
import torch

from fastgen import backends, nn

SHAPES = {1: (4, 3, 17), 2: (4, 3, 9, 8), 3: (4, 3, 4, 5, 6)}


def pair(dims, **options):
    """Ours and torch's, with the same random parameters."""
    ours = getattr(nn, f"InstanceNorm{dims}d")(3, **options)
    theirs = getattr(torch.nn, f"InstanceNorm{dims}d")(3, **options)
    for p in theirs.parameters():
        torch.nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("dims", (1, 2, 3))
@pytest.mark.parametrize("affine", (False, True))
@pytest.mark.parametrize("track", (False, True))
@pytest.mark.parametrize("momentum", (0.1, 0.7, None))
def test_twenty_steps_and_eval_as_torch(dims, affine, track, momentum):
    options = {"affine": affine, "track_running_stats": track, "momentum": momentum}
    ours, theirs = pair(dims, **options)
    for _ in range(20):
        x = torch.randn(SHAPES[dims]) * 3 + 2
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        results = [m(leaf) for m, leaf in zip((ours, theirs), leaves, strict=True)]
        torch.testing.assert_close(*results)
        for y in results:
            y.square().mean().backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, atol=1e-6, rtol=1e-4)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer, rtol=1e-6, atol=1e-6)
    theirs.load_state_dict(ours.state_dict())
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dims", (1, 2, 3))
def test_unbatched_input(dims):
    ours, theirs = pair(dims, affine=True, track_running_stats=True)
    x = torch.randn(SHAPES[dims][1:])
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    assert ours.eval()(x).shape == x.shape


@pytest.mark.parametrize("dims", (1, 2, 3))
def test_runs_the_fused_op(dims):
    layer = pair(dims, affine=True)[0]
    backends.reset_calls()
    layer(torch.randn(SHAPES[dims]))
    layer(torch.randn(SHAPES[dims][1:]))
    assert backends.calls() == {("instance_norm", "cpu"): 2}


@pytest.mark.parametrize("training", (True, False))
def test_channels_last_is_kept(training):
    layer = pair(2, affine=True, track_running_stats=True)[0].train(training)
    x = torch.randn(SHAPES[2]).contiguous(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


def test_autocast_keeps_the_dtype_of_the_input():
    ours, theirs = pair(2, affine=True)
    x = torch.randn(SHAPES[2])
    with torch.autocast("cpu", torch.bfloat16):
        for value in x, x.bfloat16():
            y, expected = ours(value), theirs(value)
            assert y.dtype == expected.dtype == value.dtype
            torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_a_layer_in_another_dtype(dtype):
    ours, theirs = pair(2, affine=True, track_running_stats=True)
    x = torch.randn(SHAPES[2]).to(dtype)
    torch.testing.assert_close(ours.to(dtype)(x), theirs.to(dtype)(x))
    assert ours.running_mean.dtype == dtype


def test_compiles_whole():
    layer = pair(2, affine=True, track_running_stats=True)[0]
    twin = pair(2, affine=True, track_running_stats=True)[0]
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(SHAPES[2])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), twin(x))
    torch.testing.assert_close(layer.running_mean, twin.running_mean)


def test_empty_batch_leaves_the_running_statistics():
    layer = nn.InstanceNorm2d(3, track_running_stats=True)
    assert layer(torch.empty(0, 3, 4, 4)).shape == (0, 3, 4, 4)
    assert torch.equal(layer.running_mean, torch.zeros(3))


def test_a_single_spatial_element_is_refused_as_in_torch():
    x = torch.randn(2, 3, 1, 1)
    with pytest.raises(ValueError, match=r"more than 1 spatial element, got shape \(2, 3, 1, 1\)"):
        nn.InstanceNorm2d(3)(x)
    assert nn.InstanceNorm2d(3, track_running_stats=True).eval()(x).shape == x.shape


def test_wrong_shapes_are_refused_as_in_torch():
    with pytest.raises(ValueError, match="3D or 4D input"):
        nn.InstanceNorm2d(3)(torch.randn(2, 3))
    with pytest.raises(ValueError, match="match num_features"):
        nn.InstanceNorm2d(3, affine=True)(torch.randn(2, 4, 5, 5))


def test_repr_names_the_options():
    text = repr(nn.InstanceNorm2d(8, affine=True))
    assert text.startswith("InstanceNorm2d(8, eps=1e-05, momentum=0.1, affine=True")
