"""Couplings that a CPU is faster without: there the library's own code runs, and says so."""

import copy
import logging
import warnings

import pytest
import torch
from torch import nn

import fastgen
from fastgen import backends
from fastgen.integrations import _coupling, _library

with warnings.catch_warnings():
    # FrEIA's docstrings hold escapes that Python does not know
    warnings.simplefilter("ignore")
    Fm = pytest.importorskip("FrEIA.modules")
nf = pytest.importorskip("normflows")

FEW = "on a CPU with fewer than {} elements to transform (measured: slower there)"


def subnet(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 8), nn.SiLU(), nn.Linear(8, outputs))


def all_in_one():
    return Fm.AllInOneBlock([(5,)], subnet_constructor=subnet)


def affine(scale_map="exp"):
    return nf.flows.AffineCoupling(nf.nets.MLP([3, 8, 4]), scale_map=scale_map)


def patched_copy(plain):
    patched = copy.deepcopy(plain)
    report = fastgen.patch(patched)
    assert report.replaced and not report.left
    return patched, report


def run(module, *args, **kwargs):
    """Outputs and gradients, and how often the op ran."""
    module.zero_grad()
    backends.reset_calls()
    outputs = [
        t for part in module(*args, **kwargs) for t in ((part,) if torch.is_tensor(part) else part)
    ]
    sum(t.square().sum() for t in outputs).backward()
    calls = sum(n for (op, _), n in backends.calls().items() if op == "affine_coupling")
    return [*outputs, *(p.grad for p in module.parameters() if p.grad is not None)], calls


@pytest.mark.parametrize("scale_map", ["exp", "sigmoid", "sigmoid_inv"])
@pytest.mark.parametrize("method", ["forward", "inverse"])
def test_affine_coupling_of_normflows(scale_map, method, caplog):
    plain = affine(scale_map)
    patched, report = patched_copy(plain)
    reason = FEW.format(2**16)
    assert report.replaced[0].own_calls == reason and f"; its own code {reason}" in str(report)
    assert fastgen.explain(patched).replaced == report.replaced
    z = [torch.randn(100, 3), torch.randn(100, 2)]
    explanation = fastgen.explain(patched, z)
    assert explanation.chosen == "normflows" and explanation.rejected == {"fastgen": reason}
    on_meta = [t.to("meta") for t in z]
    assert fastgen.explain(patched, on_meta).chosen == "fastgen"
    _library.run_own_code.cache_clear()
    plain.forward, patched_forward = getattr(plain, method), getattr(patched, method)
    expected, _ = run(plain, z)
    patched.forward = patched_forward
    with caplog.at_level(logging.DEBUG, "fastgen"):
        seen, calls = run(patched, z)
    assert calls == 0 and f"AffineCoupling: the library's own code: {reason}" in caplog.text
    torch.testing.assert_close(seen, expected, rtol=0, atol=0)


@pytest.mark.parametrize("rev", [False, True])
def test_all_in_one_block_of_freia(rev, monkeypatch, caplog):
    monkeypatch.setitem(_coupling.CPU_FROM, "AllInOneBlock", 2 * 50)
    plain = all_in_one()
    patched, _ = patched_copy(plain)
    for rows, fused in ((49, False), (50, True)):
        x = torch.randn(rows, 5)
        explanation = fastgen.explain(patched, (x,), rev=rev)
        assert explanation.chosen == ("fastgen" if fused else "FrEIA")
        assert explanation.rejected == ({} if fused else {"fastgen": FEW.format(100)})
        assert fastgen.explain(patched, (x.to("meta"),)).chosen == "fastgen"
        _library.run_own_code.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.DEBUG, "fastgen"):
            seen, calls = run(patched, (x,), rev=rev)
        assert calls == fused and (FEW.format(100) in caplog.text) != fused
        expected, _ = run(plain, (x,), rev=rev)
        close = {"rtol": 1e-4, "atol": 1e-5} if fused else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(seen, expected, **close)


def test_the_measured_sizes():
    patched, report = patched_copy(all_in_one())
    assert report.replaced[0].own_calls == FEW.format(2**15)
    of_normflows = patched_copy(affine())[0]
    for rows, chosen in ((2**15 - 1, "normflows"), (2**15, "fastgen")):
        z = [torch.randn(rows, 3), torch.randn(rows, 2)]
        assert fastgen.explain(of_normflows, z).chosen == chosen
    for elements, chosen in ((2**15 - 2, "FrEIA"), (2**15, "fastgen")):
        x = torch.randn(elements // 2, 5)
        assert fastgen.explain(patched, (x,)).chosen == chosen
    with fastgen.patch("FrEIA") as report:
        of = {piece.original: piece.own_calls for piece in report.replaced}
    assert [text for text in of.values() if text] == [FEW.format(2**15)]


@pytest.mark.parametrize("mode", ["checkerboard", "checkerboard_inv"])
def test_checkerboards_split_by_strides_still(mode, monkeypatch):
    """On a CPU, too, where only the coupling between is the library's."""
    plain = nf.flows.AffineCouplingBlock(nf.nets.ConvNet2d((2, 4, 4), (3, 3)), split_mode=mode)
    patched, _ = patched_copy(plain)
    x = torch.randn(2, 2, 4, 4)
    assert fastgen.explain(patched, x).chosen == "fastgen"
    expected, _ = run(plain, x)
    for cls in (nf.flows.Split, nf.flows.Merge):
        monkeypatch.setattr(cls, "forward", None)
        monkeypatch.setattr(cls, "inverse", None)
    seen, calls = run(patched, x)
    assert calls == 0
    torch.testing.assert_close(seen, expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(TypeError):
        plain(x)


def test_compiled_models_follow_the_same_rule(monkeypatch):
    """The size is a guard: with a dynamic batch there is a graph for either side of it."""
    monkeypatch.setitem(_coupling.CPU_FROM, "AllInOneBlock", 2 * 50)
    plain = all_in_one()
    patched, _ = patched_copy(plain)
    graphs = []

    def backend(graph, inputs):
        graphs.append("affine_coupling" in graph.print_readable(print_output=False))
        return graph.forward

    compiled = torch.compile(patched, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for rows, seen in ((20, [False]), (30, [False]), (60, [False, True]), (70, [False, True])):
            x = torch.randn(rows, 5)
            (y,), log_jacobian = compiled((x,))
            (expected,), expected_log_jacobian = plain((x,))
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(log_jacobian, expected_log_jacobian)
            assert graphs == seen
