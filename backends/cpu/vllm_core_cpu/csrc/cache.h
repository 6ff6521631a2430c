// The paged cache: its layout, how a token gets in and out.
//
// [blocks][layers][KV heads][K then V]. K of 16 tokens is [D / 2][16][2] in bfloat16 and [D][16] in
// float32, so that one register holds a score of 16 tokens; V is [tokens / 2][Dv][2] and [tokens][Dv],
// Dv padded to 16, so that one register holds 16 dims of an output.
//
// S is what is stored: T, in which attention computes, or int8_t: codes, in the order of T. Behind K
// and V then stand the scales, float32: one per token of K, one per token of V.
//
// Knows: this layout, the law of vllm_core/ops/quantized_kv.py. Does not know: who owns a block.
#pragma once

#include "kernels.h"
#include "room.h"
#include "simd.h"

namespace VC_ISA {

inline int64_t padded(int64_t dim) { return (dim + LANES - 1) / LANES * LANES; }

template <class S>
constexpr bool IS_CODED = sizeof(S) == 1;

template <class T>
struct Pairs {  // how many neighbours stand together: dims of K, tokens of V
  static constexpr int N = sizeof(T) == 2 ? 2 : 1;
};

// Elements of K, of V, and of a head in one block.
template <class T>
int64_t key_size(int64_t dim, int64_t block_tokens) {
  constexpr int N = Pairs<T>::N;
  return (dim + N - 1) / N * N * block_tokens;
}
inline int64_t value_size(int64_t dim_v, int64_t block_tokens) { return padded(dim_v) * block_tokens; }
template <class T, class S>
int64_t head_size(int64_t dim, int64_t dim_v, int64_t block_tokens) {
  const int64_t scales = IS_CODED<S> ? 2 * block_tokens * static_cast<int64_t>(sizeof(float)) : 0;
  return key_size<T>(dim, block_tokens) + value_size(dim_v, block_tokens) + scales;
}

// Codes of `count` numbers; -> their scale, NaN where one of them is none.
template <class T>
float encode(const T* x, int64_t count, int8_t* codes) {
  Vec top{}, probe{};
  by_lanes(count, [&](int64_t at, int lanes) {
    const Vec y = load_up_to(x + at, lanes);
    top = vmax(top, y < 0.0f ? -y : y);
    probe += y * 0.0f;
  });
  const bool is_finite = sum(probe) == 0;
  const float scale = largest(top) / 127.0f;
  const Vec most = set(127.0f);
  by_lanes(count, [&](int64_t at, int lanes) {
    IVec found{};
    if (is_finite && scale > 0) found = to_nearest(vmax(vmin(load_up_to(x + at, lanes) / scale, most), -most));
    for (int i = 0; i < lanes; i++) codes[at + i] = static_cast<int8_t>(found[i]);
  });
  return is_finite ? scale : NAN;
}

template <class T, class S>
struct Cache {
  S* base;
  int64_t block_stride, head_stride, dim, dim_v, block_tokens;

  S* head_at(int64_t block, int64_t head) const { return base + block * block_stride + head * head_stride; }
  S* key(int64_t block, int64_t head, int64_t slot) const {  // of a whole group of 16
    return head_at(block, head) + slot / LANES * key_size<T>(dim, LANES);
  }
  S* value(int64_t block, int64_t head, int64_t slot) const {  // slot even
    return head_at(block, head) + key_size<T>(dim, block_tokens) + slot * padded(dim_v);
  }
  float* k_scale(int64_t block, int64_t head, int64_t slot) const {
    S* const behind = value(block, head, block_tokens);
    return reinterpret_cast<float*>(behind) + slot;
  }
  float* v_scale(int64_t block, int64_t head, int64_t slot) const { return k_scale(block, head, slot) + block_tokens; }

  // A token as it comes from the model.
  void write(int64_t block, int64_t head, int64_t slot, const T* k, const T* v) const {
    if constexpr (IS_CODED<S>) {
      static thread_local Room<int8_t> room;
      int8_t *k_codes = room.fit(dim + dim_v), *v_codes = k_codes + dim;
      *k_scale(block, head, slot) = encode(k, dim, k_codes);
      *v_scale(block, head, slot) = encode(v, dim_v, v_codes);
      put(block, head, slot, k_codes, v_codes);
    } else {
      put(block, head, slot, k, v);
    }
  }
  // What is stored of a token, without scales.
  void put(int64_t block, int64_t head, int64_t slot, const S* k, const S* v) const {
    constexpr int N = Pairs<T>::N;
    S* to = key(block, head, slot) + slot % LANES * N;
    for (int64_t d = 0; d < dim; d++) to[d / N * (LANES * N) + d % N] = k[d];
    if (dim % N) to[dim / N * (LANES * N) + 1] = S(0);
    to = value(block, head, slot / N * N) + slot % N;
    for (int64_t d = 0; d < dim_v; d++) to[d * N] = v[d];
  }
  void get(int64_t block, int64_t head, int64_t slot, S* k, S* v) const {
    constexpr int N = Pairs<T>::N;
    const S* from = key(block, head, slot) + slot % LANES * N;
    for (int64_t d = 0; d < dim; d++) k[d] = from[d / N * (LANES * N) + d % N];
    from = value(block, head, slot / N * N) + slot % N;
    for (int64_t d = 0; d < dim_v; d++) v[d] = from[d * N];
  }
};

template <class T, class S>
Cache<T, S> cache_of(const vc::Attend& a) {
  const int64_t head = head_size<T, S>(a.dim, a.dim_v, a.block_tokens);
  return {static_cast<S*>(a.cache) + a.layer * a.kv_heads * head, a.block_stride, head, a.dim, a.dim_v, a.block_tokens};
}

// Blocks of one layer <-> [count, block_tokens, kv_heads, dim] and, of codes, [count, block_tokens, kv_heads].
template <class T, class S>
void move_blocks(const vc::Attend& a, const vc::Blocks& b) {
  const Cache<T, S> cache = cache_of<T, S>(a);
  S *k = static_cast<S*>(b.k), *v = static_cast<S*>(b.v);
  int64_t vector = 0;
  for (int64_t i = 0; i < b.count; i++)
    for (int64_t slot = 0; slot < a.block_tokens; slot++)
      for (int64_t h = 0; h < a.kv_heads; h++, vector++, k += a.dim, v += a.dim_v) {
        const int64_t block = b.ids[i];
        b.to_cache ? cache.put(block, h, slot, k, v) : cache.get(block, h, slot, k, v);
        if constexpr (IS_CODED<S>) {
          float *k_scale = cache.k_scale(block, h, slot), *v_scale = cache.v_scale(block, h, slot);
          if (b.to_cache)
            *k_scale = b.k_scale[vector], *v_scale = b.v_scale[vector];
          else
            b.k_scale[vector] = *k_scale, b.v_scale[vector] = *v_scale;
        }
      }
}

}  // namespace VC_ISA
