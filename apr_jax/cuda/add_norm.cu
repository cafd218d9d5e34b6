// x + update and its RMSNorm in one pass over memory, SPLIT warps a row; rounded to bfloat16 where the separate operations
// round. In front of this text stand common.cu and D, ROWS, EPS, SPLIT.

constexpr int EIGHTS = D / 8, LANES = 32 * SPLIT, EACH = ceil_div(EIGHTS, LANES);
static_assert(WARPS % SPLIT == 0, "whole rows");

__device__ u32 add_pair(u32 a, u32 b) { return round_pair(low(a) + low(b), high(a) + high(b)); }

__device__ u32 norm_pair(u32 x, u32 weight, float scale) {
    const u32 normed = round_pair(low(x) * scale, high(x) * scale);
    return round_pair(low(normed) * low(weight), high(normed) * high(weight));
}

// x and update [ROWS, D], weight [D]; sum and normed [ROWS, D].
extern "C" __global__ void __launch_bounds__(THREADS) add_norm(const uint4* x, const uint4* update, const uint4* weight,
                                                               uint4* sum, uint4* normed) {
    __shared__ float partial[WARPS];
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / 32, row = blockIdx.x * (WARPS / SPLIT) + threadIdx.x / LANES;
    const size_t first = (size_t)row * EIGHTS;
    uint4 sums[EACH];
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int at = lane + LANES * i;
        if (at >= EIGHTS || row >= ROWS) continue;
        const uint4 a = x[first + at], b = update[first + at];
        const uint4 c = sums[i] = {add_pair(a.x, b.x), add_pair(a.y, b.y), add_pair(a.z, b.z), add_pair(a.w, b.w)};
        sum[first + at] = c;
        const float wide[] = {low(c.x), high(c.x), low(c.y), high(c.y), low(c.z), high(c.z), low(c.w), high(c.w)};
#pragma unroll
        for (int j = 0; j < 8; ++j) squares += wide[j] * wide[j];
    }
    squares = sum_over<32>(squares);
    if (SPLIT > 1) {
        if (threadIdx.x % 32 == 0) partial[warp] = squares;
        __syncthreads();
        squares = 0.f;
        for (int i = 0; i < SPLIT; ++i) squares += partial[warp / SPLIT * SPLIT + i];
    }
    const float scale = rsqrtf(squares / D + EPS);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int at = lane + LANES * i;
        if (at >= EIGHTS || row >= ROWS) continue;
        const uint4 c = sums[i], w = weight[at];
        normed[first + at] = {norm_pair(c.x, w.x, scale), norm_pair(c.y, w.y, scale), norm_pair(c.z, w.z, scale),
                              norm_pair(c.w, w.w, scale)};
    }
}
