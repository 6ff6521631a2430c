// Products of a few rows of queries with the keys of a tile, and of their weights with its values.
//
// Both come as they stand in the cache (cache.h): numbers, or codes, which are met as the numbers that
// they are. No sum runs across lanes.
//
// Knows: groups of 16 keys. Does not know: scales, softmax, which key is whose.
#pragma once

#include "cache.h"
#include "simd.h"

namespace VC_ISA {

constexpr int KEYS = 64;  // keys that are met at a time
constexpr int GROUPS = KEYS / LANES;

#if defined(__AVX512F__)
constexpr int MEET_ROWS = 6;
#else
constexpr int MEET_ROWS = 4;
#endif

// What numbers of T meet in a cache of S.
template <class T, class S>
struct Meet;
template <>
struct Meet<bf16, bf16> {
  typedef UVec Lane;
  static VC_INLINE Lane lanes(const bf16* p) { return load_pairs(p); }
};
template <>
struct Meet<bf16, int8_t> {
  typedef BytePairs Lane;
  static VC_INLINE Lane lanes(const int8_t* p) { return load_pairs(p); }
};
template <class S>
struct Meet<float, S> {
  typedef Vec Lane;
  static VC_INLINE Lane lanes(const S* p) { return load(p); }
};

VC_INLINE UVec splat(const bf16* p) { return set_pair(p); }
VC_INLINE Vec splat(const float* p) { return set(*p); }
VC_INLINE Vec add_product(Vec acc, Vec a, Vec b) { return acc + a * b; }
template <class Lane>
VC_INLINE Vec add_product(Vec acc, UVec a, Lane b) { return dot2(acc, a, b); }

// A tile of keys, or of values, and the one that will be met after it, which is fetched meanwhile: a
// tile is too short for what a processor fetches of itself. None where `ahead` is null.
template <class S>
struct Groups {
  const S* const* here;
  const S* const* ahead;

  // The line that holds element `at` of a group.
  VC_INLINE void fetch(int g, int64_t at) const { __builtin_prefetch(ahead[g] + at); }
};
template <class S>
constexpr int PER_LINE = 64 / sizeof(S);  // elements that memory gives at a time

// scores [ROWS][KEYS] = q . k of 16 keys each of groups from `first` on; q rows hold an even number of dims.
template <class T, class S, int ROWS, int GROUP_COUNT>
VC_INLINE void score_groups(const T* const* q, int64_t steps, Groups<S> keys, int first, float* scores) {
  constexpr int N = Pairs<T>::N;
  for (int part = 0; part < VECTORS; part++) {
    Vec sums[ROWS][GROUP_COUNT] = {};
    for (int64_t s = 0; s < steps; s++) {
      typename Meet<T, S>::Lane k[GROUP_COUNT];
      for (int g = 0; g < GROUP_COUNT; g++) k[g] = Meet<T, S>::lanes(keys.here[first + g] + (s * LANES + part * W) * N);
      if (keys.ahead && part == 0 && s % (PER_LINE<S> / (LANES * N)) == 0)
        for (int g = 0; g < GROUP_COUNT; g++) keys.fetch(first + g, s * LANES * N);
      for (int r = 0; r < ROWS; r++) {
        const auto a = splat(q[r] + s * N);
        for (int g = 0; g < GROUP_COUNT; g++) sums[r][g] = add_product(sums[r][g], a, k[g]);
      }
    }
    for (int r = 0; r < ROWS; r++)
      for (int g = 0; g < GROUP_COUNT; g++) store(scores + r * KEYS + (first + g) * LANES + part * W, sums[r][g]);
  }
}

constexpr int SCORE_GROUPS = MEET_ROWS == 6 ? GROUPS : 2;

template <class T, class S, int ROWS>
void score_rows(const T* const* q, int64_t steps, Groups<S> keys, float* scores) {
  for (int g = 0; g < GROUPS; g += SCORE_GROUPS) score_groups<T, S, ROWS, SCORE_GROUPS>(q, steps, keys, g, scores);
}

// out[r] = (out[r] * rescale[r] + p[r] . values) * correction[r], over `count` tokens (a multiple of N), columns
// from `first` on.
template <class T, class S, int ROWS, int VECS>
VC_INLINE void weigh_columns(const T* p, int count, Groups<S> values, int64_t stride, int64_t first,
                             const float* rescale, const float* correction, float* out) {
  constexpr int N = Pairs<T>::N;
  Vec sums[ROWS][VECS];
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECS; v++) sums[r][v] = load(out + r * stride + first + v * W) * rescale[r];
  for (int j = 0; j < count; j += N) {
    const int64_t at = (j % LANES) * stride + first * N;
    typename Meet<T, S>::Lane b[VECS];
    for (int v = 0; v < VECS; v++) b[v] = Meet<T, S>::lanes(values.here[j / LANES] + at + v * W * N);
    if (values.ahead)
      for (int i = 0; i < VECS * W * N; i += PER_LINE<S>) values.fetch(j / LANES, at + i);
    for (int r = 0; r < ROWS; r++) {
      const auto a = splat(p + r * KEYS + j);
      for (int v = 0; v < VECS; v++) sums[r][v] = add_product(sums[r][v], a, b[v]);
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECS; v++) store(out + r * stride + first + v * W, sums[r][v] * correction[r]);
}

template <class T, class S, int ROWS>
void weigh_rows(const T* p, int count, Groups<S> values, int64_t stride, const float* rescale, const float* correction,
                float* out) {
  constexpr int WIDE = MEET_ROWS == 6 ? 4 : 2;
  int64_t d = 0;
  for (; d + WIDE * W <= stride; d += WIDE * W)
    weigh_columns<T, S, ROWS, WIDE>(p, count, values, stride, d, rescale, correction, out);
  for (; d < stride; d += W) weigh_columns<T, S, ROWS, 1>(p, count, values, stride, d, rescale, correction, out);
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

}  // namespace VC_ISA
