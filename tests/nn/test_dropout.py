"""Dropout by the row: the zeros do not depend on who has the row."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from fastgen.nn import Dropout, keyed_dropout
from fastgen.random import derive_key, make_key

KEY = make_key(3)


def network():
    return torch.nn.Sequential(torch.nn.Linear(7, 9), Dropout(0.3), torch.nn.ReLU(), Dropout(0.6))


@pytest.mark.parametrize("count", (1, 3, 4, 12))
def test_the_same_rows_on_any_number_of_processes(count):
    net, x = network(), torch.randn(12, 7)
    with keyed_dropout([net], KEY, 0, 12):
        whole = net(x)
    parts = []
    for first in range(0, 12, count):
        with keyed_dropout([net], KEY, first, count):
            parts.append(net(x[first : first + count]))
    assert torch.equal(torch.cat(parts) == 0, whole == 0)
    torch.testing.assert_close(torch.cat(parts), whole)


def test_several_inputs_a_row():
    layer, x = Dropout(0.5), torch.ones(12, 5)
    with keyed_dropout([layer], KEY, 0, 4):
        whole = layer(x)
    with keyed_dropout([layer], KEY, 2, 2):
        assert torch.equal(layer(x[6:]), whole[6:])


@pytest.mark.parametrize("p", (0.1, 0.3, 0.9))
def test_share_and_scale(p):
    layer, x = Dropout(p), torch.ones(400, 1000)
    with keyed_dropout([layer], KEY, 0, 400):
        y = layer(x)
    zeros = (y == 0).float()
    assert zeros.mean().item() == pytest.approx(p, abs=4 * (p * (1 - p) / x.numel()) ** 0.5)
    assert y.max().item() == pytest.approx(1 / (1 - p))
    assert zeros.mean(0).std() < 0.03 and zeros.mean(1).std() < 0.03


def test_layers_keys_and_shared_modules():
    """Two layers of one size differ; one that two modules share has one place."""
    first, second = Dropout(), Dropout()
    nets, x = [torch.nn.Sequential(first, second), first], torch.ones(50, 40)
    found = []
    for key in (KEY, KEY, derive_key(3, 1)):
        with keyed_dropout(nets, key, 0, 50):
            found += [first(x), second(x)]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[0], found[4])


def test_run_again_it_does_the_same():
    """As torch.utils.checkpoint and reversible layers do in backward."""
    layer, x = Dropout(), torch.ones(6, 8, requires_grad=True)
    with keyed_dropout([layer], KEY, 0, 6):
        y = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
        y.sum().backward()
    assert torch.equal(x.grad, y)


def test_without_a_key_it_is_that_of_torch():
    layer, x = Dropout(0.4), torch.ones(20, 20)
    with keyed_dropout([layer], KEY, 0, 20):
        keyed = layer(x)
    torch.manual_seed(1)
    found = layer(x)
    torch.manual_seed(1)
    assert torch.equal(found, torch.nn.functional.dropout(x, 0.4)) and not torch.equal(found, keyed)
    assert isinstance(layer, torch.nn.Dropout) and not layer.state_dict()


@pytest.mark.parametrize("p", (0.0, 1.0))
def test_nothing_and_everything(p):
    layer, x = Dropout(p), torch.randn(4, 3)
    with keyed_dropout([layer], KEY, 0, 4):
        assert torch.equal(layer(x), (1 - p) * x)
        assert torch.equal(layer.eval()(x), x)


def test_a_key_is_left_nowhere_after_an_error():
    layer = Dropout()
    with pytest.raises(KeyError), keyed_dropout([layer], KEY):
        raise KeyError
    assert layer._key is None


def test_half_precision_and_empty_batches():
    layer = Dropout()
    with keyed_dropout([layer], KEY, 0, 4):
        assert layer(torch.ones(4, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
        assert layer(torch.ones(0, 3)).shape == (0, 3)
        assert layer(torch.ones(4, 0)).shape == (4, 0)


def test_compiled_once_for_all_keys_and_rows():
    net, x, counter = network(), torch.randn(12, 7), CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for first in (0, 4, 8):
        for key in (KEY, derive_key(1, 2)):
            part = x[first : first + 4]
            with keyed_dropout([net], key, first, 4):
                torch.testing.assert_close(compiled(part), net(part))
    assert counter.frame_count == 1
