"""A tiny VQ-VAE run on the digits, and what its tests share."""

import shutil
from pathlib import Path

import pytest
import torch

accelerate = pytest.importorskip("accelerate", reason="needs the extra 'train'")

from fastgen.training.config import EngineConfig, OptimizerConfig, StageConfig  # noqa: E402
from fastgen.training.runs import start_run  # noqa: E402
from fastgen.training.tasks.vqvae import ModelConfig, PriorConfig, VQVAEConfig  # noqa: E402


def tiny_config() -> VQVAEConfig:
    """Every source of randomness and of state is on: dropout, revival, averaged weights."""
    optimizer = OptimizerConfig(warmup_steps=2, weight_decay=0.1)
    return VQVAEConfig(
        model=ModelConfig(num_codes=16, code_dim=4, channels=8, residual_blocks=1, revive_after=2),
        prior_model=PriorConfig(width=16, layers=1, heads=2, dropout=0.3),
        autoencoder=StageConfig(steps=10, batch_size=64, optimizer=optimizer),
        prior=StageConfig(steps=8, batch_size=64, optimizer=optimizer),
        engine=EngineConfig(
            cpu=True,
            ema_decay=0.9,
            max_grad_norm=1.0,
            log_every=3,
            valid_every=4,
            sample_every=6,
            checkpoint_every=4,
        ),
    )


@pytest.fixture
def config() -> VQVAEConfig:
    return tiny_config()


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is complete; read only."""
    torch.set_num_threads(1)
    return start_run("vqvae", tiny_config(), tmp_path_factory.mktemp("runs") / "finished").path


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the complete run, to damage."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Accelerate keeps its precision and device in process-wide singletons."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
