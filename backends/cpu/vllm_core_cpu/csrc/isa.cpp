// The kernels for one instruction set: compiled once for each, with VC_ISA its name.
#include "attention.h"
#include "kernels.h"
#include "linear.h"
#include "rows.h"

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
    pack(static_cast<const float*>(weight), stride, n, k, static_cast<float*>(out), vc::team.threads);
  else
    pack(static_cast<const bf16*>(weight), stride, n, k, static_cast<bf16*>(out), vc::team.threads);
}

template <class T>
void unpack_all(const T* packed, const int32_t* rows, int64_t count, int64_t n, int64_t k, T* out) {
  for (int64_t i = 0; i < count; i++) {
    int64_t row = rows ? rows[i] : i;
    row = row < 0 ? 0 : row < n ? row : n - 1;
    unpack_row(packed, row, k, out + i * k);
  }
}

// rows null: all.
void unpack_rows(int32_t dtype, const void* packed, const int32_t* rows, int64_t count, int64_t n,
                 int64_t k, void* out) {
  if (dtype == vc::FLOAT32)
    unpack_all(static_cast<const float*>(packed), rows, count, n, k, static_cast<float*>(out));
  else
    unpack_all(static_cast<const bf16*>(packed), rows, count, n, k, static_cast<bf16*>(out));
}

void linear_any(const vc::Linear* w, const void* x, int64_t x_stride, void* out, int64_t m) {
  int threads = vc::team.threads;
  if (w->dtype == vc::FLOAT32)
    linear(static_cast<const float*>(w->packed), w->bias, static_cast<const float*>(x), x_stride,
           static_cast<float*>(out), w->n, m, w->n, w->k, w->epilogue, threads);
  else if (w->out_dtype == vc::FLOAT32)
    linear(static_cast<const bf16*>(w->packed), w->bias, static_cast<const bf16*>(x), x_stride,
           static_cast<float*>(out), w->n, m, w->n, w->k, w->epilogue, threads);
  else
    linear(static_cast<const bf16*>(w->packed), w->bias, static_cast<const bf16*>(x), x_stride,
           static_cast<bf16*>(out), w->n, m, w->n, w->k, w->epilogue, threads);
}

void attend_any(const vc::Attend* a) {
  a->dtype == vc::FLOAT32 ? attend<float>(*a) : attend<bf16>(*a);
}

int64_t kv_head_size(int32_t dtype, int64_t dim, int64_t dim_v, int64_t block_tokens) {
  return dtype == vc::FLOAT32 ? head_size<float>(dim, dim_v, block_tokens) : head_size<bf16>(dim, dim_v, block_tokens);
}

template <class T>
void move_blocks(const vc::Attend& a, const int32_t* blocks, int64_t count, T* k, T* v, bool to_cache) {
  const Cache<T> cache = cache_of<T>(a);
  for (int64_t i = 0; i < count; i++)
    for (int64_t slot = 0; slot < a.block_tokens; slot++)
      for (int64_t h = 0; h < a.kv_heads; h++, k += a.dim, v += a.dim_v)
        to_cache ? cache.write(blocks[i], h, slot, k, v) : cache.read(blocks[i], h, slot, k, v);
}

void move_blocks_any(const vc::Attend* a, const int32_t* blocks, int64_t count, void* k, void* v, int32_t to_cache) {
  if (a->dtype == vc::FLOAT32)
    move_blocks(*a, blocks, count, static_cast<float*>(k), static_cast<float*>(v), to_cache);
  else
    move_blocks(*a, blocks, count, static_cast<bf16*>(k), static_cast<bf16*>(v), to_cache);
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
const vc::Kernels kernels = {VC_TEXT(VC_ISA), packed_bytes, pack_any, unpack_rows, linear_any,
                             attend_any, kv_head_size, move_blocks_any, rms_norm_any, layer_norm_any,
                             gate_any, rope_any, add_any, replay};

}  // namespace VC_ISA
