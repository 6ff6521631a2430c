// Matrix products with weights that were packed once: x [M, K] @ weight [N, K].T + bias.
//
// Packed weight: panels of 64 rows of the weight, [N / 64][K / 2][64][2] in bfloat16 and
// [N / 64][K][64] in float32, N and K padded with zeros. A panel is one stream of memory, and its
// columns are the lanes of a register, so no sum runs across lanes. With few rows a panel is read
// once and the products are free beside it; with many it stays in the second-level cache while all
// rows pass.
//
// Knows: this layout, tiles of registers. Does not know: threads' number, models.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace VC_ISA {

constexpr int PANEL = 64;

#if defined(__AVX512F__)
constexpr int TILE_ROWS = 6, TILE_VECTORS = 4;
#elif defined(__AVX2__)
constexpr int TILE_ROWS = 4, TILE_VECTORS = 2;
#elif defined(__ARM_NEON)
constexpr int TILE_ROWS = 5, TILE_VECTORS = 4;
#else
constexpr int TILE_ROWS = 3, TILE_VECTORS = 2;
#endif
constexpr int BLOCK_ROWS = 96;     // rows whose sums wait while K is cut
constexpr int BLOCK_K = 5120;      // of a panel this much stays in the second-level cache
constexpr int FEW_ROWS = 24;       // memory-bound: all of them pass a piece of the panel
constexpr int FEW_K = 128;         // of this length, which stays in the first-level cache
constexpr int AHEAD = 4096;        // bytes of a panel that are asked for while it is read once
constexpr int LINE = 64;           // bytes that memory gives at a time

enum Epilogue { PLAIN, SILU_GATE, GELU_GATE };

// How numbers of one type lie in a panel and meet.
template <class T>
struct Numbers;
template <>
struct Numbers<bf16> {
  static constexpr int STEP = 2;  // of K at a time
  typedef UVec Lane;
  static VC_INLINE Lane splat(const bf16* p) { return set_pair(p); }
  static VC_INLINE Lane splat_last(const bf16* p) { return UVec{} + *p; }
  static VC_INLINE Lane lanes(const bf16* p) { return load_pairs(p); }
  static VC_INLINE Vec meet(Vec acc, Lane a, Lane b) { return dot2(acc, a, b); }
};
template <>
struct Numbers<float> {
  static constexpr int STEP = 1;
  typedef Vec Lane;
  static VC_INLINE Lane splat(const float* p) { return set(*p); }
  static VC_INLINE Lane splat_last(const float* p) { return set(*p); }
  static VC_INLINE Lane lanes(const float* p) { return load(p); }
  static VC_INLINE Vec meet(Vec acc, Lane a, Lane b) { return acc + a * b; }
};

template <class T>
constexpr int64_t steps_of(int64_t k) {
  return (k + Numbers<T>::STEP - 1) / Numbers<T>::STEP;
}
template <class T>
constexpr int64_t panel_size(int64_t k) {  // elements
  return steps_of<T>(k) * Numbers<T>::STEP * PANEL;
}

// Numbers of two columns of K of a weight, W of its rows, to where they stand in a panel.
VC_INLINE void put_two(float* to, Vec a, Vec b) { store(to, a), store(to + PANEL, b); }
VC_INLINE void put_two(bf16* to, Vec a, Vec b) {
  const UVec pairs = __builtin_convertvector(narrow(a), UVec) | __builtin_convertvector(narrow(b), UVec) << 16;
  *reinterpret_cast<UVec_u*>(to) = pairs;
}

// A panel is a matrix of 4-byte units, turned: in blocks of a line of each row, which stay in the
// first-level cache.
template <class T>
void pack_panel(const T* weight, int64_t stride, int64_t n, int64_t k, T* out) {
  constexpr int S = Numbers<T>::STEP, BLOCK = LINE / 4;
  static_assert(S * sizeof(T) == 4, "a unit has 4 bytes");
  const int64_t whole = k / S;
  if (n < PANEL || k % S) std::memset(out, 0, panel_size<T>(k) * sizeof(T));
  for (int64_t from = 0; from < whole; from += BLOCK) {
    const int64_t end = whole - from < BLOCK ? whole : from + BLOCK;
    for (int64_t row = 0; row < n; row++)
      for (int64_t step = from; step < end; step++)
        std::memcpy(out + (step * PANEL + row) * S, weight + row * stride + step * S, 4);
  }
  if (k % S)
    for (int64_t row = 0; row < n; row++) out[(whole * PANEL + row) * S] = weight[row * stride + k - 1];
}

// weight [n, k] with rows `stride` apart -> panels.
template <class T>
void pack(const T* weight, int64_t stride, int64_t n, int64_t k, T* out, int threads) {
  int64_t panels = (n + PANEL - 1) / PANEL;
  vc::each_item(panels, threads, [&](int64_t p) {
    int64_t rows = n - p * PANEL < PANEL ? n - p * PANEL : PANEL;
    pack_panel(weight + p * PANEL * stride, stride, rows, k, out + p * panel_size<T>(k));
  });
}

// One row of the weight again, as an embedding looks it up.
template <class T>
void unpack_row(const T* packed, int64_t row, int64_t k, T* out) {
  constexpr int S = Numbers<T>::STEP;
  const T* from = packed + row / PANEL * panel_size<T>(k) + row % PANEL * S;
  for (int64_t at = 0; at < k; at++) out[at] = from[at / S * (PANEL * S) + at % S];
}

// What is asked of memory while a tile is computed: `bytes` from `at`, a share with every step of K.
// The panel that follows, so that it comes while this one is at work; where few rows read a panel
// once, what is a little ahead.
struct Request {
  const char* at;
  int64_t bytes;
};

// sums[r][v] += rows of x times columns of a panel.
template <class T, int ROWS, int VECS>
VC_INLINE void tile(const T* const* x, int64_t k, const T* panel, Request request, Vec (&sums)[ROWS][VECS]) {
  constexpr int S = Numbers<T>::STEP;
  typedef typename Numbers<T>::Lane Lane;
  const int64_t whole = k / S, ask = whole ? request.bytes / whole : 0;
  const char* asked = request.at;
  for (int64_t step = 0; step < whole; step++, panel += PANEL * S, asked += ask) {
    Lane b[VECS];
    for (int v = 0; v < VECS; v++) b[v] = Numbers<T>::lanes(panel + v * W * S);
    for (int line = 0; line < ask; line += LINE) __builtin_prefetch(asked + line);
    for (int r = 0; r < ROWS; r++) {
      Lane a = Numbers<T>::splat(x[r] + step * S);
      for (int v = 0; v < VECS; v++) sums[r][v] = Numbers<T>::meet(sums[r][v], a, b[v]);
    }
  }
  if (k % S) {
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < VECS; v++)
        sums[r][v] = Numbers<T>::meet(sums[r][v], Numbers<T>::splat_last(x[r] + whole * S),
                                      Numbers<T>::lanes(panel + v * W * S));
  }
}

// One row meets all columns of the panel at once, so that memory is read in one stream.
template <class T, int ROWS>
struct Reach {
  static constexpr int VECS = ROWS <= 1 ? PANEL / W : TILE_VECTORS;
};

// ROWS rows x one panel, into wait [ROWS][PANEL]; add: onto what stands there.
template <class T, int ROWS>
void rows_by_panel(const T* x, int64_t stride, int64_t k, const T* panel, Request request, float* wait, bool add) {
  constexpr int VECS = Reach<T, ROWS>::VECS;
  const T* rows[ROWS];
  for (int r = 0; r < ROWS; r++) rows[r] = x + r * stride;
  for (int column = 0; column < PANEL; column += VECS * W) {
    Vec sums[ROWS][VECS];
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < VECS; v++)
        sums[r][v] = add ? load(wait + r * PANEL + column + v * W) : Vec{};
    tile<T, ROWS, VECS>(rows, k, panel + column * Numbers<T>::STEP, request, sums);
    request.bytes = 0;
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < VECS; v++) store(wait + r * PANEL + column + v * W, sums[r][v]);
  }
}

template <class T, int ROWS>
VC_INLINE void rows_or_fewer(int rows, const T* x, int64_t stride, int64_t k, const T* panel,
                             Request request, float* wait, bool add) {
  if (rows == ROWS) return rows_by_panel<T, ROWS>(x, stride, k, panel, request, wait, add);
  if constexpr (ROWS > 1) rows_or_fewer<T, ROWS - 1>(rows, x, stride, k, panel, request, wait, add);
}

// All rows of a block x one panel; `next`: the one that follows. Tiles are as equal as they can be:
// 8 rows are 4 and 4. add: onto what stands in wait.
template <class T>
void block_by_panel(int64_t m, const T* x, int64_t stride, int64_t k, const T* panel, const T* next, float* wait,
                    bool add = false) {
  int64_t tiles = (m + TILE_ROWS - 1) / TILE_ROWS;
  const int64_t most = m <= FEW_ROWS && tiles > 1 ? FEW_K : BLOCK_K;
  for (int64_t from = 0; from < k; from += most) {
    int64_t part = k - from < most ? k - from : most;
    for (int64_t t = 0; t < tiles; t++) {
      int64_t row = m * t / tiles, rows = m * (t + 1) / tiles - row;
      const int64_t bytes = steps_of<T>(part) * Numbers<T>::STEP * PANEL * sizeof(T), own = bytes / tiles;
      const T* after = from + part < k ? panel + (from + part) * PANEL : next;
      Request request = {reinterpret_cast<const char*>(after) + own * t, own};
      if (tiles == 1) request = {reinterpret_cast<const char*>(panel + from * PANEL) + AHEAD, bytes};
      rows_or_fewer<T, TILE_ROWS>(static_cast<int>(rows), x + row * stride + from, stride, part,
                                  panel + from * PANEL, request, wait + row * PANEL, add || from > 0);
    }
  }
}

VC_INLINE Vec silu(Vec x) { return x / (vexp(-x) + 1.0f); }
// 0.5 x (1 + tanh(u)) = x / (1 + exp(-2u))
VC_INLINE Vec gelu_tanh(Vec x) {
  Vec u = x * 0.79788456f + x * x * x * 0.035677408f;
  return x / (vexp(u * -2.0f) + 1.0f);
}

// One panel's worth of results: + bias, and, where gated, act(gate) * up.
template <class Out>
void finish(int64_t m, int64_t columns, const float* sums, const float* gates, const float* bias,
            const float* gate_bias, int epilogue, Out* out, int64_t stride) {
  for (int64_t r = 0; r < m; r++, sums += PANEL, gates += gates ? PANEL : 0, out += stride)
    for (int64_t c = 0; c < columns; c += W) {
      int count = columns - c < W ? static_cast<int>(columns - c) : W;
      Vec y = load(sums + c);
      if (bias) y += load_some(bias + c, count);
      if (epilogue != PLAIN) {
        Vec gate = load(gates + c);
        if (gate_bias) gate += load_some(gate_bias + c, count);
        y *= epilogue == SILU_GATE ? silu(gate) : gelu_tanh(gate);
      }
      if (count == W)
        store(out + c, y);
      else
        store_some(out + c, y, count);
    }
}

// out [m, n]. Gated: the weight has 2n rows, the gates first, n a multiple of PANEL.
template <class T, class Out>
void linear(const T* packed, const float* bias, const T* x, int64_t x_stride, Out* out,
            int64_t out_stride, int64_t m, int64_t n, int64_t k, int epilogue, int threads) {
  const int64_t panels = (n + PANEL - 1) / PANEL, size = panel_size<T>(k);
  const int64_t blocks = (m + BLOCK_ROWS - 1) / BLOCK_ROWS;
  vc::each_item(panels * blocks, threads, [&](int64_t item) {
    alignas(64) float sums[BLOCK_ROWS * PANEL], gates[BLOCK_ROWS * PANEL];
    const int64_t p = item / blocks, row = item % blocks * BLOCK_ROWS;
    const int64_t rows = m - row < BLOCK_ROWS ? m - row : BLOCK_ROWS;
    const int64_t columns = n - p * PANEL < PANEL ? n - p * PANEL : PANEL;
    const bool gated = epilogue != PLAIN;
    const T *panel = packed + p * size, *up = panel + panels * size, *next = panel + size;
    const T* own_x = x + row * x_stride;
    if (gated) block_by_panel(rows, own_x, x_stride, k, panel, up, gates);
    block_by_panel(rows, own_x, x_stride, k, gated ? up : panel, next, sums);
    finish(rows, columns, sums, gated ? gates : nullptr, bias ? bias + p * PANEL + (gated ? n : 0) : nullptr,
           gated && bias ? bias + p * PANEL : nullptr, epilogue, out + row * out_stride + p * PANEL, out_stride);
  });
}

}  // namespace VC_ISA
