"""What a model takes from a whole batch is of all processes' rows."""

from pathlib import Path


def test_two_ranks_compute_what_one_process_does(two_ranks):
    for output in two_ranks(Path(__file__).with_name("two_ranks.py"), timeout=120):
        assert "all checks ran" in output, output
