// What is done to logits before rows draw from them, by the law of vllm_core/ops/sampling.py to the
// last bit: bias, ids that are held back, penalties for ids that the row has seen.
//
// Knows: that law. Does not know: temperatures, filters, requests.
#pragma once

#include "kernels.h"
#include "parallel.h"
#include "quantize.h"
#include "room.h"
#include "rows.h"
#include "sample.h"

namespace VC_ISA {

// A mark for each id, 0 whenever no row is at work: bit 0 where the id was seen, above it how often
// the row has drawn it.
inline int32_t* marks_for(int64_t size) {
  static thread_local Room<int32_t> room;
  const bool is_new = size > room.size;
  int32_t* marks = room.fit(size);
  if (is_new) std::memset(marks, 0, static_cast<size_t>(size) * sizeof(int32_t));
  return marks;
}

// y = x + bias; 0 to ids that are not held, since what is held gets -inf, and -0.0 + 0 is 0.
inline void bias_row(const vc::Adjust& a, const float* x, const int32_t* params, int32_t position, float* y) {
  const float* bias = a.bias + clamped(params[vc::BIAS_SLOT], a.bias_slots) * a.size;
  by_lanes(a.size, [&](int64_t at, int count) {
    store_up_to(y + at, load_up_to(x + at, count) + load_up_to(bias + at, count) + 0.0f, count);
  });
  if (position >= params[vc::HELD_UNTIL]) return;
  for (int64_t column = vc::HELD_IDS; column < a.params_stride; column++) {
    const int32_t id = params[column];
    if (id >= 0 && id < a.size) y[id] += -INFINITY;
  }
}

// Repetition for tokens [0, seen), frequency and presence for those from `prompt` on, once for each id.
inline void penalize_row(const int32_t* tokens, int64_t seen, int64_t prompt, const int32_t* params, float* y,
                         int64_t size) {
  const float repetition = float_of_bits(params[vc::REPETITION]), inverse = 1.0f / repetition;
  const float frequency = float_of_bits(params[vc::FREQUENCY]), presence = float_of_bits(params[vc::PRESENCE]);
  int32_t* marks = marks_for(size);
  const auto is_id = [&](int32_t token) { return token >= 0 && token < size; };
  for (int64_t j = 0; j < seen; j++)
    if (is_id(tokens[j])) marks[tokens[j]] = (marks[tokens[j]] | 1) + (j < prompt ? 0 : 2);
  for (int64_t j = 0; j < seen; j++) {
    const int32_t id = tokens[j];
    if (!is_id(id) || !marks[id]) continue;
    const int32_t drawn = marks[id] >> 1;
    marks[id] = 0;
    float v = rounded(y[id] * (y[id] > 0 ? inverse : repetition));
    if (drawn) v = v - rounded(static_cast<float>(drawn) * frequency) - presence;
    y[id] = v;
  }
}

inline bool has_penalties(const int32_t* params) {
  return float_of_bits(params[vc::REPETITION]) != 1 || params[vc::FREQUENCY] || params[vc::PRESENCE];  // bits of floats
}

inline void adjust_row(const vc::Adjust& a, int64_t row) {
  const float* x = a.x + row * a.size;
  float* y = a.out + row * a.size;
  const int32_t* params = a.params + row * a.params_stride;
  const int32_t position = a.positions[row];
  if (a.bias)
    bias_row(a, x, params, position, y);
  else
    std::memcpy(y, x, static_cast<size_t>(a.size) * sizeof(float));
  if (!a.history || !has_penalties(params)) return;
  const int64_t seen = position < a.history_length ? position : a.history_length;
  const int32_t* tokens = a.history + clamped(params[vc::HISTORY_SLOT], a.history_slots) * a.history_length;
  penalize_row(tokens, seen, params[vc::PROMPT_LEN], params, y, a.size);
}

inline void adjust(const vc::Adjust* a) {
  vc::each_item(a->rows, threads_for(a->rows * a->size), [&](int64_t row) { adjust_row(*a, row); });
}

}  // namespace VC_ISA
