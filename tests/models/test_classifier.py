import pytest
import torch

from fastgen.models import Classifier


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 5, 7), (3, 1, 1)])
def test_shapes(shape):
    model = Classifier(shape, 4, channels=8, feature_dim=16)
    images = torch.rand(2, *shape)
    assert model.features(images).shape == (2, 16)
    logits = model(images)
    assert logits.shape == (2, 4)
    assert not torch.equal(*logits)


def test_bad_arguments():
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        Classifier((1, 8, 8), 1)
    with pytest.raises(ValueError, match="channels and feature_dim must be at least 1"):
        Classifier((1, 8, 8), 2, feature_dim=0)
    with pytest.raises(ValueError, match=r"images must be \(B, .*, got \(2, 3, 8, 8\)"):
        Classifier((1, 8, 8), 2)(torch.zeros(2, 3, 8, 8))
