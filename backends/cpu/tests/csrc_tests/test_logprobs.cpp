// logprobs against a sort and sums in double.
//
// Rows with ties, bans, one finite logit, sizes that fill no vector; broken rows beside sound ones.
#include <algorithm>
#include <numeric>

#include "check.h"

using namespace vc_test;

namespace {

const float INFINITE = INFINITY;

// Logits of one kind or another; ties are common.
void fill(float* x, int64_t size, int kind, Random& random) {
  const float spread[] = {0.1f, 1, 4, 20};
  const float by = spread[random.below(4)];
  for (int64_t i = 0; i < size; i++) {
    const float v = random.normal() * by;
    switch (kind % 9) {
      case 0: x[i] = v; break;
      case 1: x[i] = std::round(v * 2) / 2; break;
      case 2: x[i] = 7; break;
      case 3: x[i] = random.below(10) < 7 ? -INFINITE : v; break;
      case 4: x[i] = -INFINITE; break;
      case 5: x[i] = random.below(2) ? 0.0f : -0.0f; break;
      case 6: x[i] = v * 1e30f; break;
      case 7: x[i] = v + 1e4f; break;
      case 8: x[i] = static_cast<float>(i) / 64; break;  // every one is a new best
    }
  }
  if (kind % 9 == 3 || kind % 9 == 4) x[random.below(static_cast<int>(size))] = -3;
}

struct Step {
  int64_t rows, size, count;
  Guarded<float> x, values;
  Guarded<int32_t> targets, ids, rank;

  Step(int64_t rows_, int64_t size_, int64_t count_, Random& random)
      : rows(rows_), size(size_), count(count_), x(rows * size), values(rows * (1 + count), -7), targets(rows),
        ids(rows * (1 + count), -7), rank(rows, -7) {
    for (int64_t row = 0; row < rows; row++) {
      fill(&x[row * size], size, static_cast<int>(row), random);
      targets[row] = random.below(static_cast<int>(size));
    }
  }
  void run() {
    const vc::Logprobs record = {x.data(), targets.data(), ids.data(), values.data(), rank.data(), rows, size, count};
    kernels->logprobs(&record);
  }

  void check_row(int64_t row) const {
    const float* logits = &x[row * size];
    std::vector<int32_t> order(static_cast<size_t>(size));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
    const double best = static_cast<double>(logits[order[0]]);
    double total = 0;
    for (int64_t i = 0; i < size; i++) total += std::exp(static_cast<double>(logits[i]) - best);
    const double lse = std::log(total) + best;
    const int32_t target = std::min<int32_t>(std::max(targets[row], 0), static_cast<int32_t>(size - 1));
    int larger = 0;
    for (int64_t i = 0; i < size; i++) larger += logits[i] > logits[target];
    check(rank[row] == 1 + larger, "logprobs: size %ld, row %ld: rank %d, not %d", size, row, rank[row], 1 + larger);
    for (int64_t i = 0; i <= count; i++) {
      const int32_t id = ids[row * (1 + count) + i], want = i ? order[static_cast<size_t>(i - 1)] : target;
      check(id == want, "logprobs: size %ld, row %ld, column %ld of %ld: id %d, not %d", size, row, i, count, id, want);
      const double value = static_cast<double>(values[row * (1 + count) + i]);
      const double exact = static_cast<double>(logits[want]) - lse;
      // one rounding, and what the exponentials are off
      const bool is_near = std::isinf(exact) ? value == exact
                                             : std::fabs(value - exact) <= unit<float>() * (4 + std::fabs(exact));
      check(is_near, "logprobs: size %ld, row %ld, column %ld of %ld: %g, not %g", size, row, i, count, value, exact);
    }
  }
};

void check_law(int64_t size, int64_t count, Random& random) {
  Step step(18, size, count, random);
  step.targets[0] = -5, step.targets[1] = static_cast<int32_t>(size) + 3;  // are clipped
  step.run();
  for (int64_t row = 0; row < step.rows; row++) step.check_row(row);
}

// A row that is broken has no probabilities, names ids that exist, and changes no other.
void check_faults(int64_t size, int64_t count, Random& random) {
  Step step(12, size, count, random);
  for (int64_t i = 0; i < size; i++) {
    step.x[2 * size + i] = -INFINITE;
    step.x[11 * size + i] = std::nanf("");
  }
  step.x[5 * size + size / 2] = INFINITE, step.x[7 * size] = std::nanf("");
  step.run();
  for (int64_t row = 0; row < step.rows; row++) {
    if (row != 2 && row != 5 && row != 7 && row != 11) {
      step.check_row(row);
      continue;
    }
    for (int64_t i = 0; i <= count; i++) {
      const int32_t id = step.ids[row * (1 + count) + i];
      const float value = step.values[row * (1 + count) + i];
      check(id >= 0 && id < size, "logprobs: size %ld, broken row %ld: id %d", size, row, id);
      check(value != value, "logprobs: size %ld, broken row %ld: %g", size, row, static_cast<double>(value));
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  return run(count, arguments, [] {
    with_teams([&] {
      Random random(1);
      for (int turn = 0; turn < (few ? 1 : 6); turn++)
        for (int64_t size : {1, 2, 3, 15, 16, 17, 63, 65, 255, 256, 257, 300, 1021, 3000})
          for (int64_t most : {0, 1, 5, 20, 300}) check_law(size, std::min(size, most), random);
      for (int64_t size : {1, 17, 300, 5003}) check_faults(size, std::min<int64_t>(size, 20), random);
      check_law(few ? 9001 : 70003, 20, random);
    });
  });
}
