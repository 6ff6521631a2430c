// Paged attention: one call writes the step's K and V at their slots and attends, prompts, chunks
// and decoding rows together.
//
// Cache: [blocks][layers][KV heads][K then V]. K of 16 tokens is [D / 2][16][2] in bfloat16 and
// [D][16] in float32, so that one register holds a score of 16 tokens; V is [tokens / 2][Dv][2] and
// [tokens][Dv], Dv padded to 16, so that one register holds 16 dims of an output. No sum runs across
// lanes, and each byte of K and V is read once for all query heads that share it, however many.
//
// A unit of work is some queries of one row and one KV head. All units are laid end to end, weighed
// by the keys they meet, and cut into equal shares of the threads; a unit that is cut leaves partial
// sums, which are merged at the end.
//
// Knows: this layout, visibility. Does not know: who owns a block.
#pragma once

#include "kernels.h"
#include "parallel.h"
#include "room.h"
#include "simd.h"

namespace VC_ISA {

constexpr int KEYS = 64;        // keys that are met at a time
constexpr int GROUPS = KEYS / LANES;
constexpr int UNIT_ROWS = 48;   // (query, head) pairs of a unit, about
constexpr int FIXED_COST = 8;   // of meeting a key, beside one per query row
constexpr float NEVER = -INFINITY;
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;
constexpr float RISE = 8;  // by which a score may exceed its row's base, as a power of two

#if defined(__AVX512F__)
constexpr int MEET_ROWS = 6;
#elif defined(__AVX2__)
constexpr int MEET_ROWS = 4;
#else
constexpr int MEET_ROWS = 4;
#endif

inline int64_t padded(int64_t dim) { return (dim + LANES - 1) / LANES * LANES; }
// Elements of K and of both, of one head in one block.
template <class T>
int64_t key_size(int64_t dim, int64_t block_tokens) {
  return (sizeof(T) == 2 ? (dim + 1) / 2 * 2 : dim) * block_tokens;
}
template <class T>
int64_t head_size(int64_t dim, int64_t dim_v, int64_t block_tokens) {
  return key_size<T>(dim, block_tokens) + padded(dim_v) * block_tokens;
}

template <class T>
struct Pairs {  // how many neighbours stand together: dims of K, tokens of V
  static constexpr int N = sizeof(T) == 2 ? 2 : 1;
};

// ---- the cache
template <class T>
struct Cache {
  T* base;
  int64_t block_stride, head_stride, dim, dim_v, block_tokens;

  T* key(int64_t block, int64_t head, int64_t slot) const {  // of a whole group of 16
    constexpr int N = Pairs<T>::N;
    return base + block * block_stride + head * head_stride + slot / LANES * ((dim + N - 1) / N * N * LANES);
  }
  T* value(int64_t block, int64_t head, int64_t slot) const {  // slot even
    return base + block * block_stride + head * head_stride + key_size<T>(dim, block_tokens) + slot * padded(dim_v);
  }
  void write(int64_t block, int64_t head, int64_t slot, const T* k, const T* v) const {
    constexpr int N = Pairs<T>::N;
    T* to = key(block, head, slot) + slot % LANES * N;
    for (int64_t d = 0; d < dim; d++) to[d / N * (LANES * N) + d % N] = k[d];
    if (dim % N) to[dim / N * (LANES * N) + 1] = T(0);
    to = value(block, head, slot / N * N) + slot % N;
    for (int64_t d = 0; d < dim_v; d++) to[d * N] = v[d];
  }
  void read(int64_t block, int64_t head, int64_t slot, T* k, T* v) const {
    constexpr int N = Pairs<T>::N;
    const T* from = key(block, head, slot) + slot % LANES * N;
    for (int64_t d = 0; d < dim; d++) k[d] = from[d / N * (LANES * N) + d % N];
    from = value(block, head, slot / N * N) + slot % N;
    for (int64_t d = 0; d < dim_v; d++) v[d] = from[d * N];
  }
};

template <class T>
Cache<T> cache_of(const vc::Attend& a) {
  return {static_cast<T*>(a.cache) + a.layer * a.kv_heads * head_size<T>(a.dim, a.dim_v, a.block_tokens),
          a.block_stride, head_size<T>(a.dim, a.dim_v, a.block_tokens), a.dim, a.dim_v, a.block_tokens};
}

// ---- products of a few rows with keys and values
template <class T>
struct Meet;
template <>
struct Meet<bf16> {
  typedef UVec Lane;
  static VC_INLINE Lane splat(const bf16* p) { return set_pair(p); }
  static VC_INLINE Lane lanes(const bf16* p) { return load_pairs(p); }
  static VC_INLINE Vec add(Vec acc, Lane a, Lane b) { return dot2(acc, a, b); }
};
template <>
struct Meet<float> {
  typedef Vec Lane;
  static VC_INLINE Lane splat(const float* p) { return set(*p); }
  static VC_INLINE Lane lanes(const float* p) { return load(p); }
  static VC_INLINE Vec add(Vec acc, Lane a, Lane b) { return acc + a * b; }
};

// scores [ROWS][KEYS] = q . k of GROUPS groups of 16 keys; q rows hold an even number of dims.
template <class T, int ROWS, int GROUP_COUNT>
VC_INLINE void score_groups(const T* const* q, int64_t steps, const T* const* keys, float* scores) {
  constexpr int N = Pairs<T>::N;
  for (int part = 0; part < VECTORS; part++) {
    Vec sums[ROWS][GROUP_COUNT] = {};
    for (int64_t s = 0; s < steps; s++) {
      typename Meet<T>::Lane k[GROUP_COUNT];
      for (int g = 0; g < GROUP_COUNT; g++) k[g] = Meet<T>::lanes(keys[g] + (s * LANES + part * W) * N);
      for (int r = 0; r < ROWS; r++) {
        typename Meet<T>::Lane a = Meet<T>::splat(q[r] + s * N);
        for (int g = 0; g < GROUP_COUNT; g++) sums[r][g] = Meet<T>::add(sums[r][g], a, k[g]);
      }
    }
    for (int r = 0; r < ROWS; r++)
      for (int g = 0; g < GROUP_COUNT; g++) store(scores + r * KEYS + g * LANES + part * W, sums[r][g]);
  }
}

constexpr int SCORE_GROUPS = MEET_ROWS == 6 ? GROUPS : 2;

template <class T, int ROWS>
void score_rows(const T* const* q, int64_t steps, const T* const* keys, float* scores) {
  for (int g = 0; g < GROUPS; g += SCORE_GROUPS)
    score_groups<T, ROWS, SCORE_GROUPS>(q, steps, keys + g, scores + g * LANES);
}

// out[r] = out[r] * shrink[r] + p[r] . values, over `count` tokens (a multiple of N).
template <class T, int ROWS, int VECS>
VC_INLINE void weigh_columns(const T* p, int count, const T* const* values, int64_t stride, const float* shrink,
                             float* out, int64_t out_stride) {
  constexpr int N = Pairs<T>::N;
  Vec sums[ROWS][VECS];
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECS; v++) sums[r][v] = load(out + r * out_stride + v * W) * shrink[r];
  for (int j = 0; j < count; j += N) {
    const T* row = values[j / LANES] + (j % LANES) * stride;
    typename Meet<T>::Lane b[VECS];
    for (int v = 0; v < VECS; v++) b[v] = Meet<T>::lanes(row + v * W * N);
    for (int r = 0; r < ROWS; r++) {
      typename Meet<T>::Lane a = Meet<T>::splat(p + r * KEYS + j);
      for (int v = 0; v < VECS; v++) sums[r][v] = Meet<T>::add(sums[r][v], a, b[v]);
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECS; v++) store(out + r * out_stride + v * W, sums[r][v]);
}

template <class T, int ROWS>
void weigh_rows(const T* p, int count, const T* const* values, int64_t stride, const float* shrink, float* out) {
  constexpr int WIDE = MEET_ROWS == 6 ? 4 : 2;
  const T* at[GROUPS];
  int64_t vectors = stride / W, v = 0;
  for (; v + WIDE <= vectors; v += WIDE) {
    for (int g = 0; g < GROUPS; g++) at[g] = values[g] + v * W * Pairs<T>::N;
    weigh_columns<T, ROWS, WIDE>(p, count, at, stride, shrink, out + v * W, stride);
  }
  for (; v < vectors; v++) {
    for (int g = 0; g < GROUPS; g++) at[g] = values[g] + v * W * Pairs<T>::N;
    weigh_columns<T, ROWS, 1>(p, count, at, stride, shrink, out + v * W, stride);
  }
}

#define VC_BY_ROWS(rows, call)                    \
  switch (rows) {                                 \
    case 1: { constexpr int R = 1; call; break; } \
    case 2: { constexpr int R = 2; call; break; } \
    case 3: { constexpr int R = 3; call; break; } \
    case 4: { constexpr int R = 4; call; break; } \
    case 5: { constexpr int R = 5; call; break; } \
    case 6: { constexpr int R = 6; call; break; } \
  }

// ---- one unit
struct Unit {
  int64_t row, head, query, queries;  // of the step's row; first query and how many
  int64_t first, last;                // keys that any of them sees: [first, last), first a multiple of 16
};

// Running sums of a unit's (query, head) pairs. Scores are powers of two: top, what weights are relative
// to, near the largest.
struct Sums {
  float *out, *top, *total;  // [rows][width], [rows], [rows]

  static int64_t size(int64_t rows, int64_t width) { return padded(rows * (width + 2)); }
  void start(float* at, int64_t rows, int64_t width) {
    out = at;
    top = out + rows * width;
    total = top + rows;
    for (float* p = out; p < top; p++) *p = 0.0f;
    for (int64_t r = 0; r < rows; r++) top[r] = NEVER, total[r] = 0.0f;
  }
};

// What a thread leaves of a unit that it did not do alone: the one in which its share begins, and the
// one in which it ends.
struct Part {
  Unit unit;
  int64_t number;  // of the unit; -1: none
  Sums sums;
};

template <class T>
struct Scratch {
  Room<float> sums, scores, shrink, left;
  Room<T> weights, odd;
  Room<const T*> queries;
  Room<Part> parts;
};

// The calling thread's, kept over calls.
template <class T>
Scratch<T>& scratch() {
  static thread_local Scratch<T> room;
  return room;
}

template <class T>
struct Step {
  const vc::Attend& a;
  Cache<T> cache;
  int64_t per_kv, width, query_tile;

  explicit Step(const vc::Attend& args)
      : a(args), cache(cache_of<T>(args)), per_kv(args.q_heads / args.kv_heads), width(padded(args.dim_v)) {
    query_tile = UNIT_ROWS / per_kv > 1 ? UNIT_ROWS / per_kv : 1;
  }

  const int32_t* table(int64_t row) const { return a.step->tables + a.step->rows[row] * a.step->table_stride; }
  int64_t begin(int64_t row) const { return a.step->query_start[row]; }
  int64_t queries(int64_t row) const { return a.step->query_start[row + 1] - a.step->query_start[row]; }
  int64_t cached(int64_t row) const { return a.step->seq_lens[row] - queries(row); }

  // Keys [low, high) that query `t` of the row sees.
  int64_t low(int64_t row, int64_t t) const {
    if (a.window < 0) return 0;
    int64_t at = cached(row) + t - a.window + 1;
    return at > 0 ? at : 0;
  }
  int64_t high(int64_t row, int64_t t) const { return a.causal ? cached(row) + t + 1 : a.step->seq_lens[row]; }

  template <class Visit>
  void units(const Visit& visit) const {
    for (int64_t row = 0; row < a.step->num_rows; row++) {
      int64_t n = queries(row);
      for (int64_t query = 0; query < n; query += query_tile) {
        int64_t count = n - query < query_tile ? n - query : query_tile;
        int64_t first = low(row, query) / LANES * LANES, last = high(row, query + count - 1);
        for (int64_t head = 0; head < a.kv_heads; head++) visit(Unit{row, head, query, count, first, last});
      }
    }
  }
  int64_t tiles(const Unit& u) const { return (u.last - u.first + KEYS - 1) / KEYS; }
  int64_t cost(const Unit& u) const { return u.queries * per_kv + FIXED_COST; }

  void write_tokens(int64_t begin_token, int64_t end_token) const {
    int64_t row = 0;
    for (int64_t t = begin_token; t < end_token; t++) {
      while (t >= a.step->query_start[row + 1]) row++;
      int64_t position = cached(row) + t - begin(row);
      int64_t block = table(row)[position / a.block_tokens];
      for (int64_t h = 0; h < a.kv_heads; h++)
        cache.write(block, h, position % a.block_tokens, static_cast<const T*>(a.k) + t * a.k_stride + h * a.dim,
                    static_cast<const T*>(a.v) + t * a.v_stride + h * a.dim_v);
    }
  }

  // The tiles [from, to) of a unit, onto `sums`.
  void meet(const Unit& u, int64_t from, int64_t to, const Sums& sums, Scratch<T>& room) const {
    constexpr int N = Pairs<T>::N;
    const int64_t rows = u.queries * per_kv, steps = (a.dim + N - 1) / N;
    float *scores = room.scores.fit(rows * KEYS), *shrink = room.shrink.fit(rows);
    T* p = room.weights.fit(rows * KEYS);
    const T** q = room.queries.fit(rows);
    point_at_queries(u, q, room);
    for (int64_t tile = from; tile < to; tile++) {
      const int64_t first = u.first + tile * KEYS;
      const int64_t end = u.last < first + KEYS ? u.last : first + KEYS;
      const T *keys[GROUPS], *values[GROUPS];
      point_at_keys(u, first, end, keys, values);
      for (int64_t r = 0; r < rows; r += MEET_ROWS) {
        int count = static_cast<int>(rows - r < MEET_ROWS ? rows - r : MEET_ROWS);
        VC_BY_ROWS(count, (score_rows<T, R>(q + r, steps, keys, scores + r * KEYS)));
      }
      weights(u, first, end, scores, p, sums, shrink);
      int whole = static_cast<int>(end - first) / N * N;
      for (int64_t r = 0; r < rows; r += MEET_ROWS) {
        int count = static_cast<int>(rows - r < MEET_ROWS ? rows - r : MEET_ROWS);
        VC_BY_ROWS(count, (weigh_rows<T, R>(p + r * KEYS, whole, values, width, shrink + r, sums.out + r * width)));
      }
      if (whole < end - first) add_last(whole, rows, values, p, sums.out);
    }
  }

  // A last token without a neighbour: what stands in its place is nobody's and may be NaN.
  void add_last(int at, int64_t rows, const T* const* values, const T* p, float* out) const {
    constexpr int N = Pairs<T>::N;
    const T* row = values[at / LANES] + at % LANES * width;
    for (int64_t r = 0; r < rows; r++) {
      float weight = as_float(p[r * KEYS + at]);
      for (int64_t d = 0; d < a.dim_v; d++) out[r * width + d] += weight * as_float(row[d * N]);
    }
  }
  static float as_float(float x) { return x; }
  static float as_float(bf16 x) { return to_float(x); }

  void point_at_queries(const Unit& u, const T** q, Scratch<T>& room) const {
    constexpr int N = Pairs<T>::N;
    int64_t row = 0, even = (a.dim + N - 1) / N * N;
    T* copy = even == a.dim ? nullptr : room.odd.fit(u.queries * per_kv * even);
    for (int64_t t = 0; t < u.queries; t++)
      for (int64_t g = 0; g < per_kv; g++, row++) {
        q[row] = static_cast<const T*>(a.q) + (begin(u.row) + u.query + t) * a.q_stride + (u.head * per_kv + g) * a.dim;
        if (!copy) continue;
        std::memcpy(copy, q[row], a.dim * sizeof(T));
        copy[a.dim] = T(0);
        q[row] = copy;
        copy += even;
      }
  }

  // Groups behind the last key stand at the first one: their scores are not looked at.
  void point_at_keys(const Unit& u, int64_t first, int64_t end, const T** keys, const T** values) const {
    const int32_t* blocks = table(u.row);
    for (int g = 0; g < GROUPS; g++) {
      int64_t j = first + g * LANES < end ? first + g * LANES : first;
      int64_t block = blocks[j / a.block_tokens], slot = j % a.block_tokens;
      keys[g] = cache.key(block, u.head, slot);
      values[g] = cache.value(block, u.head, slot);
    }
  }

  // Scores become weights, 2^(score - base), where a row's base is near its largest score so far; what
  // was summed shrinks when the base rises.
  void weights(const Unit& u, int64_t first, int64_t end, const float* scores, T* p, const Sums& sums,
               float* shrink) const {
    const IVec ids = lane_ids();
    const float scale = a.scale * LOG2_E;
    for (int64_t t = 0, r = 0; t < u.queries; t++) {
      const int64_t from = low(u.row, u.query + t) - first, to_all = high(u.row, u.query + t) - first;
      const int64_t to = to_all < end - first ? to_all : end - first;
      for (int64_t g = 0; g < per_kv; g++, r++) {
        Vec s[KEYS / W];
        for (int v = 0; v < KEYS / W; v++) s[v] = load(scores + r * KEYS + v * W) * scale;
        if (a.softcap > 0)
          for (Vec& x : s) x = vtanh(x * (LN_2 / a.softcap)) * (a.softcap * LOG2_E);
        if (from > 0 || to < KEYS)
          for (int v = 0; v < KEYS / W; v++) {
            const IVec j = ids + v * W;
            s[v] = (j >= static_cast<int32_t>(from)) & (j < static_cast<int32_t>(to)) ? s[v] : set(NEVER);
          }
        Vec top = s[0];
        for (int v = 1; v < KEYS / W; v++) top = vmax(top, s[v]);
        const float now = largest(top), before = sums.top[r];
        shrink[r] = 1.0f;
        if (now > before + RISE) {
          shrink[r] = before == NEVER ? 0.0f : std::exp2(before - now);
          sums.top[r] = now;
        }
        const float base = sums.top[r] == NEVER ? 0.0f : sums.top[r];
        Vec total{};
        for (int v = 0; v < KEYS / W; v++) {
          const Vec e = vexp2(s[v] - base);
          total += e;
          store(p + r * KEYS + v * W, e);
        }
        sums.total[r] = sums.total[r] * shrink[r] + sum(total);
      }
    }
  }

  // Sums become outputs.
  void finish(const Unit& u, const Sums& sums) const {
    for (int64_t t = 0, r = 0; t < u.queries; t++)
      for (int64_t g = 0; g < per_kv; g++, r++) {
        int64_t token = begin(u.row) + u.query + t, head = u.head * per_kv + g;
        float top = sums.top[r], total = sums.total[r], scale = 1.0f;
        if (a.lse) a.lse[token * a.q_heads + head] = top == NEVER ? NEVER : top * LN_2 + std::log(total);
        if (a.sinks) {
          float sink = a.sinks[head] * LOG2_E, both = top > sink ? top : sink;
          scale = top == NEVER ? 0.0f : std::exp2(top - both);
          total = total * scale + std::exp2(sink - both);
        }
        const float over = total == 0.0f ? 0.0f : scale / total;
        T* to = static_cast<T*>(a.out) + (token * a.q_heads + head) * a.dim_v;
        const float* from = sums.out + r * width;
        int64_t d = 0;
        for (; d + W <= a.dim_v; d += W) store(to + d, load(from + d) * over);
        if (d < a.dim_v) store_some(to + d, load(from + d) * over, static_cast<int>(a.dim_v - d));
      }
  }
};

// The tile in which a unit is cut, when the cut is `offset` behind its begin.
inline int64_t tile_at(int64_t offset, int64_t cost, int64_t tiles) {
  if (offset <= 0) return 0;
  int64_t tile = (offset + cost - 1) / cost;
  return tile < tiles ? tile : tiles;
}

inline void merge(const Sums& into, const Sums& from, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; r++) {
    float a = into.top[r], b = from.top[r], top = a > b ? a : b;
    if (top == NEVER) continue;
    float wa = std::exp2(a - top), wb = std::exp2(b - top);
    into.top[r] = top;
    into.total[r] = into.total[r] * wa + from.total[r] * wb;
    for (int64_t d = 0; d < width; d++)
      into.out[r * width + d] = into.out[r * width + d] * wa + from.out[r * width + d] * wb;
  }
}

template <class T>
void attend(const vc::Attend& args) {
  const Step<T> step(args);
  const int threads = vc::team_threads;
  const int64_t tokens = args.step->query_start[args.step->num_rows];
  int64_t total = 0;
  step.units([&](const Unit& u) { total += step.tiles(u) * step.cost(u); });
  vc::each_thread(tokens < 8 ? 1 : threads, [&](int index) {
    vc::Share own = vc::share(tokens, 1, index, tokens < 8 ? 1 : threads);
    step.write_tokens(own.begin, own.end);
  });
  if (args.step->num_tokens > tokens) {
    const int64_t size = args.q_heads * args.dim_v;
    std::memset(static_cast<T*>(args.out) + tokens * size, 0, (args.step->num_tokens - tokens) * size * sizeof(T));
    if (args.lse)
      for (int64_t i = tokens * args.q_heads; i < args.step->num_tokens * args.q_heads; i++) args.lse[i] = NEVER;
  }
  const int64_t size = Sums::size(step.query_tile * step.per_kv, step.width);
  float* left = scratch<T>().left.fit(2 * threads * size);
  Part* parts = scratch<T>().parts.fit(2 * threads);
  for (int i = 0; i < 2 * threads; i++) parts[i].number = -1;
  vc::each_thread(threads, [&](int index) {
    Scratch<T>& room = scratch<T>();
    const int64_t begin = total * index / threads, end = total * (index + 1) / threads;
    int64_t at = 0, number = 0, slot = 2 * index;
    step.units([&](const Unit& u) {
      const int64_t cost = step.cost(u), tiles = step.tiles(u);
      const int64_t from = tile_at(begin - at, cost, tiles), to = tile_at(end - at, cost, tiles);
      if (from < to) {
        const bool alone = from == 0 && to == tiles;
        Sums sums;
        sums.start(alone ? room.sums.fit(size) : left + slot * size, u.queries * step.per_kv, step.width);
        step.meet(u, from, to, sums, room);
        if (alone)
          step.finish(u, sums);
        else
          parts[slot++] = {u, number, sums};
      }
      at += cost * tiles;
      number++;
    });
  });
  const Part* open = nullptr;
  for (int i = 0; i < 2 * threads; i++) {
    if (parts[i].number < 0) continue;
    if (open && open->number == parts[i].number) {
      merge(open->sums, parts[i].sums, parts[i].unit.queries * step.per_kv, step.width);
      continue;
    }
    if (open) step.finish(open->unit, open->sums);
    open = &parts[i];
  }
  if (open) step.finish(open->unit, open->sums);
}

}  // namespace VC_ISA
