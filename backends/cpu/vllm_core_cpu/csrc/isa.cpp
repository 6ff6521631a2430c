// The kernels for one instruction set: compiled once for each, with VC_ISA its name.
#include "adjust.h"
#include "attention.h"
#include "kernels.h"
#include "linear.h"
#include "logprobs.h"
#include "quantized.h"
#include "rows.h"
#include "sample.h"

#define VC_TEXT_OF(x) #x
#define VC_TEXT(x) VC_TEXT_OF(x)

namespace VC_ISA {
namespace {

int64_t packed_bytes(int32_t dtype, int64_t n, int64_t k) {
  int64_t panels = (n + PANEL - 1) / PANEL;
  return dtype == vc::FLOAT32 ? panels * panel_size<float>(k) * 4 : panels * panel_size<bf16>(k) * 2;
}

void pack_any(int32_t dtype, const void* weight, int64_t stride, int64_t n, int64_t k, void* out) {
  if (dtype == vc::FLOAT32)
    pack(static_cast<const float*>(weight), stride, n, k, static_cast<float*>(out), vc::team_threads);
  else
    pack(static_cast<const bf16*>(weight), stride, n, k, static_cast<bf16*>(out), vc::team_threads);
}

int64_t packed_code_bytes(int32_t bits, int64_t n, int64_t k) {
  return (n + PANEL - 1) / PANEL * code_columns(k) * PANEL * bits / 8;
}

// 0 where a number of the weight is none.
int32_t quantize_any(int32_t dtype, const void* weight, const vc::Codes* shape, void* codes, void* scales) {
  const auto to = static_cast<uint8_t*>(codes);
  const auto own = static_cast<float*>(scales);
  return dtype == vc::FLOAT32 ? quantize(static_cast<const float*>(weight), *shape, to, own, vc::team_threads)
                              : quantize(static_cast<const bf16*>(weight), *shape, to, own, vc::team_threads);
}

void pack_codes_any(const vc::Codes* codes, void* out, void* scales, void* mins) {
  pack_codes(*codes, static_cast<uint8_t*>(out), static_cast<float*>(scales), static_cast<float*>(mins),
             vc::team_threads);
}

Coded coded_of(const vc::Linear& w) { return coded(w.packed, w.scales, w.mins, w.k, w.group, w.bits); }

template <class T>
void unpack_all(const vc::Linear& w, const int32_t* rows, int64_t count, T* out) {
  for (int64_t i = 0; i < count; i++, out += w.k) {
    int64_t row = rows ? rows[i] : i;
    row = row < 0 ? 0 : row < w.n ? row : w.n - 1;
    w.bits ? unpack_code_row(coded_of(w), row, out) : unpack_row(static_cast<const T*>(w.packed), row, w.k, out);
  }
}

void unpack_rows(const vc::Linear* w, const int32_t* rows, int64_t count, void* out) {
  if (w->dtype == vc::FLOAT32)
    unpack_all(*w, rows, count, static_cast<float*>(out));
  else
    unpack_all(*w, rows, count, static_cast<bf16*>(out));
}

template <class T, class Out>
void linear_of(const vc::Linear& w, const void* x, int64_t x_stride, void* out, int64_t m) {
  const T* from = static_cast<const T*>(x);
  Out* to = static_cast<Out*>(out);
  if (w.bits)
    coded_linear(coded_of(w), w.wide_inputs, w.bias, from, x_stride, to, w.out_stride, m, w.n, w.epilogue,
                 vc::team_threads);
  else
    linear(static_cast<const T*>(w.packed), w.bias, from, x_stride, to, w.out_stride, m, w.n, w.k, w.epilogue,
           vc::team_threads);
}

void linear_any(const vc::Linear* w, const void* x, int64_t x_stride, void* out, int64_t m) {
  if (w->dtype == vc::FLOAT32)
    linear_of<float, float>(*w, x, x_stride, out, m);
  else if (w->out_dtype == vc::FLOAT32)
    linear_of<bf16, float>(*w, x, x_stride, out, m);
  else
    linear_of<bf16, bf16>(*w, x, x_stride, out, m);
}

// use(T, S): numbers of what is computed in and of what a cache stores.
template <class Use>
auto by_format(int32_t dtype, int32_t kv_dtype, const Use& use) {
  const bool coded = kv_dtype == vc::INT8;
  if (dtype == vc::FLOAT32) return coded ? use(float(), int8_t()) : use(float(), float());
  return coded ? use(bf16(), int8_t()) : use(bf16(), bf16());
}

void attend_any(const vc::Attend* a) {
  by_format(a->dtype, a->kv_dtype, [&](auto t, auto s) { attend<decltype(t), decltype(s)>(*a); });
}

int64_t kv_head_size(int32_t dtype, int32_t kv_dtype, int64_t dim, int64_t dim_v, int64_t block_tokens) {
  return by_format(dtype, kv_dtype, [&](auto t, auto s) {
    return head_size<decltype(t), decltype(s)>(dim, dim_v, block_tokens);
  });
}

void move_blocks_any(const vc::Attend* a, const vc::Blocks* blocks) {
  by_format(a->dtype, a->kv_dtype, [&](auto t, auto s) { move_blocks<decltype(t), decltype(s)>(*a, *blocks); });
}

void rms_norm_any(const vc::Rows* a) { a->dtype == vc::FLOAT32 ? rms_norm<float>(*a) : rms_norm<bf16>(*a); }
void layer_norm_any(const vc::Rows* a) { a->dtype == vc::FLOAT32 ? layer_norm<float>(*a) : layer_norm<bf16>(*a); }
void gate_any(const vc::Rows* a, int32_t kind) {
  a->dtype == vc::FLOAT32 ? gate<float>(*a, kind) : gate<bf16>(*a, kind);
}
void rope_any(const vc::Rope* a) { a->dtype == vc::FLOAT32 ? rope<float>(*a) : rope<bf16>(*a); }
void add_any(const vc::Rows* a) { a->dtype == vc::FLOAT32 ? add<float>(*a) : add<bf16>(*a); }

void replay(const vc::Call* calls, int64_t count) {
  for (const vc::Call* c = calls; c != calls + count; c++) {
    const auto rows = static_cast<const vc::Rows*>(c->record);
    switch (c->kind) {
      case vc::LINEAR: linear_any(static_cast<const vc::Linear*>(c->record), c->x, c->x_stride, c->out, c->m); break;
      case vc::ATTEND: attend_any(static_cast<const vc::Attend*>(c->record)); break;
      case vc::RMS_NORM: rms_norm_any(rows); break;
      case vc::LAYER_NORM: layer_norm_any(rows); break;
      case vc::GATE: gate_any(rows, c->gate); break;
      case vc::ROPE: rope_any(static_cast<const vc::Rope*>(c->record)); break;
      case vc::ADD: add_any(rows); break;
    }
  }
}

}  // namespace

extern const vc::Kernels kernels;
const vc::Kernels kernels = {VC_TEXT(VC_ISA), packed_bytes, pack_any, packed_code_bytes, quantize_any, pack_codes_any,
                             unpack_rows, linear_any, attend_any, kv_head_size, move_blocks_any, rms_norm_any, layer_norm_any,
                             gate_any, rope_any, add_any, largest_of_rows, adjust,
                             sample, logprobs, replay};

}  // namespace VC_ISA
