// What every instruction set implements, and the plain structs that cross the C interface.
//
// Python fills the structs (native.py) and passes their addresses; a field added here is added
// there. Tensors are addresses; sizes and strides count elements.
#pragma once

#include <cstdint>

namespace vc {

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

// One packed weight: what linear needs of it beside x.
struct Linear {
  const void* packed;
  const float* bias;    // or null
  const float* scales;  // of codes; packed too
  const float* mins;    // or null
  int64_t n, k;         // gated: n results of 2n rows
  int64_t out_stride;   // of rows of the result
  int64_t group;        // columns that share a scale
  int32_t bits;         // of a code; 0: numbers
  int32_t wide_inputs;  // of codes: 1, inputs stay numbers
  int32_t dtype;        // of x, and of the weight where it is numbers
  int32_t out_dtype;
  int32_t epilogue;  // 0: none, 1: silu(gate) * up, 2: gelu_tanh(gate) * up
};

// A weight in codes before it is packed.
struct Codes {
  const uint8_t* codes;  // [n, k], a byte each
  const float* scales;   // [n, k / group]
  const float* mins;     // or null
  int64_t n, k, group;
  int32_t bits;
};

// What the attention layers of one step read alike.
struct AttendStep {
  const int32_t* tables;       // [state rows][table_stride] block ids
  const int32_t* rows;         // [num_rows] which table is whose
  const int32_t* seq_lens;     // [num_rows] with the tokens of this step
  const int32_t* query_start;  // [num_rows + 1]
  int64_t table_stride, num_rows, num_tokens;
};

// One attention layer of a step. Rows come as the seam has them; strides are those of tokens.
struct Attend {
  const AttendStep* step;
  void* cache;                // of the layer's pool
  const void* q;              // [num_tokens, q_heads, dim]
  const void* k;
  const void* v;
  void* out;           // [num_tokens, q_heads, dim_v], dense
  float* lse;          // [num_tokens, q_heads] or null
  const float* sinks;  // [q_heads] or null
  int64_t block_stride, layer, q_stride, k_stride, v_stride;
  int64_t q_heads, kv_heads, dim, dim_v, block_tokens;
  int64_t window;  // -1: none
  float scale;
  float softcap;  // 0: none
  int32_t causal;
  int32_t dtype;
  int32_t kv_dtype;  // of the cache: dtype, or INT8: codes with scales
};

// Blocks of one layer, and dense arrays that they come from or go to, in the cache's dtype.
struct Blocks {
  const int32_t* ids;
  void* k;         // [count, block_tokens, kv_heads, dim]
  void* v;         // [count, block_tokens, kv_heads, dim_v]
  float* k_scale;  // of codes: [count, block_tokens, kv_heads]
  float* v_scale;
  int64_t count;
  int32_t to_cache;  // 1: the cache is written
};

// Rows of numbers under a norm, an activation, a rotation. Strides are those of rows.
struct Rows {
  const void* x;
  const void* residual;  // added to x before, or null
  const float* weight;
  const float* bias;
  void* out;
  void* total;  // x + residual, or null
  int64_t rows, size, x_stride, out_stride;
  float eps;
  int32_t dtype;
};

// q and k of a step, rotated on their way.
struct Rope {
  const void* x;  // [tokens, heads, dim]
  const float* cos;  // [tokens, rotary / 2]
  const float* sin;
  void* out;  // dense
  int64_t tokens, heads, dim, half, x_stride;
  int32_t dtype;
};

// Columns of params (vllm_core/ops/step.py); floats lie there by their bits.
enum Column : int32_t {
  TEMPERATURE = 0, TOP_K = 1, TOP_P = 2, MIN_P_GAP = 3, PRESENCE = 4, FREQUENCY = 5, REPETITION = 6, SEED_LOW = 7,
  SEED_HIGH = 8, SEQUENCE_INDEX = 9, PROMPT_LEN = 10, HISTORY_SLOT = 11, BIAS_SLOT = 12, HELD_UNTIL = 13, HELD_IDS = 14
};

// Rows of logits, and what is done to them before they draw.
struct Adjust {
  const float* x;            // [rows, size]
  const float* bias;         // [bias_slots, size], or null: no row has a bias or held ids
  const int32_t* history;    // [history_slots, history_length], or null: no row has penalties
  const int32_t* params;     // [rows][params_stride], held ids to the end
  const int32_t* positions;  // [rows] of the token that is drawn
  float* out;                // [rows, size]
  int64_t rows, size, params_stride, bias_slots, history_slots, history_length;
};

// Rows of logits that draw a token each; bias and penalties are in them.
struct Sample {
  const float* x;            // [rows, size]
  const int32_t* params;     // [rows][params_stride]
  const int32_t* positions;  // [rows]
  int32_t* token;            // [rows]
  int32_t* fault;            // [rows] 1: NaN, or nothing finite
  int64_t rows, size, params_stride;
  int32_t filters;  // 0: no row has top-k, top-p or min-p
};

// Rows of logits whose log-probabilities are wanted: of a target each, and of the `count` most likely.
struct Logprobs {
  const float* x;          // [rows, size]
  const int32_t* targets;  // [rows]
  int32_t* ids;            // [rows, 1 + count] the target first
  float* values;           // [rows, 1 + count]
  int32_t* rank;           // [rows] of the target, from 1
  int64_t rows, size, count;
};

enum Kind : int32_t { LINEAR = 0, ATTEND = 1, RMS_NORM = 2, LAYER_NORM = 3, GATE = 4, ROPE = 5, ADD = 6 };

// One call of a function below, kept to be made again.
struct Call {
  int32_t kind;
  int32_t gate;        // GATE: which
  const void* record;  // the struct that the function takes
  const void* x;       // LINEAR: the rest of its arguments
  void* out;
  int64_t x_stride, m;
};

struct Kernels {
  const char* name;
  int64_t (*packed_bytes)(int32_t dtype, int64_t n, int64_t k);
  void (*pack)(int32_t dtype, const void* weight, int64_t stride, int64_t n, int64_t k, void* out);
  int64_t (*packed_code_bytes)(int32_t bits, int64_t n, int64_t k);
  int32_t (*quantize)(int32_t dtype, const void* weight, const Codes* shape, void* codes, void* scales);
  void (*pack_codes)(const Codes* codes, void* out, void* scales, void* mins);
  void (*unpack_rows)(const Linear* weight, const int32_t* rows, int64_t count, void* out);  // rows null: all
  void (*linear)(const Linear* weight, const void* x, int64_t x_stride, void* out, int64_t m);
  void (*attend)(const Attend* step);
  // elements of the cache's dtype, of one head in one block
  int64_t (*kv_head_size)(int32_t dtype, int32_t kv_dtype, int64_t dim, int64_t dim_v, int64_t block_tokens);
  void (*move_blocks)(const Attend* cache, const Blocks* blocks);
  void (*rms_norm)(const Rows* rows);
  void (*layer_norm)(const Rows* rows);
  void (*gate)(const Rows* rows, int32_t kind);  // x [rows, 2 size] -> act(x[:, :size]) * x[:, size:]
  void (*rope)(const Rope* rope);
  void (*add)(const Rows* rows);  // out = x + residual, or x alone
  // of rows of float32 [rows][size]: the largest, NaN if one is NaN, and where the first such stands
  void (*largest)(const float* x, int64_t rows, int64_t size, int32_t* index, float* value);
  void (*adjust)(const Adjust* rows);
  void (*sample)(const Sample* rows);
  void (*logprobs)(const Logprobs* rows);
  void (*replay)(const Call* calls, int64_t count);
};

}  // namespace vc
