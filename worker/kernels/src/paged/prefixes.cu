// Four 8 x 8 matrices; lane 8i + r gives the address of row r of the i-th.
__device__ __forceinline__ uint4 read_matrices(u32 row) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(row));
  return v;
}
__device__ __forceinline__ uint4 read_transposed(u32 row) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(row));
  return v;
}
// Copies 16 bytes, or writes zeros.
__device__ __forceinline__ void copy_async(u32 to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
#if GROUPED
// Sixteen tokens of a prefix from shared memory, where rows of keys, values and queries lie with their 16-byte parts permuted,
// so that eight rows are read without conflicts. A warp does all tokens for its tiles of columns.
template <int TILES> struct Staged {
  static constexpr int ROW = 8 * VALUE_CHUNKS, TOKENS = CHUNK * ROW, ROWS = PREFIX_WARPS * 32 / ROW;

  static __device__ __forceinline__ int dimension(int pair, int g, int second) { return 16 * pair + g + 8 * second; }
  static __device__ __forceinline__ int place(int row, int part) { return row * ROW + (part ^ (row & 7)); }

  static __device__ __forceinline__ void score(float (&scores)[TILES][4], const uint4* keys, int token, const uint4* queries) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int i = 0; i < 4; i++) scores[tile][i] = 0.f;
    // Neighbouring products go into different sums: none waits for the one before it.
#pragma unroll
    for (int j = 0; j < KEY_CHUNKS; j++) {
      uint4 q[TILES];
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
        q[tile] = read_matrices(shared_address(queries + place(8 * tile + (lane & 7), 4 * j + (lane >> 3))));
#pragma unroll
      for (int half = 0; half < 2; half++) {
        uint4 a = read_matrices(shared_address(keys + place(token + (lane & 15), 4 * j + 2 * half + (lane >> 4))));
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
          mma(scores[tile], a.x, a.y, a.z, a.w, half ? q[tile].z : q[tile].x, half ? q[tile].w : q[tile].y);
      }
    }
  }
  static __device__ __forceinline__ void add(Sums<TILES>& sums, const float (&weights)[TILES][4], const uint4* values, int token) {
    int lane = threadIdx.x & 31;
    u32 low[TILES], high[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      low[tile] = transposed(to_bf16x2(weights[tile][0], weights[tile][1]));
      high[tile] = transposed(to_bf16x2(weights[tile][2], weights[tile][3]));
    }
#pragma unroll
    for (int pair = 0; pair < PAIRS; pair++) {
      // Matrices: tokens 0 to 7 and dimensions 0 to 7, dimensions 8 to 15, then the same of tokens 8 to 15.
      int row = token + (lane & 7) + ((lane >> 4) << 3), part = 2 * pair + ((lane >> 3) & 1);
      uint4 a = read_transposed(shared_address(values + place(row, part)));
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) mma(sums.out[tile][pair], a.x, a.y, a.z, a.w, low[tile], high[tile]);
    }
  }
  static __device__ __forceinline__ void request_queries(uint4* to, const Context& context, const Section& section, int kv_head) {
    int part = threadIdx.x % ROW;
    for (int column = threadIdx.x / ROW; column < 8 * TILES * PREFIX_WARPS; column += ROWS) {
      bool inside = column < section.columns && 8 * part < HEAD_DIM;
      const elem* from = inside ? context.query(section, kv_head, column) + 8 * part : context.q;
      copy_async(shared_address(to + place(column, part)), from, inside);
    }
  }
  // The entries of a chunk in the table, one for every eight tokens, each held by a lane.
  static __device__ __forceinline__ u32 look_up(const u32* table, int token, int end) {
    int at = token + 8 * (threadIdx.x & 31);
    return at < min(token + CHUNK, end) ? __ldg(table + at / BLOCK_SIZE) : 0;
  }
  // Requests a chunk of keys and values. Tokens and dimensions that are not there become zeros.
  static __device__ __forceinline__ void request(uint4* keys, uint4* values, const Context& context, u32 blocks, int kv_head,
                                                 int token, int end) {
    int part = threadIdx.x % ROW;
#pragma unroll
    for (int first = 0; first < CHUNK; first += ROWS) {
      int row = first + threadIdx.x / ROW;
      u32 block = __shfl_sync(0xffffffffu, blocks, row / 8);
      bool inside = token + row < end && 8 * part < HEAD_DIM;
      i64 from = inside ? context.place(block, kv_head, token + row) + 8 * part : 0;
      copy_async(shared_address(keys + place(row, part)), context.keys + from, inside);
      copy_async(shared_address(values + place(row, part)), context.values + from, inside);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
};

// Chunks [first, last) of a prefix, in shared memory one after the other while the next one comes.
template <int TILES> __device__ __forceinline__ void attend_prefix(const Context& context, const Section& section, int kv_head,
                                                                   int first, int last, uint4* shared, const bf16*, float* slots) {
  typedef Staged<TILES> Step;
  uint4 *queries = shared, *chunks = shared + 8 * WIDE_TILES * Step::ROW;
  int warp = threadIdx.x >> 5, column = 8 * TILES * warp;
  const u32* table = context.tables + (i64)section.row * context.max_blocks;
  auto request = [&](int chunk, u32 blocks) {
    uint4* keys = chunks + (chunk & 1) * 2 * Step::TOKENS;
    Step::request(keys, keys + Step::TOKENS, context, blocks, kv_head, section.begin + chunk * CHUNK, section.end);
  };
  auto look_up = [&](int chunk) { return Step::look_up(table, section.begin + chunk * CHUNK, section.end); };
  u32 blocks = look_up(first);
  Step::request_queries(queries, context, section, kv_head);
  request(first, blocks);
  blocks = look_up(first + 1);
  queries += column * Step::ROW;
  Sums<TILES> sums;
  sums.clear();
  for (int chunk = first; chunk < last; chunk++) {
    if (chunk + 1 < last) {
      request(chunk + 1, blocks);
      blocks = look_up(chunk + 2);
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
    }
    __syncthreads();
    const uint4 *keys = chunks + (chunk & 1) * 2 * Step::TOKENS, *values = keys + Step::TOKENS;
    int tokens = min(section.end - section.begin - chunk * CHUNK, CHUNK);
    for (int token = 0; token < tokens; token += STEP) {
      float scores[TILES][4];
      Step::score(scores, keys, token, queries);
      sums.weigh(scores, tokens - token, context.scale);
      Step::add(sums, scores, values, token);
    }
    __syncthreads();
  }
  sums.template store<Step>(slots + TILES * warp * SLOT, section.columns - column);
}
template <int TILES> __device__ __forceinline__ void attend_prefix(const Context& context, const Section& section, int kv_head,
                                                                   int first, int last, uint4* shared, const float*, float* slots) {
  typedef Scalar<TILES> Step;
  int warp = threadIdx.x >> 5;
  Step::stage(shared, make_uint4(0, 0, 0, 0), context, section, kv_head, TILES * PREFIX_WARPS);
  __syncthreads();
  Sums<TILES> sums;
  sums.clear();
  Walk<Step, TILES> walk;
  walk.begin(context, section, kv_head, section.begin + first * CHUNK, min(section.begin + last * CHUNK, section.end), STEP);
  walk.run(context, shared + warp * TILES * Step::QUERIES, sums);
  sums.template store<Step>(slots + TILES * warp * SLOT, section.columns - 8 * TILES * warp);
  __syncthreads();
}

// The line of prefixes, a block per share.
extern "C" __global__ void __launch_bounds__(PREFIX_WARPS * 32, PREFIX_BLOCKS)
    paged_prefixes(const elem* q, const elem* keys, const elem* values, const u32* tables, float* partials,
                   const Section* sections, const Share* shares, int heads, int kv_heads, int max_blocks, float scale) {
  extern __shared__ uint4 shared[];
  Context context = {q, keys, values, tables, nullptr, nullptr, heads, kv_heads, max_blocks, scale * 1.44269504f};
  Share share = shares[blockIdx.x];
  Section section = share.section;
  for (int at = share.begin, index = share.index; at < share.end;) {
    int inside = at - section.start, kv_head = inside / section.units, first = inside % section.units;
    int last = min(section.units, first + share.end - at);
    float* slots = partials + ((int)blockIdx.x + index * kv_heads + kv_head) * (i64)(WIDE_TILES * SLOT);
    if (section.columns <= WIDE_COLUMNS / 2) attend_prefix<WIDE / 2>(context, section, kv_head, first, last, shared, keys, slots);
    else attend_prefix<WIDE>(context, section, kv_head, first, last, shared, keys, slots);
    at += last - first;
    if (at == section.start + section.units * kv_heads && at < share.end) section = sections[++index];
  }
}
#endif
