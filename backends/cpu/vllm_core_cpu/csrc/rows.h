// Norms, gates and rotations: one pass over rows of numbers, computed in float32.
//
// Knows: rows. Does not know: models, where rows come from.
#pragma once

#include "kernels.h"
#include "linear.h"
#include "parallel.h"
#include "simd.h"

namespace VC_ISA {

constexpr int64_t WORTH_THREADS = 1 << 15;  // numbers below which one thread is faster

inline int threads_for(int64_t numbers) { return numbers < WORTH_THREADS ? 1 : vc::team_threads; }

// Rounded to T, as a sum that is kept in T is.
VC_INLINE Vec as_kept(Vec x, const float*) { return x; }
VC_INLINE Vec as_kept(Vec x, const bf16*) {
  return (Vec)(__builtin_convertvector(narrow(x), UVec) << 16);
}

inline void largest_of_row(const float* x, int64_t size, int32_t* index, float* value) {
  Vec top = set(-INFINITY);
  IVec where{}, wrong{}, ids = lane_ids();
  int64_t at = 0;
  for (; at + W <= size; at += W, ids += W) {
    const Vec y = load(x + at);
    const auto higher = y > top;
    top = higher ? y : top, where = higher ? ids : where;
    wrong |= y != y;
  }
  float best = -INFINITY;
  int64_t place = 0;
  for (int lane = 0; lane < W; lane++)
    if (top[lane] > best || (top[lane] == best && where[lane] < place)) best = top[lane], place = where[lane];
  for (; at < size; at++) {
    if (x[at] > best) best = x[at], place = at;
    wrong[0] |= x[at] != x[at];
  }
  if (any(wrong))
    for (int64_t i = 0; i < size; i++)
      if (x[i] != x[i]) {
        best = x[i], place = i;
        break;
      }
  *index = static_cast<int32_t>(place), *value = best;
}

inline void largest_of_rows(const float* x, int64_t rows, int64_t size, int32_t* index, float* value) {
  vc::each_item(rows, threads_for(rows * size),
                [&](int64_t row) { largest_of_row(x + row * size, size, index + row, value + row); });
}

template <class T>
void add(const vc::Rows& a) {
  vc::each_item(a.rows, threads_for(a.rows * a.size), [&](int64_t row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    const T* residual = a.residual ? static_cast<const T*>(a.residual) + row * a.size : nullptr;
    T* out = static_cast<T*>(a.out) + row * a.out_stride;
    by_lanes(a.size, [&](int64_t at, int count) {
      Vec y = load_up_to(x + at, count);
      if (residual) y += load_up_to(residual + at, count);
      store_up_to(out + at, y, count);
    });
  });
}

template <class T>
void rms_norm(const vc::Rows& a) {
  vc::each_item(a.rows, threads_for(a.rows * a.size), [&](int64_t row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    const T* residual = a.residual ? static_cast<const T*>(a.residual) + row * a.size : nullptr;
    T* total = static_cast<T*>(a.total) + row * a.size;
    T* out = static_cast<T*>(a.out) + row * a.out_stride;
    Vec squares{};
    by_lanes(a.size, [&](int64_t at, int count) {
      Vec y = load_up_to(x + at, count);
      if (residual) {
        y = as_kept(y + load_up_to(residual + at, count), x);
        store_up_to(total + at, y, count);
      }
      squares += y * y;
    });
    const T* from = residual ? total : x;
    const float scale = 1.0f / std::sqrt(sum(squares) / a.size + a.eps);
    by_lanes(a.size, [&](int64_t at, int count) {
      store_up_to(out + at, load_up_to(from + at, count) * scale * load_up_to(a.weight + at, count), count);
    });
  });
}

template <class T>
void layer_norm(const vc::Rows& a) {
  vc::each_item(a.rows, threads_for(a.rows * a.size), [&](int64_t row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    T* out = static_cast<T*>(a.out) + row * a.out_stride;
    Vec total{}, squares{};
    by_lanes(a.size, [&](int64_t at, int count) { total += load_up_to(x + at, count); });
    const float mean = sum(total) / a.size;
    by_lanes(a.size, [&](int64_t at, int count) {
      Vec y = load_up_to(x + at, count) - mean;
      if (count < W) y = lane_ids() < count ? y : Vec{};
      squares += y * y;
    });
    const float scale = 1.0f / std::sqrt(sum(squares) / a.size + a.eps);
    by_lanes(a.size, [&](int64_t at, int count) {
      Vec y = (load_up_to(x + at, count) - mean) * scale * load_up_to(a.weight + at, count);
      if (a.bias) y += load_up_to(a.bias + at, count);
      store_up_to(out + at, y, count);
    });
  });
}

template <class T>
void gate(const vc::Rows& a, int32_t kind) {
  vc::each_item(a.rows, threads_for(a.rows * a.size), [&](int64_t row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    T* out = static_cast<T*>(a.out) + row * a.out_stride;
    by_lanes(a.size, [&](int64_t at, int count) {
      Vec y = load_up_to(x + at, count);
      y = kind == 1 ? silu(y) : gelu_tanh(y);
      store_up_to(out + at, y * load_up_to(x + a.size + at, count), count);
    });
  });
}

// Pairs (i, i + half); what lies behind them stays.
template <class T>
void rope(const vc::Rope& a) {
  vc::each_item(a.tokens, threads_for(a.tokens * a.heads * a.dim), [&](int64_t t) {
    const float *cos = a.cos + t * a.half, *sin = a.sin + t * a.half;
    for (int64_t h = 0; h < a.heads; h++) {
      const T* x = static_cast<const T*>(a.x) + t * a.x_stride + h * a.dim;
      T* out = static_cast<T*>(a.out) + (t * a.heads + h) * a.dim;
      by_lanes(a.half, [&](int64_t at, int count) {
        Vec c = load_up_to(cos + at, count), s = load_up_to(sin + at, count);
        Vec first = load_up_to(x + at, count), second = load_up_to(x + a.half + at, count);
        store_up_to(out + at, first * c - second * s, count);
        store_up_to(out + a.half + at, second * c + first * s, count);
      });
      if (2 * a.half < a.dim) std::memcpy(out + 2 * a.half, x + 2 * a.half, (a.dim - 2 * a.half) * sizeof(T));
    }
  });
}

}  // namespace VC_ISA
