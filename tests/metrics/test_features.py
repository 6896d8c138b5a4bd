import pytest
import torch
from torch import nn

from fastgen.metrics import extract_features
from fastgen.models import Classifier


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_parts_give_what_the_whole_gives(batch_size):
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Dropout(0.5)).train()
    images = torch.rand(7, 1, 5, 4)
    found = extract_features(network, images, batch_size=batch_size)
    assert found.shape == (7, 2 * 3 * 2) and not found.requires_grad
    torch.testing.assert_close(found, network[0](images).flatten(1).detach())
    assert network.training


def test_a_method_of_a_module():
    network = Classifier((1, 8, 8), 3, feature_dim=5).eval()
    images = torch.rand(4, 1, 8, 8)
    found = extract_features(network.features, images)
    assert found.shape == (4, 5) and (found >= 0).all()
    torch.testing.assert_close(network.head(found), network(images))


def test_bad_features():
    with pytest.raises(ValueError, match="must be finite"):
        extract_features(lambda x: x / 0, torch.zeros(2, 1, 1, 1))
    with pytest.raises(ValueError, match="a row an image, got 1 of 2"):
        extract_features(lambda x: x[:1], torch.zeros(2, 1, 1, 1))
