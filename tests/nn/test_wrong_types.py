"""Constructors and calls of the layers name the argument that has a wrong type."""

import pytest
import torch

from fastgen import nn

x = torch.ones(4, 3)


@pytest.mark.parametrize(
    "function, error, message",
    (
        (lambda: nn.AdaIN("5", 3), TypeError, "style_dim: expected a positive int, got str"),
        (lambda: nn.AdaIN(5, 0), ValueError, "num_features: expected a positive int, got 0"),
        (lambda: nn.AdaIN(5, 3, eps=-1.0), ValueError, "eps: expected a positive number, got -1.0"),
        (lambda: nn.GaussianReparam("x"), TypeError, "dim: expected an int, got str"),
        (lambda: nn.GaussianReparam(1.0), TypeError, "dim: expected an int, got float"),
        (lambda: nn.GaussianReparam()("x"), TypeError, "mu: expected a Tensor, got str"),
        (
            lambda: nn.GaussianReparam(mean_in_eval=True).eval()([1.0], x),
            TypeError,
            "mu: expected a Tensor, got list",
        ),
        (
            lambda: nn.GaussianReparam()(x[:, :2].to_sparse()),
            TypeError,
            "mu: expected a dense Tensor, got one of layout sparse_coo",
        ),
        (lambda: nn.AffineCoupling("x"), TypeError, "conditioner: expected a module, got str"),
        (lambda: nn.RQSplineCoupling(None), TypeError, "conditioner: expected a module, got NoneT"),
        (
            lambda: nn.AffineCoupling(torch.nn.Identity())("x"),
            TypeError,
            "x: expected a Tensor, got str",
        ),
        (
            lambda: nn.AffineCoupling(torch.nn.Identity(), scale=["tanh"]),
            ValueError,
            r"scale: expected one of exp, .*, got \['tanh'\]",
        ),
        (
            lambda: nn.VectorQuantizer(5, 3, dtype=torch.int64),
            TypeError,
            "dtype: expected float32, float64, float16 or bfloat16, got torch.int64",
        ),
        (
            lambda: nn.VectorQuantizer(5, 3, codebook=torch.ones(5, 3)),
            ValueError,
            "codebook: expected one of ema, gradient, got ",
        ),
        (
            lambda: nn.ResidualVQ(2, 5, 3)(x, num_stages="1"),
            TypeError,
            "num_stages: expected an int, got str",
        ),
        (
            lambda: nn.ResidualVQ(2, 5, 3)(x, num_stages=1.5),
            TypeError,
            "num_stages: expected an int, got float",
        ),
        (
            lambda: nn.VectorQuantizer(5, 3)(x.to(torch.float8_e5m2)),
            TypeError,
            "x: expected dtype .*, got float8_e5m2",
        ),
    ),
)
def test_wrong_types_are_named(function, error, message):
    with pytest.raises(error, match=f"^{message}"):
        function()
