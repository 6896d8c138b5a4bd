// Standard normal values, and the words they are made from, of a key of counter-based noise.

#include "philox.h"

#define FASTGEN_ISA_FILE "normal_kernel.h"
#include "foreach_isa.h"

namespace fastgen {
namespace {

std::int64_t checked_count(const std::vector<std::int64_t>& size) {
  std::int64_t count = 1;
  for (const std::int64_t n : size) {
    STD_TORCH_CHECK(n >= 0, "normal: size must not be negative");
    count *= n;
  }
  return count;
}

// f(begin, end) in parallel over ranges of elements that start at multiples of 4.
template <class F>
void parallel_elements(std::int64_t count, F&& f) {
  torch::stable::parallel_for(0, (count + 3) / 4, 2048, [&](std::int64_t begin, std::int64_t end) {
    f(4 * begin, std::min(count, 4 * end));
  });
}

Tensor normal(const Tensor& key, std::vector<std::int64_t> size, ScalarType dtype) {
  const PhiloxKey k = read_key(key, "normal: key");
  const std::int64_t count = checked_count(size);
  Tensor out = new_empty(key, size, dtype);
  dispatch_dtype(dtype, "normal", [&](auto* type) {
    auto* values = data<std::remove_pointer_t<decltype(type)>>(out);
    parallel_elements(count, [&](std::int64_t begin, std::int64_t end) {
      FASTGEN_DISPATCH_ISA(fill_normal, k, values, begin, end);
    });
  });
  return out;
}

Tensor philox_words(const Tensor& key, std::int64_t count) {
  const PhiloxKey k = read_key(key, "philox_words: key");
  Tensor out = new_empty(key, {checked_count({count})}, ScalarType::Long);
  parallel_elements(count, [&](std::int64_t begin, std::int64_t end) {
    FASTGEN_DISPATCH_ISA(fill_words, k, data<std::int64_t>(out), begin, end);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("normal", TORCH_BOX(&normal));
  m.impl("philox_words", TORCH_BOX(&philox_words));
}

}  // namespace fastgen
