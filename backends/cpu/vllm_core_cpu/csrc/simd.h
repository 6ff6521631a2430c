// Vectors of float, as wide as the instruction set that this file is compiled for.
//
// Everything is GCC and clang vector extensions, so that one text serves every processor; only what
// no operator says has intrinsics: dot products of 16-bit and 8-bit numbers, and conversions.
//
// Included once per instruction set, inside namespace VC_ISA. Knows: registers. Does not know:
// tensors, layouts, threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define VC_INLINE inline __attribute__((always_inline))

namespace VC_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;  // lanes
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr int LANES = 16;          // columns of one group of every packed layout
constexpr int VECTORS = LANES / W;  // vectors of one group

typedef float Vec __attribute__((vector_size(W * 4)));
typedef int32_t IVec __attribute__((vector_size(W * 4)));
typedef uint32_t UVec __attribute__((vector_size(W * 4)));
typedef Vec Vec_u __attribute__((aligned(1), may_alias));
typedef IVec IVec_u __attribute__((aligned(1), may_alias));
typedef UVec UVec_u __attribute__((aligned(1), may_alias));
typedef uint16_t Half __attribute__((vector_size(W * 2)));
typedef Half Half_u __attribute__((aligned(1), may_alias));
typedef uint16_t bf16;  // the bits

VC_INLINE Vec load(const float* p) { return *reinterpret_cast<const Vec_u*>(p); }
VC_INLINE void store(float* p, Vec v) { *reinterpret_cast<Vec_u*>(p) = v; }
VC_INLINE Vec set(float x) { return x - Vec{}; }  // x - 0 keeps -0.0
VC_INLINE IVec iset(int32_t x) { return x - IVec{}; }
VC_INLINE Vec vmax(Vec a, Vec b) { return a > b ? a : b; }
VC_INLINE Vec vmin(Vec a, Vec b) { return a < b ? a : b; }
VC_INLINE IVec lane_ids() {
  IVec ids{};
  for (int i = 0; i < W; i++) ids[i] = i;
  return ids;
}

VC_INLINE float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float parts[W];
  store(parts, v);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) parts[i] += parts[i + half];
  return parts[0];
#endif
}

VC_INLINE float largest(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float parts[W];
  store(parts, v);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) parts[i] = parts[i] > parts[i + half] ? parts[i] : parts[i + half];
  return parts[0];
#endif
}

// The first `count` lanes; the others read and write nothing.
VC_INLINE Vec load_some(const float* p, int count) {
  Vec v{};
  std::memcpy(&v, p, count * sizeof(float));
  return v;
}
VC_INLINE void store_some(float* p, Vec v, int count) { std::memcpy(p, &v, count * sizeof(float)); }

// ---- bfloat16
VC_INLINE float to_float(bf16 x) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// To the nearest, ties to even; NaN stays NaN.
VC_INLINE bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<bf16>(bits >> 16 | 0x40);
  return static_cast<bf16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

VC_INLINE Vec load(const bf16* p) {
  Half half = *reinterpret_cast<const Half_u*>(p);
  return (Vec)(__builtin_convertvector(half, UVec) << 16);
}

VC_INLINE Half narrow(Vec v) {
#if defined(__AVX512BF16__)
  return (Half)_mm512_cvtneps_pbh((__m512)v);
#else
  UVec bits = (UVec)v;
  UVec rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  UVec kept = bits >> 16 | 0x40;
  return __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? kept : rounded, Half);
#endif
}
VC_INLINE void store(bf16* p, Vec v) { *reinterpret_cast<Half_u*>(p) = narrow(v); }

VC_INLINE Vec load_some(const bf16* p, int count) {
  Half half{};
  std::memcpy(&half, p, count * sizeof(bf16));
  return (Vec)(__builtin_convertvector(half, UVec) << 16);
}
VC_INLINE void store_some(bf16* p, Vec v, int count) {
  Half half = narrow(v);
  std::memcpy(p, &half, count * sizeof(bf16));
}

// acc[lane] += a[lane].first * b[lane].first + a[lane].second * b[lane].second; every lane of a and b
// is a pair of bfloat16, the first in the lower half.
VC_INLINE Vec dot2(Vec acc, UVec a, UVec b) {
#if defined(__AVX512BF16__)
  return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  return (Vec)vbfdotq_f32((float32x4_t)acc, (bfloat16x8_t)a, (bfloat16x8_t)b);
#else
  acc += (Vec)(a << 16) * (Vec)(b << 16);
  return acc + (Vec)(a & 0xffff0000) * (Vec)(b & 0xffff0000);
#endif
}

// A pair of bfloat16 in every lane.
VC_INLINE UVec set_pair(const bf16* p) {
  uint32_t bits;
  std::memcpy(&bits, p, 4);
  return bits - UVec{};
}
VC_INLINE UVec load_pairs(const bf16* p) {
  return *reinterpret_cast<const UVec_u*>(p);
}

template <class T>
VC_INLINE T as_number(float x);
template <>
VC_INLINE float as_number<float>(float x) { return x; }
template <>
VC_INLINE bf16 as_number<bf16>(float x) { return to_bf16(x); }

// ---- 8 bits
VC_INLINE IVec load(const int32_t* p) { return *reinterpret_cast<const IVec_u*>(p); }
VC_INLINE UVec load(const uint32_t* p) { return *reinterpret_cast<const UVec_u*>(p); }

// Four signed bytes in every lane.
VC_INLINE IVec set_four(const int8_t* p) {
  int32_t bits;
  std::memcpy(&bits, p, 4);
  return iset(bits);
}

// acc[lane] += sum of b[lane].byte * a[lane].byte over four bytes: those of b unsigned, of a signed.
VC_INLINE IVec dot4(IVec acc, UVec b, IVec a) {
#if defined(__AVX512VNNI__)
  return (IVec)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)b, (__m512i)a);
#elif defined(__AVX2__)
  const __m256i low = _mm256_set1_epi16(0xff), x = (__m256i)a, y = (__m256i)b;
  __m256i even = _mm256_madd_epi16(_mm256_and_si256(y, low), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
  __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(y, 8), _mm256_srai_epi16(x, 8));
  return acc + (IVec)even + (IVec)odd;
#elif defined(__ARM_FEATURE_MATMUL_INT8)
  return (IVec)vusdotq_s32((int32x4_t)acc, (uint8x16_t)b, (int8x16_t)a);
#else
  acc += (IVec)(b & 255) * (a << 24 >> 24) + (IVec)(b >> 8 & 255) * (a << 16 >> 24);
  return acc + (IVec)(b >> 16 & 255) * (a << 8 >> 24) + (IVec)(b >> 24) * (a >> 24);
#endif
}

// To the nearest integer, ties to even; |x| below 2^22.
VC_INLINE IVec to_nearest(Vec x) {
  const Vec magic = set(12582912.0f);  // 1.5 * 2^23
  return (IVec)(x + magic) - (IVec)magic;
}
VC_INLINE Vec to_floats(IVec x) { return __builtin_convertvector(x, Vec); }

// ---- functions
// e^x to about one unit in the last place; 0 below -87.3 (also for -inf), no more than e^88; NaN stays.
VC_INLINE Vec vexp(Vec x) {
  const Vec low = set(-87.33654f), high = set(88.3762f);
  Vec clipped = vmin(vmax(x, low), high);
  Vec n = clipped * 1.44269504f;
#if defined(__AVX512F__)
  n = (Vec)_mm512_roundscale_ps((__m512)n, 8);
#else
  const Vec magic = set(12582912.0f);  // 1.5 * 2^23: rounds to an integer
  n = (n + magic) - magic;
#endif
  Vec r = clipped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec y = set(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  IVec power = __builtin_convertvector(n, IVec) << 23;
  Vec out = (Vec)((IVec)y + power);
  return x < low ? Vec{} : x == x ? out : x;
}

// 2^x for x up to 100, to about two units in the last place; 0 below -126 (also for -inf); NaN stays.
VC_INLINE Vec vexp2(Vec x) {
  const Vec low = set(-200.0f);
  Vec clipped = low > x ? low : x;
#if defined(__AVX512F__)
  const Vec n = (Vec)_mm512_roundscale_ps((__m512)clipped, 8);
#else
  const Vec magic = set(12582912.0f);  // 1.5 * 2^23: rounds to an integer
  const Vec n = (clipped + magic) - magic;
#endif
  const Vec f = clipped - n;
  Vec y = set(1.535336188e-4f);
  y = y * f + 1.339887440e-3f;
  y = y * f + 9.618437357e-3f;
  y = y * f + 5.550332471e-2f;
  y = y * f + 2.402264791e-1f;
  y = y * f + 6.931472028e-1f;
  y = y * f + 1.0f;
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
  const Vec out = (Vec)((IVec)y + (__builtin_convertvector(n, IVec) << 23));
  return clipped < -126.0f ? Vec{} : x == x ? out : x;
#endif
}

// A rational function of odd over even powers, good to about two units in the last place.
VC_INLINE Vec vtanh(Vec x) {
  Vec c = vmin(vmax(x, set(-7.9f)), set(7.9f));
  Vec s = c * c;
  Vec a = set(-2.76076847742355e-16f);
  a = a * s + 2.00018790482477e-13f;
  a = a * s - 8.60467152213735e-11f;
  a = a * s + 5.12229709037114e-08f;
  a = a * s + 1.48572235717979e-05f;
  a = a * s + 6.37261928875436e-04f;
  a = a * s + 4.89352455891786e-03f;
  Vec b = set(1.19825839466702e-06f);
  b = b * s + 1.18534705686654e-04f;
  b = b * s + 2.26843463243900e-03f;
  b = b * s + 4.89352518554385e-03f;
  return x == x ? c * a / b : x;
}

}  // namespace VC_ISA
