"""Every op's GPU kernels: in CUDA graphs, on other streams, a thousand times over, on the device of
its tensors, and beyond 2^31 elements."""

import fcntl
import tempfile
from pathlib import Path

import pytest
import torch

from fastgen import ops
from fastgen.testing import CASES, Sample, backends_here, run

pytestmark = pytest.mark.gpu

ROWS = [
    pytest.param(case, backend, id=f"{case.id}-{backend}")
    for case in CASES
    for backend in ("cuda", "triton")
    if torch.cuda.is_available() and backend in backends_here(case.op, "cuda")
]
each = pytest.mark.parametrize("case,backend", ROWS)


def test_every_op_has_kernels():
    """Where nothing is collected, nothing would fail."""
    assert {param.values[0].op for param in ROWS} == {case.op for case in CASES}


class Call:
    """An op on tensors that stay where they are: forward, and backward with fixed cotangents."""

    def __init__(self, case, backend, shape, dtype=torch.float32, device="cuda"):
        self.case, self.backend = case, backend
        sample = case.sample(shape, dtype, device)
        args = [
            a.detach().requires_grad_() if i in case.grad else a for i, a in enumerate(sample.args)
        ]
        self.sample = Sample(tuple(args), sample.kwargs)
        self.cotangents = [torch.ones_like(r) for r in self._flowing(self._forward())]

    def _forward(self):
        return run(self.case, self.sample, self.backend)

    @staticmethod
    def _flowing(results):
        return [r for r in results if r.requires_grad]

    def __call__(self):
        results = self._forward()
        wanted = [self.sample.args[i] for i in self.case.grad]
        flowing = self._flowing(results)
        grads = torch.autograd.grad(flowing, wanted, self.cotangents) if flowing else ()
        return [t.detach() for t in (*results, *grads)]

    def new_values(self):
        """Other values in the same tensors."""
        for a in self.sample.args:
            if isinstance(a, torch.Tensor) and a.is_floating_point():
                a.data.copy_(torch.randn(a.shape, device=a.device, dtype=torch.float32))


def assert_same_bits(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@each
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_graph_replays_with_the_values_it_finds(case, backend, dtype):
    call = Call(case, backend, case.big_shape, dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = call()
    for _ in range(2):
        call.new_values()
        graph.replay()
        assert_same_bits(replayed, call())


@each
def test_the_same_bits_a_thousand_times_on_streams_under_load(case, backend):
    call = Call(case, backend, case.big_shape)
    expected = call()
    load, streams = torch.cuda.Stream(), [torch.cuda.Stream() for _ in range(4)]
    busy = torch.empty(2**26, device="cuda")
    torch.cuda.synchronize()
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for i in range(1000):
        if i % 50 == 0:
            with torch.cuda.stream(load):
                busy.add_(1)
        with torch.cuda.stream(streams[i % 4]):
            same = [
                ((a == b) | (a.isnan() & b.isnan())).all()
                for a, b in zip(call(), expected, strict=True)
            ]
            wrong = ~torch.stack(same).all()
        torch.cuda.current_stream().wait_stream(streams[i % 4])
        different += wrong
    assert different.item() == 0


@each
def test_runs_on_the_device_of_its_tensors(case, backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    expected = Call(case, backend, case.shapes[0])()
    with torch.cuda.device(0):
        actual = Call(case, backend, case.shapes[0], device="cuda:1")()
    assert {t.device.index for t in actual} == {1}
    assert_same_bits([t.cpu() for t in actual], [t.cpu() for t in expected])


# --- beyond 2^31 elements ----------------------------------------------------------------------


@pytest.fixture
def much_memory():
    """Some 40 GiB of the GPU for one test at a time, of all processes that run tests."""
    with (Path(tempfile.gettempdir()) / "fastgen-gpu-tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < 40:
            pytest.skip(f"needs 40 GiB of the GPU's memory, {free:.0f} are free")
        yield
        torch.cuda.empty_cache()


LAST = 2**31


def many(*shape, scale=1.0):
    """Random values, bfloat16."""
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(0, scale)


def cotangent(result):
    """The same for every sample; not constant, for which a norm has no gradient."""
    of_sample = torch.arange(max(1, result[0].numel()), device=result.device) % 7 - 3
    return of_sample.to(result.dtype).view_as(result[0]).expand_as(result)


def with_gradient(function, *args):
    args = [a.detach().requires_grad_() for a in args]
    results = function(*args)
    results = (results,) if isinstance(results, torch.Tensor) else results
    grads = torch.autograd.grad(results, args, [cotangent(r) for r in results])
    return [t.detach() for t in (*results, *grads)]


def assert_last_samples_equal(function, *args):
    """The last three samples among all of them are what they are alone; few planes may be cut
    otherwise than many, so not to the bit."""
    every = with_gradient(function, *args)
    alone = with_gradient(function, *(a[-3:].clone() for a in args))
    assert max(a.numel() for a in args) > LAST
    for a, b in zip(every, alone, strict=True):
        error = (a[-3:].double() - b.double()).abs().max()
        assert error <= 2**-6 * b.double().abs().max()


@pytest.mark.usefixtures("much_memory")
@pytest.mark.parametrize("inverse", (False, True))
def test_affine_coupling_beyond_2_to_the_31_elements(inverse):
    rows = LAST // 1024 + 3
    x, raw, shift = many(rows, 1024), many(rows, 1024), many(1, 1024).expand(rows, -1)
    assert_last_samples_equal(
        lambda *args: ops.affine_coupling(*args, inverse=inverse), x, raw, shift.contiguous()
    )


@pytest.mark.usefixtures("much_memory")
@pytest.mark.parametrize("channels_last", (False, True))
def test_adain_beyond_2_to_the_31_elements(channels_last):
    batch = LAST // 2**22 + 3
    x = many(batch, 256, 128, 128)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    assert_last_samples_equal(ops.adain, x, many(batch, 256), many(batch, 256))


@pytest.mark.usefixtures("much_memory")
def test_rq_spline_beyond_2_to_the_31_parameters():
    rows, bins = LAST // (32 * 8) + 3, 8
    sizes = ((rows, 32), (rows, 32, bins), (rows, 32, bins), (rows, 32, bins - 1))
    assert_last_samples_equal(
        lambda *args: ops.rq_spline(*args, sum_log_det=True), *(many(*size) for size in sizes)
    )
