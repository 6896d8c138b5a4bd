// The functions of csrc/cuda/hopper.cuh on the host. What is asynchronous happens as late as the kernel allows: a
// copy when the phase of its barrier ends, a product of a warpgroup when its group is waited for. Until then the
// destination is poisoned, and operands may not change.
#pragma once

#include "ptx.h"

#define FASTGEN_HOPPER 1

namespace fastgen {
namespace emulation {

struct Mbarrier {
  Monitor monitor;
  int arrivals = 0, missing = 0;
  std::int64_t bytes = 0;  // expected and not yet asked for
  std::uint64_t phase = 0;
  std::vector<Copy> copies;

  void advance() {
    if (missing > 0 || bytes != 0) return;
    for (const Copy& copy : copies) std::memcpy(copy.to, copy.from, copy.bytes);
    copies.clear();
    missing = arrivals;
    ++phase;
    monitor.notify();
  }
};

inline Mbarrier& mbarrier(const std::uint64_t* address) { return self().block->attached<Mbarrier>(address); }

inline const unsigned char* shared_base() {
  return static_cast<const unsigned char*>(self().block->dynamic_shared.data());
}

// Bits of element k of a row of an operand, by its descriptor.
inline std::uint16_t matrix_bits(std::uint64_t descriptor, int row, int k) {
  const int swizzle = static_cast<int>(descriptor >> 62), width = swizzle == 1 ? 128 : swizzle == 2 ? 64 : 32;
  const std::uint64_t stride = (descriptor >> 32 & 0x3fff) << 4;
  std::uint64_t at = ((descriptor & 0x3fff) << 4) + row / 8 * stride + row % 8 * width + 2 * k;
  at ^= (at >> 7 & (width / 16 - 1)) << 4;
  if (at + 2 > self().block->dynamic_shared.size()) throw KernelError("wgmma reads past shared memory");
  std::uint16_t bits;
  std::memcpy(&bits, shared_base() + at, 2);
  return bits;
}

inline float matrix_element(std::uint64_t descriptor, int row, int k) {
  return torch::headeronly::Half(matrix_bits(descriptor, row, k), torch::headeronly::Half::from_bits());
}

struct Product {
  float* d;
  std::uint64_t a, b;
  bool accumulate;
  Site site;
  std::uint64_t operands;  // in the first thread of the warpgroup: what they were when the product began

  std::uint64_t checksum() const {
    std::uint64_t sum = 0;
    for (int row = 0; row < 128; ++row) {
      for (int k = 0; k < 16; ++k) {
        if (row < 64) sum = sum * 31 + matrix_bits(a, row, k);
        sum = sum * 31 + matrix_bits(b, row, k);
      }
    }
    return sum;
  }

  void run(int rank) {
    if (rank == 0 && checksum() != operands) {
      throw KernelError("operands changed under " + Call{"wgmma", 0, site}.text());
    }
    const int row = rank / 32 * 16 + rank % 32 / 4, column = rank % 4 * 2;
    for (int i = 0; i < 64; ++i) {
      const int r = row + i / 2 % 2 * 8, c = i / 4 * 8 + column + i % 2;
      float total = accumulate ? d[i] : 0;
      for (int k = 0; k < 16; ++k) total = std::fmaf(matrix_element(a, r, k), matrix_element(b, c, k), total);
      d[i] = total;
    }
  }
};

// Products of one thread that are under way. `values` are the accumulators that the registers will hold.
struct Products {
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
  std::vector<float> values;
};

inline Products& products() { return self().block->attached<Products>(&self()); }

}  // namespace emulation

inline std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(static_cast<const unsigned char*>(p) - emulation::shared_base());
}

inline void mbarrier_init(std::uint64_t* barrier, int arrivals) {
  emulation::Mbarrier& b = emulation::mbarrier(barrier);
  emulation::Lock lock(b.monitor.mutex);
  b.arrivals = b.missing = arrivals;
}

inline void mbarrier_init_done() {}

inline void mbarrier_arrive_expecting(std::uint64_t* barrier, int bytes) {
  emulation::Mbarrier& b = emulation::mbarrier(barrier);
  emulation::Lock lock(b.monitor.mutex);
  if (b.missing <= 0) throw emulation::KernelError("more arrivals at an mbarrier than it was made for");
  b.bytes += bytes;
  --b.missing;
  b.advance();
}

inline void mbarrier_arrive(std::uint64_t* barrier) { mbarrier_arrive_expecting(barrier, 0); }

inline void mbarrier_wait(std::uint64_t* barrier, unsigned parity,
                          emulation::Site site = emulation::Site::here()) {
  emulation::Mbarrier& b = emulation::mbarrier(barrier);
  emulation::Lock lock(b.monitor.mutex);
  const emulation::Call call{"mbarrier_wait", 0, site};
  emulation::wait_until(b.monitor, lock, call, [&] { return (b.phase & 1) != parity; });
}

inline void bulk_copy(void* to, const void* from, int bytes, std::uint64_t* barrier,
                      emulation::Site site = emulation::Site::here()) {
  if ((reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from) | bytes) % 16 != 0) {
    throw emulation::KernelError("misaligned: " + emulation::Call{"bulk_copy", 0, site}.text());
  }
  emulation::Mbarrier& b = emulation::mbarrier(barrier);
  emulation::Lock lock(b.monitor.mutex);
  std::memset(to, 0xff, static_cast<std::size_t>(bytes));
  b.copies.push_back({to, from, static_cast<std::size_t>(bytes)});
  b.bytes -= bytes;
  b.advance();
}

inline void wgmma_fence() {}

inline void wgmma_m64n128k16_f16(float (&d)[64], std::uint64_t a, std::uint64_t b, bool accumulate,
                                 emulation::Site site = emulation::Site::here()) {
  emulation::Products& mine = emulation::products();
  if (mine.open.empty() && mine.groups.empty()) mine.values.assign(d, d + 64);
  std::memset(d, 0xff, sizeof(d));
  emulation::Product product{d, a, b, accumulate, site, 0};
  if (emulation::self().rank % emulation::kWarpgroup == 0) product.operands = product.checksum();
  mine.open.push_back(product);
}

inline void wgmma_commit(emulation::Site site = emulation::Site::here()) {
  emulation::meet_warpgroup("wgmma.commit_group", nullptr, site, emulation::meet_nobody);
  emulation::Products& mine = emulation::products();
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

// Products run on `values`, and the registers get them when no group is left: they stay poisoned before.
template <int kPending>
void wgmma_wait(float (&)[64], emulation::Site site = emulation::Site::here()) {
  emulation::meet_warpgroup("wgmma.wait_group", nullptr, site, emulation::meet_nobody);
  emulation::Products& mine = emulation::products();
  for (; mine.groups.size() > static_cast<std::size_t>(kPending); mine.groups.pop_front()) {
    for (emulation::Product product : mine.groups.front()) {
      float* const registers = product.d;
      product.d = mine.values.data();
      product.run(emulation::self().rank % emulation::kWarpgroup);
      if (mine.groups.size() == 1) std::copy(mine.values.begin(), mine.values.end(), registers);
    }
  }
}

}  // namespace fastgen
