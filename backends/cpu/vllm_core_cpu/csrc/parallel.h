// Threads: those of the framework that the caller runs in, through its C entry point.
//
// One team of threads serves torch's own kernels and these: a second team would fight it for the
// processors. Without a framework (tests) everything runs in the caller's thread.
#pragma once

#include <cstdint>

namespace vc {

typedef void (*Body)(int64_t begin, int64_t end, void* context);
// As torch_parallel_for: body over parts of [begin, end), each in some thread of the team.
typedef int32_t (*ParallelFor)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

struct Team {
  ParallelFor parallel_for = nullptr;
  int threads = 1;
};

extern Team team;

// work(index) for each index in [0, threads): each runs once, as far as possible at the same time.
template <class Work>
void each_thread(int threads, const Work& work) {
  if (threads <= 1 || !team.parallel_for) {
    for (int index = 0; index < threads; index++) work(index);
    return;
  }
  Body body = [](int64_t begin, int64_t end, void* context) {
    for (int64_t index = begin; index < end; index++) (*static_cast<const Work*>(context))(static_cast<int>(index));
  };
  team.parallel_for(0, threads, 1, body, const_cast<Work*>(&work));
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

}  // namespace vc
