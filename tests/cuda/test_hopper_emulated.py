"""Bulk copies, their barriers and products of a warpgroup on the host emulator: a small pipeline
gives what it must, and what is planted in it is found."""

import re

import pytest


@pytest.mark.parametrize("build", ("plain", "asan"))
def test_the_pipeline_is_right_in_every_order(build, run_program):
    for seed in range(5):
        done = run_program(build, "hopper", "right", seed)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ("no_product_wait", "started_anew"))
def test_a_result_is_wrong_in_every_order(name, run_program):
    assert [run_program("plain", "hopper", name, seed).returncode for seed in range(5)] == [1] * 5


@pytest.mark.parametrize(
    "name,message",
    (
        ("no_copy_wait", "operands changed under wgmma at .*hopper.cpp"),
        ("missing_bytes", "deadlock: .*wait for mbarrier_wait at .*hopper.cpp"),
        ("two_arrivals", "deadlock: .*wait for mbarrier_wait at .*hopper.cpp"),
    ),
)
def test_a_defect_is_named(name, message, run_program):
    for seed in range(5):
        done = run_program("plain", "hopper", name, seed)
        assert done.returncode == 2, done.stderr
        assert re.search(message, done.stderr), done.stderr


def test_a_slot_released_too_early_is_found_in_every_order(run_program):
    """Either the operands change under the product, or they are the next ones from its start."""
    codes = {run_program("plain", "hopper", "early_release", seed).returncode for seed in range(5)}
    assert codes <= {1, 2}
