// The team: threads that wait for parts of a call. Included by dispatch.cpp alone.
//
// A thread that finds nothing to do spins for some microseconds, which is longer than a caller needs
// from one kernel to the next, and then sleeps until it is woken: an idle engine takes no processor.
//
// Knows: threads. Does not know: what they compute.
#pragma once

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace vc {

typedef void (*Run)(int index, const void* context);

constexpr int SPINS = 4000;

inline void pause_a_moment() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

class Pool {
 public:
  // As vc::post. One caller at a time; false when another one is posting.
  bool post(uint32_t count, Run run, const void* context) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    run_ = run, context_ = context;
    done_.store(0, std::memory_order_relaxed);
    const uint64_t phase = (parts_.load(std::memory_order_relaxed) >> 32) + 1;
    parts_.store(phase << 32 | count);
    if (sleeping_.load()) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    while (take()) {
    }
    for (int round = 0; done_.load(std::memory_order_acquire) != count; round++)
      round < SPINS ? pause_a_moment() : (void)sched_yield();
    busy_.store(false, std::memory_order_release);
    return true;
  }

  // So many threads from now on, the caller among them; as many as the system gives.
  void resize(int threads) {
    std::lock_guard<std::mutex> lock(mutex_);
    wanted_ = threads - 1;
    wake_.notify_all();
    sigset_t all, before;  // signals are for the threads of the program
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (pthread_t thread; running_ < wanted_; running_++) {
      const auto begin = [](void* pool) -> void* { return static_cast<Pool*>(pool)->serve(), nullptr; };
      if (pthread_create(&thread, nullptr, begin, this)) break;
      pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

 private:
  // Does one part, if one is left. Whoever has taken a part keeps its phase from ending, so that what
  // is read behind the exchange belongs to it.
  bool take() {
    uint64_t parts = parts_.load(std::memory_order_acquire);
    do {
      if (!static_cast<uint32_t>(parts)) return false;
    } while (!parts_.compare_exchange_weak(parts, parts - 1, std::memory_order_acq_rel, std::memory_order_acquire));
    run_(static_cast<int>(static_cast<uint32_t>(parts)) - 1, context_);
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  bool has_parts() const { return static_cast<uint32_t>(parts_.load()) != 0; }

  void serve() {
    for (;;) {
      for (int round = 0; round < SPINS; round++) {
        if (take()) round = 0;
        pause_a_moment();
      }
      std::unique_lock<std::mutex> lock(mutex_);
      sleeping_++;  // before the look at the parts, as the caller looks at it behind posting them
      while (!has_parts() && running_ <= wanted_) wake_.wait(lock);
      sleeping_--;
      if (running_ > wanted_) {
        running_--;
        return;
      }
    }
  }

  alignas(64) std::atomic<uint64_t> parts_{0};  // number of the phase, parts that nobody has taken
  alignas(64) std::atomic<uint32_t> done_{0};
  alignas(64) std::atomic<int> sleeping_{0};
  std::atomic<bool> busy_{false};
  Run run_ = nullptr;
  const void* context_ = nullptr;
  std::mutex mutex_;
  std::condition_variable wake_;
  int running_ = 0, wanted_ = 0;  // beside the caller
};

// Never destroyed: threads may outlive what else ends a process.
inline Pool*& the_pool() {
  static Pool* pool = [] {
    pthread_atfork(nullptr, nullptr, [] { the_pool() = new Pool; });  // a child has none of the threads
    return new Pool;
  }();
  return pool;
}

}  // namespace vc
