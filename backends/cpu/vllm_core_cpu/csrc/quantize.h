// Numbers to codes of 8 or 4 bits, by the law of vllm_core/ops/quantized.py to the last bit.
//
// Knows: that law. Does not know: packed layouts, products.
#pragma once

#include "kernels.h"
#include "parallel.h"
#include "room.h"
#include "rows.h"

namespace VC_ISA {

constexpr float TINY = 0x1p-118f;  // a group whose numbers are all smaller is one of zeros
constexpr int PARTS = 16;          // sums that an error is added up in

// The value, rounded: keeps the compiler from fusing a product with a sum.
template <class X>
VC_INLINE X rounded(X x) {
#if defined(__x86_64__)
  __asm__("" : "+x"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#endif
  return x;
}

// One group of `count` numbers, a multiple of 16 or the whole row, in float32.
struct Group {
  const float* x;
  int64_t count;
};

VC_INLINE IVec codes_of(Vec x, float scale, int zero, int low, int high) {
  IVec code = to_nearest(x / scale) + zero;
  code = code < low ? iset(low) : code;
  return code > high ? iset(high) : code;
}

inline void write_codes(Group g, float scale, int zero, int low, int high, uint8_t* codes) {
  by_lanes(g.count, [&](int64_t at, int count) {
    const IVec found = scale == 0 ? iset(zero) : codes_of(load_up_to(g.x + at, count), scale, zero, low, high);
    for (int i = 0; i < count; i++) codes[at + i] = static_cast<uint8_t>(found[i]);
  });
}

// Squared, added up in the order of the law.
inline float error_of(Group g, float scale) {
  Vec sums[PARTS / W] = {};
  for (int64_t at = 0; at < g.count; at += PARTS)
    for (int part = 0; part < PARTS / W; part++) {
      const int64_t here = at + part * W;
      const int count = g.count - here < W ? static_cast<int>(g.count < here ? 0 : g.count - here) : W;
      if (!count) continue;
      const Vec x = load_up_to(g.x + here, count);
      const Vec code = to_floats(scale == 0 ? iset(8) : codes_of(x, scale, 8, 0, 15));
      const Vec wrong = x - rounded((code - 8.0f) * scale);
      sums[part] += rounded(wrong * wrong);
    }
  float parts[PARTS];
  for (int part = 0; part < PARTS / W; part++) store(parts + part * W, sums[part]);
  for (int half = PARTS / 2; half; half /= 2)
    for (int i = 0; i < half; i++) parts[i] += parts[i + half];
  return parts[0];
}

inline float quantize_group(Group g, int bits, uint8_t* codes) {
  float extreme = 0;
  for (int64_t i = 0; i < g.count; i++)
    if (std::fabs(g.x[i]) > std::fabs(extreme)) extreme = g.x[i];
  const bool zeros = std::fabs(extreme) < TINY;
  if (bits == 8) {
    const float scale = zeros ? 0 : std::fabs(extreme) / 127.0f;
    return write_codes(g, scale, 128, 1, 255, codes), scale;
  }
  const float all = zeros ? 0 : extreme / -8.0f, cut = zeros ? 0 : extreme / -9.0f;
  const float scale = error_of(g, cut) < error_of(g, all) ? cut : all;
  return write_codes(g, scale, 8, 0, 15, codes), scale;
}

// weight [n, k] -> codes [n, k], scales [n, k / group]. False: a number is none.
template <class T>
bool quantize(const T* weight, const vc::Codes& to, uint8_t* codes, float* scales, int threads) {
  const int64_t groups = to.k / to.group;
  std::atomic<bool> finite{true};
  vc::each_item(to.n, threads, [&](int64_t r) {
    static thread_local Room<float> room;
    float* row = room.fit(to.k);
    Vec probe{};
    by_lanes(to.k, [&](int64_t at, int count) {
      const Vec x = load_up_to(weight + r * to.k + at, count);
      store_up_to(row + at, x, count);
      probe += x * 0.0f;
    });
    for (int64_t g = 0; g < groups; g++)
      scales[r * groups + g] =
          quantize_group({row + g * to.group, to.group}, to.bits, codes + r * to.k + g * to.group);
    if (sum(probe) != 0) finite = false;  // NaN is not 0
  });
  return finite;
}

}  // namespace VC_ISA
