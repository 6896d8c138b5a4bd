// A block of the emulator: its threads, its shared memory, and launch(), which runs the blocks of a grid one after
// another, in an order that depends on the seed.
//
// Threads are fibers: one runs until it waits, then another, again in an order of the seed, so that code that
// relies on an order it did not ask for goes wrong. With FASTGEN_EMULATION_THREADS they are threads of the system,
// for the thread sanitizer.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <typeinfo>
#include <vector>

#include "meeting.h"
#include "vector_types.h"

#if defined(FASTGEN_EMULATION_THREADS)
#include <mutex>
#include <thread>
#else
#include "fiber.h"
#endif

namespace fastgen::emulation {

constexpr int kWarp = 32, kWarpgroup = 128;
constexpr std::size_t kSharedLimit = 227 * 1024;

// Memory with nothing behind its last byte. It holds NaN in every floating type until it is written.
class Poisoned {
 public:
  explicit Poisoned(std::size_t bytes) : bytes_(bytes) {
    if (posix_memalign(&memory_, 1024, std::max<std::size_t>(bytes, 1)) != 0) throw std::bad_alloc();
    std::memset(memory_, 0xff, bytes);
  }
  Poisoned(const Poisoned&) = delete;
  Poisoned& operator=(const Poisoned&) = delete;
  ~Poisoned() { std::free(memory_); }

  void* data() const { return memory_; }
  std::size_t size() const { return bytes_; }

 private:
  void* memory_ = nullptr;
  std::size_t bytes_;
};

// A copy of 16 bytes to shared memory that has been asked for (cp.async); only the first `bytes` have a source.
struct Copy {
  void* to;
  const void* from;
  std::size_t bytes;
};

class Block;

struct Thread {
  Block* block = nullptr;
  int rank = 0;
  uint3 index{};
  std::vector<Copy> copies;
  std::deque<std::vector<Copy>> copy_groups;
#if !defined(FASTGEN_EMULATION_THREADS)
  const Wait* wait = nullptr;
  Fiber* fiber = nullptr;
#endif
};

inline Thread*& current() {
#if defined(FASTGEN_EMULATION_THREADS)
  static thread_local Thread* thread = nullptr;
#else
  static Thread* thread = nullptr;
#endif
  return thread;
}

inline Thread& self() { return *current(); }

// Meetings of the lanes of a warp, by mask: disjoint masks may be under way at once.
class Warp {
 public:
  Meeting& meeting(std::uint32_t mask) {
    Lock lock(monitor_.mutex);
    return meetings_[mask];
  }

 private:
  Monitor monitor_;
  std::map<std::uint32_t, Meeting> meetings_;
};

struct LaunchShape {
  dim3 grid, block;
  std::size_t shared_bytes = 0;
  unsigned seed = 0;
};

class Block {
 public:
  Block(const LaunchShape& shape, uint3 index)
      : grid(shape.grid),
        size(shape.block),
        index(index),
        dynamic_shared(shape.shared_bytes),
        threads_(static_cast<std::size_t>(size.x) * size.y * size.z),
        warps_((threads_.size() + kWarp - 1) / kWarp),
        warpgroups_((threads_.size() + kWarpgroup - 1) / kWarpgroup) {
    for (unsigned i = 0; i < threads_.size(); ++i) {
      threads_[i].block = this;
      threads_[i].rank = static_cast<int>(i);
      threads_[i].index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    }
  }

  int thread_count() const { return static_cast<int>(threads_.size()); }
  Warp& warp(int i) { return warps_[static_cast<std::size_t>(i)]; }
  Meeting& warpgroup(int i) { return warpgroups_[static_cast<std::size_t>(i)]; }
  // Barrier 0 is that of __syncthreads().
  Meeting& barrier(int i) { return barriers_[i]; }

  // The block's variable of that key, made and poisoned by the first thread that asks.
  void* shared(const void* key, std::size_t bytes) {
    Lock lock(monitor_.mutex);
    auto& memory = shared_[key];
    if (memory == nullptr) memory = std::make_unique<Poisoned>(bytes);
    return memory->data();
  }

  // State that the emulator keeps for an address in shared memory, such as an mbarrier.
  template <class T>
  T& attached(const void* address) {
    Lock lock(monitor_.mutex);
    auto& state = attached_[address];
    if (state == nullptr) state = std::make_shared<T>();
    return *static_cast<T*>(state.get());
  }

  void run(const std::function<void()>& kernel, std::mt19937& order);

  const dim3 grid, size;
  const uint3 index;
  const Poisoned dynamic_shared;

 private:
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<Meeting> warpgroups_;
  Meeting barriers_[16];
  Monitor monitor_;
  std::map<const void*, std::unique_ptr<Poisoned>> shared_;
  std::map<const void*, std::shared_ptr<void>> attached_;
};

#if defined(FASTGEN_EMULATION_THREADS)

inline void Block::run(const std::function<void()>& kernel, std::mt19937&) {
  std::vector<std::thread> running;
  for (Thread& thread : threads_) {
    running.emplace_back([&] {
      current() = &thread;
      try {
        kernel();
      } catch (const KernelError& error) {
        // The others wait for this thread: there is no way on.
        std::fprintf(stderr, "KernelError: %s\n", error.what());
        std::_Exit(3);
      }
    });
  }
  for (std::thread& thread : running) thread.join();
}

#else

inline void give_way(const Wait& wait) {
  Thread& thread = self();
  thread.wait = &wait;
  thread.fiber->pause();
  thread.wait = nullptr;
}

// "0-31, 40": ranks in order as ranges.
inline std::string ranges(const std::vector<int>& ranks) {
  std::string text;
  for (std::size_t i = 0; i < ranks.size();) {
    std::size_t last = i;
    while (last + 1 < ranks.size() && ranks[last + 1] == ranks[last] + 1) ++last;
    text += (text.empty() ? "" : ", ") + std::to_string(ranks[i]);
    if (last > i) text += "-" + std::to_string(ranks[last]);
    i = last + 1;
  }
  return text;
}

inline std::string deadlock(const std::vector<Thread>& threads) {
  std::map<std::string, std::vector<int>> where;
  for (const Thread& thread : threads) {
    where[thread.fiber->done() ? "ended" : "wait for " + thread.wait->call->text()].push_back(thread.rank);
  }
  std::string text = "deadlock:";
  for (const auto& [what, ranks] : where) text += " threads " + ranges(ranks) + " " + what + ";";
  text.back() = '.';
  return text;
}

inline void Block::run(const std::function<void()>& kernel, std::mt19937& order) {
  // Stacks are kept for the next block.
  static std::deque<Fiber> fibers;
  while (fibers.size() < threads_.size()) fibers.emplace_back();
  std::string error;
  for (std::size_t i = 0; i < threads_.size(); ++i) {
    threads_[i].fiber = &fibers[i];
    fibers[i].start([&] {
      try {
        kernel();
      } catch (const KernelError& e) {
        error = e.what();
      }
    });
  }
  std::vector<std::size_t> turns(threads_.size());
  std::iota(turns.begin(), turns.end(), 0);
  for (std::size_t alive = turns.size(); alive > 0;) {
    bool moved = false;
    std::shuffle(turns.begin(), turns.end(), order);
    for (const std::size_t i : turns) {
      Thread& thread = threads_[i];
      if (thread.fiber->done() || (thread.wait != nullptr && !thread.wait->ready(thread.wait->closure))) continue;
      moved = true;
      current() = &thread;
      thread.fiber->resume();
      if (!error.empty()) throw KernelError(error);
      if (thread.fiber->done()) --alive;
    }
    if (!moved) throw KernelError(deadlock(threads_));
  }
}

#endif

// Runs kernel() in every thread of every block.
inline void launch(const LaunchShape& shape, const std::function<void()>& kernel) {
  const dim3 grid = shape.grid, block = shape.block;
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || blocks == 0 || grid.y > 65535 || grid.z > 65535 ||
      shape.shared_bytes > kSharedLimit) {
    throw KernelError("invalid configuration: " + std::to_string(blocks) + " blocks of " +
                      std::to_string(threads) + " threads, " + std::to_string(shape.shared_bytes) +
                      " bytes of shared memory");
  }
  std::mt19937 order(shape.seed);
  std::vector<std::uint64_t> turns(blocks);
  std::iota(turns.begin(), turns.end(), 0);
  std::shuffle(turns.begin(), turns.end(), order);
  for (const std::uint64_t i : turns) {
    const uint3 index{static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                      static_cast<unsigned>(i / grid.x / grid.y)};
    Block(shape, index).run(kernel, order);
  }
}

}  // namespace fastgen::emulation
