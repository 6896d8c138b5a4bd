// Several arrays in one allocation.
#pragma once

#include <cstdint>

namespace fastgen {

// Lays arrays out one after another.
class Carver {
 public:
  // Without memory it only counts.
  explicit Carver(void* memory = nullptr) : memory_(static_cast<unsigned char*>(memory)) {}

  template <class T>
  T* take(std::int64_t count) {
    unsigned char* const at = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += (count * static_cast<std::int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(at);
  }

  std::int64_t used() const { return used_; }

 private:
  static constexpr std::int64_t kAlignment = 256;
  unsigned char* memory_;
  std::int64_t used_ = 0;
};

// layout(carver) takes arrays; it runs twice, first to count. run.allocate(bytes) gives the memory.
template <class Run, class Layout>
void carve(Run& run, Layout layout) {
  Carver count;
  layout(count);
  Carver carver(run.allocate(count.used()));
  layout(carver);
}

}  // namespace fastgen
