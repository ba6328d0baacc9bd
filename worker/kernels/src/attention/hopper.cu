// Attention on Hopper's tensor cores by wgmma, which reads its right operand from shared memory. One warp group loads, two
// compute on 64 rows each: scores become weights in registers and are the left operand of the next product as they lie
// (FlashAttention-3, Shah et al. 2024). Blocks stay for many tiles, so that the first loads of a tile run while the last one is
// computed.
//
// A matrix in shared memory is panels of 64 columns: rows of 128 bytes, whose 16-byte chunks are permuted by the row's number
// as wgmma's 128-byte swizzle has it. Panels are multiples of 1,024 bytes.
static constexpr int DIM = (HEAD_DIM + 15) / 16 * 16;
static constexpr int PANELS = (DIM + 63) / 64;
static constexpr int CHUNKS = HEAD_DIM / 8;
// Chunks in shared memory that copies or zeros fill.
static constexpr int ALL_CHUNKS = DIM / 8;
static constexpr int GROUPS = 2, CONSUMERS = GROUPS * 128, THREADS = CONSUMERS + 128, TILE = GROUPS * 64;

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The assembler moves a wait for products upwards, before the exponentials that are meant to run beside them, but not across a
// store of what they add up to.
__device__ __forceinline__ void after(float x) {
  __shared__ float unused[CONSUMERS];
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(shared_address(unused + threadIdx.x)), "f"(x) : "memory");
}

// c[64, N] = a · bᵀ: 64 rows of a matrix of A_ROWS, N rows of a matrix of N.
template <int A_ROWS, int N> __device__ __forceinline__ void multiply_across(float (&c)[N / 2], u32 a, u32 b) {
#pragma unroll
  for (int d = 0; d < DIM / 16; d++)
    wgmma(c, across(a + d / 4 * A_ROWS * 128 + d % 4 * 32), across(b + d / 4 * N * 128 + d % 4 * 32), d > 0);
}
// c[64, DIM] += a · b: K columns of `a` in registers, K rows of a matrix.
template <int K> __device__ __forceinline__ void multiply(float (&c)[DIM / 2], const u32 (&a)[K / 16][4], u32 b) {
#pragma unroll
  for (int k = 0; k < K / 16; k++) wgmma(c, a[k], along<K>(b + k * 16 * 128));
}
// A product's result as a left operand.
template <int N> __device__ __forceinline__ void to_left(u32 (&to)[N / 16][4], const float (&from)[N / 2]) {
#pragma unroll
  for (int n = 0; n < N / 16; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) to[n][i] = to_bf16x2(from[n * 8 + i * 2], from[n * 8 + i * 2 + 1]);
}

// ROWS rows from `first` on into a matrix of as many, by the loading group; those from `count` on are zeros, and so are columns
// after HEAD_DIM. A thread copies one chunk of every eighth row (or sixteenth), so that the swizzle is the same for all of them,
// and an address takes one addition: copies are given at the rate at which products need them.
static constexpr int LANES = ALL_CHUNKS <= 8 ? 8 : 16, EVERY = 128 / LANES;
template <int ROWS>
__device__ __forceinline__ void load_rows(u32 to, const elem* from, i64 stride, int first, int count) {
  int chunk = threadIdx.x % LANES, row = (threadIdx.x % 128) / LANES;
  if (chunk >= ALL_CHUNKS) return;
  to += chunk / 8 * (ROWS * 128) + row * 128 + ((chunk ^ row) & 7) * 16;
  from += (first + row) * stride + chunk * 8;
  int rows = chunk < CHUNKS ? count - first - row : 0;
#pragma unroll
  for (int i = 0; i < ROWS; i += EVERY, from += EVERY * stride) copy16(to + i * 128, from, i < rows);
}
#if PAGED
// The same from blocks of a pool: a lane looks up one block, of which a tile has at most 16. ROWS and EVERY are multiples of a
// block or divide it, so that no sum of row numbers carries into the number of the block.
template <int ROWS> __device__ __forceinline__ void load_blocks(u32 to, const elem* pool, const Keys& keys, int first) {
  int chunk = threadIdx.x % LANES, row = (threadIdx.x % 128) / LANES, bits = keys.block_bits, mask = (1 << bits) - 1;
  int looked_up = (first >> bits) + (threadIdx.x & 31);
  u32 block = looked_up << bits < keys.length ? keys.table[looked_up] : 0;
  to += chunk / 8 * (ROWS * 128) + row * 128 + ((chunk ^ row) & 7) * 16;
  pool += ((first & mask) + (row & mask)) * HEAD_DIM + chunk * 8;
  int rows = chunk < CHUNKS ? keys.length - first - row : 0;
#pragma unroll 8
  for (int i = 0; i < ROWS; i += EVERY) {
    u32 its = __shfl_sync(FULL, block, (row >> bits) + (i >> bits));
    const elem* from = pool + (u64)its * (u32)keys.block_stride + (i & mask) * HEAD_DIM;
    if (chunk < ALL_CHUNKS) copy16(to + i * 128, from, i < rows);
  }
}
#endif

// Threads that share a row hold neighbouring columns.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(FULL, x, 1));
  return fmaxf(x, __shfl_xor_sync(FULL, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(FULL, x, 1);
  return x + __shfl_xor_sync(FULL, x, 2);
}

// 64 rows of a group's result through as many rows of shared memory, which nobody else reads any more: 16 bytes at a time to
// global memory. `matrix` is the group's first row in a matrix of ROWS.
template <int ROWS, typename At>
__device__ __forceinline__ void store_rows(u8* matrix, const float (&c)[DIM / 2], float first, float second, int count, At at) {
  int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % 4, row = warp * 16 + lane / 4;
#pragma unroll
  for (int d = 0; d < DIM / 8; d++) {
    // Row + 8 has the same permutation.
    u8* to = matrix + d / 8 * (ROWS * 128) + row * 128 + ((d ^ row) & 7) * 16 + (lane & 3) * 4;
    *reinterpret_cast<u32*>(to) = to_bf16x2(c[d * 4] * first, c[d * 4 + 1] * first);
    *reinterpret_cast<u32*>(to + 1024) = to_bf16x2(c[d * 4 + 2] * second, c[d * 4 + 3] * second);
  }
  __syncwarp();
#pragma unroll 4
  for (int i = lane; i < 16 * CHUNKS; i += 32) {
    int r = warp * 16 + i / CHUNKS, chunk = i % CHUNKS;
    if (r < count)
      *reinterpret_cast<uint4*>(at(r) + chunk * 8) =
          *reinterpret_cast<const uint4*>(matrix + chunk / 8 * (ROWS * 128) + r * 128 + ((chunk ^ r) & 7) * 16);
  }
}

// Which tile a block does in this round: from left to right and back, since tiles become shorter.
__device__ __forceinline__ int turn(int round) {
  return round * gridDim.x + (round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

#ifdef FORWARD
static constexpr int KEYS = 128, STAGES = 2;
static constexpr int Q_BYTES = PANELS * TILE * 128, STAGE_BYTES = PANELS * KEYS * 128;

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    forward_hopper(elem* __restrict__ out, float* __restrict__ lse, const elem* __restrict__ q, int q_stride,
                   const u32* __restrict__ q_offsets, int segments, int tokens, KEY_OPERANDS, int heads, int kv_heads,
                   float scale) {
  extern __shared__ __align__(1024) u8 memory[];
  __shared__ __align__(8) u64 barriers[6 * STAGES];
  __shared__ int tile[STAGES][2];
  u32 q_tiles = shared_address(memory), k_tiles = q_tiles + STAGES * Q_BYTES, v_tiles = k_tiles + STAGES * STAGE_BYTES;
  u32 q_full = shared_address(barriers), q_free = q_full + 8 * STAGES, k_full = q_free + 8 * STAGES,
      k_free = k_full + 8 * STAGES, v_full = k_free + 8 * STAGES, v_free = v_full + 8 * STAGES;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; stage++) {
      // One arrival more: of the thread that says which tile it is.
      barrier_init(q_full + 8 * stage, 129), barrier_init(q_free + 8 * stage, CONSUMERS / 32);
      barrier_init(k_full + 8 * stage, 128), barrier_init(k_free + 8 * stage, CONSUMERS / 32);
      barrier_init(v_full + 8 * stage, 128), barrier_init(v_free + 8 * stage, CONSUMERS / 32);
    }
  }
  __syncthreads();
  int lane = threadIdx.x & 31;

  if (threadIdx.x >= CONSUMERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    // Tiles of keys so far.
    int loaded = 0;
    for (int round = 0;; round++) {
      int rank = turn(round), head = rank % heads, segment = 0, level;
      __syncwarp();
      bool is = find_tile(rank / heads, q_offsets, segments, TILE, (tokens + TILE - 1) / TILE, segment, level);
      int slot = round % STAGES;
      barrier_wait(q_free + 8 * slot, (round / STAGES & 1) ^ 1);
      if (threadIdx.x == CONSUMERS) {
        tile[slot][0] = is ? segment : -1, tile[slot][1] = level * TILE;
        barrier_arrive(q_full + 8 * slot);
      }
      if (!is) {
        barrier_arrive(q_full + 8 * slot);
        break;
      }
      int begin = q_offsets[segment], queries = q_offsets[segment + 1] - begin, first = level * TILE;
      Keys keys = KEYS_OF(segment, head / (heads / kv_heads), kv_heads);
      int end = CAUSAL ? min(keys.length, first + TILE + keys.length - queries) : keys.length;
      const elem* query = q + (i64)begin * q_stride + head * HEAD_DIM;
      load_rows<TILE>(q_tiles + slot * Q_BYTES, query, q_stride, first, queries);
      tell_when_loaded(q_full + 8 * slot);
      int steps = (end + KEYS - 1) / KEYS;
      // In the order in which they are used: scores run ahead of their weights by one.
      for (int step = 0; step <= steps; step++) {
        if (step < steps) {
          int at = loaded + step, stage = at % STAGES;
          barrier_wait(k_free + 8 * stage, (at / STAGES & 1) ^ 1);
#if PAGED
          load_blocks<KEYS>(k_tiles + stage * STAGE_BYTES, keys.k, keys, step * KEYS);
#else
          load_rows<KEYS>(k_tiles + stage * STAGE_BYTES, keys.k, keys.k_stride, step * KEYS, keys.length);
#endif
          tell_when_loaded(k_full + 8 * stage);
        }
        if (step > 0) {
          int at = loaded + step - 1, stage = at % STAGES;
          barrier_wait(v_free + 8 * stage, (at / STAGES & 1) ^ 1);
#if PAGED
          load_blocks<KEYS>(v_tiles + stage * STAGE_BYTES, keys.v, keys, (step - 1) * KEYS);
#else
          load_rows<KEYS>(v_tiles + stage * STAGE_BYTES, keys.v, keys.v_stride, (step - 1) * KEYS, keys.length);
#endif
          tell_when_loaded(v_full + 8 * stage);
        }
      }
      loaded += max(steps, 0);
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  int group = threadIdx.x / 128, row = group * 64 + (threadIdx.x / 32 % 4) * 16 + lane / 4;
  float factor = scale * LOG2E;
  int used = 0;
  // The groups take turns in giving work to the tensor cores: while one does, the other computes exponentials.
  auto my_turn = [&]() { asm volatile("bar.sync %0, 256;" ::"r"(3 + group) : "memory"); };
  auto your_turn = [&]() { asm volatile("bar.arrive %0, 256;" ::"r"(4 - group) : "memory"); };
  if (group == 1) your_turn();
  for (int round = 0;; round++) {
    int head = turn(round) % heads;
    int slot = round % STAGES;
    wait_loaded(q_full + 8 * slot, round / STAGES & 1);
    int segment = tile[slot][0], first = tile[slot][1];
    if (segment < 0) break;
    int begin = q_offsets[segment], queries = q_offsets[segment + 1] - begin;
    Keys keys = KEYS_OF(segment, head / (heads / kv_heads), kv_heads);
    // Query i sees keys up to i + ahead.
    int ahead = keys.length - queries;
    int end = CAUSAL ? min(keys.length, first + TILE + ahead) : keys.length;
    int steps = max((end + KEYS - 1) / KEYS, 0);

    float score[KEYS / 2], sum[DIM / 2], most[2] = {-INFINITE, -INFINITE}, total[2] = {0.f, 0.f}, faded[2];
    u32 weights[KEYS / 16][4];
#pragma unroll
    for (int i = 0; i < DIM / 2; i++) sum[i] = 0.f;
    u32 ours = q_tiles + slot * Q_BYTES + group * 64 * 128;

    auto softmax = [&](int key) {
      if (key + KEYS > keys.length || (CAUSAL && key + KEYS - 1 > first + group * 64 + ahead)) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          int limit = keys.length - 1;
          if (CAUSAL) limit = min(limit, first + row + half * 8 + ahead);
          limit -= key + (lane & 3) * 2;
#pragma unroll
          for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int j = 0; j < 2; j++)
              if (n * 8 + j > limit) score[n * 4 + half * 2 + j] = -INFINITE;
        }
      }
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float now = most[half];
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) now = fmaxf(now, fmaxf(score[n * 4 + half * 2], score[n * 4 + half * 2 + 1]));
        now = quad_max(now);
        // A row that has seen no key yet: any finite number will do.
        float shift = now == -INFINITE ? 0.f : now * factor, part = 0.f;
        faded[half] = exp2_fast(most[half] * factor - shift);
        most[half] = now;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
          for (int j = 0; j < 2; j++) {
            float weight = exp2_fast(score[n * 4 + half * 2 + j] * factor - shift);
            score[n * 4 + half * 2 + j] = weight;
            part += weight;
          }
        total[half] = total[half] * faded[half] + part;
      }
    };
    auto release = [&](u32 barrier) {
      __syncwarp();
      if (lane == 0) barrier_arrive(barrier);
    };

    if (steps > 0) {
      wait_loaded(k_full + 8 * (used % STAGES), used / STAGES & 1);
      my_turn();
      wgmma_begin();
      multiply_across<TILE, KEYS>(score, ours, k_tiles + used % STAGES * STAGE_BYTES);
      wgmma_commit();
      your_turn();
      wgmma_wait<0>();
      pin(score);
      release(k_free + 8 * (used % STAGES));
      softmax(0);
      to_left<KEYS>(weights, score);
      for (int step = 1; step < steps; step++, used++) {
        int next = used + 1;
        barrier_wait(k_full + 8 * (next % STAGES), next / STAGES & 1);
        wait_loaded(v_full + 8 * (used % STAGES), used / STAGES & 1);
        pin(score), pin(weights), pin(sum);
        my_turn();
        wgmma_begin();
        multiply_across<TILE, KEYS>(score, ours, k_tiles + next % STAGES * STAGE_BYTES);
        wgmma_commit();
        multiply<KEYS>(sum, weights, v_tiles + used % STAGES * STAGE_BYTES);
        wgmma_commit();
        your_turn();
        wgmma_wait<1>();
        pin(score);
        release(k_free + 8 * (next % STAGES));
        softmax(step * KEYS);
        after(total[0] + total[1]);
        wgmma_wait<0>();
        pin(sum), pin(weights);
        release(v_free + 8 * (used % STAGES));
#pragma unroll
        for (int i = 0; i < DIM / 2; i++) sum[i] *= faded[i / 2 % 2];
        to_left<KEYS>(weights, score);
      }
      wait_loaded(v_full + 8 * (used % STAGES), used / STAGES & 1);
      pin(weights), pin(sum);
      wgmma_begin();
      multiply<KEYS>(sum, weights, v_tiles + used % STAGES * STAGE_BYTES);
      wgmma_commit();
      wgmma_wait<0>();
      pin(sum);
      release(v_free + 8 * (used % STAGES));
      used++;
    }

    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float all = quad_sum(total[half]);
      inverse[half] = all > 0.f ? 1.f / all : 0.f;
      int at = first + row + half * 8;
      if (lse && (lane & 3) == 0 && at < queries)
        lse[(i64)head * tokens + begin + at] = all > 0.f ? most[half] * scale + logf(all) : -INFINITE;
    }
    // The group's queries make room for its result.
    asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
    elem* to = out + ((i64)(begin + first + group * 64) * heads + head) * HEAD_DIM;
    store_rows<TILE>(memory + slot * Q_BYTES + group * 64 * 128, sum, inverse[0], inverse[1], queries - first - group * 64,
                     [&](int r) { return to + (i64)r * heads * HEAD_DIM; });
    release(q_free + 8 * slot);
  }
}
#endif

#ifdef BACKWARD
// Two passes, each of which holds a tile of rows and passes over steps of the other side: keys over queries for dk and dv,
// queries over keys for dq. Scores are computed twice; in return no sum is shared between blocks, and its order is fixed.
static constexpr int STEP = 64, STAGES = 3;
static constexpr int TILE_BYTES = PANELS * TILE * 128, STEP_BYTES = PANELS * STEP * 128;
// After the tiles and stages.
static constexpr int NORMS_AT = 2 * TILE_BYTES + 2 * STAGES * STEP_BYTES;

__device__ __forceinline__ void copy4(u32 to, const float* from, bool is) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(is ? 4 : 0) : "memory");
}
// Norms and means of ROWS queries, behind one another; zeros where there is no query, whose other operands are zeros too.
template <int ROWS>
__device__ __forceinline__ void load_norms(u32 to, const float* lse, const float* delta, int first, int count) {
  for (int i = threadIdx.x % 128; i < 2 * ROWS; i += 128) {
    bool is = first + i % ROWS < count;
    copy4(to + i * 4, (i < ROWS ? lse : delta) + (is ? first + i % ROWS : 0), is);
  }
}

struct Barriers {
  // Of a tile there is one arrival more: of the thread that says which it is.
  u32 tile_full, tile_free, full, free;
  __device__ __forceinline__ Barriers(u64* memory) {
    tile_full = shared_address(memory), tile_free = tile_full + 8, full = tile_free + 8, free = full + 8 * STAGES;
    if (threadIdx.x == 0) {
      barrier_init(tile_full, 129), barrier_init(tile_free, CONSUMERS / 32);
      for (int stage = 0; stage < STAGES; stage++)
        barrier_init(full + 8 * stage, 128), barrier_init(free + 8 * stage, CONSUMERS / 32);
    }
    __syncthreads();
  }
  __device__ __forceinline__ void wait_full(int step) const { wait_loaded(full + 8 * (step % STAGES), step / STAGES & 1); }
  __device__ __forceinline__ void release(u32 barrier) const {
    __syncwarp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(barrier);
  }
  __device__ __forceinline__ void release_stage(int step) const { release(free + 8 * (step % STAGES)); }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    backward_key_hopper(elem* __restrict__ dk, int dk_stride, elem* __restrict__ dv, int dv_stride,
                        const elem* __restrict__ dout, const float* __restrict__ lse, const float* __restrict__ delta,
                        const elem* __restrict__ q, int q_stride, const u32* __restrict__ q_offsets, int segments, int tokens,
                        KEY_OPERANDS, int key_tokens, int heads, int kv_heads, float scale) {
  extern __shared__ __align__(1024) u8 memory[];
  __shared__ __align__(8) u64 barrier_memory[2 + 2 * STAGES];
  __shared__ int tile[2];
  u32 k_tile = shared_address(memory), v_tile = k_tile + TILE_BYTES, stages = v_tile + TILE_BYTES;
  Barriers barriers(barrier_memory);
  int lane = threadIdx.x & 31, group_heads = heads / kv_heads;
  // Of a tile, from its place: the queries of the first step, and steps of each head.
  auto steps_of = [&](int first, int keys, int queries, int& start) {
    start = CAUSAL ? max(0, first - (keys - queries)) / STEP : 0;
    return max(0, (queries + STEP - 1) / STEP - start);
  };

  if (threadIdx.x >= CONSUMERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    int loaded = 0;
    for (int round = 0;; round++) {
      int rank = turn(round), kv_head = rank % kv_heads, segment = 0, level;
      __syncwarp();
      bool is = find_tile(rank / kv_heads, k_offsets, segments, TILE, (key_tokens + TILE - 1) / TILE, segment, level);
      barrier_wait(barriers.tile_free, (round & 1) ^ 1);
      if (!is) {
        if (threadIdx.x == CONSUMERS) {
          tile[0] = -1;
          barrier_arrive(barriers.tile_full);
        }
        barrier_arrive(barriers.tile_full);
        break;
      }
      int begin = q_offsets[segment], queries = q_offsets[segment + 1] - begin;
      Keys keys = KEYS_OF(segment, kv_head, kv_heads);
      // The first keys are seen by most queries: they come first.
      int first = (CAUSAL ? (keys.length + TILE - 1) / TILE - 1 - level : level) * TILE;
      if (threadIdx.x == CONSUMERS) {
        tile[0] = segment, tile[1] = first;
        barrier_arrive(barriers.tile_full);
      }
      load_rows<TILE>(k_tile, keys.k, k_stride, first, keys.length);
      load_rows<TILE>(v_tile, keys.v, v_stride, first, keys.length);
      tell_when_loaded(barriers.tile_full);
      int start, steps = steps_of(first, keys.length, queries, start);
      for (int head = kv_head * group_heads; head < (kv_head + 1) * group_heads; head++) {
        const elem* query = q + (i64)begin * q_stride + head * HEAD_DIM;
        const elem* gradient = dout + ((i64)begin * heads + head) * HEAD_DIM;
        i64 norms = (i64)head * tokens + begin;
        for (int step = 0; step < steps; step++, loaded++) {
          int stage = loaded % STAGES, at = (start + step) * STEP;
          u32 to = stages + stage * 2 * STEP_BYTES;
          barrier_wait(barriers.free + 8 * stage, (loaded / STAGES & 1) ^ 1);
          load_rows<STEP>(to, query, q_stride, at, queries);
          load_rows<STEP>(to + STEP_BYTES, gradient, (i64)heads * HEAD_DIM, at, queries);
          load_norms<STEP>(k_tile + NORMS_AT + stage * 2 * STEP * 4, lse + norms, delta + norms, at, queries);
          tell_when_loaded(barriers.full + 8 * stage);
        }
      }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  int group = threadIdx.x / 128, row = group * 64 + (threadIdx.x / 32 % 4) * 16 + lane / 4;
  float factor = scale * LOG2E;
  int used = 0;
  for (int round = 0;; round++) {
    wait_loaded(barriers.tile_full, round & 1);
    int segment = tile[0], first = tile[1];
    if (segment < 0) break;
    int queries = q_offsets[segment + 1] - q_offsets[segment], length = k_offsets[segment + 1] - k_offsets[segment];
    int ahead = length - queries, start, steps = steps_of(first, length, queries, start), all = steps * group_heads;
    u32 our_keys = k_tile + group * 64 * 128, our_values = v_tile + group * 64 * 128;

    float weight[STEP / 2], change[STEP / 2], key_sum[DIM / 2], value_sum[DIM / 2];
    u32 weights[STEP / 16][4], changes[STEP / 16][4];
#pragma unroll
    for (int i = 0; i < DIM / 2; i++) key_sum[i] = value_sum[i] = 0.f;

    for (int i = 0, step = 0; i < all; i++, used++, step = step + 1 == steps ? 0 : step + 1) {
      int stage = used % STAGES, at = (start + step) * STEP;
      u32 q_tile = stages + stage * 2 * STEP_BYTES, gradients = q_tile + STEP_BYTES;
      const float* norm = reinterpret_cast<const float*>(memory + NORMS_AT) + stage * 2 * STEP + (lane & 3) * 2;
      barriers.wait_full(used);
      wgmma_begin();
      multiply_across<TILE, STEP>(weight, our_keys, q_tile);
      wgmma_commit();
      multiply_across<TILE, STEP>(change, our_values, gradients);
      wgmma_commit();
      wgmma_wait<1>();
      pin(weight);
      // Key k is not seen by query q where k > q + ahead.
      int hidden = first + row - at - ahead - (lane & 3) * 2;
      bool masked = CAUSAL && first + group * 64 + 63 > at + ahead;
#pragma unroll
      for (int n = 0; n < STEP / 8; n++) {
        float2 shift = *reinterpret_cast<const float2*>(norm + n * 8);
#pragma unroll
        for (int j = 0; j < 4; j++) {
          float w = exp2_fast(weight[n * 4 + j] * factor - (j & 1 ? shift.y : shift.x) * LOG2E);
          if (masked && n * 8 + (j & 1) - (j >> 1) * 8 < hidden) w = 0.f;
          weight[n * 4 + j] = w;
        }
      }
      to_left<STEP>(weights, weight);
      pin(weights), pin(value_sum);
      wgmma_begin();
      multiply<STEP>(value_sum, weights, gradients);
      wgmma_commit();
      wgmma_wait<1>();
      pin(change);
#pragma unroll
      for (int n = 0; n < STEP / 8; n++) {
        float2 mean = *reinterpret_cast<const float2*>(norm + STEP + n * 8);
#pragma unroll
        for (int j = 0; j < 4; j++) {
          // The rounded weight, as it is in registers anyway.
          u32 pair = weights[n / 2][n % 2 * 2 + j / 2];
          change[n * 4 + j] = (j & 1 ? high_float(pair) : low_float(pair)) * (change[n * 4 + j] - (j & 1 ? mean.y : mean.x));
        }
      }
      to_left<STEP>(changes, change);
      pin(changes), pin(key_sum);
      wgmma_begin();
      multiply<STEP>(key_sum, changes, q_tile);
      wgmma_commit();
      wgmma_wait<0>();
      pin(key_sum), pin(value_sum), pin(changes), pin(weights);
      barriers.release_stage(used);
    }
    wgmma_wait<0>();
    pin(key_sum), pin(value_sum);

    // The group's keys and values make room for their gradients.
    asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
    int kv_head = turn(round) % kv_heads, count = length - first - group * 64;
    i64 token = (i64)k_offsets[segment] + first + group * 64;
    elem *to_k = dk + token * dk_stride + kv_head * HEAD_DIM, *to_v = dv + token * dv_stride + kv_head * HEAD_DIM;
    store_rows<TILE>(memory + group * 64 * 128, key_sum, scale, scale, count, [&](int r) { return to_k + (i64)r * dk_stride; });
    store_rows<TILE>(memory + TILE_BYTES + group * 64 * 128, value_sum, 1.f, 1.f, count,
                     [&](int r) { return to_v + (i64)r * dv_stride; });
    barriers.release(barriers.tile_free);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    backward_query_hopper(elem* __restrict__ dq, int dq_stride, const elem* __restrict__ dout, const float* __restrict__ lse,
                          const float* __restrict__ delta, const elem* __restrict__ q, int q_stride,
                          const u32* __restrict__ q_offsets, int segments, int tokens, KEY_OPERANDS, int heads, int kv_heads,
                          float scale) {
  extern __shared__ __align__(1024) u8 memory[];
  __shared__ __align__(8) u64 barrier_memory[2 + 2 * STAGES];
  __shared__ int tile[2];
  u32 q_tile = shared_address(memory), gradients = q_tile + TILE_BYTES, stages = gradients + TILE_BYTES;
  Barriers barriers(barrier_memory);
  int lane = threadIdx.x & 31;
  auto end_of = [&](int first, int keys, int queries) { return CAUSAL ? min(keys, first + TILE + keys - queries) : keys; };

  if (threadIdx.x >= CONSUMERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    int loaded = 0;
    for (int round = 0;; round++) {
      int rank = turn(round), head = rank % heads, segment = 0, level;
      __syncwarp();
      bool is = find_tile(rank / heads, q_offsets, segments, TILE, (tokens + TILE - 1) / TILE, segment, level);
      barrier_wait(barriers.tile_free, (round & 1) ^ 1);
      if (threadIdx.x == CONSUMERS) {
        tile[0] = is ? segment : -1, tile[1] = level * TILE;
        barrier_arrive(barriers.tile_full);
      }
      if (!is) {
        barrier_arrive(barriers.tile_full);
        break;
      }
      int begin = q_offsets[segment], queries = q_offsets[segment + 1] - begin, first = level * TILE;
      Keys keys = KEYS_OF(segment, head / (heads / kv_heads), kv_heads);
      const elem* query = q + (i64)begin * q_stride + head * HEAD_DIM;
      const elem* gradient = dout + ((i64)begin * heads + head) * HEAD_DIM;
      i64 norms = (i64)head * tokens + begin;
      load_rows<TILE>(q_tile, query, q_stride, first, queries);
      load_rows<TILE>(gradients, gradient, (i64)heads * HEAD_DIM, first, queries);
      load_norms<TILE>(q_tile + NORMS_AT, lse + norms, delta + norms, first, queries);
      tell_when_loaded(barriers.tile_full);
      int end = end_of(first, keys.length, queries);
      for (int key = 0; key < end; key += STEP, loaded++) {
        int stage = loaded % STAGES;
        u32 to = stages + stage * 2 * STEP_BYTES;
        barrier_wait(barriers.free + 8 * stage, (loaded / STAGES & 1) ^ 1);
        load_rows<STEP>(to, keys.k, k_stride, key, keys.length);
        load_rows<STEP>(to + STEP_BYTES, keys.v, v_stride, key, keys.length);
        tell_when_loaded(barriers.full + 8 * stage);
      }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  int group = threadIdx.x / 128, row = group * 64 + (threadIdx.x / 32 % 4) * 16 + lane / 4;
  float factor = scale * LOG2E;
  int used = 0;
  for (int round = 0;; round++) {
    wait_loaded(barriers.tile_full, round & 1);
    int segment = tile[0], first = tile[1];
    if (segment < 0) break;
    int begin = q_offsets[segment], queries = q_offsets[segment + 1] - begin;
    int length = k_offsets[segment + 1] - k_offsets[segment], ahead = length - queries;
    int end = end_of(first, length, queries);
    u32 our_queries = q_tile + group * 64 * 128, our_gradients = gradients + group * 64 * 128;
    const float* norms = reinterpret_cast<const float*>(memory + NORMS_AT) + row;
    float norm[2] = {norms[0] * LOG2E, norms[8] * LOG2E}, mean[2] = {norms[TILE], norms[TILE + 8]};

    float weight[STEP / 2], change[STEP / 2], sum[DIM / 2];
    u32 changes[STEP / 16][4];
#pragma unroll
    for (int i = 0; i < DIM / 2; i++) sum[i] = 0.f;
    for (int key = 0; key < end; key += STEP, used++) {
      u32 k_tile = stages + used % STAGES * 2 * STEP_BYTES, v_tile = k_tile + STEP_BYTES;
      barriers.wait_full(used);
      wgmma_begin();
      multiply_across<TILE, STEP>(weight, our_queries, k_tile);
      wgmma_commit();
      multiply_across<TILE, STEP>(change, our_gradients, v_tile);
      wgmma_commit();
      // The last step's product is done.
      wgmma_wait<2>();
      pin(changes);
      if (key > 0) barriers.release_stage(used - 1);
      wgmma_wait<1>();
      pin(weight);
      bool masked = key + STEP > length || (CAUSAL && key + STEP - 1 > first + group * 64 + ahead);
      float total = 0.f;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int limit = length - 1;
        if (CAUSAL) limit = min(limit, first + row + half * 8 + ahead);
        limit -= key + (lane & 3) * 2;
#pragma unroll
        for (int n = 0; n < STEP / 8; n++)
#pragma unroll
          for (int j = 0; j < 2; j++) {
            float w = exp2_fast(weight[n * 4 + half * 2 + j] * factor - norm[half]);
            if (masked && n * 8 + j > limit) w = 0.f;
            weight[n * 4 + half * 2 + j] = w;
            total += w;
          }
      }
      after(total);
      wgmma_wait<0>();
      pin(change);
#pragma unroll
      for (int i = 0; i < STEP / 2; i++) change[i] = weight[i] * (change[i] - mean[i / 2 % 2]);
      to_left<STEP>(changes, change);
      pin(changes), pin(sum);
      wgmma_begin();
      multiply<STEP>(sum, changes, k_tile);
      wgmma_commit();
    }
    wgmma_wait<0>();
    pin(sum);
    if (end > 0) barriers.release_stage(used - 1);

    asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
    int head = turn(round) % heads;
    elem* to = dq + (i64)(begin + first + group * 64) * dq_stride + head * HEAD_DIM;
    store_rows<TILE>(memory + group * 64 * 128, sum, scale, scale, queries - first - group * 64,
                     [&](int r) { return to + (i64)r * dq_stride; });
    barriers.release(barriers.tile_free);
  }
}
#endif
