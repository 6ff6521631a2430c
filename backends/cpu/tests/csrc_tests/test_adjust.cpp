// adjust against the law, operation by operation, to the last bit.
//
// Rows with and without bias, held ids and penalties, ids that do not exist, steps of every size in turn
// on one thread: what a row marked must be gone when the next one comes.
#include <map>

#include "check.h"

using namespace vc_test;

namespace {

constexpr int COLUMNS = vc::HELD_IDS + 5, HELD = 5;

int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
float float_of(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Through memory: no compiler rounds twice at once.
float product(float a, float b) {
  volatile float out = a * b;
  return out;
}

struct Step {
  int64_t rows, size, slots, length;
  Guarded<float> x, bias, out;
  Guarded<int32_t> history, params, positions;

  Step(int64_t rows_, int64_t size_, int64_t length_, Random& random)
      : rows(rows_), size(size_), slots(rows_ + 1), length(length_), x(rows * size), bias(slots * size),
        out(rows * size), history(slots * length), params(rows * COLUMNS), positions(rows) {
    const float odd[] = {0.0f, -0.0f, 1e-40f, -1e-40f, INFINITY, -INFINITY, 3e38f, -3e38f, 1e-38f};
    for (int64_t i = 0; i < rows * size; i++) x[i] = random.below(8) ? random.normal() * 4 : odd[random.below(9)];
    for (int64_t i = 0; i < rows * size; i++)
      if (!random.below(3)) bias[i] = random.below(9) ? random.normal() : odd[random.below(9)];
    for (int64_t i = 0; i < slots * length; i++) {
      const int64_t id = random.below(3) ? random.below(static_cast<int>(size)) : random.below(7);
      history[i] = random.below(50) ? static_cast<int32_t>(id % size) : random.below(2) ? -1 - random.below(9)
                                                                                        : static_cast<int32_t>(size);
    }
    for (int64_t row = 0; row < rows; row++) ask(row, random);
  }

  void ask(int64_t row, Random& random) {
    const float presence[] = {0, -1.5f, 0.7f, -0.0f}, frequency[] = {0, 0.25f, 0.1f, 2}, repetition[] = {1, 0.5f, 1.1f, 1.3f};
    int32_t* p = &params[row * COLUMNS];
    p[vc::PRESENCE] = bits_of(presence[random.below(4)]), p[vc::FREQUENCY] = bits_of(frequency[random.below(4)]);
    p[vc::REPETITION] = bits_of(repetition[random.below(4)]);
    p[vc::PROMPT_LEN] = random.below(static_cast<int>(length) + 3);
    p[vc::HISTORY_SLOT] = random.below(static_cast<int>(slots)), p[vc::BIAS_SLOT] = random.below(static_cast<int>(slots));
    positions[row] = random.below(static_cast<int>(length) + 5);
    p[vc::HELD_UNTIL] = positions[row] + random.below(3) - 1;
    for (int i = 0; i < HELD; i++) p[vc::HELD_IDS + i] = random.below(static_cast<int>(size) + 6) - 3;
  }

  void run(bool has_bias, bool has_penalties) {
    const vc::Adjust record = {x.data(), has_bias ? bias.data() : nullptr, has_penalties ? history.data() : nullptr,
                               params.data(), positions.data(), out.data(), rows, size, COLUMNS, slots, slots, length};
    kernels->adjust(&record);
  }

  std::vector<float> law(int64_t row, bool has_bias, bool has_penalties) const {
    const int32_t* p = &params[row * COLUMNS];
    std::vector<float> y(&x[row * size], &x[row * size] + size);
    for (int64_t id = 0; has_bias && id < size; id++) {
      bool is_held = false;
      for (int i = 0; i < HELD; i++) is_held |= p[vc::HELD_IDS + i] == id;
      float& v = y[static_cast<size_t>(id)];
      v = v + bias[p[vc::BIAS_SLOT] * size + id];
      v = v + (is_held && positions[row] < p[vc::HELD_UNTIL] ? -INFINITY : 0.0f);
    }
    std::map<int32_t, int> seen;  // id -> how often drawn
    for (int64_t j = 0; has_penalties && j < length && j < positions[row]; j++) {
      const int32_t id = history[p[vc::HISTORY_SLOT] * length + j];
      if (id >= 0 && id < size) seen[id] += j >= p[vc::PROMPT_LEN];
    }
    const float repetition = float_of(p[vc::REPETITION]);
    for (const auto& [id, count] : seen) {
      float& v = y[static_cast<size_t>(id)];
      v = product(v, v > 0 ? 1 / repetition : repetition);
      if (count) v = v - product(static_cast<float>(count), float_of(p[vc::FREQUENCY])) - float_of(p[vc::PRESENCE]);
    }
    return y;
  }
};

void check_law(int64_t rows, int64_t size, int64_t length, Random& random) {
  Step step(rows, size, length, random);
  for (int which = 0; which < 4; which++) {
    const bool has_bias = which & 1, has_penalties = which & 2;
    step.run(has_bias, has_penalties);
    for (int64_t row = 0; row < rows; row++) {
      const std::vector<float> want = step.law(row, has_bias, has_penalties);
      int64_t wrong = 0, at = -1;
      for (int64_t id = 0; id < size; id++) {
        const float got = step.out[row * size + id], expected = want[static_cast<size_t>(id)];
        const bool is_same = expected != expected ? got != got : bits_of(got) == bits_of(expected);
        if (!is_same) wrong++, at = id;
      }
      check(!wrong, "adjust: %ld ids, %ld tokens, bias %d, penalties %d, row %ld: %ld wrong, such as id %ld: %a, not %a",
            size, length, has_bias, has_penalties, row, wrong, at,
            static_cast<double>(at < 0 ? 0 : step.out[row * size + at]),
            static_cast<double>(at < 0 ? 0 : want[static_cast<size_t>(at)]));
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  return run(count, arguments, [] {
    with_teams([&] {
      Random random(1);
      for (int turn = 0; turn < (few ? 1 : 4); turn++)
        for (int64_t size : {3000, 1, 2, 5, 16, 17, 65, 300, 4001})
          for (int64_t length : {1, 30, 400}) check_law(12, size, length, random);
      check_law(3, few ? 9001 : 70003, 700, random);
    });
  });
}
