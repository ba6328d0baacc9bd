// Attention on tensor cores by mma.sync m16n8k16 (FlashAttention-2, Dao 2023). Each warp owns 16 rows (or 32) of a tile; scores
// become weights in registers and are the left operand of the next product as they lie, so that nothing but K, V, Q and dout
// goes through shared memory. Widths that are no multiple of 16 are filled up with zeros there.
static constexpr int DIM = (HEAD_DIM + 15) / 16 * 16;
// Elements between two rows in shared memory: an odd number of 16-byte chunks, so that 8 rows touch all banks.
static constexpr int PITCH = DIM + 8;
static constexpr int CHUNKS = HEAD_DIM / 8;

// 16 bytes to shared memory; zeros where there is no row.
__device__ __forceinline__ void copy16(u32 to, const void* from, bool is) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(is ? 16 : 0) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

__device__ __forceinline__ void ldmatrix(u32 (&r)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_trans(u32 (&r)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}
__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Addresses of the operands in a matrix of rows of PITCH elements: of 16 rows as the left operand; of 16 columns of the
// transposed as the right operand (scores); of 16 rows as the right operand (what weights are multiplied with).
__device__ __forceinline__ u32 left_at(u32 matrix, int row, int column) {
  int lane = threadIdx.x & 31;
  return matrix + ((row + (lane & 15)) * PITCH + column + (lane >> 4) * 8) * 2;
}
__device__ __forceinline__ u32 across_at(u32 matrix, int row, int column) {
  int lane = threadIdx.x & 31;
  return matrix + ((row + (lane & 7) + (lane >> 4) * 8) * PITCH + column + ((lane >> 3) & 1) * 8) * 2;
}

// Rows `first` up to `first + ROWS` of a matrix in global memory; those from `count` on are zeros. A thread copies one chunk of
// every row that is a multiple of EVERY after its first: an address takes one addition.
static constexpr int LANES = CHUNKS <= 8 ? 8 : 16;
template <int ROWS, int THREADS>
__device__ __forceinline__ void load_rows(u32 to, const elem* from, i64 stride, int first, int count) {
  constexpr int EVERY = THREADS / LANES;
  int chunk = threadIdx.x % LANES, row = threadIdx.x / LANES;
  if (chunk >= CHUNKS) return;
  to += (row * PITCH + chunk * 8) * 2;
  from += (first + row) * stride + chunk * 8;
  int rows = count - first - row;
#pragma unroll
  for (int i = 0; i < ROWS; i += EVERY, from += EVERY * stride) copy16(to + i * PITCH * 2, from, i < rows);
}
#if PAGED
// The same from blocks of a pool: a lane looks up one block.
template <int ROWS, int THREADS>
__device__ __forceinline__ void load_blocks(u32 to, const elem* pool, const Keys& keys, int first) {
  constexpr int EVERY = THREADS / LANES;
  int chunk = threadIdx.x % LANES, row = threadIdx.x / LANES, first_block = first >> keys.block_bits;
  int looked_up = first_block + (threadIdx.x & 31);
  u32 block = looked_up << keys.block_bits < keys.length ? keys.table[looked_up] : 0;
  to += (row * PITCH + chunk * 8) * 2;
  pool += chunk * 8;
#pragma unroll
  for (int i = 0; i < ROWS; i += EVERY) {
    int at = first + row + i;
    i64 base = (i64)__shfl_sync(FULL, block, (at >> keys.block_bits) - first_block) * keys.block_stride;
    const elem* from = pool + base + (at & ((1 << keys.block_bits) - 1)) * HEAD_DIM;
    if (chunk < CHUNKS) copy16(to + i * PITCH * 2, from, at < keys.length);
  }
}
#endif
// Columns after HEAD_DIM, once: no copy writes them.
template <int ROWS, int THREADS> __device__ __forceinline__ void clear_rest(elem* matrix) {
  if (HEAD_DIM < DIM)
    for (int row = threadIdx.x; row < ROWS; row += THREADS)
      *reinterpret_cast<uint4*>(matrix + row * PITCH + HEAD_DIM) = make_uint4(0, 0, 0, 0);
}

// c[MT][16, N] += a · bᵀ for rows of `a` from `row` on, and N rows of `b`.
template <int MT, int N>
__device__ __forceinline__ void multiply_across(float (&c)[MT][N / 8][4], u32 a, int row, u32 b) {
#pragma unroll
  for (int d = 0; d < DIM; d += 16) {
    u32 left[MT][4];
#pragma unroll
    for (int m = 0; m < MT; m++) ldmatrix(left[m], left_at(a, row + m * 16, d));
#pragma unroll
    for (int n = 0; n < N; n += 16) {
      u32 right[4];
      ldmatrix(right, across_at(b, n, d));
#pragma unroll
      for (int m = 0; m < MT; m++) {
        mma(c[m][n / 8], left[m], right[0], right[1]);
        mma(c[m][n / 8 + 1], left[m], right[2], right[3]);
      }
    }
  }
}
// c[MT][16, DIM] += a · b for N columns of `a` in registers, and N rows of `b`.
template <int MT, int N>
__device__ __forceinline__ void multiply(float (&c)[MT][DIM / 8][4], const u32 (&a)[MT][N / 16][4], u32 b) {
#pragma unroll
  for (int n = 0; n < N; n += 16) {
#pragma unroll
    for (int d = 0; d < DIM; d += 16) {
      u32 right[4];
      ldmatrix_trans(right, left_at(b, n, d));
#pragma unroll
      for (int m = 0; m < MT; m++) {
        mma(c[m][d / 8], a[m][n / 16], right[0], right[1]);
        mma(c[m][d / 8 + 1], a[m][n / 16], right[2], right[3]);
      }
    }
  }
}
// A product's result as a left operand.
template <int N> __device__ __forceinline__ void to_left(u32 (&to)[N / 16][4], const float (&from)[N / 8][4]) {
#pragma unroll
  for (int n = 0; n < N / 16; n++) {
    to[n][0] = to_bf16x2(from[2 * n][0], from[2 * n][1]);
    to[n][1] = to_bf16x2(from[2 * n][2], from[2 * n][3]);
    to[n][2] = to_bf16x2(from[2 * n + 1][0], from[2 * n + 1][1]);
    to[n][3] = to_bf16x2(from[2 * n + 1][2], from[2 * n + 1][3]);
  }
}

// Rows of a warp's result through its own 16 rows of shared memory, 16 bytes at a time.
template <typename At>
__device__ __forceinline__ void store_rows(elem* matrix, int row, const float (&c)[DIM / 8][4], float first, float second,
                                           int count, At at) {
  int lane = threadIdx.x & 31;
#pragma unroll
  for (int d = 0; d < DIM / 8; d++) {
    elem* to = matrix + (row + lane / 4) * PITCH + d * 8 + (lane & 3) * 2;
    *reinterpret_cast<u32*>(to) = to_bf16x2(c[d][0] * first, c[d][1] * first);
    *reinterpret_cast<u32*>(to + 8 * PITCH) = to_bf16x2(c[d][2] * second, c[d][3] * second);
  }
  __syncwarp();
#pragma unroll
  for (int i = lane; i < 16 * CHUNKS; i += 32) {
    int r = row + i / CHUNKS, chunk = i % CHUNKS;
    if (r < count)
      *reinterpret_cast<uint4*>(at(r) + chunk * 8) = *reinterpret_cast<const uint4*>(matrix + r * PITCH + chunk * 8);
  }
}

// Threads that share a row hold neighbouring columns.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(FULL, x, 1));
  return fmaxf(x, __shfl_xor_sync(FULL, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(FULL, x, 1);
  return x + __shfl_xor_sync(FULL, x, 2);
}

#ifdef FORWARD
// One block: 64 * WARP_TILES queries of one head, which pass over the keys in tiles of 64.
static constexpr int MT = WARP_TILES, THREADS = 128, ROWS = 64 * MT, KEYS = 64;

extern "C" __global__ void __launch_bounds__(THREADS)
    forward_tensor(elem* __restrict__ out, float* __restrict__ lse, const elem* __restrict__ q, int q_stride,
                   const u32* __restrict__ q_offsets, int segments, int tokens, KEY_OPERANDS, int heads, int kv_heads,
                   float scale) {
  extern __shared__ __align__(16) elem memory[];
  int head = blockIdx.x, segment, level;
  if (!find_tile(blockIdx.y, q_offsets, segments, ROWS, (tokens + ROWS - 1) / ROWS, segment, level)) return;
  int begin = q_offsets[segment], queries = q_offsets[segment + 1] - begin, first = level * ROWS;
  Keys keys = KEYS_OF(segment, head / (heads / kv_heads), kv_heads);
  // Query i sees keys up to i + ahead.
  int ahead = keys.length - queries;
  int end = CAUSAL ? min(keys.length, first + ROWS + ahead) : keys.length;

  u32 q_tile = shared_address(memory), k_tile = q_tile + ROWS * PITCH * 2, v_tile = k_tile + KEYS * PITCH * 2;
  clear_rest<ROWS + 2 * KEYS, THREADS>(memory);
#if PAGED
  auto load_k = [&](int key) { load_blocks<KEYS, THREADS>(k_tile, keys.k, keys, key); };
  auto load_v = [&](int key) { load_blocks<KEYS, THREADS>(v_tile, keys.v, keys, key); };
#else
  auto load_k = [&](int key) { load_rows<KEYS, THREADS>(k_tile, keys.k, k_stride, key, keys.length); };
  auto load_v = [&](int key) { load_rows<KEYS, THREADS>(v_tile, keys.v, v_stride, key, keys.length); };
#endif
  load_rows<ROWS, THREADS>(q_tile, q + (i64)begin * q_stride + head * HEAD_DIM, q_stride, first, queries);
  load_k(0);
  commit();

  int lane = threadIdx.x & 31, row = (threadIdx.x >> 5) * 16 * MT;
  float factor = scale * LOG2E;
  float sum[MT][DIM / 8][4] = {}, most[MT][2], total[MT][2] = {};
#pragma unroll
  for (int m = 0; m < MT; m++) most[m][0] = most[m][1] = -INFINITE;

  for (int key = 0; key < end; key += KEYS) {
    wait<0>();
    __syncthreads();
    load_v(key);
    commit();
    float score[MT][KEYS / 8][4] = {};
    multiply_across<MT, KEYS>(score, q_tile, row, k_tile);
    wait<0>();
    __syncthreads();
    if (key + KEYS < end) {
      load_k(key + KEYS);
      commit();
    }
    if (key + KEYS > keys.length || (CAUSAL && key + KEYS - 1 > first + row + ahead)) {
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          int limit = keys.length - 1 - key;
          if (CAUSAL) limit = min(limit, first + row + m * 16 + lane / 4 + half * 8 + ahead - key);
#pragma unroll
          for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int j = 0; j < 2; j++)
              if (n * 8 + (lane & 3) * 2 + j > limit) score[m][n][half * 2 + j] = -INFINITE;
        }
    }
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float now = most[m][half];
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) now = fmaxf(now, fmaxf(score[m][n][half * 2], score[m][n][half * 2 + 1]));
        now = quad_max(now);
        // A row that has seen no key yet: any finite number will do.
        float shift = now == -INFINITE ? 0.f : now * factor;
        float faded = exp2_fast(most[m][half] * factor - shift), part = 0.f;
        most[m][half] = now;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
          for (int j = 0; j < 2; j++) {
            float weight = exp2_fast(score[m][n][half * 2 + j] * factor - shift);
            score[m][n][half * 2 + j] = weight;
            part += weight;
          }
        total[m][half] = total[m][half] * faded + part;
#pragma unroll
        for (int d = 0; d < DIM / 8; d++) sum[m][d][half * 2] *= faded, sum[m][d][half * 2 + 1] *= faded;
      }
    u32 weights[MT][KEYS / 16][4];
#pragma unroll
    for (int m = 0; m < MT; m++) to_left<KEYS>(weights[m], score[m]);
    multiply<MT, KEYS>(sum, weights, v_tile);
  }
  wait<0>();
  __syncthreads();

#pragma unroll
  for (int m = 0; m < MT; m++) {
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float all = quad_sum(total[m][half]);
      inverse[half] = all > 0.f ? 1.f / all : 0.f;
      int at = first + row + m * 16 + lane / 4 + half * 8;
      if (lse && (lane & 3) == 0 && at < queries)
        lse[(i64)head * tokens + begin + at] = all > 0.f ? most[m][half] * scale + logf(all) : -INFINITE;
    }
    store_rows(memory, row + m * 16, sum[m], inverse[0], inverse[1], queries - first,
               [&](int r) { return out + ((i64)(begin + first + r) * heads + head) * HEAD_DIM; });
  }
}
#endif

#ifdef BACKWARD
static constexpr int THREADS = 256, ROWS = 128, STEP = 64;

// Numbers of STEP queries. One that is not there, or sees no key, gets a norm that makes its weights zero.
__device__ __forceinline__ void load_norms(float* norms, float* means, const float* lse, const float* delta, i64 at, int first,
                                           int queries, int count) {
  for (int i = threadIdx.x; i < count; i += THREADS) {
    bool is = first + i < queries;
    float norm = is ? lse[at + first + i] : -INFINITE;
    norms[i] = norm == -INFINITE ? INFINITE : norm * LOG2E;
    means[i] = is ? delta[at + first + i] : 0.f;
  }
}

// One block: 128 keys of one head, which pass over the queries of the heads that read them.
extern "C" __global__ void __launch_bounds__(THREADS)
    backward_key_tensor(elem* __restrict__ dk, int dk_stride, elem* __restrict__ dv, int dv_stride,
                        const elem* __restrict__ dout, const float* __restrict__ lse, const float* __restrict__ delta,
                        const elem* __restrict__ q, int q_stride, const u32* __restrict__ q_offsets, int segments, int tokens,
                        KEY_OPERANDS, int key_tokens, int heads, int kv_heads, float scale) {
  extern __shared__ __align__(16) elem memory[];
  int kv_head = blockIdx.x, segment, level;
  if (!find_tile(blockIdx.y, k_offsets, segments, ROWS, (key_tokens + ROWS - 1) / ROWS, segment, level)) return;
  int begin = q_offsets[segment], queries = q_offsets[segment + 1] - begin;
  Keys keys = KEYS_OF(segment, kv_head, kv_heads);
  // The first keys are seen by most queries: they come first.
  int tile = CAUSAL ? (keys.length + ROWS - 1) / ROWS - 1 - level : level, first = tile * ROWS;
  int group = heads / kv_heads, ahead = keys.length - queries;
  // Queries from the first that sees a key of the tile.
  int start = CAUSAL ? max(0, first - ahead) / STEP : 0;
  int steps = max(0, (queries + STEP - 1) / STEP - start), all = steps * group;

  u32 k_tile = shared_address(memory), v_tile = k_tile + ROWS * PITCH * 2, stages = v_tile + ROWS * PITCH * 2;
  constexpr int STAGE = 2 * STEP * PITCH * 2;
  float* norms = reinterpret_cast<float*>(memory + 2 * (ROWS + 2 * STEP) * PITCH);
  clear_rest<2 * ROWS + 4 * STEP, THREADS>(memory);
  auto load = [&](int step) {
    int head = kv_head * group + step / steps, at = (start + step % steps) * STEP;
    u32 stage = stages + (step & 1) * STAGE;
    load_rows<STEP, THREADS>(stage, q + (i64)begin * q_stride + head * HEAD_DIM, q_stride, at, queries);
    load_rows<STEP, THREADS>(stage + STAGE / 2, dout + ((i64)begin * heads + head) * HEAD_DIM, (i64)heads * HEAD_DIM, at,
                             queries);
    float* to = norms + (step & 1) * 2 * STEP;
    load_norms(to, to + STEP, lse, delta, (i64)head * tokens + begin, at, queries, STEP);
  };
  load_rows<ROWS, THREADS>(k_tile, keys.k, k_stride, first, keys.length);
  load_rows<ROWS, THREADS>(v_tile, keys.v, v_stride, first, keys.length);
  if (all > 0) load(0);
  commit();

  int lane = threadIdx.x & 31, row = (threadIdx.x >> 5) * 16;
  float factor = scale * LOG2E;
  float key_sum[1][DIM / 8][4] = {}, value_sum[1][DIM / 8][4] = {};
  for (int step = 0; step < all; step++) {
    wait<0>();
    __syncthreads();
    if (step + 1 < all) {
      load(step + 1);
      commit();
    }
    int at = (start + step % steps) * STEP;
    u32 q_tile = stages + (step & 1) * STAGE, gradients = q_tile + STAGE / 2;
    const float* norm = norms + (step & 1) * 2 * STEP;

    float weight[1][STEP / 8][4] = {};
    multiply_across<1, STEP>(weight, k_tile, row, q_tile);
    bool masked = CAUSAL && first + row + 15 > at + ahead;
#pragma unroll
    for (int n = 0; n < STEP / 8; n++) {
      float2 shift = *reinterpret_cast<const float2*>(norm + n * 8 + (lane & 3) * 2);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float w = exp2_fast(weight[0][n][i] * factor - (i & 1 ? shift.y : shift.x));
        if (masked && first + row + lane / 4 + (i >> 1) * 8 > at + n * 8 + (lane & 3) * 2 + (i & 1) + ahead) w = 0.f;
        weight[0][n][i] = w;
      }
    }
    u32 left[1][STEP / 16][4];
    to_left<STEP>(left[0], weight[0]);
    multiply<1, STEP>(value_sum, left, gradients);

    float change[1][STEP / 8][4] = {};
    multiply_across<1, STEP>(change, v_tile, row, gradients);
#pragma unroll
    for (int n = 0; n < STEP / 8; n++) {
      float2 mean = *reinterpret_cast<const float2*>(norm + STEP + n * 8 + (lane & 3) * 2);
#pragma unroll
      for (int i = 0; i < 4; i++) change[0][n][i] = weight[0][n][i] * (change[0][n][i] - (i & 1 ? mean.y : mean.x));
    }
    to_left<STEP>(left[0], change[0]);
    multiply<1, STEP>(key_sum, left, q_tile);
  }
  wait<0>();
  __syncthreads();
  i64 token = (i64)k_offsets[segment] + first;
  store_rows(memory, row, key_sum[0], scale, scale, keys.length - first,
             [&](int r) { return dk + (token + r) * dk_stride + kv_head * HEAD_DIM; });
  store_rows(memory + ROWS * PITCH, row, value_sum[0], 1.f, 1.f, keys.length - first,
             [&](int r) { return dv + (token + r) * dv_stride + kv_head * HEAD_DIM; });
}

// One block: 128 queries of one head, which pass over the keys.
extern "C" __global__ void __launch_bounds__(THREADS)
    backward_query_tensor(elem* __restrict__ dq, int dq_stride, const elem* __restrict__ dout, const float* __restrict__ lse,
                          const float* __restrict__ delta, const elem* __restrict__ q, int q_stride,
                          const u32* __restrict__ q_offsets, int segments, int tokens, KEY_OPERANDS, int heads, int kv_heads,
                          float scale) {
  extern __shared__ __align__(16) elem memory[];
  int head = blockIdx.x, segment, level;
  if (!find_tile(blockIdx.y, q_offsets, segments, ROWS, (tokens + ROWS - 1) / ROWS, segment, level)) return;
  int begin = q_offsets[segment], queries = q_offsets[segment + 1] - begin, first = level * ROWS;
  Keys keys = KEYS_OF(segment, head / (heads / kv_heads), kv_heads);
  int ahead = keys.length - queries;
  int end = CAUSAL ? min(keys.length, first + ROWS + ahead) : keys.length;

  u32 q_tile = shared_address(memory), gradients = q_tile + ROWS * PITCH * 2, stages = gradients + ROWS * PITCH * 2;
  constexpr int STAGE = 2 * STEP * PITCH * 2;
  float* norms = reinterpret_cast<float*>(memory + 2 * (ROWS + 2 * STEP) * PITCH);
  clear_rest<2 * ROWS + 4 * STEP, THREADS>(memory);
  auto load = [&](int key, int step) {
    u32 stage = stages + (step & 1) * STAGE;
    load_rows<STEP, THREADS>(stage, keys.k, k_stride, key, keys.length);
    load_rows<STEP, THREADS>(stage + STAGE / 2, keys.v, v_stride, key, keys.length);
  };
  load_rows<ROWS, THREADS>(q_tile, q + (i64)begin * q_stride + head * HEAD_DIM, q_stride, first, queries);
  load_rows<ROWS, THREADS>(gradients, dout + ((i64)begin * heads + head) * HEAD_DIM, (i64)heads * HEAD_DIM, first, queries);
  load_norms(norms, norms + ROWS, lse, delta, (i64)head * tokens + begin, first, queries, ROWS);
  if (end > 0) load(0, 0);
  commit();
  __syncthreads();

  int lane = threadIdx.x & 31, row = (threadIdx.x >> 5) * 16;
  float factor = scale * LOG2E;
  float norm[2] = {norms[row + lane / 4], norms[row + lane / 4 + 8]};
  float mean[2] = {norms[ROWS + row + lane / 4], norms[ROWS + row + lane / 4 + 8]};
  float sum[1][DIM / 8][4] = {};
  for (int key = 0, step = 0; key < end; key += STEP, step++) {
    wait<0>();
    __syncthreads();
    if (key + STEP < end) {
      load(key + STEP, step + 1);
      commit();
    }
    u32 k_tile = stages + (step & 1) * STAGE, v_tile = k_tile + STAGE / 2;
    float weight[1][STEP / 8][4] = {}, change[1][STEP / 8][4] = {};
    multiply_across<1, STEP>(weight, q_tile, row, k_tile);
    multiply_across<1, STEP>(change, gradients, row, v_tile);
    bool masked = key + STEP > keys.length || (CAUSAL && key + STEP - 1 > first + row + ahead);
#pragma unroll
    for (int n = 0; n < STEP / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float w = exp2_fast(weight[0][n][i] * factor - norm[i >> 1]);
        if (masked) {
          int column = key + n * 8 + (lane & 3) * 2 + (i & 1);
          if (column >= keys.length || (CAUSAL && column > first + row + lane / 4 + (i >> 1) * 8 + ahead)) w = 0.f;
        }
        change[0][n][i] = w * (change[0][n][i] - mean[i >> 1]);
      }
    u32 left[1][STEP / 16][4];
    to_left<STEP>(left[0], change[0]);
    multiply<1, STEP>(sum, left, k_tile);
  }
  wait<0>();
  __syncthreads();
  store_rows(memory, row, sum[0], scale, scale, queries - first,
             [&](int r) { return dq + (i64)(begin + first + r) * dq_stride + head * HEAD_DIM; });
}
#endif
