// silu(gate) * up, rounded to bfloat16 where the separate operations round.
// In front of this text stand common.cu and F, ROWS.

constexpr int EIGHTS = F / 8, EACH = 4;  // rows a thread: their loads are in flight together

__device__ float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

__device__ u32 gated_pair(u32 gate, u32 up) {
    const u32 activated = round_pair(silu(low(gate)), silu(high(gate)));
    return round_pair(low(activated) * low(up), high(activated) * high(up));
}

// gate_up [ROWS, 2 F]; out [ROWS, F].
extern "C" __global__ void __launch_bounds__(THREADS) swiglu(const uint4* gate_up, uint4* out) {
    const int at = blockIdx.x * THREADS + threadIdx.x, first = blockIdx.y * EACH;
    if (at >= EIGHTS) return;
    uint4 gates[EACH], ups[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const size_t row = min(first + i, ROWS - 1);
        gates[i] = gate_up[row * 2 * EIGHTS + at], ups[i] = gate_up[(row * 2 + 1) * EIGHTS + at];
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const uint4 g = gates[i], u = ups[i];
        if (first + i < ROWS)
            out[(size_t)(first + i) * EIGHTS + at] = {gated_pair(g.x, u.x), gated_pair(g.y, u.y), gated_pair(g.z, u.z),
                                                      gated_pair(g.w, u.w)};
    }
}
