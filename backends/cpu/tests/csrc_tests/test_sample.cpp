// sample against the law itself: a sort, whole numbers of 128 bits and exp in double.
//
// Rows with ties, bans, one finite logit, sizes that fill no vector; every filter at its edges.
#include <algorithm>
#include <numeric>

#include "check.h"

using namespace vc_test;

namespace {

constexpr int COLUMNS = 16;
const float INFINITE = INFINITY, TINY = 0x1p-126f;

struct Request {
  float temperature = 1, top_p = 1, gap = INFINITE;
  int top_k = 0;
};

int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

uint32_t philox(uint32_t position, uint32_t sequence, uint32_t low, uint32_t high) {
  uint64_t c[4] = {position, sequence, 0, 0};
  for (int round = 0; round < 10; round++) {
    const uint64_t left = c[0] * 0xD2511F53u, right = c[2] * 0xCD9E8D57u;
    const uint64_t next[4] = {right >> 32 ^ c[1] ^ low, right & 0xffffffff, left >> 32 ^ c[3] ^ high,
                              left & 0xffffffff};
    std::copy(next, next + 4, c);
    low += 0x9E3779B9u, high += 0xBB67AE85u;
  }
  return static_cast<uint32_t>(c[0]);
}

// The token of finite logits, and of what is -inf.
int64_t law(const float* logits, int64_t size, const Request& r, bool filters, uint32_t word) {
  if (!(r.temperature >= TINY)) return std::max_element(logits, logits + size) - logits;
  std::vector<float> x(logits, logits + size), distance(x);
  for (float& v : x) v = std::fabs(v) < TINY ? 0 : v;
  const float best = *std::max_element(x.begin(), x.end());
  float inverse_temperature = 1 / r.temperature;
  if (inverse_temperature < TINY) inverse_temperature = 0;
  std::vector<uint64_t> w(x.size());
  for (size_t i = 0; i < x.size(); i++) {
    distance[i] = (best - x[i]) * inverse_temperature;
    if (!(distance[i] >= 0)) distance[i] = INFINITE;
    const float power = static_cast<float>(std::exp(-static_cast<double>(distance[i])));
    w[i] = static_cast<uint64_t>(std::nearbyint(static_cast<double>(power) * (1 << 27)));
  }
  if (filters) {
    std::vector<size_t> order(x.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return x[a] > x[b]; });
    if (r.top_k > 0)
      for (size_t n = static_cast<size_t>(r.top_k); n < order.size(); n++) w[order[n]] = 0;
    const unsigned __int128 share = std::max<int64_t>(1, std::llrint(static_cast<double>(r.top_p) * (1 << 24)));
    unsigned __int128 total = std::accumulate(w.begin(), w.end(), uint64_t{0}), mass = 0;
    for (size_t i : order) {
      const uint64_t own = w[i];
      if (mass << 24 >= share * total) w[i] = 0;  // what stands before reaches top_p already
      mass += own;
    }
    for (size_t i = 0; i < x.size(); i++)
      if (distance[i] > std::max(r.gap, TINY)) w[i] = 0;
  }
  const unsigned __int128 total = std::accumulate(w.begin(), w.end(), uint64_t{0});
  const uint64_t target = static_cast<uint64_t>(total * word >> 32);
  int64_t token = 0;
  for (uint64_t mass = w[0]; mass <= target; mass += w[static_cast<size_t>(token)]) token++;
  return token;
}

// Logits of one kind or another; ties are common.
void fill(float* x, int64_t size, int kind, Random& random) {
  const float spread[] = {0.1f, 1, 4, 20};
  const float by = spread[random.below(4)];
  for (int64_t i = 0; i < size; i++) {
    const float v = random.normal() * by;
    switch (kind % 8) {
      case 0: x[i] = v; break;
      case 1: x[i] = std::round(v * 2) / 2; break;
      case 2: x[i] = 7; break;
      case 3: x[i] = random.below(10) < 7 ? -INFINITE : v; break;
      case 4: x[i] = -INFINITE; break;
      case 5: x[i] = random.below(2) ? 0.0f : -0.0f; break;
      case 6: x[i] = v * 1e30f; break;
      case 7: x[i] = random.below(20) ? 3.0f : v; break;
    }
  }
  if (kind % 8 == 3 || kind % 8 == 4) x[random.below(static_cast<int>(size))] = -3;
}

Request any_request(Random& random, int64_t size) {
  const float temperature[] = {0, 1e-40f, 1e-30f, 0.3f, 0.8f, 1, 1.7f, 1e4f, 1e38f, INFINITE};
  const float top_p[] = {1, 1, 0.999f, 0.9f, 0.5f, 0.1f, 1e-9f};
  const float gap[] = {INFINITE, INFINITE, 6.9f, 3, 0.7f, 0, 25};
  const int all = static_cast<int>(size), top_k[] = {0, 0, 1, 2, 5, 40, 300, all - 1, all, all + 5};
  return {temperature[random.below(10)], top_p[random.below(7)], gap[random.below(7)], top_k[random.below(10)]};
}

struct Step {
  int64_t rows, size;
  Guarded<float> x;
  Guarded<int32_t> params, positions, token, fault;

  Step(int64_t rows_, int64_t size_)
      : rows(rows_), size(size_), x(rows_ * size_), params(rows_ * COLUMNS), positions(rows_), token(rows_, -7),
        fault(rows_, -7) {}
  void ask(int64_t row, const Request& r, Random& random) {
    int32_t* p = &params[row * COLUMNS];
    p[vc::TEMPERATURE] = bits_of(r.temperature), p[vc::TOP_P] = bits_of(r.top_p), p[vc::MIN_P_GAP] = bits_of(r.gap);
    p[vc::TOP_K] = r.top_k, p[vc::SEQUENCE_INDEX] = random.below(5);
    p[vc::SEED_LOW] = static_cast<int32_t>(random.bits()), p[vc::SEED_HIGH] = static_cast<int32_t>(random.bits());
    positions[row] = random.below(1 << 30);
  }
  uint32_t word(int64_t row) const {
    const int32_t* p = &params[row * COLUMNS];
    return philox(static_cast<uint32_t>(positions[row]), static_cast<uint32_t>(p[vc::SEQUENCE_INDEX]),
                  static_cast<uint32_t>(p[vc::SEED_LOW]), static_cast<uint32_t>(p[vc::SEED_HIGH]));
  }
  void run(bool filters) {
    const vc::Sample record = {x.data(), params.data(), positions.data(), token.data(), fault.data(),
                               rows,     size,          COLUMNS,          filters};
    kernels->sample(&record);
  }
};

void check_law(int64_t rows, int64_t size, bool filters, uint64_t seed) {
  Random random(seed);
  Step step(rows, size);
  std::vector<Request> requests;
  for (int64_t row = 0; row < rows; row++) {
    fill(&step.x[row * size], size, static_cast<int>(row), random);
    requests.push_back(any_request(random, size));
    step.ask(row, requests.back(), random);
  }
  step.run(filters);
  for (int64_t row = 0; row < rows; row++) {
    const Request& r = requests[static_cast<size_t>(row)];
    const int64_t want = law(&step.x[row * size], size, r, filters, step.word(row));
    check(step.token[row] == want && !step.fault[row],
          "sample: size %ld, kind %ld, filters %d, temperature %g, top_k %d, top_p %g, gap %g: token %d, not %ld", size,
          row % 8, filters, static_cast<double>(r.temperature), r.top_k, static_cast<double>(r.top_p),
          static_cast<double>(r.gap), step.token[row], want);
  }
}

// A row that is broken is flagged, names a token that exists, and changes no other.
void check_faults(int64_t size, uint64_t seed) {
  const int64_t rows = 12;
  Random random(seed);
  Step step(rows, size);
  for (int64_t row = 0; row < rows; row++) {
    fill(&step.x[row * size], size, 0, random);
    step.ask(row, any_request(random, size), random);
  }
  step.run(true);
  std::vector<int32_t> want(step.token.data(), step.token.data() + rows);
  for (int64_t row : {2, 5, 7, 11})
    for (int64_t i = 0; i < size; i++) {
      float& v = step.x[row * size + i];
      if (row == 5) v = -INFINITE;
      if (row == 7 && i == size / 2) v = INFINITE;
      if (row == 11 || (row == 2 && i == size - 1)) v = std::nanf("");
    }
  step.run(true);
  for (int64_t row = 0; row < rows; row++) {
    const bool is_bad = row == 2 || row == 5 || row == 7 || row == 11;
    check(step.fault[row] == is_bad, "sample: size %ld, row %ld: fault %d", size, row, step.fault[row]);
    check(is_bad ? step.token[row] >= 0 && step.token[row] < size : step.token[row] == want[static_cast<size_t>(row)],
          "sample: size %ld, row %ld: token %d beside broken rows", size, row, step.token[row]);
  }
}

// Of 4 equal logits with top_p = kept / 4 exactly the first `kept` are drawn.
void check_top_p_of_equals() {
  for (int kept = 1; kept <= 4; kept++) {
    Random random(static_cast<uint64_t>(kept));
    Step step(40, 64);
    const int ids[] = {5, 9, 33, 60};
    bool is_seen[64] = {};
    for (int64_t row = 0; row < step.rows; row++) {
      for (int64_t i = 0; i < 64; i++) step.x[row * 64 + i] = -INFINITE;
      for (int id : ids) step.x[row * 64 + id] = 1.5f;
      Request r;
      r.top_p = static_cast<float>(kept) / 4;
      step.ask(row, r, random);
    }
    step.run(true);
    for (int64_t row = 0; row < step.rows; row++) is_seen[step.token[row]] = true;
    for (int n = 0; n < 4; n++)
      check(is_seen[ids[n]] == (n < kept), "top_p %d/4: id %d is drawn: %d", kept, ids[n], is_seen[ids[n]]);
  }
}

// The mass before a token is not the token's: uniforms that fall on 0 and on the edge between two.
void check_edges() {
  const int32_t at_zero = 48643752, at_half = 169383018;  // positions whose words are 21 and 2^31 + 4
  for (int64_t first : {0, 290})
    for (float top_p : {1.0f, 0.99f}) {
      Step step(2, 300);
      Request r;
      r.top_p = top_p;
      Random random(1);
      for (int64_t i = 0; i < 600; i++) step.x[i] = -INFINITE;
      step.x[299] = step.x[300 + first] = step.x[599] = 2;
      for (int64_t row : {0, 1}) {
        step.ask(row, r, random);
        for (int column : {vc::SEED_LOW, vc::SEED_HIGH, vc::SEQUENCE_INDEX}) step.params[row * COLUMNS + column] = 0;
      }
      step.positions[0] = at_zero, step.positions[1] = at_half;
      step.run(true);
      check(step.token[0] == 299, "uniform 0: token %d, not 299", step.token[0]);
      check(step.token[1] == 299, "uniform on the edge: token %d, not 299", step.token[1]);
    }
}

}  // namespace

int main(int count, char** arguments) {
  return run(count, arguments, [] {
    check(philox(0, 0, 0, 0) == 0x6627E8D5, "Philox: the known answer");
    with_teams([&] {
      uint64_t seed = 0;
      for (int64_t size : {1, 2, 3, 15, 16, 17, 63, 64, 65, 255, 256, 257, 300, 1021, 3000})
        for (int turn = 0; turn < (few ? 1 : 12); turn++)
          for (bool filters : {false, true}) check_law(24, size, filters, ++seed);
      for (int64_t size : {1, 17, 300, 5003}) check_faults(size, ++seed);
      check_top_p_of_equals();
      check_edges();
      for (int turn = 0; turn < (few ? 1 : 4); turn++) check_law(16, few ? 9001 : 70003, true, ++seed);
    });
  });
}
