// Barriers, and what the lanes of a warp do together.
#pragma once

#include <type_traits>

#include "block.h"

namespace fastgen::emulation {

// All threads of the block. body(slots by rank) runs in the last to come.
template <class Body>
void meet_block(const char* name, void* slot, Site site, Body body) {
  Thread& t = self();
  const int count = t.block->thread_count();
  t.block->barrier(0).meet(t.rank, count, count, slot, {name, 0, site}, true, body);
}

// The lanes of `mask`. body(slots by lane, null for lanes that are not of the mask) runs in the last to come.
template <class Body>
void meet_warp(const char* name, std::uint32_t mask, void* slot, Site site, Body body) {
  Thread& t = self();
  const int lane = t.rank % kWarp;
  const Call call{name, mask, site};
  if ((mask >> lane & 1) == 0) {
    throw KernelError("lane " + std::to_string(lane) + " is not of the mask: " + call.text());
  }
  t.block->warp(t.rank / kWarp).meeting(mask).meet(lane, kWarp, __builtin_popcount(mask), slot, call, false, body);
}

// The 128 threads of a warpgroup. body(slots by rank in the warpgroup) runs in the last to come.
template <class Body>
void meet_warpgroup(const char* name, void* slot, Site site, Body body) {
  Thread& t = self();
  t.block->warpgroup(t.rank / kWarpgroup)
      .meet(t.rank % kWarpgroup, kWarpgroup, kWarpgroup, slot, {name, 0, site}, false, body);
}

inline void meet_nobody(void* const*) {}

// Every thread of the block gets result(number of nonzero predicates, number of threads).
template <class Result>
int vote_block(const char* name, int predicate, Site site, Result result) {
  const int count = self().block->thread_count();
  meet_block(name, &predicate, site, [&](void* const* slots) {
    int nonzero = 0;
    for (int i = 0; i < count; ++i) nonzero += *static_cast<int*>(slots[i]) != 0;
    for (int i = 0; i < count; ++i) *static_cast<int*>(slots[i]) = result(nonzero, count);
  });
  return predicate;
}

// One value of each lane of `mask`: a lane gets result(values by lane, null where not of the mask).
template <class T, class Result>
T share_warp(const char* name, std::uint32_t mask, T value, Site site, Result result) {
  struct Slot {
    T in, out;
  } mine{value, value};
  meet_warp(name, mask, &mine, site, [&](void* const* slots) {
    const T* values[kWarp];
    for (int i = 0; i < kWarp; ++i) values[i] = slots[i] == nullptr ? nullptr : &static_cast<Slot*>(slots[i])->in;
    for (int i = 0; i < kWarp; ++i) {
      if (slots[i] != nullptr) static_cast<Slot*>(slots[i])->out = result(values, i);
    }
  });
  return mine.out;
}

// The lane takes the value of lane source(lane, first lane of its segment, width, argument): undefined, so
// poisoned, where that lane is not of the mask.
template <class T, class Source>
T shuffle(const char* name, std::uint32_t mask, T value, int argument, int width, Site site, Source source) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  if (width < 1 || width > kWarp || (width & (width - 1)) != 0) {
    throw KernelError("width " + std::to_string(width) + " of " + Call{name, mask, site}.text());
  }
  struct Slot {
    T value;
    int from;
  };
  const int lane = self().rank % kWarp;
  const Slot mine{value, source(lane, lane & -width, width, argument)};
  const Slot got = share_warp(name, mask, mine, site, [](const Slot* const* slots, int i) {
    Slot result = *slots[i];
    const Slot* from = slots[result.from];
    if (from != nullptr)
      result.value = from->value;
    else
      std::memset(static_cast<void*>(&result.value), 0xff, sizeof(T));
    return result;
  });
  return got.value;
}

// Folds the values of the lanes of `mask`, from lane 0 up; every lane gets the result.
template <class T, class Fold>
T reduce(const char* name, std::uint32_t mask, T value, Site site, T start, Fold fold) {
  return share_warp(name, mask, value, site, [&](const T* const* values, int) {
    T result = start;
    for (int i = 0; i < kWarp; ++i) {
      if (values[i] != nullptr) result = fold(result, *values[i], i);
    }
    return result;
  });
}

template <class T>
struct Peers {
  T value;
  unsigned mask;
};

}  // namespace fastgen::emulation

// Barriers of the block.

inline void __syncthreads(fastgen::emulation::Site site = fastgen::emulation::Site::here()) {
  fastgen::emulation::meet_block("__syncthreads", nullptr, site, fastgen::emulation::meet_nobody);
}

inline int __syncthreads_count(int predicate, fastgen::emulation::Site site = fastgen::emulation::Site::here()) {
  return fastgen::emulation::vote_block("__syncthreads_count", predicate, site,
                                        [](int nonzero, int) { return nonzero; });
}

inline int __syncthreads_and(int predicate, fastgen::emulation::Site site = fastgen::emulation::Site::here()) {
  return fastgen::emulation::vote_block("__syncthreads_and", predicate, site,
                                        [](int nonzero, int all) { return nonzero == all; });
}

inline int __syncthreads_or(int predicate, fastgen::emulation::Site site = fastgen::emulation::Site::here()) {
  return fastgen::emulation::vote_block("__syncthreads_or", predicate, site,
                                        [](int nonzero, int) { return nonzero > 0; });
}

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       fastgen::emulation::Site site = fastgen::emulation::Site::here()) {
  fastgen::emulation::meet_warp("__syncwarp", mask, nullptr, site, fastgen::emulation::meet_nobody);
}

// Shuffles. Segments of `width` lanes; a lane that would read past its segment keeps its own value.

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32,
              fastgen::emulation::Site site = fastgen::emulation::Site::here()) {
  return fastgen::emulation::shuffle("__shfl_sync", mask, value, from, width, site,
                                     [](int lane, int first, int w, int n) { return first + (n & (w - 1)); });
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 fastgen::emulation::Site site = fastgen::emulation::Site::here()) {
  return fastgen::emulation::shuffle(
      "__shfl_up_sync", mask, value, static_cast<int>(delta), width, site,
      [](int lane, int first, int, int n) { return lane - n < first ? lane : lane - n; });
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   fastgen::emulation::Site site = fastgen::emulation::Site::here()) {
  return fastgen::emulation::shuffle(
      "__shfl_down_sync", mask, value, static_cast<int>(delta), width, site,
      [](int lane, int first, int w, int n) { return lane + n >= first + w ? lane : lane + n; });
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  fastgen::emulation::Site site = fastgen::emulation::Site::here()) {
  return fastgen::emulation::shuffle(
      "__shfl_xor_sync", mask, value, bits, width, site,
      [](int lane, int first, int w, int n) { return (lane ^ n) >= first + w ? lane : lane ^ n; });
}

// Votes and reductions of a warp.

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              fastgen::emulation::Site site = fastgen::emulation::Site::here()) {
  return fastgen::emulation::reduce<unsigned>(
      "__ballot_sync", mask, predicate != 0, site, 0u,
      [](unsigned all, unsigned one, int lane) { return all | one << lane; });
}

inline int __any_sync(unsigned mask, int predicate,
                      fastgen::emulation::Site site = fastgen::emulation::Site::here()) {
  return fastgen::emulation::reduce<int>("__any_sync", mask, predicate != 0, site, 0,
                                         [](int all, int one, int) { return all | one; });
}

inline int __all_sync(unsigned mask, int predicate,
                      fastgen::emulation::Site site = fastgen::emulation::Site::here()) {
  return fastgen::emulation::reduce<int>("__all_sync", mask, predicate != 0, site, 1,
                                         [](int all, int one, int) { return all & one; });
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value,
                          fastgen::emulation::Site site = fastgen::emulation::Site::here()) {
  const fastgen::emulation::Peers<T> peers{value, 0};
  return fastgen::emulation::share_warp("__match_any_sync", mask, peers, site,
                                        [](const fastgen::emulation::Peers<T>* const* values, int lane) {
                                          fastgen::emulation::Peers<T> mine{values[lane]->value, 0};
                                          for (int i = 0; i < fastgen::emulation::kWarp; ++i) {
                                            if (values[i] != nullptr && values[i]->value == mine.value)
                                              mine.mask |= 1u << i;
                                          }
                                          return mine;
                                        })
      .mask;
}

#define FASTGEN_REDUCE_SYNC(name, type, start, expression)                                                        \
  inline type name(unsigned mask, type value, fastgen::emulation::Site site = fastgen::emulation::Site::here()) { \
    return fastgen::emulation::reduce<type>(#name, mask, value, site, start,                                      \
                                            [](type a, type b, int) -> type { return expression; });              \
  }
FASTGEN_REDUCE_SYNC(__reduce_add_sync, unsigned, 0u, a + b)
FASTGEN_REDUCE_SYNC(__reduce_add_sync, int, 0, a + b)
FASTGEN_REDUCE_SYNC(__reduce_min_sync, unsigned, ~0u, a < b ? a : b)
FASTGEN_REDUCE_SYNC(__reduce_min_sync, int, 0x7fffffff, a < b ? a : b)
FASTGEN_REDUCE_SYNC(__reduce_max_sync, unsigned, 0u, a > b ? a : b)
FASTGEN_REDUCE_SYNC(__reduce_max_sync, int, -0x7fffffff - 1, a > b ? a : b)
FASTGEN_REDUCE_SYNC(__reduce_and_sync, unsigned, ~0u, a& b)
FASTGEN_REDUCE_SYNC(__reduce_or_sync, unsigned, 0u, a | b)
FASTGEN_REDUCE_SYNC(__reduce_xor_sync, unsigned, 0u, a ^ b)
#undef FASTGEN_REDUCE_SYNC
