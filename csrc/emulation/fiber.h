// One CUDA thread of the host emulator as a fiber: it runs until it waits, then the scheduler picks another.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstddef>
#include <functional>
#include <new>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastgen::emulation {

// A stack with a page below it that may not be touched.
class Stack {
 public:
  Stack() : memory_(mmap(nullptr, size(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    if (memory_ == MAP_FAILED || mprotect(memory_, guard(), PROT_NONE) != 0) throw std::bad_alloc();
  }
  Stack(Stack&& other) noexcept : memory_(std::exchange(other.memory_, MAP_FAILED)) {}
  Stack& operator=(Stack&&) = delete;
  ~Stack() {
    if (memory_ != MAP_FAILED) munmap(memory_, size());
  }

  void* bottom() const { return static_cast<char*>(memory_) + guard(); }
  static std::size_t usable() { return std::size_t{1} << 18; }

 private:
  static std::size_t guard() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }
  static std::size_t size() { return usable() + guard(); }

  void* memory_;
};

// Runs `body` on its own stack. body must not let an exception out.
class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void start(std::function<void()> body) {
    body_ = std::move(body);
    done_ = false;
    getcontext(&own_);
    own_.uc_stack.ss_sp = stack_.bottom();
    own_.uc_stack.ss_size = Stack::usable();
    own_.uc_link = nullptr;
    makecontext(&own_, &Fiber::enter, 0);
  }

  bool done() const { return done_; }

  // Called by the scheduler: runs the fiber until it pauses or ends.
  void resume() {
    entering() = this;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_.bottom(), Stack::usable());
    swapcontext(&scheduler_, &own_);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    swapcontext(&scheduler_, &own_);
#endif
  }

  // Called by the fiber: back to the scheduler until the next resume().
  void pause() {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(done_ ? nullptr : &fake, scheduler_bottom_, scheduler_size_);
    swapcontext(&own_, &scheduler_);
    __sanitizer_finish_switch_fiber(fake, &scheduler_bottom_, &scheduler_size_);
#else
    swapcontext(&own_, &scheduler_);
#endif
  }

 private:
  static Fiber*& entering() {
    static Fiber* fiber = nullptr;
    return fiber;
  }

  static void enter() {
    Fiber& self = *entering();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &self.scheduler_bottom_, &self.scheduler_size_);
#endif
    self.body_();
    self.done_ = true;
    self.pause();
  }

  Stack stack_;
  std::function<void()> body_;
  ucontext_t own_{}, scheduler_{};
  bool done_ = true;
#if defined(__SANITIZE_ADDRESS__)
  const void* scheduler_bottom_ = nullptr;
  std::size_t scheduler_size_ = 0;
#endif
};

}  // namespace fastgen::emulation
