"""One benchmark file an op: `CASES`, a list of `benchmarks.harness.Case`."""
