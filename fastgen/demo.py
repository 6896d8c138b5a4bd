"""`python -m fastgen.demo`: train a VQ-VAE and its prior, look at the results, time the training
step.

The training is that of `fastgen train vqvae`; the timing runs the same training step with the fused
ops and with the plain-PyTorch references in turn, and prints medians.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fastgen
from fastgen.cli import CommandParser, command_line, needs_training, run_command

_SHORT_STEPS = 300
_TIMED_STEPS = 30
_WARM_UP_STEPS = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the exit status is that of `fastgen train`."""
    return run_command(_demo, command_line(arguments))


@needs_training
def _demo(arguments: Sequence[str]) -> int:
    from fastgen.training.options import parse_train_options
    from fastgen.training.runs import start_run

    parser = CommandParser("fastgen.demo", description="train a VQ-VAE on real images")
    parser.add_argument("--data", default="digits", help="digits (default), mnist, ...")
    parser.add_argument("--data-root", help="folder of the data files")
    parser.add_argument("--run-dir", type=Path, help="new folder (runs/vqvae-<data>-<time>)")
    parser.add_argument("--steps", type=int, help="steps of each stage")
    options = parser.parse_args(arguments)
    wanted = [f"--data={options.data}"]
    wanted += [f"--data_root={options.data_root}"] if options.data_root else []
    steps = options.steps
    if steps is not None and steps < 1:
        parser.error(f"--steps: expected at least 1, got {steps}")
    if steps is None and options.data != "digits":
        # The recipe trains larger images for hours; the demo shows a start of that, in minutes.
        steps = _SHORT_STEPS
        wanted += ["--model.decay=0.95", "--model.revive_after=20"]
    if steps is not None:
        wanted += [f"--{stage}.steps={steps}" for stage in ("autoencoder", "prior")]
    recipe = parse_train_options("vqvae", wanted)
    started = time.perf_counter()
    run = start_run("vqvae", recipe.config, options.run_dir)
    print(f"\ntrained in {time.perf_counter() - started:.0f} s: {run.path}\n")
    _print_results(run.metrics_path)
    for path in sorted(run.samples.glob("*.png")):
        print(f"  {path}")
    print()
    _print_timing(run.path, options.data_root)
    return 0


def _print_results(metrics: Path) -> None:
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    valid = {
        stage: [r for r in records if r["stage"] == stage and r["split"] == "valid"]
        for stage in ("autoencoder", "prior")
    }
    if valid["autoencoder"]:
        first, last = valid["autoencoder"][0], valid["autoencoder"][-1]
        print("validation, first and last")
        print(f"  mean squared error    {first['mse']:.5f} -> {last['mse']:.5f}")
        print(f"  relative to variance  {first['relative_mse']:.4f} -> {last['relative_mse']:.4f}")
        print(f"  codebook usage        {first['usage']:.1%} -> {last['usage']:.1%}")
        print(f"  codebook perplexity   {first['perplexity']:.1f} -> {last['perplexity']:.1f}")
    if valid["prior"]:
        last = valid["prior"][-1]
        print(
            f"  prior, nats a code    {last['nats_per_code']:.3f}, uniform codes "
            f"{last['uniform_nats_per_code']:.3f}"
        )


def _print_timing(run: Path, data_root: str | None) -> None:
    """Time the first stage's training step, and the quantizer in it, on every backend."""
    import torch

    from fastgen.training.draws import Draws
    from fastgen.training.runs import load_run

    stage: Any = load_run(run, data_root).stages[0]
    model = stage.modules["autoencoder"].train()
    device = next(model.parameters()).device
    images = stage.train_source().take(torch.arange(stage.config.batch_size))["images"].to(device)
    (optimizer,) = stage.optimizers().values()
    with torch.no_grad():
        embedded = model.encoder(2 * images - 1)
    embedded.requires_grad_()

    def training_step() -> None:
        optimizer.zero_grad()
        draws = Draws(len(images), device=device)
        stage.loss(stage.name, stage.modules, {"images": images}, draws).loss.backward()
        optimizer.step()
        _wait(device)

    def quantizer_step() -> None:
        embedded.grad = None
        quantized, _, loss = model.quantizer(embedded)
        (quantized.sum() + loss).backward()
        _wait(device)

    rows = {"training step": training_step, "quantizer alone": quantizer_step}
    dim = embedded.shape[1]
    vectors = embedded.numel() // dim
    print(f"median of {_TIMED_STEPS} steps in turn, batch {len(images)}, {device}")
    print(f"{'':18}{'fused ops':>12}{'reference':>12}{'ratio':>8}")
    for name, step in rows.items():
        fused, reference = _interleaved(step)
        line = f"{name:18}{fused:9.2f} ms{reference:9.2f} ms{reference / fused:8.2f}"
        print(line)
    print(f"(quantizer: {vectors} vectors of {dim}, {model.num_codes} codes)")


def _interleaved(step: Callable[[], None]) -> tuple[float, float]:
    """Median milliseconds of a step with the fused ops and with the references, run in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(_WARM_UP_STEPS + _TIMED_STEPS):
        for backend, found in zip((None, "reference"), times, strict=True):
            with fastgen.use_backend(backend):
                started = time.perf_counter()
                step()
                elapsed = time.perf_counter() - started
            if i >= _WARM_UP_STEPS:
                found.append(1e3 * elapsed)
    return statistics.median(times[0]), statistics.median(times[1])


def _wait(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
