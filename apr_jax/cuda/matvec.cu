// A matrix times one vector, a warp a row.
// In front of this text stand common.cu and ROWS, WIDTH.

constexpr int EIGHTS = WIDTH / 8, AHEAD = 8;  // loads in flight a lane: a device has few rows for its many bytes

// Loads what is read once. With the barrier behind all of them the compiler does not put loads off until their use.
__device__ uint4 load_early(const uint4* p) {
    uint4 x;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
    return x;
}

// weights [ROWS, WIDTH], x [WIDTH]; y [ROWS].
extern "C" __global__ void __launch_bounds__(THREADS) matvec(const uint4* weights, const uint4* x, bf16* y) {
    const int lane = threadIdx.x % 32, row = blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= ROWS) return;
    const uint4* w = weights + (size_t)row * EIGHTS;
    float2 sum = {};
#pragma unroll 1
    for (int start = lane; start < ceil_div(EIGHTS, 32) * 32; start += 32 * AHEAD) {
        uint4 ahead[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) ahead[i] = load_early(w + min(start + 32 * i, EIGHTS - 1));
        __syncwarp();
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const uint4 eight = start + 32 * i < EIGHTS ? x[start + 32 * i] : uint4{};
            const float wide[] = {low(eight.x), high(eight.x), low(eight.y), high(eight.y),
                                  low(eight.z), high(eight.z), low(eight.w), high(eight.w)};
            add_dot8(sum, ahead[i], wide);
        }
    }
    const float total = sum_over<32>(sum.x + sum.y);
    if (lane == 0) y[row] = round_one(total);
}
