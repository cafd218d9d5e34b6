// One token of each of ROWS, 2 to 8, rows through all decoder layers in one launch: bfloat16, compute capability 9.0.
//
// Every block owns a share of the rows of every weight matrix and stays on its multiprocessor for the whole token:
//
// - One thread streams the block's rows, in the order in which they will be needed, through a ring in shared memory by
//   bulk copies. Weights do not depend on activations, so the stream never waits for the computation but only for room:
//   the memory is kept busy while the blocks exchange activations.
// - A product is split over the warps by columns. A warp takes its columns of all the block's rows into registers before
//   the activations are there, polls for its part of these alone, and multiplies on the tensor cores, where the tokens
//   are the columns of one tile; shared memory adds the warps' parts up.
// - Blocks exchange activations on a board in global memory that is zero at the launch. Each of its words is written once
//   a launch, and never as zero: in place of 0 stands -0. Who needs a value polls its word until it is not zero. An
//   access to a word is atomic, so there are neither fences nor grid barriers, and nothing on the board is overwritten.
//
// All blocks must be resident at once (grid <= multiprocessors, one stream). Then nobody waits for ever: what a block
// polls for is published by others out of what they polled for earlier, and at first out of x.
//
// In front of this text stand common.cu, head.cu, ring.cu and ROWS, D, F, LAYERS, EPS, GRID, STAGES, STAGE_BYTES,
// SHARED_BYTES, PAD_BYTES, PARAMETERS and LAYER_TABLE, which name one pointer per array. One warp more than WARPS runs: it
// streams.

constexpr int PAIRS = ROWS * HEADS;  // of a token and a query head
constexpr int SPARE = GRID / PAIRS;  // blocks for each of them
constexpr int MOST_SPLITS = SPARE < 1 ? 1 : SPARE < WARPS + 1 ? SPARE : WARPS + 1;

// The board, in words of 32 bits: x, bfloat16 [ROWS, D], then for each layer what follows. Float32 are q, k and v
// [ROWS, QKV] and the parts of attention [GRID, PART], bfloat16 the others, [ROWS, width].
constexpr int BOARD_X = ROWS * D / 2, BOARD_QKV = 0, BOARD_PARTS = ROWS * QKV;
constexpr int BOARD_ATTENTION = BOARD_PARTS + (MOST_SPLITS > 1 ? ceil_div(GRID * PART, 4) * 4 : 0);
constexpr int BOARD_MIDDLE = BOARD_ATTENTION + ROWS * Q_WIDTH / 2, BOARD_FFN = BOARD_MIDDLE + BOARD_X;
constexpr int BOARD_END = BOARD_FFN + ROWS * F / 2, BOARD_LAYER = BOARD_END + BOARD_X;
static_assert(D % 8 == 0 && F % 8 == 0 && Q_WIDTH % 8 == 0 && QKV % 8 == 0, "rows are copied 16 bytes at a time");
static_assert(3 * HEAD_DIM <= THREADS, "head size");
static_assert(MOST_QKV <= 16 && MOST_ROWS <= 8 && ROWS <= 8 && 16 * ROWS <= THREADS, "one tile of rows");

// Adds 16 x 16 weights times 16 activations of eight tokens. Lane 4 g + c holds rows g (first) and g + 8 (second) of the
// weights, token g of the activations, and of the sums rows g and g + 8 of the tokens 2 c and 2 c + 1.
__device__ void multiply(float2 (&sum)[2], uint2 first, uint2 second, uint2 x) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0].x), "+f"(sum[0].y), "+f"(sum[1].x), "+f"(sum[1].y)
        : "r"(first.x), "r"(second.x), "r"(first.y), "r"(second.y), "r"(x.x), "r"(x.y));
}

__device__ void multiply(float2 (&sum)[1], uint2 first, uint2, uint2 x) {
    float none_x, none_y;
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %6, %5, %6}, {%7, %8}, {%0, %1, %9, %9};"
        : "+f"(sum[0].x), "+f"(sum[0].y), "=f"(none_x), "=f"(none_y)
        : "r"(first.x), "r"(first.y), "r"(0), "r"(x.x), "r"(x.y), "f"(0.f));
}

// --- The board -------------------------------------------------------------------------------------------------------

constexpr u32 NOTHING = 0x80008000u;  // a pair of -0: published, and adds nothing to a sum

__device__ void publish(u32* word, float value) {
    const u32 bits = __float_as_uint(value);
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(word), "r"(bits ? bits : 0x80000000u) : "memory");
}

__device__ void publish(bf16* word, float value) {
    const bf16 bits = round_one(value);
    asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(word), "h"(bits ? bits : (bf16)0x8000) : "memory");
}

__device__ float await(const u32* word) {
    u32 value;
    do asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
    while (!value);
    return __uint_as_float(value);
}

// Whether all of eight bfloat16 were published: none of them is zero.
__device__ bool published(uint4 x) {
    const auto zeros = [](u32 pair) { return (pair - 0x00010001u) & ~pair; };
    return !((zeros(x.x) | zeros(x.y) | zeros(x.z) | zeros(x.w)) & NOTHING);
}

__device__ void read_if(bool wanted, uint4& eight, const bf16* words) {
    asm volatile("{\n.reg .pred wanted;\nsetp.ne.u32 wanted, %5, 0;\n"
                 "@wanted ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
                 : "+r"(eight.x), "+r"(eight.y), "+r"(eight.z), "+r"(eight.w)
                 : "l"(words), "r"((u32)wanted)
                 : "memory");
}

// --- Products --------------------------------------------------------------------------------------------------------

// Of the warp's columns lane 4 g + c takes eight neighbouring ones from 8 c on out of every 32, of the weights' rows g (and
// g + 8) as of token g.

// A warp's sums: for each token 16 rows a tile, and four more so that lanes meet different banks.
__device__ constexpr int sums_of(int tiles) { return 16 * tiles + 4; }

constexpr int FFN_TILES = ceil_div(MOST_FFN, 8);

// Polls for the warp's columns of the tokens' vectors [ROWS, WIDTH]; tokens and columns beyond are NOTHING.
template <int WIDTH>
__device__ void await_rows(const bf16* words, uint4 (&x)[steps_of(WIDTH)]) {
    constexpr int STEPS = steps_of(WIDTH);
    const int lane = threadIdx.x % 32, g = lane / 4, first = threadIdx.x / 32 * 32 * STEPS + lane % 4 * 8;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const u32 start = g < ROWS && first + 32 * step < WIDTH ? 0 : NOTHING;
        x[step] = {start, start, start, start};
    }
    bool all;
    do {  // all words together: one after the other each would wait for a round trip of its own
        all = true;
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
            read_if(!published(x[step]), x[step], words + g * WIDTH + first + 32 * step);
#pragma unroll
        for (int step = 0; step < STEPS; ++step) all &= published(x[step]);
    } while (!all);
    __syncwarp();
}

// Multiplies eight values with eight weights of the norm; returns the sum of the values' squares.
__device__ float weigh(uint4& x, uint4 weight) {
    const auto pair = [](u32& x, u32 weight) {
        const float first = low(x), second = high(x);
        x = round_pair(first * low(weight), second * high(weight));
        return first * first + second * second;
    };
    return pair(x.x, weight.x) + pair(x.y, weight.y) + pair(x.z, weight.z) + pair(x.w, weight.w);
}

// Multiplies the warp's columns and leaves the sums, [ROWS, sums_of(TILES)].
template <int TILES, int STEPS, int PARTS>
__device__ void multiply_rows(const Weights<TILES, STEPS, PARTS>& w, const uint4 (&x)[STEPS], float* sums) {
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    constexpr int CHAINS = TILES == 1 ? 4 : 1;  // sums that do not wait for one another
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        float2 parts[CHAINS][PARTS] = {};
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const uint4 a = w.eight[tile][step][0], b = w.eight[tile][step][PARTS - 1];
            multiply(parts[2 * step % CHAINS], {a.x, a.y}, {b.x, b.y}, {x[step].x, x[step].y});
            multiply(parts[(2 * step + 1) % CHAINS], {a.z, a.w}, {b.z, b.w}, {x[step].z, x[step].w});
        }
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            float2 sum = {};
#pragma unroll
            for (int chain = 0; chain < CHAINS; ++chain) sum.x += parts[chain][part].x, sum.y += parts[chain][part].y;
            float* to = sums + 2 * c * sums_of(TILES) + 16 * tile + 8 * part + g;
            if (2 * c < ROWS) to[0] = sum.x;
            if (2 * c + 1 < ROWS) to[sums_of(TILES)] = sum.y;
        }
    }
}

// Sum over the warps of what they left for a token at `row`.
template <int TILES>
__device__ float sum_of_warps(const float* sums, int token, int row) {
    float sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) sum += sums[(warp * ROWS + token) * sums_of(TILES) + row];
    return sum;
}

// --- The kernel ------------------------------------------------------------------------------------------------------

struct Shared {
    alignas(16) float sums[WARPS * ROWS * sums_of(FFN_TILES)];
    u64 full[STAGES], empty[STAGES];
    Layer layers[LAYERS];
    float squares[WARPS][8];
    float cos[ROWS][HEAD_DIM / 2], sin[ROWS][HEAD_DIM / 2];
    int position[ROWS], slot, slots;
    const int* positions;  // [ROWS, slots]
    float residual[ROWS * MOST_ROWS];
    AttentionScratch attention;
};

static_assert(STAGES * STAGE_BYTES + sizeof(Shared) <= SHARED_BYTES, "shared memory");

struct Block {
    Ring ring;
    const unsigned char* stages;
    Shared& s;
};

// The product of matrix `index` with the tokens' vectors [ROWS, WIDTH] at `words`, normed with `weight` where there is
// one: then scale_of says what a token's rows are multiplied by. sum_of_warps gives the rows.
template <int WIDTH, int TILES, int PARTS>
__device__ void product(Block& b, const Layer& layer, int index, const bf16* words, const bf16* weight) {
    constexpr int STEPS = steps_of(WIDTH);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint4 norm[STEPS], x[STEPS];
    if (weight) {
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
            norm[step] = ((const uint4*)weight)[min(4 * (warp * STEPS + step) + lane % 4, WIDTH / 8 - 1)];
    }
    Weights<TILES, STEPS, PARTS> w;
    take(b.ring, b.stages, matrix(layer, index), w);
    await_rows<WIDTH>(words, x);
    if (weight) {
        float squares = 0.f;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) squares += weigh(x[step], norm[step]);
        squares = sum_over<4>(squares);
        if (lane % 4 == 0) b.s.squares[warp][lane / 4] = squares;
    }
    multiply_rows(w, x, b.s.sums + warp * ROWS * sums_of(TILES));
    sync_compute();
}

// What norming multiplies a token's rows by.
__device__ float scale_of(const Block& b, int token) {
    float squares = 0.f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) squares += b.s.squares[warp][token];
    return rsqrtf(squares / D + EPS);
}

// Into how many parts the earlier tokens of one head are split: one block each.
__device__ int splits_of(int slot) { return max(1, min(MOST_SPLITS, slot / 256)); }

// Attention of one query head of one token over one part of its cache; the new token belongs to the last part.
__device__ void attend(Block& b, const Layer& layer, u32* board, int row, int head, int split, int splits) {
    const int thread = threadIdx.x;
    const size_t first = (size_t)row * b.s.slots;
    AttentionScratch& s = b.s.attention;
    const Token token{b.s.cos[row],      b.s.sin[row], b.s.positions + first,
                      b.s.position[row], b.s.slot,     layer.keys + first * KV_WIDTH,
                      layer.values + first * KV_WIDTH};
    const int begin = token.slot * split / splits, end = token.slot * (split + 1) / splits;
    attend_to_cache(s, token, head, begin, end, split == splits - 1, [&] {
        if (thread < 3 * HEAD_DIM)
            s.fresh[thread] = await(board + BOARD_QKV + row * QKV + row_of(thread / HEAD_DIM, head) + thread % HEAD_DIM);
    });
    float top, sum, value = combine(s.parts, WARPS + 1, thread % HEAD_DIM, top, sum);
    if (splits > 1) {
        u32* parts = board + BOARD_PARTS + blockIdx.x * PART;
        if (thread < HEAD_DIM) publish(parts + thread, value);
        if (thread == 0) publish(parts + HEAD_DIM, top), publish(parts + HEAD_DIM + 1, sum);
        if (split) return;
        sync_compute();
#pragma unroll 1
        for (int i = thread; i < splits * PART; i += THREADS) s.parts[0][i] = await(parts + i);
        sync_compute();
        value = combine(s.parts, splits, thread % HEAD_DIM, top, sum);
    }
    bf16* words = (bf16*)(board + BOARD_ATTENTION) + row * Q_WIDTH + head * HEAD_DIM;
    if (thread < HEAD_DIM) publish(words + thread, value / sum);
}

// A block's part of attention: pairs of a token and a head, or parts of those, spread over the blocks.
__device__ void attend_to_all(Block& b, const Layer& layer, u32* board) {
    const int splits = splits_of(b.s.slot);
#pragma unroll 1
    for (int i = blockIdx.x; i < PAIRS * splits; i += GRID)
        attend(b, layer, board, i / splits / HEADS, i / splits % HEADS, i % splits, splits);
}

// Adds a product's rows to the residual stream, and publishes or writes it at `to` [ROWS, D].
__device__ void add_to_residual(Block& b, bf16* to, bool last) {
    const Share mine = share(D);
    const int token = threadIdx.x / MOST_ROWS, row = threadIdx.x % MOST_ROWS;
    if (token >= ROWS || row >= mine.count) return;
    const float sum = b.s.residual[threadIdx.x] += sum_of_warps<1>(b.s.sums, token, row);
    to += token * D + mine.first + row;
    if (last) *to = round_one(sum);
    else publish(to, sum);
}

__device__ void attention_half(Block& b, const Layer& layer, u32* board) {
    const Share qkv = share(QKV);
    const int thread = threadIdx.x, token = thread / MOST_QKV, row = thread % MOST_QKV;
    const bool owner = token < ROWS && row < qkv.count;
    const float bias = owner ? widen(layer.qkv_bias[qkv.first + row]) : 0.f;
    product<D, 1, 2>(b, layer, 0, (bf16*)(board - BOARD_X), layer.input_norm);
    if (owner)
        publish(board + BOARD_QKV + token * QKV + qkv.first + row, sum_of_warps<1>(b.s.sums, token, row) * scale_of(b, token) + bias);
    sync_compute();
    attend_to_all(b, layer, board);
    product<Q_WIDTH, 1, 1>(b, layer, 1, (bf16*)(board + BOARD_ATTENTION), nullptr);
    add_to_residual(b, (bf16*)(board + BOARD_MIDDLE), false);
    sync_compute();
}

__device__ void mlp_half(Block& b, const Layer& layer, u32* board, bf16* y) {
    const Share ffn = share(F);
    bf16* words = (bf16*)(board + BOARD_FFN);
    product<D, FFN_TILES, 2>(b, layer, 2, (bf16*)(board + BOARD_MIDDLE), layer.post_norm);
#pragma unroll 1
    for (int i = threadIdx.x; i < ROWS * MOST_FFN; i += THREADS) {
        const int token = i / MOST_FFN, row = i % MOST_FFN, at = row / 8 * 16 + row % 8;
        if (row >= ffn.count) continue;
        const float scale = scale_of(b, token);
        const float gate = sum_of_warps<FFN_TILES>(b.s.sums, token, at) * scale;
        const float up = sum_of_warps<FFN_TILES>(b.s.sums, token, at + 8) * scale;
        publish(words + token * F + ffn.first + row, __fdividef(gate, 1.f + __expf(-gate)) * up);
    }
    sync_compute();
    product<F, 1, 1>(b, layer, 3, words, nullptr);
    add_to_residual(b, y ? y : (bf16*)(board + BOARD_END), y);
    sync_compute();
}

__device__ void compute(Block& b, const bf16* x, u32* board, bf16* y) {
    const Share mine = share(D);
    const int token = threadIdx.x / MOST_ROWS, row = threadIdx.x % MOST_ROWS;
    if (token < ROWS && row < mine.count) {
        const int at = token * D + mine.first + row;
        b.s.residual[threadIdx.x] = widen(x[at]);
        publish((bf16*)board + at, widen(x[at]));
    }
    board += BOARD_X;
#pragma unroll 1
    for (int l = 0; l < LAYERS; ++l, board += BOARD_LAYER) {
        attention_half(b, b.s.layers[l], board);
        mlp_half(b, b.s.layers[l], board, l + 1 < LAYERS ? nullptr : y);
    }
}

// x [ROWS, D], cos and sin [ROWS, HEAD_DIM / 2], position [ROWS], slot [1], positions [ROWS, slots], slots [1], the board's
// words; for each layer its weights and caches [ROWS, slots, KV_HEADS, HEAD_DIM], as LAYER_TABLE names them; y [ROWS, D].
extern "C" __global__ void __launch_bounds__(THREADS + 32, 1) decode_rows(PARAMETERS) {
    extern __shared__ __align__(128) unsigned char stages[];
    Shared& s = *(Shared*)(stages + STAGES * STAGE_BYTES);
    if (threadIdx.x == 0) {
        LAYER_TABLE
        init(s.full, s.empty);
        s.slot = *slot, s.slots = *slots, s.positions = positions;
    }
    for (int i = threadIdx.x; i < ROWS * HEAD_DIM / 2; i += THREADS + 32) s.cos[0][i] = cos[i], s.sin[0][i] = sin[i];
    if (threadIdx.x < ROWS) s.position[threadIdx.x] = position[threadIdx.x];
    __syncthreads();
    Ring ring{shared_address(stages), shared_address(s.full), shared_address(s.empty)};
    if (threadIdx.x < THREADS) {
        Block b{ring, stages, s};
        compute(b, x, board, y);
    } else if (threadIdx.x == THREADS) {
        stream(ring, s.layers);
    }
}
