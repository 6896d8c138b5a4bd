import pytest
import torch

from fastgen.data import BatchLoader


def loader(**options):
    return BatchLoader({"x": torch.arange(10)}, 3, **options)


def test_an_epoch_has_every_row_once_at_most():
    batches = loader(seed=5)
    for _ in range(3):
        rows = torch.cat([batches.next_batch()["x"] for _ in range(3)])
        assert len(set(rows.tolist())) == 9


def test_epochs_differ_and_seeds_differ():
    def epochs(seed):
        batches = loader(seed=seed)
        return [torch.cat([batches.next_batch()["x"] for _ in range(3)]).tolist() for _ in range(2)]

    first, second = epochs(1)
    assert first != second
    assert epochs(1) == [first, second]
    assert epochs(2)[0] != first


@pytest.mark.parametrize("position", range(8))
def test_goes_on_from_any_position(position):
    whole = loader(seed=3)
    for _ in range(position):
        whole.next_batch()
    torch.manual_seed(position)  # a global generator must not matter
    resumed = loader(seed=3)
    resumed.load_state_dict(whole.state_dict())
    for _ in range(5):
        assert torch.equal(whole.next_batch()["x"], resumed.next_batch()["x"])


def test_any_batch_can_be_had_again():
    batches = loader(seed=3)
    expected = [batches.next_batch()["x"] for _ in range(8)]
    for call in (7, 0, 3, 2):
        assert torch.equal(batches.batch_of(call)["x"], expected[call])
    other = loader(seed=3)
    for _ in range(8):
        other.next_batch()
    assert torch.equal(batches.next_batch()["x"], other.next_batch()["x"])


def test_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    batches = loader()
    for _ in range(7):
        batches.next_batch()
    assert torch.equal(before, torch.get_rng_state())


def test_ranks_share_the_joint_batch():
    tensors = {"x": torch.arange(20), "y": torch.arange(20) * 2, "none": None}
    joint = BatchLoader(tensors, 4, seed=1)
    parts = [BatchLoader(tensors, 4, seed=1, rank=r, world_size=2) for r in range(2)]
    for _ in range(11):
        batch = joint.next_batch()
        assert set(batch) == {"x", "y"} and torch.equal(batch["y"], 2 * batch["x"])
        assert torch.equal(batch["x"], torch.cat([part.next_batch()["x"] for part in parts]))


@pytest.mark.parametrize("parts", (1, 2, 3))
@pytest.mark.parametrize("world", (1, 2, 4))
def test_a_part_of_all_ranks_has_the_rows_of_one_process(parts, world):
    """`first_rows` say where in the joint batch a rank's share of each part lies."""
    tensors = {"x": torch.arange(50)}
    joint = BatchLoader(tensors, 24, seed=1, parts=parts).next_batch()["x"]
    together = torch.empty_like(joint)
    for rank in range(world):
        loader = BatchLoader(tensors, 24, seed=1, parts=parts, rank=rank, world_size=world)
        pieces = loader.next_batch()["x"].chunk(parts)
        for number, (first, piece) in enumerate(zip(loader.first_rows, pieces, strict=True)):
            assert number * 24 // parts <= first < (number + 1) * 24 // parts
            together[first : first + len(piece)] = piece
    assert torch.equal(together, joint)


@pytest.mark.parametrize(
    ("tensors", "size", "world", "message"),
    [
        ({"x": torch.zeros(3), "y": torch.zeros(4)}, 1, 1, "common first dimension"),
        ({"x": torch.zeros(3)}, 4, 1, r"batch_size must be in \[1, 3\]"),
        ({"x": torch.zeros(3)}, 0, 1, r"batch_size must be in \[1, 3\]"),
        ({"x": torch.zeros(3)}, 3, 2, "multiple of the 2 processes"),
    ],
)
def test_bad_sizes(tensors, size, world, message):
    with pytest.raises(ValueError, match=message):
        BatchLoader(tensors, size, world_size=world)
