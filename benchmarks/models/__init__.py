"""Training steps of whole models: `python -m benchmarks.models.run`."""
