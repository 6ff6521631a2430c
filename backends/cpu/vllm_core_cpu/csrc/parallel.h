// Work in parts, for whoever of the team is there.
//
// The caller posts the parts of one call and takes some itself; it waits for parts that somebody has
// begun, and for nobody who does not come. So a team on a busy machine is as fast as the processor time
// that it gets, where one that meets at a barrier waits a turn of the system's scheduler each time.
//
// Knows: parts, shares. Does not know: how threads wait (pool.h), what is computed.
#pragma once

#include <atomic>
#include <cstdint>

namespace vc {

// How many threads may work, the caller among them.
extern int team_threads;

// run(index, context) for each index below count, and returns when the last one is done.
void post(uint32_t count, void (*run)(int index, const void* context), const void* context);

// work(index) for each index in [0, count): each runs once, as far as possible at the same time.
template <class Work>
void each_thread(int count, const Work& work) {
  if (count <= 1) {
    if (count == 1) work(0);
    return;
  }
  post(static_cast<uint32_t>(count), [](int index, const void* context) { (*static_cast<const Work*>(context))(index); },
       &work);
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

constexpr int MAX_SHARES = 256;

// work(item) for each item in [0, count): every thread goes through a share of its own, and then helps
// with those of the others.
template <class Work>
void each_item(int64_t count, int threads, const Work& work) {
  if (threads > MAX_SHARES) threads = MAX_SHARES;
  if (threads > count) threads = static_cast<int>(count);
  if (threads <= 1) {
    for (int64_t item = 0; item < count; item++) work(item);
    return;
  }
  struct alignas(64) Next {
    std::atomic<int64_t> item;
  };
  Next next[MAX_SHARES];
  for (int index = 0; index < threads; index++)
    next[index].item.store(share(count, 1, index, threads).begin, std::memory_order_relaxed);
  each_thread(threads, [&](int self) {
    for (int other = 0; other < threads; other++) {
      const int index = (self + other) % threads;
      const int64_t end = share(count, 1, index, threads).end;
      for (int64_t item; (item = next[index].item.fetch_add(1, std::memory_order_relaxed)) < end;) work(item);
    }
  });
}

}  // namespace vc
