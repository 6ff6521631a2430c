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

#if defined(__ARM_NEON)
#include <arm_neon.h>
#else
#include <immintrin.h>
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

// Whether any lane of a comparison holds.
VC_INLINE bool any(IVec v) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)v, (__m512i)v) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)v, (__m256i)v);
#else
  int32_t found = 0;
  for (int i = 0; i < W; i++) found |= v[i];
  return found != 0;
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

VC_INLINE float to_float(float x) { return x; }

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

// ---- numbers of either kind, however many
// visit(at, count): `count` lanes from `at`, all of W but the last.
template <class Visit>
VC_INLINE void by_lanes(int64_t size, const Visit& visit) {
  int64_t at = 0;
  for (; at + W <= size; at += W) visit(at, W);
  if (at < size) visit(at, static_cast<int>(size - at));
}
template <class T>
VC_INLINE Vec load_up_to(const T* p, int count) { return count == W ? load(p) : load_some(p, count); }
template <class T>
VC_INLINE void store_up_to(T* p, Vec v, int count) { count == W ? store(p, v) : store_some(p, v, count); }

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

VC_INLINE Vec to_floats(IVec x) { return __builtin_convertvector(x, Vec); }

// W signed numbers of 8 or 16 bits. By hand: gcc 12 takes them one by one.
VC_INLINE IVec load_bytes(const int8_t* p) {
#if defined(__AVX512F__)
  return (IVec)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i_u*>(p)));
#elif defined(__AVX2__)
  return (IVec)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i_u*>(p)));
#else
  int32_t four;
  std::memcpy(&four, p, 4);
#if defined(__ARM_NEON)
  return (IVec)vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)))));
#else
  const __m128i x = _mm_cvtsi32_si128(four), twice = _mm_unpacklo_epi8(x, x);
  return (IVec)_mm_unpacklo_epi16(twice, twice) >> 24;
#endif
#endif
}
VC_INLINE IVec load_shorts(const int8_t* p) {
#if defined(__AVX512F__)
  return (IVec)_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(p)));
#elif defined(__AVX2__)
  return (IVec)_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i_u*>(p)));
#elif defined(__ARM_NEON)
  return (IVec)vmovl_s16(vreinterpret_s16_s8(vld1_s8(p)));
#else
  const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i_u*>(p));
  return (IVec)_mm_unpacklo_epi16(x, x) >> 16;
#endif
}

// Signed bytes as W floats.
VC_INLINE Vec load(const int8_t* p) { return to_floats(load_bytes(p)); }

// As it stands in memory.
VC_INLINE Vec as_stored(Vec x) { return x; }
VC_INLINE UVec as_stored(UVec x) { return x; }

// Signed bytes as W pairs, for dot2: of bfloat16, which holds them too, where dot2 is one instruction.
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
typedef UVec BytePairs;
VC_INLINE BytePairs load_pairs(const int8_t* p) {
#if defined(__AVX512BF16__)
  return (UVec)_mm512_cvtne2ps_pbh((__m512)load(p + W), (__m512)load(p));
#else
  const IVec both = load_shorts(p);
  return (UVec)to_floats(both << 24 >> 24) >> 16 | (UVec)to_floats(both >> 8);
#endif
}
#else
struct BytePairs {
  Vec first, second;
};
VC_INLINE BytePairs load_pairs(const int8_t* p) {
  const IVec both = load_shorts(p);
  return {to_floats(both << 24 >> 24), to_floats(both >> 8)};
}
VC_INLINE UVec as_stored(BytePairs x) { return (UVec)x.first >> 16 | (UVec)x.second; }
VC_INLINE Vec dot2(Vec acc, UVec a, BytePairs b) {
  acc += (Vec)(a << 16) * b.first;
  return acc + (Vec)(a & 0xffff0000) * b.second;
}
#endif

// To the nearest integer, ties to even; |x| below 2^22.
VC_INLINE IVec to_nearest(Vec x) {
  const Vec magic = set(12582912.0f);  // 1.5 * 2^23
  return (IVec)(x + magic) - (IVec)magic;
}

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

// 2^x for x up to 100, to about two units in the last place; 0 for -inf; NaN stays.
VC_INLINE Vec vexp2(Vec x) {
#if defined(__AVX512F__)
  const Vec f = (Vec)_mm512_reduce_ps((__m512)x, 9);  // x - floor(x)
#else
  const Vec magic = set(12582912.0f), low = set(-200.0f);  // 1.5 * 2^23: rounds to an integer
  const Vec clipped = low > x ? low : x, n = (clipped - 0.5f + magic) - magic, f = clipped - n;
#endif
  Vec y = set(1.867130213e-3f);
  y = y * f + 9.017030019e-3f;
  y = y * f + 5.579991332e-2f;
  y = y * f + 2.401644501e-1f;
  y = y * f + 6.931513118e-1f;
  y = y * f + 1.0f;
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)y, (__m512)x);
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
