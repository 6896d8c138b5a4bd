"""Numbers that judge a model."""

from fastgen.metrics.codebook import code_histogram, codebook_perplexity, codebook_usage
from fastgen.metrics.features import extract_features
from fastgen.metrics.frechet import FeatureMoments, frechet_distance
from fastgen.metrics.inception import InceptionFeatures
from fastgen.metrics.likelihood import bits_per_dim, mean_and_error
from fastgen.metrics.manifold import PRDC, precision_recall_density_coverage

__all__ = [
    "PRDC",
    "FeatureMoments",
    "InceptionFeatures",
    "bits_per_dim",
    "code_histogram",
    "codebook_perplexity",
    "codebook_usage",
    "extract_features",
    "frechet_distance",
    "mean_and_error",
    "precision_recall_density_coverage",
]
