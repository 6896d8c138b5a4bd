"""fastgen.patch on diffusers."""

import copy

import pytest
import torch

import fastgen
from fastgen.integrations import _library

normalization = pytest.importorskip("diffusers.models.normalization")


def layer(groups, act="silu"):
    torch.manual_seed(0)
    return normalization.AdaGroupNorm(10, 8, groups, act_fn=act, eps=1e-4)


def run(norm, x, emb):
    leaves = [x.detach().requires_grad_(), emb.detach().requires_grad_()]
    y = norm(*leaves)
    norm.zero_grad()
    y.square().mean().backward()
    return [y, *(leaf.grad for leaf in leaves), *(p.grad for p in norm.parameters())]


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("act", ["silu", None])
@pytest.mark.parametrize(
    ("dtype", "close"),
    [
        (torch.float32, {"rtol": 1e-5, "atol": 5e-6}),
        (torch.float64, {"rtol": 1e-12, "atol": 1e-13}),
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_as_before(groups, act, dtype, close, memory_format):
    plain = layer(groups, act).to(dtype)
    patched = copy.deepcopy(plain)
    assert len(fastgen.patch(patched).replaced) == 1
    x = (3 + torch.randn(2, 8, 5, 6, dtype=dtype)).to(memory_format=memory_format)
    emb = torch.randn(2, 10, dtype=dtype)
    own = fastgen.explain(patched, x, emb)
    assert own.chosen == ("fastgen" if groups == 8 or x.is_contiguous() else "diffusers")
    for a, b in zip(run(plain, x, emb), run(patched, x, emb), strict=True):
        torch.testing.assert_close(b, a, **close)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (plain, patched)]
    for _ in range(20):
        for model, optimizer in zip((plain, patched), optimizers, strict=True):
            run(model, x, emb)
            optimizer.step()
    for a, b in zip(plain.parameters(), patched.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4 if dtype == torch.float32 else 1e-11, atol=1e-6)
    plain.load_state_dict(patched.state_dict())
    fastgen.unpatch(patched)
    assert type(patched) is normalization.AdaGroupNorm


def test_second_order():
    norm = layer(4).double()
    fastgen.patch(norm)
    x = torch.randn(2, 8, 3, 3, dtype=torch.double, requires_grad=True)
    emb = torch.randn(2, 10, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradgradcheck(norm, (x, emb))


def test_half_precision_and_compile():
    norm = layer(4)
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 10)
    expected = norm(x, emb)
    fastgen.patch(norm)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, emb), expected)
    y = copy.deepcopy(norm).bfloat16()(x.bfloat16(), emb.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)


def test_block_of_the_library():
    resnet = pytest.importorskip("diffusers.models.resnet")
    torch.manual_seed(0)
    options = {"in_channels": 8, "temb_channels": 16, "groups": 4}
    before = resnet.ResnetBlockCondNorm2D(**options, time_embedding_norm="ada_group")
    with fastgen.patch("diffusers"):
        torch.manual_seed(0)
        after = resnet.ResnetBlockCondNorm2D(**options, time_embedding_norm="ada_group")
    assert len(fastgen.explain(after).replaced) == 2 and not fastgen.explain(before).replaced
    x, temb = torch.randn(2, 8, 6, 6), torch.randn(2, 16)
    torch.testing.assert_close(after(x, temb), before(x, temb))


def test_fingerprint():
    library = _library.find("diffusers")
    assert not library.changed
    for swap in library.swaps:
        assert _library.fingerprint(swap.original, *swap.relies_on) == swap.fingerprint
