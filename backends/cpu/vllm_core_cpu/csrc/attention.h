// Paged attention: one call writes the step's K and V at their slots and attends, prompts, chunks
// and decoding rows together.
//
// Each byte of K and V is read once for all query heads that share it, however many. A cache in codes
// is met as the numbers that the codes are: scores are multiplied by the scales of K, and weights, as
// they meet V, by those of V. Where scales are alike, and scores too, such weights are all rounded to
// bfloat16 the same way; so what a tile adds to a row is put right by what its weights in sum are off.
//
// A unit of work is some queries of one row and one KV head. All units are laid end to end, weighed
// by the keys they meet, and cut into equal shares of the threads; a unit that is cut leaves partial
// sums, which are merged at the end.
//
// Knows: visibility, softmax. Does not know: who owns a block.
#pragma once

#include "cache.h"
#include "kernels.h"
#include "parallel.h"
#include "products.h"
#include "room.h"
#include "simd.h"

namespace VC_ISA {

constexpr int UNIT_ROWS = 48;   // (query, head) pairs of a unit, about
constexpr int FIXED_COST = 8;   // of meeting a key, beside one per query row
constexpr float NEVER = -INFINITY;
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;
// By which a score may exceed its row's base, as a power of two. A weight is 2^8 at most, so sums of n
// values may overflow, before they are divided, where these exceed 1e36 / n.
constexpr float RISE = 8;

// ---- one unit
struct Unit {
  int64_t row, head, query, queries;  // of the step's row; first query and how many
  int64_t first, last;                // keys that any of them sees: [first, last), first a multiple of 16
};

// Some keys of a row, up to 64 from `first` on, in groups of 16.
template <class S>
struct Tile {
  int64_t first;
  int size;
  const S *keys[GROUPS], *values[GROUPS];
  const float *k_scales[GROUPS], *v_scales[GROUPS];  // of codes

  // Those of vector `v` of the tile.
  Vec scales(const float* const* of, int v) const { return load(of[v / VECTORS] + v % VECTORS * W); }
};

// Running sums of a unit's (query, head) pairs. Scores are powers of two: top, what weights are relative
// to, near the largest.
struct Sums {
  float *out, *top, *total;  // [rows][width], [rows], [rows][W]

  static int64_t size(int64_t rows, int64_t width) { return padded(rows * (width + 1 + W)); }
  void start(float* at, int64_t rows, int64_t width) {
    out = at;
    top = out + rows * width;
    total = top + rows;
    for (float* p = out; p < top; p++) *p = 0.0f;
    for (int64_t r = 0; r < rows; r++) top[r] = NEVER;
    for (float* p = total; p < total + rows * W; p++) *p = 0.0f;
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
  Room<float> sums, scores, rescale, correction, left;
  Room<T> weights, odd, wide;
  Room<const T*> queries;
  Room<Part> parts;
};

// The calling thread's, kept over calls.
template <class T>
Scratch<T>& scratch() {
  static thread_local Scratch<T> room;
  return room;
}

template <class T, class S>
struct Step {
  const vc::Attend& a;
  Cache<T, S> cache;
  int64_t per_kv, width, query_tile;
  static constexpr bool IS_CORRECTED = IS_CODED<S> && sizeof(T) == 2;  // weights with scales, rounded

  explicit Step(const vc::Attend& args)
      : a(args), cache(cache_of<T, S>(args)), per_kv(args.q_heads / args.kv_heads), width(padded(args.dim_v)) {
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
    const int64_t rows = u.queries * per_kv, k_size = key_size<T>(a.dim, LANES), v_size = value_size(a.dim_v, LANES);
    room.scores.fit(rows * KEYS), room.weights.fit(rows * KEYS), room.queries.fit(rows);
    room.rescale.fit(rows), room.correction.fit(rows);
    point_at_queries(u, room);
    Tile<S> here = tile_of(u, u.first + from * KEYS), ahead{};
    for (int64_t tile = from; tile < to; tile++, here = ahead) {
      const bool more = tile + 1 < to, fetches = more || u.head + 1 < a.kv_heads;
      if (more)
        ahead = tile_of(u, here.first + KEYS);
      else if (fetches)  // the next unit, but in the last one of a thread
        ahead = tile_of({u.row, u.head + 1, u.query, u.queries, u.first, u.last}, u.first);
      const Groups<S> keys = {here.keys, fetches ? ahead.keys : nullptr};
      const Groups<S> values = {here.values, fetches ? ahead.values : nullptr};
      if (IS_CODED<S> && rows > MEET_ROWS) {  // widened once instead of for every few rows
        const T* wide[GROUPS];
        score(rows, widen(keys, k_size, room, wide), room);
        weights(u, here, sums, room);
        weigh(rows, here.size, widen(values, v_size, room, wide), sums, room);
      } else {
        score(rows, keys, room);
        weights(u, here, sums, room);
        weigh(rows, here.size, values, sums, room);
      }
    }
  }

  template <class K>  // T or S
  void score(int64_t rows, Groups<K> keys, const Scratch<T>& room) const {
    constexpr int N = Pairs<T>::N;
    const int64_t steps = (a.dim + N - 1) / N;
    for (int64_t r = 0; r < rows; r += MEET_ROWS, keys.ahead = nullptr) {
      int count = static_cast<int>(rows - r < MEET_ROWS ? rows - r : MEET_ROWS);
      VC_BY_ROWS(count, (score_rows<T, K, R>(room.queries.data + r, steps, keys, room.scores.data + r * KEYS)));
    }
  }

  template <class V>  // T or S
  void weigh(int64_t rows, int size, Groups<V> values, const Sums& sums, const Scratch<T>& room) const {
    constexpr int N = Pairs<T>::N;
    // a code that is nobody's is a number, and its weight is 0
    const int whole = (IS_CODED<S> ? size + N - 1 : size) / N * N;
    for (int64_t r = 0; r < rows; r += MEET_ROWS, values.ahead = nullptr) {
      int count = static_cast<int>(rows - r < MEET_ROWS ? rows - r : MEET_ROWS);
      VC_BY_ROWS(count, (weigh_rows<T, V, R>(room.weights.data + r * KEYS, whole, values, width, room.rescale.data + r,
                                             room.correction.data + r, sums.out + r * width)));
    }
    if constexpr (!IS_CODED<S>)
      if (whole < size) add_last(whole, rows, values.here, room.weights.data, sums.out);
  }

  // Codes as numbers, `size` of each group.
  Groups<T> widen(Groups<S> from, int64_t size, Scratch<T>& room, const T** wide) const {
    constexpr int STEP = W * Pairs<T>::N;
    T* to = room.wide.fit(GROUPS * size);
    for (int g = 0; g < GROUPS; g++, to += size) {
      wide[g] = to;
      for (int64_t i = 0; i < size; i += STEP) {
        const auto numbers = as_stored(Meet<T, S>::lanes(from.here[g] + i));
        std::memcpy(to + i, &numbers, sizeof numbers);
        if (from.ahead && i % PER_LINE<S> == 0) from.fetch(g, i);
      }
    }
    return {wide, nullptr};
  }

  // A last token without a neighbour: what stands in its place is nobody's and may be NaN.
  void add_last(int at, int64_t rows, const T* const* values, const T* p, float* out) const {
    constexpr int N = Pairs<T>::N;
    const T* row = values[at / LANES] + at % LANES * width;
    for (int64_t r = 0; r < rows; r++) {
      float weight = to_float(p[r * KEYS + at]);
      for (int64_t d = 0; d < a.dim_v; d++) out[r * width + d] += weight * to_float(row[d * N]);
    }
  }

  void point_at_queries(const Unit& u, Scratch<T>& room) const {
    constexpr int N = Pairs<T>::N;
    const T** q = room.queries.data;
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
  Tile<S> tile_of(const Unit& u, int64_t first) const {
    const int64_t end = u.last < first + KEYS ? u.last : first + KEYS;
    Tile<S> tile;
    tile.first = first, tile.size = static_cast<int>(end - first);
    const int32_t* blocks = table(u.row);
    for (int g = 0; g < GROUPS; g++) {
      int64_t j = first + g * LANES < end ? first + g * LANES : first;
      int64_t block = blocks[j / a.block_tokens], slot = j % a.block_tokens;
      tile.keys[g] = cache.key(block, u.head, slot);
      tile.values[g] = cache.value(block, u.head, slot);
      if constexpr (IS_CODED<S>) {
        tile.k_scales[g] = cache.k_scale(block, u.head, slot);
        tile.v_scales[g] = cache.v_scale(block, u.head, slot);
      }
    }
    return tile;
  }

  // Scores become weights, 2^(score - base), where a row's base is near its largest score so far; what
  // was summed shrinks when the base rises.
  void weights(const Unit& u, const Tile<S>& tile, const Sums& sums, const Scratch<T>& room) const {
    const float* scores = room.scores.data;
    float *rescale = room.rescale.data, *correction = room.correction.data;
    const IVec ids = lane_ids();
    const float scale = a.scale * LOG2_E;
    for (int64_t t = 0, r = 0; t < u.queries; t++) {
      const int64_t from = low(u.row, u.query + t) - tile.first, to_all = high(u.row, u.query + t) - tile.first;
      const int64_t to = to_all < tile.size ? to_all : tile.size;
      for (int64_t g = 0; g < per_kv; g++, r++) {
        Vec s[KEYS / W];
        for (int v = 0; v < KEYS / W; v++) {
          s[v] = load(scores + r * KEYS + v * W) * scale;
          if constexpr (IS_CODED<S>) s[v] *= tile.scales(tile.k_scales, v);
        }
        if (a.softcap > 0)
          for (Vec& x : s) x = vtanh(x * (LN_2 / a.softcap)) * (a.softcap * LOG2_E);
        if (from > 0 || to < KEYS)
          for (int v = 0; v < KEYS / W; v++) {
            const IVec j = ids + v * W;
            s[v] = (j >= static_cast<int32_t>(from)) & (j < static_cast<int32_t>(to)) ? s[v] : set(NEVER);
          }
        Vec top = s[0];
        for (int v = 1; v < KEYS / W; v++) top = vmax(top, s[v]);
        const float before = sums.top[r];
        rescale[r] = correction[r] = 1.0f;
        if (any(top > before + RISE)) {
          const float now = largest(top);
          rescale[r] = before == NEVER ? 0.0f : std::exp2(before - now);
          sums.top[r] = now;
        }
        const float base = sums.top[r] == NEVER ? 0.0f : sums.top[r];
        Vec total{}, exact{}, rounded{};
        for (int v = 0; v < KEYS / W; v++) {
          Vec e = vexp2(s[v] - base);
          total += e;
          // a scale that is nobody's may be NaN
          if constexpr (IS_CODED<S>) e = s[v] == NEVER ? Vec{} : e * tile.scales(tile.v_scales, v);
          store(room.weights.data + r * KEYS + v * W, e);
          if constexpr (IS_CORRECTED) exact += e, rounded += load(room.weights.data + r * KEYS + v * W);
        }
        store(sums.total + r * W, load(sums.total + r * W) * rescale[r] + total);
        if constexpr (IS_CORRECTED) {  // none where all scales are 0
          const float met = sum(rounded);
          if (met > 0) correction[r] = sum(exact) / met, rescale[r] /= correction[r];
        }
      }
    }
  }

  // Sums become outputs.
  void finish(const Unit& u, const Sums& sums) const {
    for (int64_t t = 0, r = 0; t < u.queries; t++)
      for (int64_t g = 0; g < per_kv; g++, r++) {
        int64_t token = begin(u.row) + u.query + t, head = u.head * per_kv + g;
        float top = sums.top[r], total = sum(load(sums.total + r * W)), scale = 1.0f;
        if (a.lse) a.lse[token * a.q_heads + head] = top * LN_2 + std::log(total);  // of nothing: NEVER
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
    const float a = into.top[r], b = from.top[r], top = a > b ? a : b;
    const float base = top == NEVER ? 0.0f : top;  // then sums are 0, or NaN, which stays
    const float wa = std::exp2(a - base), wb = std::exp2(b - base);
    into.top[r] = top;
    store(into.total + r * W, load(into.total + r * W) * wa + load(from.total + r * W) * wb);
    for (int64_t d = 0; d < width; d++)
      into.out[r * width + d] = into.out[r * width + d] * wa + from.out[r * width + d] * wb;
  }
}

template <class T, class S>
void attend(const vc::Attend& args) {
  const Step<T, S> step(args);
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
