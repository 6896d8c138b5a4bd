import math

import pytest
import torch

from fastgen.metrics import bits_per_dim, mean_and_error


def test_bits_per_dim_of_uniform_pixels():
    assert bits_per_dim(3 * 32 * 32 * math.log(256), (3, 32, 32)) == pytest.approx(8)


def test_mean_and_error():
    values = torch.arange(100.0)
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(49.5) and error == pytest.approx(values.std().item() / 10)
    many = mean_and_error(torch.full((1000,), 89.123456789))
    assert many == pytest.approx((89.123456789, 0), abs=1e-5)


def test_one_and_no_values():
    mean, error = mean_and_error(torch.tensor([3.0]))
    assert mean == 3 and math.isnan(error)
    with pytest.raises(ValueError, match="values must not be empty"):
        mean_and_error(torch.empty(0))
