"""The host emulator of CUDA: its operations give what CUDA's manuals say, and it finds the defects
that are planted in kernels."""

import re

import pytest


@pytest.mark.parametrize("build", ("plain", "asan"))
def test_operations(build, run_program):
    done = run_program(build, "operations")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ("block_sum", "reverse", "rotate"))
@pytest.mark.parametrize("build", ("plain", "asan", "tsan"))
def test_right_kernels_pass_in_every_order(build, name, run_program):
    for seed in range(2 if build == "tsan" else 5):
        done = run_program(build, "planted", name, seed)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ("no_barrier", "unwritten_shared", "no_copy_wait"))
def test_a_result_is_wrong_in_every_order(name, run_program):
    assert [run_program("plain", "planted", name, seed).returncode for seed in range(5)] == [1] * 5


def test_a_missing_warp_barrier_gives_a_wrong_result(run_program):
    assert 1 in [
        run_program("plain", "planted", "no_warp_barrier", seed).returncode for seed in range(5)
    ]


@pytest.mark.parametrize(
    "name,message",
    (
        ("divergent_barrier", r"deadlock: .*threads 32-63 ended.*threads 0-31 wait for __sync"),
        ("other_barrier", r"divergence: __syncthreads at .*:(\d+) meets __syncthreads at .*:(\d+)"),
        ("missing_lanes", r"deadlock: threads 0-15, 32-47 wait for __shfl_xor_sync of mask 0xff"),
        ("lane_not_of_mask", r"lane \d+ is not of the mask: __shfl_xor_sync of mask 0xffff at"),
        ("mixed_operations", r"divergence: __\w+_sync of mask 0xffffffff .* meets __\w+_sync of"),
        ("misaligned_copy", r"misaligned or wrong size: cp.async at .*planted.cpp:\d+"),
    ),
)
def test_undefined_behaviour_stops_the_launch_and_says_where(name, message, run_program):
    done = run_program("plain", "planted", name, 0)
    assert done.returncode == 3
    assert re.search(f"KernelError: {message}", done.stderr), done.stderr
    assert "planted.cpp:" in done.stderr


@pytest.mark.parametrize("name", ("beyond_shared", "beyond_dynamic", "beyond_global"))
def test_the_address_sanitizer_finds_a_write_out_of_bounds(name, run_program):
    done = run_program("asan", "planted", name, 0)
    assert done.returncode != 0
    assert re.search("heap-buffer-overflow|out of bounds", done.stderr), done.stderr


@pytest.mark.parametrize("name", ("no_barrier", "no_warp_barrier"))
def test_the_thread_sanitizer_finds_a_race(name, run_program):
    done = run_program("tsan", "planted", name, 0)
    assert done.returncode == 66
    assert re.search(r"ThreadSanitizer: data race.*planted\.cpp:\d+", done.stderr), done.stderr
