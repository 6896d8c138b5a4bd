"""Numbers that judge a model."""

from fastgen.metrics.codebook import code_histogram, codebook_perplexity, codebook_usage

__all__ = ["code_histogram", "codebook_perplexity", "codebook_usage"]
