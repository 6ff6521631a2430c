// Matrix products with weights of 8 or 4 bits: value = scale * (code - zero), or scale * code + min;
// a scale for each group of a row's columns.
//
// Packed codes: panels of 64 rows of the weight as in linear.h, [N / 64][K / 4][64][4] bytes for 8
// bits; for 4 bits [N / 64][K / 8][64] words, whose low nibbles are four columns and whose high ones
// the next four. Scales and mins: [N / 64][groups][64] float32.
//
// Two ways to multiply. Inputs of 8 bits, quantised here for each row and group: whole numbers meet
// (dot4) and become float32 once a group. Or inputs as they are: piece by piece a panel becomes
// numbers of their type, and linear.h goes on.
//
// Knows: these layouts, how inputs are quantised. Does not know: where codes come from, models.
#pragma once

#include "kernels.h"
#include "linear.h"
#include "quantize.h"

namespace VC_ISA {

constexpr int CODE_STEP = 8;     // K is padded to multiples of this, with codes of 0
constexpr int64_t PIECE_K = 256;  // what all rows pass while it is in the first-level cache
constexpr int64_t INPUT_GROUP = 32;  // columns of the inputs that share a scale, at least

// A weight's codes as linear reads them.
struct Coded {
  const uint8_t* codes;
  const float* scales;
  const float* mins;  // or null
  int64_t k, group, columns, groups, panel_bytes;
  int bits, zero;
};

inline int64_t code_columns(int64_t k) { return (k + CODE_STEP - 1) / CODE_STEP * CODE_STEP; }

inline Coded coded(const void* codes, const float* scales, const float* mins, int64_t k, int64_t group, int bits) {
  const int64_t columns = code_columns(k);
  return {static_cast<const uint8_t*>(codes), scales, mins, k, group, columns, k / group,
          columns * PANEL * bits / 8, bits, mins ? 0 : 1 << (bits - 1)};
}

// Where the code of (lane, column) of a panel is: its byte, and how far it is shifted.
VC_INLINE int64_t code_at(int bits, int64_t lane, int64_t column, int* shift) {
  *shift = bits == 4 ? column % 8 / 4 * 4 : 0;
  return (column / (bits == 4 ? 8 : 4) * PANEL + lane) * 4 + column % 4;
}

// from.codes [n, k] a byte each, scales and mins [n, groups] -> packed.
inline void pack_codes(const vc::Codes& from, uint8_t* out, float* scales, float* mins, int threads) {
  const Coded c = coded(out, scales, mins, from.k, from.group, from.bits);
  vc::each_item((from.n + PANEL - 1) / PANEL, threads, [&](int64_t p) {
    uint8_t* to = out + p * c.panel_bytes;
    const int64_t rows = from.n - p * PANEL < PANEL ? from.n - p * PANEL : PANEL;
    std::memset(to, 0, c.panel_bytes);
    for (int64_t lane = 0; lane < PANEL; lane++) {
      const uint8_t* codes = from.codes + (p * PANEL + lane) * from.k;
      for (int64_t at = 0; lane < rows && at < from.k; at++) {
        int shift;
        const int64_t byte = code_at(from.bits, lane, at, &shift);
        to[byte] = static_cast<uint8_t>(to[byte] | codes[at] << shift);
      }
      for (int64_t g = 0; g < c.groups; g++) {
        const int64_t here = (p * c.groups + g) * PANEL + lane, there = (p * PANEL + lane) * c.groups + g;
        scales[here] = lane < rows ? from.scales[there] : 0;
        if (mins) mins[here] = lane < rows ? from.mins[there] : 0;
      }
    }
  });
}

// One row of the weight again.
template <class T>
void unpack_code_row(const Coded& c, int64_t row, T* out) {
  const int64_t p = row / PANEL, lane = row % PANEL;
  for (int64_t at = 0; at < c.k; at++) {
    int shift;
    const uint8_t byte = c.codes[p * c.panel_bytes + code_at(c.bits, lane, at, &shift)];
    const int code = byte >> shift & ((1 << c.bits) - 1);
    const int64_t scale = (p * c.groups + at / c.group) * PANEL + lane;
    float value = rounded(c.scales[scale] * static_cast<float>(code - c.zero));
    if (c.mins) value += c.mins[scale];
    out[at] = as_number<T>(value);
  }
}

// ---------------------------------------------------------------- inputs
// x in codes: [rows][columns], zeros behind k; for each group of the weight its scale and the sum of
// its codes.
struct Inputs {
  const int8_t* codes;
  const float* scales;
  const int32_t* sums;
  int64_t columns, groups;
};

struct InputRoom {
  Room<int8_t> codes;
  Room<float> scales;
  Room<int32_t> sums;
};

template <class T>
void quantize_row(const T* x, const Coded& c, int8_t* codes, float* scales, int32_t* sums) {
  int64_t wide = c.group < INPUT_GROUP ? INPUT_GROUP : c.group;
  wide = wide < c.k ? wide : c.k;
  for (int64_t from = 0; from < c.k; from += wide) {
    Vec top{}, probe{};
    by_lanes(wide, [&](int64_t at, int count) {
      Vec y = load_up_to(x + from + at, count);
      top = vmax(top, vmax(y, -y)), probe += y * 0.0f;  // NaN where a number is none
    });
    const float amax = largest(top), wrong = sum(probe), scale = amax < TINY ? 0 : amax / 127.0f;
    const Vec factor = set(amax < TINY || wrong != 0 ? 0 : 127.0f / amax);
    by_lanes(wide, [&](int64_t at, int count) {
      const IVec code = to_nearest(rounded(load_up_to(x + from + at, count) * factor));
      for (int i = 0; i < count; i++) codes[from + at + i] = static_cast<int8_t>(code[i]);
    });
    for (int64_t at = from; at < from + wide; at += c.group) {
      int32_t total = 0;
      for (int64_t i = at; i < at + c.group; i++) total += codes[i];
      scales[at / c.group] = scale + wrong, sums[at / c.group] = total;
    }
  }
  std::memset(codes + c.k, 0, c.columns - c.k);
}

template <class T>
Inputs quantize_inputs(const T* x, int64_t stride, int64_t m, const Coded& c, InputRoom& room, int threads) {
  int8_t* codes = room.codes.fit(m * c.columns);
  float* scales = room.scales.fit(m * c.groups);
  int32_t* sums = room.sums.fit(m * c.groups);
  vc::each_item(m, threads_for(m * c.k) == 1 ? 1 : threads, [&](int64_t row) {
    quantize_row(x + row * stride, c, codes + row * c.columns, scales + row * c.groups, sums + row * c.groups);
  });
  return {codes, scales, sums, c.columns, c.groups};
}

// ---------------------------------------------------------------- products of codes
// Some groups of a panel, from column `at` on, and what is asked of memory meanwhile.
struct Piece {
  const uint8_t* codes;
  const float* scales;
  const float* mins;
  int64_t at, group, count;  // `count` groups of `group` columns
  Request request;
};

// Codes of four columns from `codes` on: [half] the first four of eight, or the next.
template <int BITS>
VC_INLINE UVec four_codes(UVec word, int half) {
  return BITS == 8 ? word : half ? word >> 4 & 0x0f0f0f0f : word & 0x0f0f0f0f;
}

// ROWS rows x VECS vectors of columns of a piece, onto wait.
template <int BITS, int ROWS, int VECS>
VC_INLINE void code_tile(const Inputs& x, int64_t row, const Piece& piece, int zero, int column, float* wait) {
  constexpr int STEP = 32 / BITS;  // columns in a word
  const int64_t steps = piece.group / STEP, ask = piece.request.bytes / (steps * piece.count);
  const uint8_t* codes = piece.codes + column * 4;
  const char* asked = piece.request.at;
  const int8_t* rows[ROWS];
  for (int r = 0; r < ROWS; r++) rows[r] = x.codes + (row + r) * x.columns + piece.at;
  const int64_t first = piece.at / piece.group;
  for (int64_t g = 0; g < piece.count; g++) {
    IVec sums[ROWS][VECS];
    for (int r = 0; r < ROWS; r++) {
      const IVec start = iset(-zero * x.sums[(row + r) * x.groups + first + g]);
      for (int v = 0; v < VECS; v++) sums[r][v] = start;
    }
    for (int64_t step = 0; step < steps; step++, codes += PANEL * 4, asked += ask) {
      UVec words[VECS];
      for (int v = 0; v < VECS; v++) words[v] = load(reinterpret_cast<const uint32_t*>(codes + v * W * 4));
      for (int line = 0; line < ask; line += LINE) __builtin_prefetch(asked + line);
      for (int half = 0; half < STEP / 4; half++)
        for (int r = 0; r < ROWS; r++) {
          const IVec a = set_four(rows[r] + (g * steps + step) * STEP + half * 4);
          for (int v = 0; v < VECS; v++) sums[r][v] = dot4(sums[r][v], four_codes<BITS>(words[v], half), a);
        }
    }
    Vec scales[VECS];
    for (int v = 0; v < VECS; v++) scales[v] = load(piece.scales + g * PANEL + column + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      const float scale = x.scales[(row + r) * x.groups + first + g];
#pragma GCC unroll 8
      for (int v = 0; v < VECS; v++) {
        float* to = wait + r * PANEL + column + v * W;
        store(to, load(to) + to_floats(sums[r][v]) * (scales[v] * scale));
      }
    }
  }
}

// What the mins of a piece add: each times the sum of its group's inputs.
template <int ROWS>
VC_INLINE void add_mins(const Inputs& x, int64_t row, const Piece& piece, float* wait) {
  for (int64_t g = 0; g < piece.count; g++)
    for (int r = 0; r < ROWS; r++) {
      const int64_t at = (row + r) * x.groups + piece.at / piece.group + g;
      const float total = x.scales[at] * static_cast<float>(x.sums[at]);
      for (int column = 0; column < PANEL; column += W) {
        float* to = wait + r * PANEL + column;
        store(to, load(to) + load(piece.mins + g * PANEL + column) * total);
      }
    }
}

template <int BITS, int ROWS>
VC_INLINE void code_rows(int rows, const Inputs& x, int64_t row, Piece piece, int zero, float* wait) {
  if (rows != ROWS) {
    if constexpr (ROWS > 1) code_rows<BITS, ROWS - 1>(rows, x, row, piece, zero, wait);
    return;
  }
  constexpr int VECS = ROWS <= 1 ? PANEL / W : TILE_VECTORS;
  for (int column = 0; column < PANEL; column += VECS * W) {
    code_tile<BITS, ROWS, VECS>(x, row, piece, zero, column, wait);
    piece.request.bytes = 0;
  }
  if (piece.mins) add_mins<ROWS>(x, row, piece, wait);
}

// Rows [row, row + m) x one panel, into wait.
template <int BITS>
void codes_by_panel(int64_t m, const Inputs& x, int64_t row, const Coded& c, int64_t panel, int64_t next, float* wait) {
  std::memset(wait, 0, m * PANEL * sizeof(float));
  const int64_t tiles = (m + TILE_ROWS - 1) / TILE_ROWS, group = c.groups == 1 ? c.columns : c.group;
  const int64_t at_once = group < PIECE_K ? PIECE_K / group : 1, scales = panel * c.groups * PANEL;
  for (int64_t g = 0; g < c.groups; g += at_once) {
    const int64_t count = c.groups - g < at_once ? c.groups - g : at_once;
    const int64_t offset = g * group * PANEL * BITS / 8, bytes = count * group * PANEL * BITS / 8;
    const uint8_t* codes = c.codes + panel * c.panel_bytes + offset;
    Piece piece = {codes, c.scales + scales + g * PANEL, c.mins ? c.mins + scales + g * PANEL : nullptr,
                   g * group, group, count, {reinterpret_cast<const char*>(codes) + AHEAD, bytes}};
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t first = m * t / tiles, rows = m * (t + 1) / tiles - first;
      if (tiles > 1) {
        const uint8_t* after = g + count < c.groups ? codes + bytes : c.codes + next * c.panel_bytes;
        const char* from = reinterpret_cast<const char*>(after);
        piece.request = {from + bytes / tiles * t, bytes / tiles};
      }
      code_rows<BITS, TILE_ROWS>(static_cast<int>(rows), x, row + first, piece, c.zero, wait + first * PANEL);
    }
  }
}

// ---------------------------------------------------------------- codes that become numbers
// Columns [from, from + count) of a panel as linear.h has a panel.
template <class T, int BITS>
void widen(const Coded& c, int64_t panel, int64_t from, int64_t count, T* out) {
  constexpr int STEP = 32 / BITS, S = Numbers<T>::STEP;
  const uint8_t* codes = c.codes + panel * c.panel_bytes + from / STEP * PANEL * 4;
  for (int64_t at = 0; at < count; at += STEP, codes += PANEL * 4)
    for (int v = 0; v < PANEL / W; v++) {
      int64_t g = (from + at) / c.group;
      g = ((g < c.groups ? g : c.groups - 1) + panel * c.groups) * PANEL + v * W;
      const Vec scale = load(c.scales + g), low = c.mins ? load(c.mins + g) : Vec{};
      const UVec word = load(reinterpret_cast<const uint32_t*>(codes) + v * W);
      for (int i = 0; i < STEP; i += 2) {
        Vec y[2];
        for (int j = 0; j < 2; j++) {
          const UVec code = word >> ((i + j) % 4 * 8 + (i + j) / 4 * 4) & ((1 << BITS) - 1);
          y[j] = rounded(to_floats((IVec)code - c.zero) * scale) + low;
        }
        put_two(out + (at + i) / S * PANEL * S + v * W * S, y[0], y[1]);
      }
    }
}

template <class T>
void numbers_by_panel(int64_t m, const T* x, int64_t stride, const Coded& c, int64_t panel, float* wait) {
  alignas(64) T room[PIECE_K * PANEL];
  for (int64_t from = 0; from < c.k; from += PIECE_K) {
    const int64_t part = c.k - from < PIECE_K ? c.k - from : PIECE_K, columns = code_columns(part);
    c.bits == 8 ? widen<T, 8>(c, panel, from, columns, room) : widen<T, 4>(c, panel, from, columns, room);
    block_by_panel(m, x + from, stride, part, room, room, wait, from > 0);
  }
}

// ---------------------------------------------------------------- the product
// As linear: out [m, n]. wide: inputs stay as they are.
template <class T, class Out>
void coded_linear(const Coded& c, bool wide, const float* bias, const T* x, int64_t x_stride, Out* out,
                  int64_t out_stride, int64_t m, int64_t n, int epilogue, int threads) {
  static thread_local InputRoom room;
  const Inputs inputs = wide ? Inputs{} : quantize_inputs(x, x_stride, m, c, room, threads);
  const int64_t panels = (n + PANEL - 1) / PANEL;
  const bool gated = epilogue != PLAIN;
  vc::each_item(panels, threads, [&](int64_t p) {
    alignas(64) float sums[BLOCK_ROWS * PANEL], gates[BLOCK_ROWS * PANEL];
    const auto block = [&](int64_t row, int64_t rows, int64_t panel, int64_t next, float* wait) {
      if (wide)
        numbers_by_panel(rows, x + row * x_stride, x_stride, c, panel, wait);
      else if (c.bits == 8)
        codes_by_panel<8>(rows, inputs, row, c, panel, next, wait);
      else
        codes_by_panel<4>(rows, inputs, row, c, panel, next, wait);
    };
    const int64_t columns = n - p * PANEL < PANEL ? n - p * PANEL : PANEL, up = p + panels;
    for (int64_t row = 0; row < m; row += BLOCK_ROWS) {
      const int64_t rows = m - row < BLOCK_ROWS ? m - row : BLOCK_ROWS;
      if (gated) block(row, rows, p, up, gates);
      block(row, rows, gated ? up : p, p + 1, sums);
      finish(rows, columns, sums, gated ? gates : nullptr, bias ? bias + p * PANEL + (gated ? n : 0) : nullptr,
             gated && bias ? bias + p * PANEL : nullptr, epilogue, out + row * out_stride + p * PANEL, out_stride);
    }
  });
}

}  // namespace VC_ISA
