// Log-probabilities of rows of logits: of one id, and of the most likely.
//
// A row is read once for the largest logit of each block, and once more, from the cache, for the sum of
// exponentials and the rank; for the most likely only blocks whose largest may be among them.
//
// Knows: vllm_core/ops/sampling.py: logprobs. Does not know: draws, requests.
#pragma once

#include "kernels.h"
#include "parallel.h"
#include "rows.h"
#include "sample.h"

namespace VC_ISA {

// The largest numbers of a row so far, largest first, of equals the one that came first.
struct Best {
  float* x;
  int32_t* ids;
  int64_t count, found;

  bool takes(float y) const { return found < count || y > x[count - 1]; }
  void offer(float y, int64_t id) {
    if (!takes(y)) return;
    int64_t at = found < count ? found++ : count - 1;
    for (; at > 0 && y > x[at - 1]; at--) x[at] = x[at - 1], ids[at] = ids[at - 1];
    x[at] = y, ids[at] = static_cast<int32_t>(id);
  }
};

inline void find_best(const float* x, int64_t size, const float* tops, Best best) {
  for (int64_t b = 0; b < blocks_of(size); b++) {
    if (!best.takes(tops[b])) continue;
    const int64_t first = b * BLOCK, count = block_size(b, size);
    by_vectors(x + first, count, [&](int64_t at, Vec y) {
      if (best.found == best.count && !any(y > best.x[best.count - 1])) return;
      for (int lane = 0; lane < W && at + lane < count; lane++) best.offer(y[lane], first + at + lane);
    });
  }
}

// ln of the sum of e^x; NaN where a number is, or where the largest is infinite. rank: 1 and how many
// are larger than `own`.
inline double log_sum(const float* x, int64_t size, float best, float own, int32_t* rank) {
  double total = 0;
  IVec larger{};
  for (int64_t b = 0; b < blocks_of(size); b++) {
    Vec lanes{};
    by_vectors(x + b * BLOCK, block_size(b, size), [&](int64_t, Vec y) {
      lanes += vexp(y - best);
      larger -= y > own;
    });
    total += sum(lanes);
  }
  *rank = 1;
  for (int lane = 0; lane < W; lane++) *rank += larger[lane];
  return std::log(total) + best;
}

inline void logprobs_of_row(const vc::Logprobs& a, int64_t row) {
  const float* x = a.x + row * a.size;
  int32_t* ids = a.ids + row * (1 + a.count);
  float* values = a.values + row * (1 + a.count);
  float* tops = sample_room().tops.fit(blocks_of(a.size));
  find_tops(x, a.size, tops);
  float best = tops[0];
  for (int64_t b = 1; b < blocks_of(a.size); b++) best = tops[b] > best ? tops[b] : best;
  ids[0] = static_cast<int32_t>(clamped(a.targets[row], a.size));
  values[0] = x[ids[0]];
  const double total = log_sum(x, a.size, best, values[0], a.rank + row);
  if (a.count) find_best(x, a.size, tops, {values + 1, ids + 1, a.count, 0});
  for (int64_t i = 0; i <= a.count; i++) values[i] = static_cast<float>(values[i] - total);
}

inline void logprobs(const vc::Logprobs* a) {
  vc::each_item(a->rows, threads_for(a->rows * a->size), [&](int64_t row) { logprobs_of_row(*a, row); });
}

}  // namespace VC_ISA
