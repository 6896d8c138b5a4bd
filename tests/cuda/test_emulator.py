"""The host emulator of CUDA: its operations give what CUDA's manuals say, and it finds the defects
that are planted in kernels."""

import os
import re
import shutil
import subprocess

import pytest

RIGHT = ("block_sum", "reverse", "rotate")
#: The builds: flags, and the environment to run under.
BUILDS = {
    "plain": (("-O1",), {}),
    "asan": (
        ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
        {"ASAN_OPTIONS": "detect_leaks=0"},
    ),
    "tsan": (
        ("-O1", "-g1", "-fsanitize=thread", "-DFASTGEN_EMULATION_THREADS"),
        {"TSAN_OPTIONS": "halt_on_error=1"},
    ),
}
SANITIZERS = {"asan": "libasan.so", "tsan": "libtsan.so"}


def lacks_sanitizer(build):
    """gcc answers with a path where it has the library, and with the bare name where not."""
    if build not in SANITIZERS:
        return False
    compiler = shutil.which("c++") or shutil.which("g++")
    asked = [compiler, f"-print-file-name={SANITIZERS[build]}"]
    found = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    return not os.path.isabs(found)


@pytest.fixture(scope="module")
def run(compiled):
    """run(build, program, *arguments): the finished process."""

    def start(build, program, *arguments):
        if lacks_sanitizer(build):
            pytest.skip(f"the compiler has no {SANITIZERS[build]}")
        flags, environment = BUILDS[build]
        path = compiled(f"emulation/{program}.cpp", f".{build}", *flags)
        return subprocess.run(
            [path, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, **environment},
        )

    return start


@pytest.mark.parametrize("build", ("plain", "asan"))
def test_operations(build, run):
    done = run(build, "operations")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("build", BUILDS)
def test_right_kernels_pass_in_every_order(build, name, run):
    for seed in range(2 if build == "tsan" else 5):
        done = run(build, "planted", name, seed)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ("no_barrier", "unwritten_shared", "no_copy_wait"))
def test_a_result_is_wrong_in_every_order(name, run):
    assert [run("plain", "planted", name, seed).returncode for seed in range(5)] == [1] * 5


def test_a_missing_warp_barrier_gives_a_wrong_result(run):
    assert 1 in [run("plain", "planted", "no_warp_barrier", seed).returncode for seed in range(5)]


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
def test_undefined_behaviour_stops_the_launch_and_says_where(name, message, run):
    done = run("plain", "planted", name, 0)
    assert done.returncode == 3
    assert re.search(f"KernelError: {message}", done.stderr), done.stderr
    assert "planted.cpp:" in done.stderr


@pytest.mark.parametrize("name", ("beyond_shared", "beyond_dynamic", "beyond_global"))
def test_the_address_sanitizer_finds_a_write_out_of_bounds(name, run):
    done = run("asan", "planted", name, 0)
    assert done.returncode != 0
    assert re.search("heap-buffer-overflow|out of bounds", done.stderr), done.stderr


@pytest.mark.parametrize("name", ("no_barrier", "no_warp_barrier"))
def test_the_thread_sanitizer_finds_a_race(name, run):
    done = run("tsan", "planted", name, 0)
    assert done.returncode == 66
    assert re.search(r"ThreadSanitizer: data race.*planted\.cpp:\d+", done.stderr), done.stderr
