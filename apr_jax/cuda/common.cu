// What the kernels share: types, bfloat16, sums over lanes. WARPS is defined in front of this text.

using bf16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

constexpr int THREADS = 32 * WARPS;  // that compute

__device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

__device__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ float widen(bf16 x) { return __uint_as_float((u32)x << 16); }

__device__ u32 round_pair(float first, float second) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}

__device__ bf16 round_one(float x) { return (bf16)round_pair(x, 0.f); }

__device__ void add_dot8(float2& sum, uint4 w, const float* x) {  // two sums, so that they can go on side by side
    sum.x += low(w.x) * x[0], sum.y += high(w.x) * x[1], sum.x += low(w.y) * x[2], sum.y += high(w.y) * x[3];
    sum.x += low(w.z) * x[4], sum.y += high(w.z) * x[5], sum.x += low(w.w) * x[6], sum.y += high(w.w) * x[7];
}

template <int LANES>
__device__ float sum_over(float x) {  // over groups of LANES neighbouring lanes
    for (int step = LANES / 2; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

__device__ void sync_compute() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }
