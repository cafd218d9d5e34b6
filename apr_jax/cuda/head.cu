// Attention of one query head of one new token over the cache: what the whole-token kernel and the batched one share.
// HEADS, KV_HEADS, HEAD_DIM, WARPS and ROTATE (an expression of x, d, cos and sin) are defined in front of this text.

constexpr int Q_WIDTH = HEADS * HEAD_DIM, KV_WIDTH = KV_HEADS * HEAD_DIM, QKV = Q_WIDTH + 2 * KV_WIDTH;
constexpr int GROUP = HEADS / KV_HEADS;
constexpr float LOWEST = -1e30f;    // a maximum of nothing: finite, so that differences are
constexpr int PART = HEAD_DIM + 2;  // a partial result: values, maximum, sum
static_assert(HEAD_DIM % 8 == 0 && 32 % (HEAD_DIM / 8) == 0 && HEAD_DIM <= THREADS, "head size");

struct AttentionScratch {
    float fresh[3 * HEAD_DIM];  // q, k and v of the new token
    float rotated[2 * HEAD_DIM];
    float parts[WARPS + 1][PART];
};

// One row's new token and cache.
struct Token {
    const float *cos, *sin;
    const int* positions;  // of the slots
    int position, slot;
    bf16 *keys, *values;  // [slots, KV_HEADS, HEAD_DIM]
};

__device__ float rotate(const float* x, int d, const float* cos, const float* sin) { return ROTATE; }

// Where q, k or v (0, 1, 2) of a query head begins among the rows of the projection.
__device__ int row_of(int vector, int head) {
    return vector ? Q_WIDTH + (vector - 1) * KV_WIDTH + head / GROUP * HEAD_DIM : head * HEAD_DIM;
}

// Rotates what `fresh` holds, scales q, and writes k and v to the cache if this block is the one that does.
__device__ void rotate_fresh(AttentionScratch& s, const Token& token, int head, bool owner) {
    sync_compute();
    for (int i = threadIdx.x; i < 3 * HEAD_DIM; i += THREADS) {
        const int vector = i / HEAD_DIM, d = i % HEAD_DIM;
        const float value = vector == 2 ? s.fresh[i] : rotate(s.fresh + vector * HEAD_DIM, d, token.cos, token.sin);
        const bf16 rounded = round_one(value);
        const size_t at = ((size_t)token.slot * KV_HEADS + head / GROUP) * HEAD_DIM + d;
        if (vector == 0) s.rotated[d] = value * rsqrtf((float)HEAD_DIM);
        if (vector == 1) s.rotated[HEAD_DIM + d] = widen(rounded);
        if (vector == 2) s.parts[WARPS][d] = owner ? widen(rounded) : 0.f;
        if (vector && owner && head % GROUP == 0) (vector == 1 ? token.keys : token.values)[at] = rounded;
    }
    sync_compute();
}

// Combines `count` <= 32 partial results: dimension d of the values, and the sum. Called by whole warps.
__device__ float combine(const float (*parts)[PART], int count, int d, float& top, float& sum) {
    const int lane = threadIdx.x % 32;
    const float own = lane < count ? parts[lane][HEAD_DIM] : LOWEST;
    top = own;
    for (int step = 16; step; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
    const float weight = __expf(own - top);
    sum = sum_over<32>(lane < count ? weight * parts[lane][HEAD_DIM + 1] : 0.f);
    float value = 0.f;
#pragma unroll 5
    for (int i = 0; i < count; ++i) value += __shfl_sync(~0u, weight, i) * parts[i][d];
    return value;
}

// Attention over the slots first .. last - 1, and over the new token if `owner`; leaves a part a warp and one for the new
// token in `parts`. fill() puts q, k and v into `fresh`; it runs when the first keys and values are on their way.
template <class Fill>
__device__ void attend_to_cache(AttentionScratch& s, const Token& token, int head, int first, int last, bool owner, Fill fill) {
    constexpr int LANES = HEAD_DIM / 8, KEYS = 32 / LANES, STRIDE = KEYS * WARPS, UNROLL = 3;
    const int thread = threadIdx.x, warp = thread / 32, sub = thread % LANES;
    float q[8], sum = 0.f, highest = LOWEST, values[8] = {};
    int start = first;
    do {
        uint4 k[UNROLL], v[UNROLL];
        bool seen[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            const int key = start + i * STRIDE + thread / LANES;
            seen[i] = false;
            if (key >= last) continue;
            const int position = token.positions[key];
            seen[i] = position >= 0 && position <= token.position;
            const size_t at = ((size_t)key * KV_HEADS + head / GROUP) * LANES + sub;
            k[i] = ((const uint4*)token.keys)[at];
            v[i] = ((const uint4*)token.values)[at];
        }
        if (start == first) {
            fill();
            rotate_fresh(s, token, head, owner);
            for (int j = 0; j < 8; ++j) q[j] = s.rotated[8 * sub + j];
        }
        float scores[UNROLL], top = highest;
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            float2 score = {};
            if (seen[i]) add_dot8(score, k[i], q);
            scores[i] = sum_over<LANES>(score.x + score.y);
            if (seen[i]) top = fmaxf(top, scores[i]);
        }
        const float shrink = __expf(highest - top);
        highest = top, sum *= shrink;
        for (int j = 0; j < 8; ++j) values[j] *= shrink;
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            if (!seen[i]) continue;
            const float p = __expf(scores[i] - highest);
            const u32 pairs[] = {v[i].x, v[i].y, v[i].z, v[i].w};
            sum += p;
            for (int j = 0; j < 4; ++j) values[2 * j] += p * low(pairs[j]), values[2 * j + 1] += p * high(pairs[j]);
        }
        start += UNROLL * STRIDE;
    } while (start < last);
    float top = highest;  // of the warp
    for (int step = 16; step >= LANES; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
    const float shrink = __expf(highest - top);
    sum *= shrink;
    for (int j = 0; j < 8; ++j) values[j] *= shrink;
    for (int step = 16; step >= LANES; step /= 2) {
        sum += __shfl_xor_sync(~0u, sum, step);
        for (int j = 0; j < 8; ++j) values[j] += __shfl_xor_sync(~0u, values[j], step);
    }
    if (thread % 32 < LANES) {
        for (int j = 0; j < 8; ++j) s.parts[warp][8 * sub + j] = values[j];
        if (sub == 0) s.parts[warp][HEAD_DIM] = top, s.parts[warp][HEAD_DIM + 1] = sum;
    }
    if (warp == 0) {  // the new token's own key
        float own = 0.f;
        for (int d = thread; d < HEAD_DIM; d += 32) own += s.rotated[d] * s.rotated[HEAD_DIM + d];
        own = sum_over<32>(own);
        if (thread == 0) s.parts[WARPS][HEAD_DIM] = owner ? own : LOWEST, s.parts[WARPS][HEAD_DIM + 1] = owner;
    }
    sync_compute();
}
