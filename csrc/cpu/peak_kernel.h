// Arithmetic that does nothing else, for one instruction set; see peak.cpp.

namespace fastgen::FASTGEN_ISA_NS {

// Independent chains: enough to hide the latency of a multiply-add, few enough to stay in registers.
#if defined(FASTGEN_SIMD_AVX512)
constexpr int kChains = 24;
#elif defined(FASTGEN_SIMD_AVX2)
constexpr int kChains = 12;
#else
constexpr int kChains = 6;
#endif

// Every chain repeats c <- c * factor + addend. Returns the number of float operations.
inline std::int64_t fma_chains(std::int64_t repeats, float factor, float addend, std::atomic<float>& sink) {
  using V = Vec<float>;
  const V a(factor), b(addend);
  V chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = V(static_cast<float>(i));
  for (std::int64_t r = 0; r < repeats; ++r) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) chain[i] = fma(chain[i], a, b);
  }
  V total = chain[0];
  for (int i = 1; i < kChains; ++i) total = total + chain[i];
  sink.store(sum(total), std::memory_order_relaxed);
  return repeats * kChains * V::width * 2;
}

}  // namespace fastgen::FASTGEN_ISA_NS
