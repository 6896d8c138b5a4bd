// Probes of what the cores can do at most: the benchmarks time them and call the rate the roof.

#include <atomic>

#include "common.h"

#define FASTGEN_ISA_FILE "peak_kernel.h"
#include "foreach_isa.h"

namespace fastgen {
namespace {

// Where the compiler must assume that results are read.
std::atomic<float> g_sink{0};

#if FASTGEN_BF16
bool has_bf16_dot() { return current_isa() >= Isa::kAvx512Bf16; }

__attribute__((target("avx512f,avx512bf16"))) std::int64_t bf16_dot_chains(std::int64_t repeats) {
  constexpr int kChains = 24;
  constexpr std::int64_t kOperations = 64;
  // Two bfloat16 halves of 0.5 in each word, and sums that stay finite for any number of repeats.
  const __m512bh a = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3f003f00));
  const __m512bh b = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(0xbf003f00u)));
  __m512 chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = _mm512_set1_ps(static_cast<float>(i));
  for (std::int64_t r = 0; r < repeats; ++r) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) chain[i] = _mm512_dpbf16_ps(chain[i], a, b);
  }
  __m512 total = chain[0];
  for (int i = 1; i < kChains; ++i) total = _mm512_add_ps(total, chain[i]);
  g_sink.store(_mm512_cvtss_f32(total), std::memory_order_relaxed);
  return repeats * kChains * kOperations;
}
#else
bool has_bf16_dot() { return false; }
std::int64_t bf16_dot_chains(std::int64_t) { return 0; }
#endif

// Runs f `pieces` times in parallel and adds up the operations that it counts.
template <class F>
std::int64_t counted(std::int64_t pieces, F&& f) {
  std::atomic<std::int64_t> operations{0};
  torch::stable::parallel_for(0, pieces, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) operations += f();
  });
  return operations;
}

std::int64_t fma_probe(std::int64_t pieces, std::int64_t repeats) {
  return counted(pieces, [=] { return FASTGEN_DISPATCH_ISA(fma_chains, repeats, 0.999f, 0.001f, g_sink); });
}

std::int64_t bf16_dot_probe(std::int64_t pieces, std::int64_t repeats) {
  if (!has_bf16_dot()) return 0;
  return counted(pieces, [=] { return bf16_dot_chains(repeats); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CompositeExplicitAutograd, m) {
  m.impl("fma_probe", TORCH_BOX(&fma_probe));
  m.impl("bf16_dot_probe", TORCH_BOX(&bf16_dot_probe));
}

}  // namespace fastgen
