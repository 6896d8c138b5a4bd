"""One benchmark file an op: `CASES` and, at the sizes of GPUs, `GPU_CASES`: lists of
`benchmarks.case.Case`."""
