// Rotary positions, cache update and attention of one new token a row, any batch: one block a query head.
// In front of this text stand common.cu, head.cu and SLOTS.

// qkv [B, QKV], cos and sin [B, HEAD_DIM / 2], position [B], positions [B, SLOTS], slot [1]; out [B, HEADS * HEAD_DIM].
extern "C" __global__ void __launch_bounds__(THREADS) attention(
    const bf16* qkv, const float* cos, const float* sin, const int* position, const int* positions, const int* slot,
    const bf16*, const bf16*, bf16* out, bf16* keys, bf16* values) {
    __shared__ AttentionScratch s;
    __shared__ float angles[HEAD_DIM];  // cos, then sin
    const int head = blockIdx.x, row = blockIdx.y, thread = threadIdx.x;
    const size_t cache = (size_t)row * SLOTS * KV_WIDTH;
    const Token token{angles,        angles + HEAD_DIM / 2, positions + (size_t)row * SLOTS,
                      position[row], *slot,                 keys + cache,
                      values + cache};
    attend_to_cache(s, token, head, 0, token.slot, true, [&] {
        for (int i = thread; i < HEAD_DIM; i += THREADS)
            angles[i] = i < HEAD_DIM / 2 ? cos[row * (HEAD_DIM / 2) + i] : sin[row * (HEAD_DIM / 2) + i - HEAD_DIM / 2];
        for (int i = thread; i < 3 * HEAD_DIM; i += THREADS)
            s.fresh[i] = widen(qkv[(size_t)row * QKV + row_of(i / HEAD_DIM, head) + i % HEAD_DIM]);
    });
    float top, sum;
    const float value = combine(s.parts, WARPS + 1, thread % HEAD_DIM, top, sum);
    if (thread < HEAD_DIM) out[((size_t)row * HEADS + head) * HEAD_DIM + thread] = round_one(value / sum);
}
