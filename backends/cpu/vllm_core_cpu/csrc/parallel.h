// Threads: those of the framework that the caller runs in, through its C entry point.
//
// One team of threads serves torch's own kernels and these: a second team would fight it for the
// processors. Without a framework (tests) everything runs in the caller's thread.
//
// Many calls in a row share one entry (`together`): the caller posts the work of each, and whoever of
// the team is there helps. Nobody is waited for who does not come, so that a team on a busy machine
// is as fast as the processor time that it gets.
#pragma once

#include <atomic>
#include <cstdint>

#if defined(__linux__)
#include <sched.h>
#endif

namespace vc {

typedef void (*Body)(int64_t begin, int64_t end, void* context);
// As torch_parallel_for: body over parts of [begin, end), each in some thread of the team.
typedef int32_t (*ParallelFor)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

struct Team {
  ParallelFor parallel_for = nullptr;
  int threads = 1;
};

extern Team team;

constexpr int MAX_THREADS = 256;
constexpr int SPINS = 2000;  // rounds before a thread that waits lets others have the processor

// Waits a moment; longer, the more often it was called.
static inline void wait_a_little(int round) {
  if (round < SPINS) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
    return;
  }
#if defined(__linux__)
  sched_yield();
#endif
}

// Work that the caller posts, part by part, to the threads that are in `serve`.
class Pool {
 public:
  // run(index, context) for each index below count: the caller takes parts like all others, and
  // returns when the last one is done.
  void post(uint32_t count, void (*run)(int index, const void* context), const void* context) {
    run_ = run, context_ = context;
    done_.store(0, std::memory_order_relaxed);
    const uint64_t phase = (parts_.load(std::memory_order_relaxed) >> 32) + 1;
    parts_.store(phase << 32 | count, std::memory_order_release);
    while (take()) {
    }
    for (int round = 0; done_.load(std::memory_order_acquire) != count; round++) wait_a_little(round);
  }

  // Until `close`.
  void serve() {
    for (int round = 0; open_.load(std::memory_order_acquire); round++) {
      if (take()) round = 0;
      wait_a_little(round);
    }
  }

  void close() { open_.store(false, std::memory_order_release); }

 private:
  // Does one part, if one is left. Who has taken a part keeps its phase from ending, so that what
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

  alignas(64) std::atomic<uint64_t> parts_{0};  // number of the phase, parts that nobody has taken
  alignas(64) std::atomic<uint32_t> done_{0};
  alignas(64) std::atomic<bool> open_{true};
  void (*run_)(int, const void*) = nullptr;
  const void* context_ = nullptr;
};

extern thread_local Pool* pool;  // of the caller, inside `together`

// work(index) for each index in [0, threads): each runs once, as far as possible at the same time.
template <class Work>
void each_thread(int threads, const Work& work) {
  if (threads <= 1 || !team.parallel_for) {
    for (int index = 0; index < threads; index++) work(index);
    return;
  }
  if (pool) {
    return pool->post(static_cast<uint32_t>(threads),
                      [](int index, const void* context) { (*static_cast<const Work*>(context))(index); }, &work);
  }
  Body body = [](int64_t begin, int64_t end, void* context) {
    for (int64_t index = begin; index < end; index++) (*static_cast<const Work*>(context))(static_cast<int>(index));
  };
  team.parallel_for(0, threads, 1, body, const_cast<Work*>(&work));
}

// work() in the caller's thread, while the rest of the team helps each_thread in it.
template <class Work>
void together(int threads, const Work& work) {
  if (threads <= 1 || !team.parallel_for || pool) return work();
  struct Both {
    Pool pool;
    const Work& work;
  } both{{}, work};
  Body body = [](int64_t begin, int64_t end, void* context) {
    Both& own = *static_cast<Both*>(context);
    for (int64_t index = begin; index < end; index++) {
      if (index) {
        own.pool.serve();
        continue;
      }
      pool = &own.pool;
      own.work();
      pool = nullptr;
      own.pool.close();
    }
  };
  team.parallel_for(0, threads, 1, body, &both);
}

// A contiguous share of [0, count) for one of `threads`, in multiples of `unit`.
struct Share {
  int64_t begin, end;
};
static inline Share share(int64_t count, int64_t unit, int index, int threads) {
  int64_t units = (count + unit - 1) / unit;
  int64_t begin = units * index / threads * unit, end = units * (index + 1) / threads * unit;
  return {begin < count ? begin : count, end < count ? end : count};
}

// work(item) for each item in [0, count): every thread goes through a share of its own, and then
// helps with those of the others.
template <class Work>
void each_item(int64_t count, int threads, const Work& work) {
  if (threads > MAX_THREADS) threads = MAX_THREADS;
  struct alignas(64) Next {
    std::atomic<int64_t> item;
  };
  if (threads <= 1) {
    for (int64_t item = 0; item < count; item++) work(item);
    return;
  }
  Next next[MAX_THREADS];
  for (int index = 0; index < threads; index++) next[index].item = share(count, 1, index, threads).begin;
  each_thread(threads, [&](int self) {
    for (int other = 0; other < threads; other++) {
      const int index = (self + other) % threads;
      const int64_t end = share(count, 1, index, threads).end;
      for (int64_t item; (item = next[index].item.fetch_add(1, std::memory_order_relaxed)) < end;) work(item);
    }
  });
}

}  // namespace vc
