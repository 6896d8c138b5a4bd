// The exact nearest-code search on the GPU, as vq_nearest.cu and vq_quantize.cu call it; how: vq_chain.cuh.
#pragma once

#include "run.h"
#include "vq_chain.cuh"

namespace fastgen::vq {

// Throws unless a search may read x and codebook.
void check_codebook(const Tensor& x, const Tensor& codebook, const char* op);

// Rows (..., D) against codes (K, D), or (H, N, D) against (H, K, D).
Sizes sizes_of(const Tensor& x, const Tensor& codebook);

template <class S>
void search_on_gpu(Run& run, const S* x, const S* codes, const Sizes& sizes, bool cosine,
                   const Answers<S>& answers);

}  // namespace fastgen::vq
