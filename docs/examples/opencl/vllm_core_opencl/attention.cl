// Paged attention, decode and prefill alike: one work-group per query head and token.
// Cache of a pool: [block][layer][2][kv head][token][dim] float.

#define GROUP 64      // work-items of a group, and keys of a tile
#define MAX_DIM 256
#define MAX_PER_ITEM (MAX_DIM / GROUP)

inline size_t head_at(int block, int layer, int which, int head, int layers, int kv_heads,
                      int block_tokens, int dim) {
    return ((((size_t)block * layers + layer) * 2 + which) * kv_heads + head) * block_tokens * dim;
}

// One work-item per (dim, kv head, token). slots < block_tokens lie in the null block: padding.
__kernel void write_kv(__global float *cache, __global const float *k, __global const float *v,
                       __global const int *slots, int layer, int layers, int kv_heads,
                       int block_tokens, int dim) {
    int d = get_global_id(0), head = get_global_id(1), token = get_global_id(2);
    int slot = slots[token];
    if (slot < block_tokens) return;
    size_t from = ((size_t)token * kv_heads + head) * dim + d;
    size_t in_head = (size_t)(slot % block_tokens) * dim + d;
    int block = slot / block_tokens;
    cache[head_at(block, layer, 0, head, layers, kv_heads, block_tokens, dim) + in_head] = k[from];
    cache[head_at(block, layer, 1, head, layers, kv_heads, block_tokens, dim) + in_head] = v[from];
}

// Online softmax over tiles of GROUP keys. rows [T]: row of the table, -1 for padding.
// range [T, 2]: first and last + 1 visible position of the token.
__kernel __attribute__((reqd_work_group_size(GROUP, 1, 1))) void attend(
    __global float *out, __global float *lse, __global const float *cache,
    __global const float *q, __global const int *tables, __global const int *rows,
    __global const int *range, __global const float *sinks, int layer, int layers, int heads,
    int kv_heads, int block_tokens, int dim, int width, float scale, float softcap,
    int has_sinks) {
    __local float query[MAX_DIM], score[GROUP], reduce[GROUP];
    int item = get_local_id(0), head = get_group_id(0), token = get_group_id(1);
    int kv_head = head / (heads / kv_heads);
    size_t row_at = ((size_t)token * heads + head) * dim;
    int first = range[2 * token], end = range[2 * token + 1];
    __global const int *table = tables + (size_t)max(rows[token], 0) * width;

    for (int d = item; d < dim; d += GROUP) query[d] = q[row_at + d];
    float sum[MAX_PER_ITEM] = {0};
    float best = has_sinks ? sinks[head] : -INFINITY;
    float total = has_sinks ? 1.0f : 0.0f;
    barrier(CLK_LOCAL_MEM_FENCE);

    for (int tile = first; tile < end; tile += GROUP) {
        int position = tile + item, count = min(GROUP, end - tile);
        float x = -INFINITY;
        if (item < count) {
            __global const float *key =
                cache + head_at(table[position / block_tokens], layer, 0, kv_head, layers, kv_heads,
                                block_tokens, dim) + (size_t)(position % block_tokens) * dim;
            float dot = 0;
            for (int d = 0; d < dim; d++) dot = fma(query[d], key[d], dot);
            x = dot * scale;
            if (softcap > 0) x = softcap * tanh(x / softcap);
        }
        score[item] = x;
        barrier(CLK_LOCAL_MEM_FENCE);
        float highest = best;
        for (int i = 0; i < count; i++) highest = fmax(highest, score[i]);
        float p = item < count ? exp(x - highest) : 0.0f;
        reduce[item] = p;
        barrier(CLK_LOCAL_MEM_FENCE);

        float fade = best == -INFINITY ? 0.0f : exp(best - highest);
        float tile_total = 0;
        for (int i = 0; i < count; i++) tile_total += reduce[i];
        total = total * fade + tile_total;
        best = highest;
        for (int n = 0; n < MAX_PER_ITEM && n * GROUP + item < dim; n++) {
            int d = n * GROUP + item;
            float tile_sum = 0;
            for (int i = 0; i < count; i++) {
                int at = tile + i;
                __global const float *value =
                    cache + head_at(table[at / block_tokens], layer, 1, kv_head, layers, kv_heads,
                                    block_tokens, dim) + (size_t)(at % block_tokens) * dim;
                tile_sum = fma(reduce[i], value[d], tile_sum);
            }
            sum[n] = sum[n] * fade + tile_sum;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    for (int n = 0; n < MAX_PER_ITEM && n * GROUP + item < dim; n++)
        out[row_at + n * GROUP + item] = first < end ? sum[n] / total : 0.0f;
    if (item == 0) lse[(size_t)token * heads + head] = first < end ? best + log(total) : -INFINITY;
}
