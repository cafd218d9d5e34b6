// One token through all decoder layers in one launch: batch 1, bfloat16 weights, compute capability 9.0.
//
// Every block owns a share of the rows of every weight matrix and stays on its multiprocessor for the whole token:
//
// - One thread streams the block's rows, in the order in which they will be needed, through a ring in shared memory by
//   bulk copies. Weights do not depend on activations, so the stream never waits for the computation but only for room:
//   the memory is kept busy while the blocks exchange activations.
// - A product is split over the warps by columns. A warp takes its columns of all the block's rows into registers before
//   the activations are there, polls for its part of these alone, and multiplies on the tensor cores; shared memory adds
//   the warps' parts up.
// - Blocks exchange activations by words on a board in global memory: a value and the layer's number. Who needs a value
//   polls its word until the number is the layer's. An access to a word is atomic, so there are neither fences nor grid
//   barriers. Each word is written once a layer, and nobody can write it for the next layer before everybody has read
//   it: every block contributes to the vectors in between, and does so only after reading the ones before.
//
// All blocks must be resident at once (grid <= multiprocessors, one stream), and the board must be zero at the launch.
//
// In front of this text stand common.cu, head.cu, ring.cu and D, F, LAYERS, EPS, GRID, STAGES, STAGE_BYTES, SHARED_BYTES,
// PAD_BYTES, PARAMETERS and LAYER_TABLE, which name one pointer per array. One warp more than WARPS runs: it streams.
// For one row this is faster than decode_rows.cu (0.44 beside 0.52 ms a token of the 0.5B shape), which takes several.

// The board, in words.
constexpr int BOARD_QKV = 0, BOARD_PARTS = QKV, BOARD_ATTENTION = BOARD_PARTS + (GRID * PART + 1) / 2 * 2;
constexpr int BOARD_MIDDLE = BOARD_ATTENTION + Q_WIDTH, BOARD_END = BOARD_MIDDLE + D, BOARD_FFN = BOARD_END + D;
static_assert(D % 8 == 0 && F % 8 == 0 && Q_WIDTH % 8 == 0 && QKV % 2 == 0, "rows are copied 16 bytes at a time");
static_assert(3 * HEAD_DIM <= THREADS, "head size");
static_assert(GRID <= D && GRID <= F && GRID <= QKV && HEADS <= GRID, "every block owns rows of every matrix");
static_assert(MOST_QKV <= 16 && MOST_ROWS <= 8 && LAYERS < 65535, "one tile of rows");

// Adds 16 x 16 weights times 16 activations: rows g and g + 8 of lane 4 g + c at sum.x and sum.y.
__device__ void multiply(float2& sum, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    float same_x, same_y;  // the neighbouring column of the result: all eight columns are the same
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %0, %2, %2};"
        : "+f"(sum.x), "=f"(same_x), "+f"(sum.y), "=f"(same_y)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// --- The board -------------------------------------------------------------------------------------------------------

__device__ void publish(u64* word, u32 value, u32 tag) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(word), "l"((u64)tag << 32 | value) : "memory");
}

__device__ void publish_half(u32* word, u32 value_and_tag) {  // bfloat16 above the layer's number
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(word), "r"(value_and_tag) : "memory");
}

__device__ void publish(u64* word, float value, u32 tag) { publish(word, __float_as_uint(value), tag); }

__device__ float await(const u64* word, u32 tag) {
    u64 value;
    do asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
    while ((u32)(value >> 32) != tag);
    return __uint_as_float((u32)value);
}

__device__ ulonglong2 read_two(const u64* words) {  // neighbours, the first of even index
    ulonglong2 two;
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(two.x), "=l"(two.y) : "l"(words) : "memory");
    return two;
}

__device__ uint4 read_four(const u32* words) {
    uint4 four;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(four.x), "=r"(four.y), "=r"(four.z), "=r"(four.w)
                 : "l"(words)
                 : "memory");
    return four;
}

__device__ float2 await_two(const u64* words, u32 tag) {
    ulonglong2 two;
    do two = read_two(words);
    while ((u32)(two.x >> 32) != tag || (u32)(two.y >> 32) != tag);
    return {__uint_as_float((u32)two.x), __uint_as_float((u32)two.y)};
}

// --- Products --------------------------------------------------------------------------------------------------------

constexpr int MOST_STEPS = steps_of(F) > steps_of(D) ? steps_of(F) : steps_of(D);
constexpr int FFN_TILES = ceil_div(MOST_FFN, 8);
constexpr int SLICE = 16 * MOST_STEPS > 16 * FFN_TILES ? 16 * MOST_STEPS : 16 * FFN_TILES;  // words a warp
static_assert(steps_of(Q_WIDTH) <= MOST_STEPS, "width of the heads");

// Polls for the warp's part of a vector [width] of float32 words and leaves it in its slice, times `weight` where there
// is one, as bfloat16. Returns this lane's sum of squares.
template <int STEPS>
__device__ float await_slice(const u64* words, u32 tag, int width, const bf16* weight, u32* slice) {
    constexpr int each = ceil_div(16 * STEPS, 32);
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16 * STEPS;  // in pairs of values
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < each; ++i) {
        const int at = lane + 32 * i;
        if (at >= 16 * STEPS) continue;
        slice[at] = 0;  // what columns beyond the matrix meet
        if (first + at >= width / 2) continue;
        const u32 scales = weight ? ((const u32*)weight)[first + at] : 0x3f803f80u;
        const float2 two = await_two(words + 2 * (first + at), tag);
        squares += two.x * two.x + two.y * two.y;
        slice[at] = round_pair(two.x * low(scales), two.y * high(scales));
    }
    return squares;
}

// The same for silu(gate) * up, whose words are bfloat16 above the layer's number.
template <int STEPS>
__device__ void await_ffn(const u32* words, u32 tag, u32* slice) {
    constexpr int each = ceil_div(8 * STEPS, 32);
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 8 * STEPS;  // in fours of values
    bool all;
    do {  // all words together: one after the other each would wait for a round trip of its own
        all = true;
#pragma unroll
        for (int i = 0; i < each; ++i) {
            const int at = lane + 32 * i;
            if (at >= 8 * STEPS) continue;
            ((uint2*)slice)[at] = {};
            if (first + at >= F / 4) continue;
            const uint4 four = read_four(words + 4 * (first + at));
            all &= (four.x & 0xffff) == tag && (four.y & 0xffff) == tag && (four.z & 0xffff) == tag && (four.w & 0xffff) == tag;
            ((uint2*)slice)[at] = {four.x >> 16 | (four.y & 0xffff0000u), four.z >> 16 | (four.w & 0xffff0000u)};
        }
    } while (!all);
}

// Multiplies the warp's columns with its slice and leaves the sums of the rows, 16 a tile, in the slice's place.
template <int TILES, int STEPS, int PARTS>
__device__ void multiply_slice(const Weights<TILES, STEPS, PARTS>& w, u32* slice) {
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    constexpr int CHAINS = TILES == 1 ? 4 : 1;  // sums that do not wait for one another
    float2 sums[TILES][CHAINS] = {};
    __syncwarp();
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const uint4 x = ((const uint4*)slice)[4 * step + c];
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            const uint4 a = w.eight[tile][step][0], b = PARTS == 2 ? w.eight[tile][step][PARTS - 1] : uint4{};
            multiply(sums[tile][2 * step % CHAINS], a.x, b.x, a.y, b.y, x.x, x.y);
            multiply(sums[tile][(2 * step + 1) % CHAINS], a.z, b.z, a.w, b.w, x.z, x.w);
        }
    }
    __syncwarp();
    if (c) return;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        float2 sum = {};
#pragma unroll
        for (int chain = 0; chain < CHAINS; ++chain) sum.x += sums[tile][chain].x, sum.y += sums[tile][chain].y;
        ((float*)slice)[16 * tile + g] = sum.x;
        if (PARTS == 2) ((float*)slice)[16 * tile + 8 + g] = sum.y;
    }
}

// Sum over the warps of what they left at `row`.
__device__ float sum_of_warps(const float* slices, int row) {
    float sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) sum += slices[warp * SLICE + row];
    return sum;
}

// --- Attention -------------------------------------------------------------------------------------------------------

// Into how many parts the earlier tokens of one head are split: one block each.
__device__ int splits_of(int slot) { return max(1, min(min(GRID / HEADS, WARPS + 1), slot / 256)); }

// Attention of query head blockIdx / splits over its part of the cache; the new token belongs to the last part.
__device__ void attend(const Token& token, u64* board, u32 tag, AttentionScratch& s) {
    const int splits = splits_of(token.slot), head = blockIdx.x / splits, split = blockIdx.x % splits, thread = threadIdx.x;
    attend_to_cache(s, token, head, token.slot * split / splits, token.slot * (split + 1) / splits, split == splits - 1, [&] {
        if (thread < 3 * HEAD_DIM)
            s.fresh[thread] = await(board + BOARD_QKV + row_of(thread / HEAD_DIM, head) + thread % HEAD_DIM, tag);
    });
    float top, sum, value = combine(s.parts, WARPS + 1, thread % HEAD_DIM, top, sum);
    if (splits > 1) {
        u64* parts = board + BOARD_PARTS + blockIdx.x * PART;
        if (thread < HEAD_DIM) publish(parts + thread, value, tag);
        if (thread == 0) publish(parts + HEAD_DIM, top, tag), publish(parts + HEAD_DIM + 1, sum, tag);
        if (split) return;
        sync_compute();
#pragma unroll 1
        for (int i = thread; i < splits * PART; i += THREADS) s.parts[0][i] = await(parts + i, tag);
        sync_compute();
        value = combine(s.parts, splits, thread % HEAD_DIM, top, sum);
    }
    if (thread < HEAD_DIM) publish(board + BOARD_ATTENTION + head * HEAD_DIM + thread, value / sum, tag);
}

// --- The kernel ------------------------------------------------------------------------------------------------------

struct Shared {
    alignas(16) u32 slices[WARPS * SLICE];
    u64 full[STAGES], empty[STAGES];
    Layer layers[LAYERS];
    float squares[WARPS];
    float cos[HEAD_DIM / 2], sin[HEAD_DIM / 2];
    float residual[MOST_ROWS];
    AttentionScratch attention;
};

static_assert(STAGES * STAGE_BYTES + sizeof(Shared) <= SHARED_BYTES, "shared memory");

struct Block {
    Ring ring;
    const unsigned char* stages;
    Shared& s;
    u64* board;
    u32* slice;           // of this warp
    const float* slices;  // as sums
};

// The product of matrix `index` with a vector on the board, normed with `weight` where there is one. Afterwards
// sum_of_warps gives the rows; returns what norming multiplies them by.
template <int WIDTH, int TILES, int PARTS>
__device__ float product(Block& b, const Layer& layer, int index, const u64* words, u32 tag, const bf16* weight) {
    constexpr int STEPS = steps_of(WIDTH);
    Weights<TILES, STEPS, PARTS> w;
    take(b.ring, b.stages, matrix(layer, index), w);
    const float squares = sum_over<32>(await_slice<STEPS>(words, tag, WIDTH, weight, b.slice));
    multiply_slice(w, b.slice);
    if (threadIdx.x % 32 == 0) b.s.squares[threadIdx.x / 32] = squares;
    sync_compute();
    float total = 0.f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) total += b.s.squares[warp];
    return rsqrtf(total / WIDTH + EPS);
}

__device__ void attention_half(Block& b, const Layer& layer, Token token, u32 tag, u32 tag_of_x) {
    token.keys = layer.keys, token.values = layer.values;
    const Share qkv = share(QKV), mine = share(D);
    const int thread = threadIdx.x;
    const float bias = thread < qkv.count ? widen(layer.qkv_bias[qkv.first + thread]) : 0.f;
    const float scale = product<D, 1, 2>(b, layer, 0, b.board + BOARD_END, tag_of_x, layer.input_norm);
    if (thread < qkv.count)
        publish(b.board + BOARD_QKV + qkv.first + thread, sum_of_warps(b.slices, thread) * scale + bias, tag);
    sync_compute();
    if (blockIdx.x < HEADS * splits_of(token.slot)) attend(token, b.board, tag, b.s.attention);
    product<Q_WIDTH, 1, 1>(b, layer, 1, b.board + BOARD_ATTENTION, tag, nullptr);
    if (thread < mine.count) {
        const float sum = b.s.residual[thread] += sum_of_warps(b.slices, thread);
        publish(b.board + BOARD_MIDDLE + mine.first + thread, sum, tag);
    }
    sync_compute();
}

__device__ void mlp_half(Block& b, const Layer& layer, u32 tag, bf16* y) {
    const Share ffn = share(F), mine = share(D);
    const int thread = threadIdx.x;
    u32* words = (u32*)(b.board + BOARD_FFN);
    const float scale = product<D, FFN_TILES, 2>(b, layer, 2, b.board + BOARD_MIDDLE, tag, layer.post_norm);
    for (int row = thread; row < ffn.count; row += THREADS) {
        const int at = row / 8 * 16 + row % 8;
        const float gate = sum_of_warps(b.slices, at) * scale, up = sum_of_warps(b.slices, at + 8) * scale;
        publish_half(words + ffn.first + row, (u32)round_one(__fdividef(gate, 1.f + __expf(-gate)) * up) << 16 | tag);
    }
    sync_compute();
    Weights<1, steps_of(F), 1> w;
    take(b.ring, b.stages, matrix(layer, 3), w);
    await_ffn<steps_of(F)>(words, tag, b.slice);
    multiply_slice(w, b.slice);
    sync_compute();
    if (thread < mine.count) {
        const float sum = b.s.residual[thread] += sum_of_warps(b.slices, thread);
        if (y) y[mine.first + thread] = round_one(sum);
        else publish(b.board + BOARD_END + mine.first + thread, sum, tag);
    }
    sync_compute();
}

__device__ void compute(Block& b, const bf16* x, const Token& token, bf16* y) {
    const Share mine = share(D);
    if (threadIdx.x < mine.count) {
        const float own = b.s.residual[threadIdx.x] = widen(x[mine.first + threadIdx.x]);
        publish(b.board + BOARD_END + mine.first + threadIdx.x, own, LAYERS + 1);
    }
#pragma unroll 1
    for (int l = 0; l < LAYERS; ++l) {
        attention_half(b, b.s.layers[l], token, l + 1, l ? l : LAYERS + 1);
        mlp_half(b, b.s.layers[l], l + 1, l + 1 < LAYERS ? nullptr : y);
    }
}

// x [D], cos and sin [HEAD_DIM / 2], position and slot [1], positions [capacity], the board's words; for each layer its
// weights and caches, as LAYER_TABLE names them; y [D].
extern "C" __global__ void __launch_bounds__(THREADS + 32, 1) decode(PARAMETERS) {
    extern __shared__ __align__(128) unsigned char stages[];
    Shared& s = *(Shared*)(stages + STAGES * STAGE_BYTES);
    if (threadIdx.x == 0) {
        LAYER_TABLE
        init(s.full, s.empty);
    }
    if (threadIdx.x < HEAD_DIM / 2) s.cos[threadIdx.x] = cos[threadIdx.x], s.sin[threadIdx.x] = sin[threadIdx.x];
    __syncthreads();
    Ring ring{shared_address(stages), shared_address(s.full), shared_address(s.empty)};
    if (threadIdx.x < THREADS) {
        Block b{ring, stages, s, board, s.slices + threadIdx.x / 32 * SLICE, (const float*)s.slices};
        compute(b, x, Token{s.cos, s.sin, positions, *position, *slot, nullptr, nullptr}, y);
    } else if (threadIdx.x == THREADS) {
        stream(ring, s.layers);
    }
}
