"""TensorBoard reads what is written for it."""

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastgen.training.board import Board


def test_curves_pictures_and_a_second_life(tmp_path):
    folder = tmp_path / "tensorboard"
    for first, value in ((1, 0.25), (3, 0.75)):
        board = Board(folder, first)
        for step in (first, first + 1, first + 2):
            board.add_scalar("vae/train/loss", value, step)
        board.add_images("vae/samples", torch.rand(2, 1, 8, 8), first)
        board.flush()
        board.close()
    assert len(list(folder.iterdir())) == 2
    events = EventAccumulator(str(folder))
    events.Reload()
    curve = [(event.step, event.value) for event in events.Scalars("vae/train/loss")]
    assert curve == [(1, 0.25), (2, 0.25), (3, 0.75), (4, 0.75), (5, 0.75)]
    (first, second) = events.Images("vae/samples")
    assert (first.step, second.step) == (1, 3)
    assert (first.width, first.height) == (16, 8)
    assert second.encoded_image_string.startswith(b"\x89PNG")
