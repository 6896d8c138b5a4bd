import pytest
import torch

from fastgen.data import BatchLoader, DataError, TensorSource


def loader(**options):
    return BatchLoader(TensorSource(x=torch.arange(10)), 3, **options)


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
    source = TensorSource(x=torch.arange(20), y=torch.arange(20) * 2, none=None)
    joint = BatchLoader(source, 4, seed=1)
    parts = [BatchLoader(source, 4, seed=1, rank=r, world_size=2) for r in range(2)]
    for _ in range(11):
        batch = joint.next_batch()
        assert set(batch) == {"x", "y"} and torch.equal(batch["y"], 2 * batch["x"])
        assert torch.equal(batch["x"], torch.cat([part.next_batch()["x"] for part in parts]))


@pytest.mark.parametrize("parts", (1, 2, 3))
@pytest.mark.parametrize("world", (1, 2, 4))
def test_a_part_of_all_ranks_has_the_rows_of_one_process(parts, world):
    """`first_rows` say where in the joint batch a rank's share of each part lies."""
    source = TensorSource(x=torch.arange(50))
    joint = BatchLoader(source, 24, seed=1, parts=parts).next_batch()["x"]
    together = torch.empty_like(joint)
    for rank in range(world):
        loader = BatchLoader(source, 24, seed=1, parts=parts, rank=rank, world_size=world)
        pieces = loader.next_batch()["x"].chunk(parts)
        for number, (first, piece) in enumerate(zip(loader.first_rows, pieces, strict=True)):
            assert number * 24 // parts <= first < (number + 1) * 24 // parts
            together[first : first + len(piece)] = piece
    assert torch.equal(together, joint)


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (4, {}, r"batch_size must be in \[1, 3\]"),
        (0, {}, r"batch_size must be in \[1, 3\]"),
        (3, {"world_size": 2}, "multiple of the 2 processes, got 3"),
        (2, {"world_size": 2, "parts": 2}, "multiple of the 2 processes times 2 parts, got 2"),
    ],
)
def test_bad_sizes(size, options, message):
    with pytest.raises(ValueError, match=message):
        BatchLoader(TensorSource(x=torch.zeros(3)), size, **options)


# --- workers, several sources, augmentation ----------------------------------------------------


class Numbered:
    """Rows that are their numbers; some cannot be read."""

    def __init__(self, size, name="x", broken=()):
        self.size, self.name, self.broken = size, name, set(broken)

    def __len__(self):
        return self.size

    def take(self, rows):
        bad = self.broken & set(rows.tolist())
        if bad:
            raise DataError(f"row {min(bad)} is broken")
        return {self.name: rows.clone()}


def noisy(row, generator):
    return {name: value + torch.rand((), generator=generator) for name, value in row.items()}


@pytest.mark.parametrize("workers", (0, 2))
def test_a_batch_depends_on_its_number_alone(workers):
    """Whatever the workers; from any position, twice in a row; by two processes together."""

    def make(workers=0, **options):
        sources = [Numbered(10), Numbered(7, "y")]
        return BatchLoader(sources, 4, seed=3, augment=noisy, workers=workers, **options)

    plain = make()
    expected = [plain.next_batch() for _ in range(9)]
    for start in 0, 3, 5:
        loader = make(workers)
        for resume in range(2):
            loader.load_state_dict({"batches": start + 2 * resume})
            for wanted in expected[start + 2 * resume :][:2]:
                for name, value in loader.next_batch().items():
                    assert torch.equal(value, wanted[name])
        assert loader.state_dict() == {"batches": start + 4}
        assert torch.equal(loader.batch_of(8)["y"], expected[8]["y"])
        loader.close()
    ranks = [make(workers, rank=rank, world_size=2) for rank in range(2)]
    for wanted in expected[:3]:
        shares = [rank.next_batch() for rank in ranks]
        for name, value in wanted.items():
            assert torch.equal(torch.cat([share[name] for share in shares]), value)
    for rank in ranks:
        rank.close()


def test_augmentation_is_new_in_each_epoch():
    loader = BatchLoader(Numbered(4), 4, augment=noisy)
    first, second = (loader.next_batch()["x"].sort().values for _ in range(2))
    assert torch.equal(first.floor(), second.floor()) and not torch.equal(first, second)


def test_sources_of_other_lengths_have_epochs_of_their_own():
    loader = BatchLoader([Numbered(6), Numbered(4, "y")], 2)
    batches = [loader.next_batch() for _ in range(6)]
    for name, size in ("x", 6), ("y", 4):
        rows = torch.cat([batch[name] for batch in batches])
        for epoch in rows.split(size):
            assert sorted(epoch.tolist()) == list(range(size))
    # the order of one says nothing of the other's
    assert not torch.equal(batches[0]["x"], batches[0]["y"])


@pytest.mark.parametrize("workers", (0, 2))
def test_a_row_that_cannot_be_read_is_one_line(workers):
    loader = BatchLoader(Numbered(10, broken=[6]), 5, workers=workers)
    with pytest.raises(DataError, match=r"^row 6 is broken$"):
        for _ in range(2):
            loader.next_batch()
    loader.close()


def test_two_sources_of_one_name():
    with pytest.raises(DataError, match="two sources of one batch have x"):
        BatchLoader([Numbered(3), Numbered(3)], 2).next_batch()


def test_bytes_become_floats_on_the_device():
    images = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1)
    loader = BatchLoader(TensorSource(images=images, labels=torch.arange(256)), 256)
    batch = loader.next_batch()
    expected = images[batch["labels"]].float() / 255
    torch.testing.assert_close(batch["images"], expected, rtol=0, atol=0)
    assert images.dtype == torch.uint8
