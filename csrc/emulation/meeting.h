// Where threads of the emulator wait for each other. Everything that a kernel can wait for (barriers, warp
// operations, mbarriers) is built on wait_until() and Meeting.
#pragma once

#include <cstdint>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(FASTGEN_EMULATION_THREADS)
#include <chrono>
#include <condition_variable>
#include <mutex>
#endif

namespace fastgen::emulation {

// The kernel did what CUDA leaves undefined. The launch stops and says where.
struct KernelError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A place in the kernel's source: as a default argument, Site::here() is that of the call.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// What a thread waits for.
struct Call {
  const char* name;
  std::uint32_t mask;
  Site site;

  std::string text() const {
    std::ostringstream out;
    out << name;
    if (mask != 0) out << " of mask 0x" << std::hex << mask << std::dec;
    out << " at " << site.file << ":" << site.line;
    return out.str();
  }
};

#if defined(FASTGEN_EMULATION_THREADS)

// The lock of one object that threads wait on. Each has its own: one lock for all would order accesses that the
// kernel leaves unordered, and hide their races from the thread sanitizer.
struct Monitor {
  std::mutex mutex;
  std::condition_variable changed;
  void notify() { changed.notify_all(); }
};
using Lock = std::unique_lock<std::mutex>;

// Waits for ready(), which is asked under the lock; whoever makes it true calls monitor.notify().
template <class Ready>
void wait_until(Monitor& monitor, Lock& lock, const Call& call, Ready ready) {
  // Fibers know a deadlock at once; threads only see that nobody comes.
  const auto deadline = std::chrono::system_clock::now() + std::chrono::seconds(30);
  if (!monitor.changed.wait_until(lock, deadline, ready)) {
    throw KernelError("deadlock: nobody came for half a minute to " + call.text());
  }
}

#else

struct Monitor {
  int mutex = 0;
  void notify() {}
};
struct Lock {
  explicit Lock(int) {}
};

// What the scheduler asks of a waiting fiber.
struct Wait {
  const Call* call;
  bool (*ready)(void*);
  void* closure;
};
// Lets other fibers run until wait.ready; in block.h.
void give_way(const Wait& wait);

template <class Ready>
void wait_until(Monitor&, Lock&, const Call& call, Ready ready) {
  if (ready()) return;
  give_way({&call, [](void* closure) { return (*static_cast<Ready*>(closure))(); }, &ready});
}

#endif

// A number of threads that must all come before any goes on. The last to come runs a body for all of them.
class Meeting {
 public:
  // Threads known by rank in [0, ranks), `count` of which come, each with a `slot`. body(slots by rank) runs once
  // and may write to the slots. All must make the same call, at the same site where same_site.
  template <class Body>
  void meet(int rank, int ranks, int count, void* slot, const Call& call, bool same_site, Body body) {
    Lock lock(monitor_.mutex);
    if (arrived_ == 0) {
      first_ = call;
      slots_.assign(static_cast<std::size_t>(ranks), nullptr);
    } else if (!same_call(call, same_site)) {
      throw KernelError("divergence: " + first_.text() + " meets " + call.text());
    }
    slots_[static_cast<std::size_t>(rank)] = slot;
    if (++arrived_ < count) return wait(lock, call);
    body(static_cast<void* const*>(slots_.data()));
    release();
  }

  // Any `count` threads; those that do not wait only count (bar.sync and bar.arrive).
  void come(int count, bool waits, const Call& call) {
    Lock lock(monitor_.mutex);
    if (++arrived_ == count) return release();
    if (waits) wait(lock, call);
  }

 private:
  bool same_call(const Call& call, bool same_site) const {
    if (std::strcmp(first_.name, call.name) != 0 || first_.mask != call.mask) return false;
    return !same_site ||
           (first_.site.line == call.site.line && std::strcmp(first_.site.file, call.site.file) == 0);
  }

  void wait(Lock& lock, const Call& call) {
    wait_until(monitor_, lock, call, [this, mine = round_] { return round_ != mine; });
  }

  void release() {
    arrived_ = 0;
    ++round_;
    monitor_.notify();
  }

  Monitor monitor_;
  int arrived_ = 0;
  std::uint64_t round_ = 0;
  Call first_{};
  std::vector<void*> slots_;
};

}  // namespace fastgen::emulation
