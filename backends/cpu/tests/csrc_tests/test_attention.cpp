// attend and move_blocks against the formula of vllm_core/backend/attention.py, in double.
//
// A batch has rows that decode, prompts, chunks behind a prefix and an empty row, and tokens of
// padding behind them. Whatever nobody may read is poison: slots from seq_len on, blocks that no row
// holds or sees, other layers, gaps between tokens; in the tables, blocks that do not exist. T is what
// is computed in; S what the cache stores: T, or int8_t, codes by the law of
// vllm_core/ops/quantized_kv.py.
#include <algorithm>

#include "check.h"

using namespace vc_test;

namespace {

const float NOT_READ = std::nanf("");
const int64_t LAYERS = 2, LAYER = 1, PADDING = 3;

struct Row {
  int64_t cached, queries;
  int64_t length() const { return cached + queries; }
};

struct Shape {
  int64_t kv_heads, per_kv, dim, dim_v, block_tokens;
  int64_t q_heads() const { return kv_heads * per_kv; }
};

struct Rules {
  int64_t window = -1;  // none
  float softcap = 0, sharpness = 1;
  bool causal = true, sinks = false, lse = true;
};

struct Wanted {
  double out, allowed;
};

template <class S>
constexpr bool CODED = sizeof(S) == 1;

// What a cache holds of vectors [count][dim], and what that is worth.
template <class T, class S>
struct Held {
  std::vector<S> stored;
  std::vector<float> scales, worth;  // [count] of codes; [count][dim]

  Held(const std::vector<T>& x, int64_t dim) {
    for (size_t first = 0; first < x.size(); first += static_cast<size_t>(dim)) {
      const T* vector = &x[first];
      float most = 0;
      for (int64_t d = 0; d < dim; d++) most = std::max(most, std::fabs(widen(vector[d])));
      scales.push_back(most / 127.0f);
      for (int64_t d = 0; d < dim; d++) hold(vector[d], scales.back());
    }
  }
  void hold(T x, float scale) {
    if constexpr (CODED<S>) {
      stored.push_back(static_cast<S>(scale > 0 ? std::nearbyint(widen(x) / scale) : 0));
      worth.push_back(stored.back() * scale);
    } else {
      stored.push_back(x);
      worth.push_back(widen(x));
    }
  }
};

template <class T, class S>
struct Case {
  Shape s;
  Rules rules;
  std::vector<Row> rows;
  int64_t tokens = 0, longest = 0, used = 1, blocks, table_stride, head_size;
  std::vector<std::vector<T>> keys, values;  // of each row: [length][kv_heads][dim]
  std::vector<Held<T, S>> held_keys, held_values;
  Guarded<int32_t> tables, row_ids, seq_lens, query_start;
  Guarded<float> sinks;
  std::vector<Wanted> wanted, wanted_lse;

  static int64_t count_tokens(const std::vector<Row>& rows) {
    int64_t sum = 0;
    for (const Row& row : rows) sum += row.queries;
    return sum;
  }
  static int64_t count_columns(const std::vector<Row>& rows, int64_t block_tokens) {
    int64_t most = 0;
    for (const Row& row : rows) most = std::max(most, (row.length() + block_tokens - 1) / block_tokens);
    return most + 2;
  }

  Case(Shape shape, Rules rules_, std::vector<Row> rows_, uint64_t seed)
      : s(shape),
        rules(rules_),
        rows(rows_),
        tokens(count_tokens(rows)),
        table_stride(count_columns(rows, s.block_tokens)),
        tables(static_cast<int64_t>(rows.size() + 1) * table_stride, INT32_MAX),
        row_ids(static_cast<int64_t>(rows.size())),
        seq_lens(static_cast<int64_t>(rows.size())),
        query_start(static_cast<int64_t>(rows.size()) + 1),
        sinks(s.q_heads()) {
    Random random(seed);
    for (int64_t h = 0; h < s.q_heads(); h++) sinks[h] = h % 4 == 3 ? -INFINITY : 3 * random.normal();
    for (size_t r = 0; r < rows.size(); r++) {
      keys.push_back(numbers(random, rows[r].length() * s.kv_heads * s.dim));
      values.push_back(numbers(random, rows[r].length() * s.kv_heads * s.dim_v));
      if (rows[r].length() > 2) std::fill_n(keys[r].begin(), s.dim, T()), std::fill_n(values[r].begin(), s.dim_v, T());
      held_keys.emplace_back(keys[r], s.dim);
      held_values.emplace_back(values[r], s.dim_v);
      const int64_t i = static_cast<int64_t>(r);
      row_ids[i] = static_cast<int32_t>(rows.size() - r);  // table 0 is nobody's
      seq_lens[i] = static_cast<int32_t>(rows[r].length());
      query_start[i + 1] = query_start[i] + static_cast<int32_t>(rows[r].queries);
    }
    give_blocks();
    head_size = kernels->kv_head_size(dtype_of<T>(), kv_dtype(), s.dim, s.dim_v, s.block_tokens);
    ask(random);
  }

  static std::vector<T> numbers(Random& random, int64_t count) {
    std::vector<T> out;
    for (int64_t i = 0; i < count; i++) out.push_back(narrow<T>(random.normal()));
    return out;
  }

  static int32_t kv_dtype() { return CODED<S> ? static_cast<int32_t>(vc::INT8) : dtype_of<T>(); }

  bool sees(int64_t at, int64_t key) const {
    return (!rules.causal || key <= at) && (rules.window < 0 || key > at - rules.window);
  }

  // Rows take blocks in turn, so that no two of a row are neighbours; none where no query looks: the
  // null block, or one that does not exist.
  void give_blocks() {
    for (int64_t column = 0; column < table_stride; column++)
      for (size_t r = 0; r < rows.size(); r++) {
        const int64_t from = column * s.block_tokens, to = from + s.block_tokens;
        if (from >= rows[r].length() || !rows[r].queries) continue;
        int32_t* entry = &tables[(row_ids[static_cast<int64_t>(r)]) * table_stride + column];
        if (rules.window < 0 || to > rows[r].cached - rules.window + 1)
          *entry = static_cast<int32_t>(used++);
        else if (r % 2)
          *entry = 0;
      }
    blocks = used + 2;
  }

  // visit(block, slot, row, position): every slot that holds something, with the step's tokens or before.
  template <class Visit>
  void slots(bool after, const Visit& visit) const {
    for (size_t r = 0; r < rows.size(); r++)
      for (int64_t at = 0; at < (after ? rows[r].length() : rows[r].cached); at++) {
        int32_t block = tables[row_ids[static_cast<int64_t>(r)] * table_stride + at / s.block_tokens];
        if (block > 0 && block < used) visit(block, at % s.block_tokens, r, at);
      }
  }

  std::vector<T> queries;  // [tokens][q_heads][dim]

  // What is wanted, and how far a sum of rounded numbers may be from it.
  void ask(Random& random) {
    queries = numbers(random, tokens * s.q_heads() * s.dim);
    const double u = unit<float>(), scale = scale_of(), noise = (4 + 2 * std::sqrt(s.dim)) * u;
    int64_t token = 0;
    std::vector<double> scores, out, sizes, squares;
    for (size_t r = 0; r < rows.size(); r++)
      for (int64_t t = 0; t < rows[r].queries; t++, token++)
        for (int64_t h = 0; h < s.q_heads(); h++) {
          const T* q = &queries[static_cast<size_t>((token * s.q_heads() + h) * s.dim)];
          scores.assign(static_cast<size_t>(rows[r].length()), -INFINITY);
          double top = -INFINITY, wrong = 0, total = 0;
          for (int64_t j = 0; j < rows[r].length(); j++) {
            if (!sees(rows[r].cached + t, j)) continue;
            const float* k = &held_keys[r].worth[static_cast<size_t>((j * s.kv_heads + h / s.per_kv) * s.dim)];
            double score = 0, size = 0;
            for (int64_t d = 0; d < s.dim; d++) {
              double term = scale * static_cast<double>(widen(q[d])) * k[d];
              score += term;
              size += std::fabs(term);
            }
            wrong = std::max(wrong, noise * size + 4 * u * std::fabs(score) + 16 * u * rules.softcap);
            if (rules.softcap > 0) score = rules.softcap * std::tanh(score / rules.softcap);
            scores[static_cast<size_t>(j)] = score;
            top = std::max(top, score);
          }
          out.assign(static_cast<size_t>(s.dim_v), 0);
          sizes = squares = out;
          for (size_t j = 0; j < scores.size(); j++) {
            double p = std::exp(scores[j] - top);
            if (p == 0) continue;
            total += p;
            const size_t at = j * static_cast<size_t>(s.kv_heads) + static_cast<size_t>(h / s.per_kv);
            const float* v = &held_values[r].worth[at * out.size()];
            for (size_t d = 0; d < out.size(); d++) {
              out[d] += p * v[d];
              sizes[d] += std::fabs(p * v[d]);
              squares[d] += p * p * v[d] * v[d];
            }
          }
          wrong = 2 * wrong + (8 + std::sqrt(scores.size())) * u;  // of a weight, relative
          wanted_lse.push_back({top + std::log(total), wrong + 2 * u * std::fabs(top)});
          if (rules.sinks) total += std::exp(sinks[h] - top);
          const double rounded = sizeof(T) == 2 ? 4 * unit<T>() : 0;  // weights are, each on its own
          for (size_t d = 0; d < out.size(); d++) {
            double allowed = (2 * wrong * sizes[d] + rounded * std::sqrt(squares[d])) / total;
            out[d] /= total;
            wanted.push_back({out[d], allowed + 1.01 * unit<T>() * (std::fabs(out[d]) + allowed) + 1e-30});
          }
        }
  }

  // Every query is infinite where keys are negative, and 0 from `first_zero` on: scores of -inf, then
  // NaN, and so no result.
  void spoil(int64_t first_zero) {
    for (size_t at = 0; at < queries.size(); at += static_cast<size_t>(s.dim)) queries[at] = narrow<T>(INFINITY);
    for (size_t r = 0; r < rows.size(); r++) {
      const size_t size = static_cast<size_t>(s.kv_heads * s.dim);
      for (size_t at = 0; at < keys[r].size(); at += static_cast<size_t>(s.dim))
        keys[r][at] = narrow<T>(static_cast<int64_t>(at / size) < first_zero ? -1.0f : 0.0f);
      held_keys[r] = Held<T, S>(keys[r], s.dim);
    }
    for (Wanted& w : wanted) w.out = NAN;
    for (Wanted& w : wanted_lse) w.out = NAN;
  }
  float scale_of() const { return rules.sharpness / std::sqrt(static_cast<float>(s.dim)); }
};

bool is_near(double got, const Wanted& w) {
  return std::isnan(w.out) ? std::isnan(got) : std::fabs(got - w.out) <= w.allowed;
}

// What nobody may read: NaN, or another number.
template <class T>
struct Poison {
  T number;
  float scale;
  int8_t byte;  // a scale of such bytes is NaN, or 3e38
  template <class S>
  S stored() const {
    if constexpr (CODED<S>)
      return byte;
    else
      return number;
  }
};

// What a layer's blocks hold, as move_blocks has it: [blocks][block_tokens][kv_heads][dim].
template <class T, class S>
struct Content {
  const Case<T, S>& c;
  Guarded<S> k, v;
  Guarded<float> k_scale, v_scale;

  Content(const Case<T, S>& of, const Poison<T>& poison)
      : c(of),
        k(vectors() * c.s.dim, poison.template stored<S>()),
        v(vectors() * c.s.dim_v, poison.template stored<S>()),
        k_scale(vectors(), poison.scale),
        v_scale(vectors(), poison.scale) {}
  int64_t vectors() const { return c.blocks * c.s.block_tokens * c.s.kv_heads; }
  void fill(bool after) {
    c.slots(after, [&](int64_t block, int64_t slot, size_t row, int64_t at) {
      const int64_t heads = c.s.kv_heads, to = (block * c.s.block_tokens + slot) * heads;
      copy(&k[to * c.s.dim], c.held_keys[row].stored, at, heads * c.s.dim);
      copy(&v[to * c.s.dim_v], c.held_values[row].stored, at, heads * c.s.dim_v);
      copy(&k_scale[to], c.held_keys[row].scales, at, heads);
      copy(&v_scale[to], c.held_values[row].scales, at, heads);
    });
  }
  template <class X>
  static void copy(X* to, const std::vector<X>& from, int64_t at, int64_t count) {
    std::memcpy(to, &from[static_cast<size_t>(at * count)], static_cast<size_t>(count) * sizeof(X));
  }
  void move(const vc::Attend& a, bool to_cache) {
    std::vector<int32_t> ids;
    for (int64_t block = 0; block < c.blocks; block++) ids.push_back(static_cast<int32_t>(block));
    const vc::Blocks blocks = {ids.data(), k.data(), v.data(), CODED<S> ? k_scale.data() : nullptr,
                               CODED<S> ? v_scale.data() : nullptr, c.blocks, to_cache};
    kernels->move_blocks(&a, &blocks);
  }
  bool is(const Content& other) const;
};

template <class T>
bool same(const Guarded<T>& a, const Guarded<T>& b) {
  return !std::memcmp(a.data(), b.data(), static_cast<size_t>(a.size()) * sizeof(T));
}

template <class T, class S>
bool Content<T, S>::is(const Content& other) const {
  const bool scales = !CODED<S> || (same(k_scale, other.k_scale) && same(v_scale, other.v_scale));
  return scales && same(k, other.k) && same(v, other.v);
}

// q, k or v of the step, tokens `gap` further apart than they must be.
template <class T>
void fill_tokens(Guarded<T>& to, int64_t token, int64_t stride, const T* from, int64_t count) {
  std::memcpy(&to[token * stride], from, static_cast<size_t>(count) * sizeof(T));
}

// One step on a fresh cache; out and lse come back as the kernel left them.
template <class T, class S>
void step(const Case<T, S>& c, const Poison<T>& unread, const char* name, Guarded<T>& out, Guarded<float>& lse) {
  const Shape s = c.s;
  const T poison = unread.number;
  const S blank = unread.template stored<S>();
  const int64_t all = c.tokens + PADDING, q_size = s.q_heads() * s.dim, k_size = s.kv_heads * s.dim,
                v_size = s.kv_heads * s.dim_v, block_size = LAYERS * s.kv_heads * c.head_size;
  Guarded<S> cache(c.blocks * block_size, blank);
  Guarded<T> q((all - 1) * (q_size + 3) + q_size, poison), k((all - 1) * (k_size + 1) + k_size, poison);
  Guarded<T> v((all - 1) * (v_size + 5) + v_size, poison);
  for (size_t r = 0; r < c.rows.size(); r++)
    for (int64_t t = 0; t < c.rows[r].queries; t++) {
      const int64_t token = c.query_start[static_cast<int64_t>(r)] + t, at = c.rows[r].cached + t;
      fill_tokens(q, token, q_size + 3, &c.queries[static_cast<size_t>(token * q_size)], q_size);
      fill_tokens(k, token, k_size + 1, &c.keys[r][static_cast<size_t>(at * k_size)], k_size);
      fill_tokens(v, token, v_size + 5, &c.values[r][static_cast<size_t>(at * v_size)], v_size);
    }
  const vc::AttendStep shared = {c.tables.data(), c.row_ids.data(), c.seq_lens.data(), c.query_start.data(),
                                 c.table_stride, static_cast<int64_t>(c.rows.size()), all};
  vc::Attend a = {};
  a.step = &shared, a.cache = cache.data();
  a.q = q.data(), a.k = k.data(), a.v = v.data(), a.out = out.data();
  a.lse = c.rules.lse ? lse.data() : nullptr;
  a.sinks = c.rules.sinks ? c.sinks.data() : nullptr;
  a.block_stride = block_size, a.layer = LAYER;
  a.q_stride = q_size + 3, a.k_stride = k_size + 1, a.v_stride = v_size + 5;
  a.q_heads = s.q_heads(), a.kv_heads = s.kv_heads, a.dim = s.dim, a.dim_v = s.dim_v;
  a.block_tokens = s.block_tokens, a.window = c.rules.window;
  a.scale = c.scale_of(), a.softcap = c.rules.softcap, a.causal = c.rules.causal, a.dtype = dtype_of<T>(), a.kv_dtype = c.kv_dtype();

  Content<T, S> before(c, unread), after(c, unread), found(c, Poison<T>{});
  before.fill(false);
  after.fill(true);
  before.move(a, true);
  found.move(a, false);
  check(found.is(before), "%s: move_blocks there and back", name);
  kernels->attend(&a);
  found.move(a, false);
  check(found.is(after), "%s: the cache after the step", name);
  int64_t changed = 0;
  for (int64_t i = 0; i < cache.size(); i++)
    if (i % block_size / (s.kv_heads * c.head_size) != LAYER)
      changed += std::memcmp(&cache[i], &blank, sizeof(S)) != 0;
  check(!changed, "%s: %ld numbers of another layer have changed", name, changed);
}

template <class T, class S>
void check_case(const Case<T, S>& c, const char* rules) {
  char name[200];
  for (int threads : {1, 2, 3}) {
    vc_set_threads(threads);
    std::snprintf(name, sizeof name,
                  "attend: dtype %d, cache %d, heads %ld / %ld dim %ld / %ld blocks of %ld, %ld rows, %s, %d threads",
                  dtype_of<T>(), c.kv_dtype(), c.s.q_heads(), c.s.kv_heads, c.s.dim, c.s.dim_v, c.s.block_tokens,
                  static_cast<int64_t>(c.rows.size()), rules, threads);
    const int64_t heads = c.s.q_heads(), size = heads * c.s.dim_v, all = c.tokens + PADDING;
    Guarded<T> out(all * size, narrow<T>(NOT_READ)), again(all * size, narrow<T>(NOT_READ));
    Guarded<float> lse(all * heads, NOT_READ), lse_again(all * heads, NOT_READ);
    step(c, Poison<T>{narrow<T>(NOT_READ), NOT_READ, -1}, name, out, lse);
    if (threads == 3) {  // the bits do not hang on what is not to be read, either
      step(c, Poison<T>{narrow<T>(3e38f), 3e38f, 0x7f}, name, again, lse_again);
      check(same(out, again) && same(lse, lse_again), "%s: another poison, other bits", name);
    }
    for (int64_t i = 0; i < c.tokens * size; i++) {
      const Wanted& w = c.wanted[static_cast<size_t>(i)];
      double got = widen(out[i]);
      check(is_near(got, w), "%s: token %ld head %ld [%ld]: %.9g, not %.9g +- %.2g", name,
            i / size, i % size / c.s.dim_v, i % c.s.dim_v, got, w.out, w.allowed);
    }
    for (int64_t i = 0; c.rules.lse && i < c.tokens * heads; i++) {
      const Wanted& w = c.wanted_lse[static_cast<size_t>(i)];
      check(is_near(lse[i], w), "%s: token %ld head %ld: lse %.9g, not %.9g +- %.2g", name,
            i / heads, i % heads, lse[i], w.out, w.allowed);
    }
    for (int64_t i = c.tokens * size; i < all * size; i++)
      check(widen(out[i]) == 0, "%s: padding, but %.9g", name, widen(out[i]));
    for (int64_t i = c.tokens * heads; c.rules.lse && i < all * heads; i++)
      check(lse[i] == -INFINITY, "%s: padding, but lse %.9g", name, lse[i]);
  }
}

void check_all(Shape shape, const char* name, Rules rules, const std::vector<Row>& rows, uint64_t seed) {
  check_case(Case<float, float>(shape, rules, rows, seed), name);
  check_case(Case<bf16, bf16>(shape, rules, rows, seed), name);
  check_case(Case<float, int8_t>(shape, rules, rows, seed), name);
  check_case(Case<bf16, int8_t>(shape, rules, rows, seed), name);
}

void check_spoiled(Shape shape, Rules rules, const std::vector<Row>& rows, int64_t first_zero, uint64_t seed) {
  const auto check_one = [&](auto&& c) {
    c.spoil(first_zero);
    check_case(c, first_zero ? "scores of -inf, then NaN" : "scores of NaN");
  };
  check_one(Case<float, float>(shape, rules, rows, seed));
  check_one(Case<bf16, bf16>(shape, rules, rows, seed));
  check_one(Case<float, int8_t>(shape, rules, rows, seed));
  check_one(Case<bf16, int8_t>(shape, rules, rows, seed));
}

Rules made(int64_t window, float softcap, bool sinks, bool causal = true, bool lse = true, float sharpness = 1) {
  Rules rules;
  rules.window = window, rules.softcap = softcap, rules.sinks = sinks, rules.causal = causal, rules.lse = lse;
  rules.sharpness = sharpness;
  return rules;
}

}  // namespace

int main(int count, char** arguments) {
  return run(count, arguments, [] {
    const std::vector<std::pair<const char*, Rules>> all_rules = {
        {"plain", made(-1, 0, false)},
        {"window 1", made(1, 0, false)},
        {"window 2, softcap", made(2, 5, false)},
        {"window 17, sinks", made(17, 0, true)},
        {"window 100, scores of hundreds", made(100, 0, false, true, true, 200)},
        {"softcap, sinks, no lse", made(-1, 3, true, true, false, 4)},
        {"not causal", made(-1, 0, false, false)},
        {"not causal, window 9, sinks", made(9, 0, true, false)},
    };
    const std::vector<Row> mixed = few ? std::vector<Row>{{0, 1}, {34, 1}, {0, 19}, {45, 7}, {5, 0}, {15, 1}}
                                       : std::vector<Row>{{0, 1},  {199, 1}, {0, 70},  {90, 37}, {5, 0},
                                                          {15, 1}, {16, 1},  {63, 1},  {64, 2},  {130, 5}};
    const std::vector<Shape> shapes = {{2, 1, 64, 64, 32}, {1, 7, 2, 2, 16},   {2, 3, 72, 72, 64}, {1, 3, 80, 80, 16},
                                       {2, 7, 5, 5, 32},   {1, 1, 64, 40, 64}, {3, 3, 5, 33, 16},  {1, 50, 3, 18, 16}};
    uint64_t seed = 0;
    for (const Shape& shape : shapes)
      for (const auto& [name, rules] : all_rules)
        if (++seed && (!few || seed % 9 % 4 == 1)) check_all(shape, name, rules, mixed, seed);
    // one row or two, cut among the threads; with the window, a thread has keys that some queries never see
    const int64_t many = few ? 300 : 3000;
    for (const Shape& shape : std::vector<Shape>{{1, 3, 64, 64, 32}, {2, 1, 5, 20, 16}}) {
      check_all(shape, "long", made(-1, 0, true), {{many, 1}}, ++seed);
      check_all(shape, "long, odd", made(-1, 0, false, true, true, 6), {{many + 2, 1}, {many / 3, 9}}, ++seed);
      check_all(shape, "long, window 100", made(100, 0, false), {{many / 5, 60}}, ++seed);
      check_spoiled(shape, made(-1, 0, false), {{many, 1}, {20, 30}}, 0, ++seed);
      check_spoiled(shape, made(-1, 0, true), {{many, 1}}, many * 3 / 4, ++seed);
    }
  });
}
