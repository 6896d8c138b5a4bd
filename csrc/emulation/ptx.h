// The functions of csrc/cuda/ptx.cuh on the host, fragment layouts included.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "intrinsics.h"
#include "synchronize.h"

namespace fastgen {

inline float lg2_approx(float x) { return std::log2(x); }
inline float ex2_approx(float x) { return std::exp2(x); }
inline float sqrt_approx(float x) { return std::sqrt(x); }
inline float sin_approx(float x) { return std::sin(x); }
inline float cos_approx(float x) { return std::cos(x); }

inline void store_quad(uint4* to, uint4 quad) { *to = quad; }

namespace emulation {

// Registers of one lane, and the tile they are part of.
struct MmaLane {
  float* d;
  const std::uint32_t *a, *b;
  const float* c;
};

// Element types of mma: how many lie in a register, and element i of it.
struct Bf16Operand {
  static constexpr int kPerRegister = 2;
  static float element(std::uint32_t bits, int i) {
    return bit_cast<float>(i == 0 ? bits << 16 : bits & 0xffff0000u);
  }
};
struct HalfOperand {
  static constexpr int kPerRegister = 2;
  static float element(std::uint32_t bits, int i) {
    return torch::headeronly::Half(static_cast<unsigned short>(bits >> 16 * i),
                                   torch::headeronly::Half::from_bits());
  }
};
struct Tf32Operand {
  static constexpr int kPerRegister = 1;
  static float element(std::uint32_t bits, int) { return bit_cast<float>(bits & 0xffffe000u); }
};

// A 16 x 8 tile; the products of an element are 8 registers' worth.
template <class Operand>
void mma(const char* name, MmaLane lane, Site site) {
  constexpr int kPer = Operand::kPerRegister, kDepth = 8 * kPer;
  meet_warp(name, 0xffffffffu, &lane, site, [](void* const* slots) {
    const auto lanes = [&](int i) { return *static_cast<const MmaLane*>(slots[i]); };
    float a[16][kDepth], b[kDepth][8], sum[16][8];
    for (int l = 0; l < kWarp; ++l) {
      const int g = l / 4, t = l % 4;
      for (int r = 0; r < 4; ++r) {
        for (int i = 0; i < kPer; ++i)
          a[g + r % 2 * 8][(t + r / 2 * 4) * kPer + i] = Operand::element(lanes(l).a[r], i);
        sum[g + r / 2 * 8][2 * t + r % 2] = lanes(l).c[r];
      }
      for (int r = 0; r < 2; ++r) {
        for (int i = 0; i < kPer; ++i) b[(t + r * 4) * kPer + i][g] = Operand::element(lanes(l).b[r], i);
      }
    }
    for (int l = 0; l < kWarp; ++l) {
      for (int r = 0; r < 4; ++r) {
        const int row = l / 4 + r / 2 * 8, column = 2 * (l % 4) + r % 2;
        float total = sum[row][column];
        for (int k = 0; k < kDepth; ++k) total = std::fmaf(a[row][k], b[k][column], total);
        lanes(l).d[r] = total;
      }
    }
  });
}

inline void ldmatrix(const char* name, std::uint32_t* to, const void* row, bool transposed, Site site) {
  struct Slot {
    std::uint32_t* to;
    const void* row;
  } mine{to, row};
  if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) {
    throw KernelError("misaligned row of " + Call{name, 0, site}.text());
  }
  meet_warp(name, 0xffffffffu, &mine, site, [&](void* const* slots) {
    std::uint16_t rows[kWarp][8];
    for (int l = 0; l < kWarp; ++l) std::memcpy(rows[l], static_cast<Slot*>(slots[l])->row, 16);
    for (int l = 0; l < kWarp; ++l) {
      for (int i = 0; i < 4; ++i) {
        const int r = l / 4, c = 2 * (l % 4);
        const std::uint16_t low = transposed ? rows[8 * i + c][r] : rows[8 * i + r][c];
        const std::uint16_t high = transposed ? rows[8 * i + c + 1][r] : rows[8 * i + r][c + 1];
        static_cast<Slot*>(slots[l])->to[i] = std::uint32_t{high} << 16 | low;
      }
    }
  });
}

}  // namespace emulation

inline void mma_m16n8k16_bf16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                              const float (&c)[4], emulation::Site site = emulation::Site::here()) {
  emulation::mma<emulation::Bf16Operand>("mma.m16n8k16.bf16", {d, a, b, c}, site);
}

inline void mma_m16n8k16_f16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                             const float (&c)[4], emulation::Site site = emulation::Site::here()) {
  emulation::mma<emulation::HalfOperand>("mma.m16n8k16.f16", {d, a, b, c}, site);
}

inline void mma_m16n8k8_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                             const float (&c)[4], emulation::Site site = emulation::Site::here()) {
  emulation::mma<emulation::Tf32Operand>("mma.m16n8k8.tf32", {d, a, b, c}, site);
}

inline void ldmatrix_x4(std::uint32_t (&to)[4], const void* row, emulation::Site site = emulation::Site::here()) {
  emulation::ldmatrix("ldmatrix.x4", to, row, false, site);
}

inline void ldmatrix_x4_trans(std::uint32_t (&to)[4], const void* row,
                              emulation::Site site = emulation::Site::here()) {
  emulation::ldmatrix("ldmatrix.x4.trans", to, row, true, site);
}

inline void barrier_sync(int id, int threads, emulation::Site site = emulation::Site::here()) {
  emulation::self().block->barrier(id).come(threads, true, {"barrier.sync", 0, site});
}

inline void barrier_arrive(int id, int threads, emulation::Site site = emulation::Site::here()) {
  emulation::self().block->barrier(id).come(threads, false, {"barrier.arrive", 0, site});
}

// The destination is poisoned now and written by the wait: a wait that is missing shows.
inline void cp_async_16(void* to, const void* from, int valid = 16,
                        emulation::Site site = emulation::Site::here()) {
  const bool aligned = (reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from)) % 16 == 0;
  if (!aligned || valid < 0 || valid > 16) {
    throw emulation::KernelError("misaligned or wrong size: " + emulation::Call{"cp.async", 0, site}.text());
  }
  std::memset(to, 0xff, 16);
  emulation::self().copies.push_back({to, from, static_cast<std::size_t>(valid)});
}

inline void cp_async_commit() {
  emulation::Thread& thread = emulation::self();
  thread.copy_groups.push_back(std::move(thread.copies));
  thread.copies.clear();
}

template <int kPending>
void cp_async_wait() {
  auto& groups = emulation::self().copy_groups;
  for (; groups.size() > static_cast<std::size_t>(kPending); groups.pop_front()) {
    for (const emulation::Copy& copy : groups.front()) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }
}

}  // namespace fastgen
