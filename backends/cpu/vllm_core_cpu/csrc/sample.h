// Draws tokens from rows of logits, by the law of vllm_core/ops/sampling.py.
//
// A weight is round(e^-distance * 2^27), and from there every sum is a whole number: no order of
// summing changes a token. A row is read once for the largest logit of each block, and where nothing
// is filtered once more for the weight of each block; top-k and top-p look at a list of what they may
// keep, which is short as a rule: the k-th largest of the blocks is no larger than the k-th logit.
//
// Knows: that law. Does not know: bias, penalties, log-probabilities, requests.
#pragma once

#include "kernels.h"
#include "parallel.h"
#include "quantize.h"
#include "room.h"
#include "rows.h"

namespace VC_ISA {

constexpr int64_t BLOCK = 16 * W;  // a lane sums 16 weights, in 32 bits
constexpr float FAR = 20.0f;       // so far from the best logit the weight is 0
constexpr int SHARE = 24;          // bits of top_p
constexpr int64_t FIRST_LOOK = 64;  // how many of the largest blocks top-p looks at before it takes all

// Where the weights of a row come from.
struct Scale {
  float best, inverse_temperature;
};

// The first place at which a sum in descending order exceeds something: the key there, the sum of what
// is above that key.
struct Cut {
  uint32_t key;
  uint64_t above;
};
struct Entry {
  uint32_t key, amount;
};

// Logits that a filter may keep, by ascending id.
struct List {
  int32_t* ids;
  float* x;
  uint32_t *weights, *keys;
  int64_t count;
};

struct SampleRoom {
  Room<float> tops, x;
  Room<uint64_t> sums;
  Room<int32_t> ids;
  Room<uint32_t> weights, keys;
  Room<Entry> entries;
};
inline SampleRoom& sample_room() {
  static thread_local SampleRoom room;
  return room;
}

// ---- numbers
// What a device may take for 0 is 0, of either sign.
VC_INLINE Vec flushed(Vec x) { return ((IVec)x & 0x7fffffff) < 0x00800000 ? Vec{} : x; }
VC_INLINE float flushed(float x) { return std::fabs(x) < 0x1p-126f ? 0.0f : x; }

// Unsigned order of keys = order of flushed numbers.
VC_INLINE UVec keys_of(Vec x) {
  const IVec bits = (IVec)x;
  return (UVec)(bits ^ (bits >> 31 | INT32_MIN));
}
VC_INLINE float number_of(uint32_t key) {
  const uint32_t bits = key >> 31 ? key ^ 0x80000000u : ~key;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
// An index within [0, count).
VC_INLINE int64_t clamped(int64_t index, int64_t count) {
  return index < 0 ? 0 : index < count ? index : count - 1;
}
VC_INLINE float float_of_bits(int32_t bits) {
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// How far below the best, in units of the temperature; NaN where infinity meets an inverse temperature of 0.
template <class X>
VC_INLINE X distance(X x, Scale s) { return rounded((s.best - flushed(x)) * s.inverse_temperature); }

// round(e^-distance * 2^27), 0 for NaN. The power is nearly always the float32 next to the true one:
// what is rounded off the reduced argument and off 1 + r is added to the small terms.
VC_INLINE UVec weights_of(Vec distance) {
  const Vec x = -(distance < FAR ? distance : set(FAR));
  const IVec power = to_nearest(x * 1.44269504f);
  const Vec n = to_floats(power);
  const Vec high = x - n * 0.693359375f;  // exact
  const Vec r = high + n * 2.12194440e-4f;
  const Vec low = (high - r) + n * 2.12194440e-4f;
  Vec y = set(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  const Vec one = r + 1.0f;
  const Vec rest = (r - (one - 1.0f)) + low * one;
  y = one + (y * (r * r) + rest);
  y = (Vec)((IVec)y + ((power + 27) << 23));
  const Vec whole = set(0x1p23f);  // from here on floats are whole numbers
  const IVec small = (IVec)(y + whole) - (IVec)whole;
  return (UVec)(y < whole ? small : __builtin_convertvector(y, IVec));
}

// Word 0 of Philox4x32-10 for the counter (position, sequence, 0, 0).
inline uint32_t uniform(uint32_t position, uint32_t sequence, uint32_t key_low, uint32_t key_high) {
  uint32_t c[4] = {position, sequence, 0, 0};
  for (int round = 0; round < 10; round++) {
    const uint64_t first = uint64_t{c[0]} * 0xD2511F53u, second = uint64_t{c[2]} * 0xCD9E8D57u;
    const uint32_t c1 = c[1], c3 = c[3];
    c[0] = static_cast<uint32_t>(second >> 32) ^ c1 ^ key_low, c[1] = static_cast<uint32_t>(second);
    c[2] = static_cast<uint32_t>(first >> 32) ^ c3 ^ key_high, c[3] = static_cast<uint32_t>(first);
    key_low += 0x9E3779B9u, key_high += 0xBB67AE85u;
  }
  return c[0];
}

// floor(word * mass / 2^32), for a mass below 2^63; exact: whether nothing was cut off.
inline uint64_t scaled(uint32_t word, uint64_t mass, bool* exact = nullptr) {
  const uint64_t low = word * (mass & 0xffffffffu), high = word * (mass >> 32);
  if (exact) *exact = !(low & 0xffffffffu);
  return high + (low >> 32);
}

// ---- passes over a row
// visit(at, numbers) for `count` numbers, a vector at a time; -inf behind the last.
template <class Visit>
VC_INLINE void by_vectors(const float* x, int64_t count, const Visit& visit) {
  int64_t at = 0;
  for (; at + W <= count; at += W) visit(at, load(x + at));
  if (at == count) return;
  const int rest = static_cast<int>(count - at);
  visit(at, lane_ids() < rest ? load_some(x + at, rest) : set(-INFINITY));
}

VC_INLINE int64_t blocks_of(int64_t size) { return (size + BLOCK - 1) / BLOCK; }
VC_INLINE int64_t block_size(int64_t block, int64_t size) {
  return size - block * BLOCK < BLOCK ? size - block * BLOCK : BLOCK;
}

// The largest of each block; false where a number is NaN.
inline bool find_tops(const float* x, int64_t size, float* tops) {
  IVec wrong{};
  for (int64_t b = 0; b < blocks_of(size); b++) {
    const float* from = x + b * BLOCK;
    const int64_t count = block_size(b, size);
    Vec top = set(-INFINITY);
    int64_t at = 0;
    for (; at + W <= count; at += W) {
      const Vec y = load(from + at);
      top = vmax(y, top), wrong |= y != y;
    }
    tops[b] = largest(top);
    for (; at < count; at++) tops[b] = from[at] > tops[b] ? from[at] : tops[b], wrong[0] |= from[at] != from[at];
  }
  return !any(wrong);
}

VC_INLINE UVec near_weights(Vec x, Scale s, float limit) {
  const Vec d = distance(x, s);
  return d <= limit ? weights_of(d) : UVec{};
}

// The mass of each block within `limit` of the best; the sum of all.
inline uint64_t weigh_blocks(const float* x, int64_t size, Scale s, float limit, const float* tops, uint64_t* sums) {
  uint64_t total = 0;
  for (int64_t b = 0; b < blocks_of(size); b++) {
    sums[b] = 0;
    if (!(distance(tops[b], s) <= limit)) continue;
    UVec lanes{};
    by_vectors(x + b * BLOCK, block_size(b, size), [&](int64_t, Vec y) { lanes += near_weights(y, s, limit); });
    for (int lane = 0; lane < W; lane++) sums[b] += lanes[lane];
    total += sums[b];
  }
  return total;
}

// The first id whose mass, with all before it, exceeds the target.
inline int64_t first_above(const uint32_t* weights, uint64_t target) {
  int64_t at = 0;
  for (uint64_t mass = weights[0]; mass <= target; mass += weights[at]) at++;
  return at;
}

inline int32_t draw_from_blocks(const float* x, int64_t size, Scale s, float limit, const float* tops, uint32_t word) {
  uint64_t* sums = sample_room().sums.fit(blocks_of(size));
  uint64_t target = scaled(word, weigh_blocks(x, size, s, limit, tops, sums));
  int64_t b = 0;
  for (; sums[b] <= target; b++) target -= sums[b];
  alignas(64) uint32_t weights[BLOCK];
  by_vectors(x + b * BLOCK, block_size(b, size), [&](int64_t at, Vec y) {
    const UVec w = near_weights(y, s, limit);
    std::memcpy(weights + at, &w, sizeof(w));
  });
  return static_cast<int32_t>(b * BLOCK + first_above(weights, target));
}

// ---- filters
// Of entries whose amounts add up to more than `need`; changes them.
inline Cut find_cut(Entry* entries, int64_t count, uint64_t need) {
  constexpr int MANY = 11, FEW = 8;  // bits of a key at a time
  uint64_t sums[1 << MANY], above = 0;
  for (;;) {
    uint32_t low = entries[0].key, high = low;
    for (int64_t i = 1; i < count; i++) {
      low = entries[i].key < low ? entries[i].key : low;
      high = entries[i].key > high ? entries[i].key : high;
    }
    if (low == high) return {low, above};
    const int bits = count > 4096 ? MANY : FEW, differ = 32 - __builtin_clz(low ^ high);
    const int shift = differ > bits ? differ - bits : 0;  // above these bits all are alike
    const uint32_t mask = (1u << bits) - 1;
    std::memset(sums, 0, sizeof(uint64_t) << bits);
    for (int64_t i = 0; i < count; i++) sums[entries[i].key >> shift & mask] += entries[i].amount;
    uint32_t part = mask;
    while (above + sums[part] <= need) above += sums[part--];
    int64_t kept = 0;
    for (int64_t i = 0; i < count; i++) {
      const Entry entry = entries[i];
      entries[kept] = entry;
      kept += (entry.key >> shift & mask) == part;
    }
    count = kept;
  }
}

// A number that at least `count` logits reach; -inf where blocks do not tell.
inline float floor_of(const float* tops, int64_t blocks, int64_t count) {
  if (count > blocks) return -INFINITY;
  Entry* entries = sample_room().entries.fit(blocks);
  for (int64_t b = 0; b < blocks; b++) entries[b] = {keys_of(set(flushed(tops[b])))[0], 1};
  return number_of(find_cut(entries, blocks, static_cast<uint64_t>(count - 1)).key);
}

// Logits no less than `floor` and no farther from the best than `limit`.
inline List list_of(const float* x, int64_t size, Scale s, float floor, float limit, const float* tops) {
  SampleRoom& room = sample_room();
  const int64_t most = size + W;  // whole vectors
  List list = {room.ids.fit(most), room.x.fit(most), room.weights.fit(most), room.keys.fit(most), 0};
  int64_t count = 0;
  for (int64_t b = 0; b < blocks_of(size); b++) {
    if (flushed(tops[b]) < floor || !(distance(tops[b], s) <= limit)) continue;
    by_vectors(x + b * BLOCK, block_size(b, size), [&](int64_t at, Vec y) {
      y = flushed(y);
      const IVec is_in = (y >= floor) & (distance(y, s) <= limit);
      const int32_t first = static_cast<int32_t>(b * BLOCK + at);
      for (int lane = 0; lane < W; lane++) {
        list.ids[count] = first + lane, list.x[count] = y[lane];
        count -= is_in[lane];
      }
    });
  }
  list.count = count;
  store(list.x + count, set(-INFINITY));
  for (int64_t at = 0; at < count; at += W) {
    const Vec y = load(list.x + at);
    const UVec w = near_weights(y, s, FAR), keys = keys_of(y);
    std::memcpy(list.weights + at, &w, sizeof(w)), std::memcpy(list.keys + at, &keys, sizeof(keys));
  }
  return list;
}

inline uint64_t mass_of(const List& list) {
  uint64_t mass = 0;
  for (int64_t i = 0; i < list.count; i++) mass += list.weights[i];
  return mass;
}

// Keeps the shortest prefix by (logit descending, id ascending) whose amounts exceed `need`: of the
// weights, or of one each.
inline void keep_top(List& list, bool by_weight, uint64_t need) {
  Entry* entries = sample_room().entries.fit(list.count);
  for (int64_t i = 0; i < list.count; i++) entries[i] = {list.keys[i], by_weight ? list.weights[i] : 1};
  Cut cut = find_cut(entries, list.count, need);
  int64_t kept = 0;
  for (int64_t i = 0; i < list.count; i++) {
    const uint32_t key = list.keys[i], weight = list.weights[i];
    const bool is_tie = key == cut.key;
    list.ids[kept] = list.ids[i], list.x[kept] = list.x[i], list.weights[kept] = weight, list.keys[kept] = key;
    kept += key > cut.key || (is_tie && cut.above <= need);
    if (is_tie) cut.above += by_weight ? weight : 1;
  }
  list.count = kept;
}

// What one row asks for.
struct Filters {
  int64_t top_k;   // 0: off
  uint32_t share;  // top_p in SHARE bits
  float gap;       // of min_p

  Filters(const int32_t* params, int64_t size) {
    top_k = params[vc::TOP_K] > 0 && params[vc::TOP_K] < size ? params[vc::TOP_K] : 0;
    const float top_p = float_of_bits(params[vc::TOP_P]);
    share = top_p < 1 ? static_cast<uint32_t>(std::nearbyint((top_p > 0 ? top_p : 0) * (1 << SHARE))) : 1 << SHARE;
    share = share ? share : 1;  // the best token stays
    gap = float_of_bits(params[vc::MIN_P_GAP]);
    gap = gap > 0x1p-126f ? gap : 0x1p-126f;
  }
  bool has_top_p() const { return share < 1 << SHARE; }
  // The prefix whose mass reaches top_p of `total` is the shortest that exceeds this.
  uint64_t need(uint64_t total) const {
    bool exact;
    const uint64_t found = scaled(share << (32 - SHARE), total, &exact);
    return exact ? found - 1 : found;
  }
};

// By ascending id, a prefix of the order whose mass exceeds `need`, as short as can be told in advance.
inline List list_of_mass(const float* x, int64_t size, Scale s, uint64_t total, uint64_t need, const float* tops) {
  List list = list_of(x, size, s, floor_of(tops, blocks_of(size), FIRST_LOOK), FAR, tops);
  if (mass_of(list) > need) return list;
  // what is farther than this has no more mass than is left over, all of it together
  const float most = static_cast<float>(size) * 0x1p27f / static_cast<float>(total - need);
  list = list_of(x, size, s, -INFINITY, std::log(most) + 0.01f, tops);
  return mass_of(list) > need ? list : list_of(x, size, s, -INFINITY, FAR, tops);
}

inline int32_t draw_filtered(const float* x, int64_t size, Scale s, const Filters& f, const float* tops,
                             uint32_t word) {
  List list;
  if (f.top_k) {
    list = list_of(x, size, s, floor_of(tops, blocks_of(size), f.top_k), FAR, tops);
    if (f.top_k < list.count) keep_top(list, false, static_cast<uint64_t>(f.top_k - 1));
    if (f.has_top_p()) keep_top(list, true, f.need(mass_of(list)));
  } else {
    uint64_t* sums = sample_room().sums.fit(blocks_of(size));
    const uint64_t total = weigh_blocks(x, size, s, FAR, tops, sums), need = f.need(total);
    list = list_of_mass(x, size, s, total, need, tops);
    keep_top(list, true, need);
  }
  for (int64_t at = 0; f.gap < FAR && at < list.count; at += W) {
    const UVec w = near_weights(load(list.x + at), s, f.gap);
    std::memcpy(list.weights + at, &w, sizeof(w));
  }
  return list.ids[first_above(list.weights, scaled(word, mass_of(list)))];
}

inline void sample_row(const vc::Sample& a, int64_t row) {
  const float* x = a.x + row * a.size;
  const int32_t* params = a.params + row * a.params_stride;
  const float temperature = float_of_bits(params[vc::TEMPERATURE]);
  float best;
  if (!(temperature >= 0x1p-126f)) {
    largest_of_row(x, a.size, a.token + row, &best);
    a.fault[row] = !std::isfinite(best);
    return;
  }
  const int64_t blocks = blocks_of(a.size);
  float* tops = sample_room().tops.fit(blocks);
  if (find_tops(x, a.size, tops)) {
    best = tops[0];
    for (int64_t b = 1; b < blocks; b++) best = tops[b] > best ? tops[b] : best;
  } else {
    largest_of_row(x, a.size, a.token + row, &best);
  }
  a.fault[row] = !std::isfinite(best);
  a.token[row] = 0;
  if (a.fault[row]) return;
  const float inverse_temperature = 1.0f / temperature;
  const Scale s = {flushed(best), inverse_temperature >= 0x1p-126f ? inverse_temperature : 0.0f};
  const auto word_of = [&](int column) { return static_cast<uint32_t>(params[column]); };
  const uint32_t word = uniform(static_cast<uint32_t>(a.positions[row]), word_of(vc::SEQUENCE_INDEX),
                                word_of(vc::SEED_LOW), word_of(vc::SEED_HIGH));
  const Filters f(params, a.size);
  const float limit = a.filters && f.gap < FAR ? f.gap : FAR;
  a.token[row] = a.filters && (f.top_k || f.has_top_p()) ? draw_filtered(x, a.size, s, f, tops, word)
                                                         : draw_from_blocks(x, a.size, s, limit, tops, word);
}

inline void sample(const vc::Sample* a) {
  vc::each_item(a->rows, threads_for(a->rows * a->size), [&](int64_t row) { sample_row(*a, row); });
}

}  // namespace VC_ISA
