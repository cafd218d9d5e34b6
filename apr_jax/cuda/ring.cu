// What the kernels that take tokens through all layers share: which rows of the weights a block owns, and the ring in
// shared memory through which one thread streams them. In front of this text stand common.cu, head.cu and D, F, LAYERS,
// GRID, STAGES, STAGE_BYTES and PAD_BYTES.

// Rows of a weight matrix that a block owns at most.
constexpr int MOST_QKV = ceil_div(QKV, GRID), MOST_ROWS = ceil_div(D, GRID), MOST_FFN = ceil_div(F, GRID);

struct Layer {
    const bf16 *input_norm, *qkv, *qkv_bias, *o, *post_norm, *gate_up, *down;
    bf16 *keys, *values;
};

struct Share {
    int first, count;
};

__device__ Share share(int rows) {
    const int first = rows * blockIdx.x / GRID;
    return {first, rows * (int)(blockIdx.x + 1) / GRID - first};
}

// --- The ring --------------------------------------------------------------------------------------------------------

// Stages of weights in shared memory, each with a barrier that says when it is full and one that says when it is empty.
// One lane of each warp waits for the one and tells the other: all of them cost 3 % of a token of one row.
struct Ring {
    u32 stages, full, empty;  // addresses in shared memory
    int stage = 0;
    u32 parity = 0;

    __device__ void advance() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

__device__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ void wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// By one thread, before all others begin.
__device__ void init(u64* full, u64* empty) {
    for (int i = 0; i < STAGES; ++i) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(full + i)) : "memory");
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(empty + i)), "n"(WARPS) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// A weight matrix of `sides` stacked [side_rows, width] parts, of which a block takes the same rows.
struct Matrix {
    const bf16* weights;
    Share share;
    int width, sides, side_rows;
    int rows;  // of each side in one stage

    __device__ int stride() const { return 2 * width + PAD_BYTES; }  // bytes; padded: eight rows, different banks
    __device__ int stages() const { return ceil_div(share.count, rows); }
};

constexpr int MATRICES = 4;

// The matrices of a layer in the order of their use.
__device__ Matrix matrix(const Layer& layer, int index) {
    if (index == 0) return {layer.qkv, share(QKV), D, 1, 0, 16};
    if (index == 1) return {layer.o, share(D), Q_WIDTH, 1, 0, 16};
    if (index == 2) return {layer.gate_up, share(F), D, 2, F, 8};
    return {layer.down, share(D), F, 1, 0, STAGE_BYTES / (2 * F + PAD_BYTES)};
}

// Weights are read once a token: they are the first to leave the L2 cache, where the board and the caches are to stay.
__device__ u64 read_once() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ void stream(Ring& ring, const Matrix& m, u64 policy) {
#pragma unroll 1
    for (int start = 0; start < m.share.count; start += m.rows) {
        const int rows = min(m.rows, m.share.count - start);
        const u32 full = ring.full + 8 * ring.stage, bytes = 2 * m.width;
        wait(ring.empty + 8 * ring.stage, ring.parity ^ 1);
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full), "r"(bytes * rows * m.sides) : "memory");
#pragma unroll 1
        for (int side = 0; side < m.sides; ++side) {
            const bf16* from = m.weights + (size_t)(side * m.side_rows + m.share.first + start) * m.width;
            u32 to = ring.stages + ring.stage * STAGE_BYTES + side * m.rows * m.stride();
#pragma unroll 1
            for (int row = 0; row < rows; ++row, from += m.width, to += m.stride())
                asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                             "[%0], [%1], %2, [%3], %4;" ::"r"(to),
                             "l"(from), "r"(bytes), "r"(full), "l"(policy)
                             : "memory");
        }
        ring.advance();
    }
}

// All weights of all layers, by one thread.
__device__ void stream(Ring ring, const Layer* layers) {
    const u64 policy = read_once();
#pragma unroll 1
    for (int i = 0; i < LAYERS * MATRICES; ++i) stream(ring, matrix(layers[i / MATRICES], i % MATRICES), policy);
}

// --- Taking weights --------------------------------------------------------------------------------------------------

// Warp w takes the columns 32 STEPS w .. 32 STEPS (w + 1) of a matrix.
__device__ constexpr int steps_of(int width) { return ceil_div(ceil_div(width, 32), WARPS); }

// Eight columns of one row: rows g and g + 8 of a tile of 16 rows, for each tile and step. Of gate and up a tile has
// eight rows each.
template <int TILES, int STEPS, int PARTS>
struct Weights {
    uint4 eight[TILES][STEPS][PARTS];
};

// Takes the warp's columns of the block's rows out of the ring. Rows beyond the block's are whatever stands there: their
// sums are not used. Columns beyond the matrix are its last ones: they meet zeros.
template <int TILES, int STEPS, int PARTS>
__device__ void take(Ring& ring, const unsigned char* stages, const Matrix& m, Weights<TILES, STEPS, PARTS>& w) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        const int here = m.sides == 2 ? min(1, m.stages() - tile) : m.stages();  // stages that the tile spans
        Ring at = ring;
#pragma unroll 1
        for (int i = 0; i < here; ++i, at.advance())
            if (lane == 0) wait(at.full + 8 * at.stage, at.parity);
        __syncwarp();
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const int row = m.sides == 2 ? 8 * tile + g : 8 * part + g, in_stage = m.sides == 2 ? 8 * part + g : row % m.rows;
            const int stage = ring.stage + (m.sides == 2 ? 0 : row / m.rows);
            const unsigned char* from = stages + (stage < STAGES ? stage : stage - STAGES) * STAGE_BYTES + in_stage * m.stride();
#pragma unroll
            for (int step = 0; step < STEPS; ++step)
                w.eight[tile][step][part] = ((const uint4*)from)[min(4 * (warp * STEPS + step) + c, m.width / 8 - 1)];
        }
        __syncwarp();
#pragma unroll 1
        for (int i = 0; i < here; ++i, ring.advance())
            if (lane == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(ring.empty + 8 * ring.stage) : "memory");
    }
}
