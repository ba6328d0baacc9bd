__device__ __forceinline__ float power(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// What a sum of powers relative to `from` is worth relative to the larger `to`. Nothing has been summed at minus infinity.
__device__ __forceinline__ float rescale(float from, float to) { return from == MINUS_INFINITY ? 0.f : power(from - to); }

// Not `.nc`: the kernel before may have written it, and this one may have begun while that one ran.
__device__ __forceinline__ uint4 read16(const bf16* from) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}
// Each time anew: kept in registers over a loop, queries would push sums out of them.
__device__ __forceinline__ uint4 read_shared(const uint4* from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(shared_address(from)));
  return v;
}
__device__ __forceinline__ void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// An 8 x 8 matrix of 16-bit numbers in the registers of a warp, transposed.
__device__ __forceinline__ u32 transposed(u32 x) {
  u32 y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Warps that do a row together. They are a block, or one of several teams of a block that count their barriers by a number.
static constexpr int TEAM = ROW_WARPS * 32;
__device__ __forceinline__ int team_thread() { return threadIdx.x % TEAM; }
__device__ __forceinline__ void team_wait(int team) { asm volatile("bar.sync %0, %1;" ::"r"(team), "n"(TEAM) : "memory"); }

struct Context {
  const elem *q, *keys, *values;
  const u32* tables;
  elem* out;
  float* lse;
  int heads, kv_heads, max_blocks;
  float scale;  // times log2(e)

  // Where a token's key or value of a head begins, by its entry in the table.
  __device__ __forceinline__ i64 place(u32 block, int kv_head, int token) const {
    return ((i64)block * kv_heads + kv_head) * (BLOCK_SIZE * HEAD_DIM) + token % BLOCK_SIZE * HEAD_DIM;
  }
  // The query of a column of a section.
  __device__ __forceinline__ const elem* query(const Section& section, int kv_head, int column) const {
    int line = section.column + column;
    return q + ((i64)(section.row + line / PER_KV) * heads + kv_head * PER_KV + line % PER_KV) * HEAD_DIM;
  }
};

// What a warp has summed for tiles of 8 columns over its tokens. Of the scores of 16 tokens, thread (g, c) = (lane / 4,
// lane % 4) holds those of tokens g (numbers 0, 1) and g + 8 (numbers 2, 3) with columns 2c and 2c + 1; of a pair of
// dimensions, the sums of the first (0, 1) and of the second (2, 3) for the same columns.
template <int TILES> struct Sums {
  float out[TILES][PAIRS][4], best[TILES][2], sum[TILES][2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
      for (int x = 0; x < 2; x++) best[tile][x] = MINUS_INFINITY, sum[tile][x] = 0.f;
#pragma unroll
      for (int pair = 0; pair < PAIRS; pair++)
#pragma unroll
        for (int i = 0; i < 4; i++) out[tile][pair][i] = 0.f;
    }
  }

  // Scores to weights relative to the largest score yet, to which all that has been summed is brought. Only the first
  // `tokens` are there; at least one is.
  __device__ __forceinline__ void weigh(float (&scores)[TILES][4], int tokens, float scale) {
    int g = (threadIdx.x & 31) >> 2;
    float factor[TILES][2];
    bool grew = false;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int x = 0; x < 2; x++) {
        float a = g < tokens ? scores[tile][x] * scale : MINUS_INFINITY;
        float b = g + 8 < tokens ? scores[tile][2 + x] * scale : MINUS_INFINITY;
        float most = fmaxf(a, b);
#pragma unroll
        for (int offset = 4; offset < 32; offset <<= 1) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, offset));
        most = fmaxf(most, best[tile][x]);
        grew |= most != best[tile][x];
        factor[tile][x] = rescale(best[tile][x], most);
        best[tile][x] = most;
        scores[tile][x] = power(a - most), scores[tile][2 + x] = power(b - most);
        sum[tile][x] = sum[tile][x] * factor[tile][x] + (scores[tile][x] + scores[tile][2 + x]);
      }
    if (__any_sync(0xffffffffu, grew)) {
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int pair = 0; pair < PAIRS; pair++)
#pragma unroll
          for (int i = 0; i < 4; i++) out[tile][pair][i] *= factor[tile][i & 1];
    }
  }

  // A warp's sums of its own, to slots of their tiles. `columns` are there.
  template <typename Step> __device__ __forceinline__ void store(float* slots, int columns) {
    int g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      float* slot = slots + tile * SLOT;
#pragma unroll
      for (int x = 0; x < 2; x++) {
#pragma unroll
        for (int offset = 4; offset < 32; offset <<= 1) sum[tile][x] += __shfl_xor_sync(0xffffffffu, sum[tile][x], offset);
        if (8 * tile + 2 * c + x >= columns) continue;
        if (g == 0) slot[8 * HEAD_DIM + 2 * c + x] = best[tile][x], slot[8 * HEAD_DIM + 8 + 2 * c + x] = sum[tile][x];
#pragma unroll
        for (int pair = 0; pair < PAIRS; pair++)
#pragma unroll
          for (int second = 0; second < 2; second++) {
            int dim = Step::dimension(pair, g, second);
            if (HEAD_DIM % 64 == 0 || dim < HEAD_DIM) slot[(2 * c + x) * HEAD_DIM + dim] = out[tile][pair][2 * second + x];
          }
      }
    }
  }
};

// Sixteen tokens of a warp, straight from global memory to tensor cores. Keys and values wait in registers, requested before
// the sixteen tokens before them are computed; `low` and `high` point to the first and to the ninth token.
struct Tensor {
  // Of 16 bytes of the queries of a tile.
  static constexpr int QUERIES = KEY_CHUNKS * 32;
  uint4 keys[KEY_CHUNKS][2];
  uint4 values[VALUE_CHUNKS][4];

  static __device__ __forceinline__ int dimension(int pair, int g, int second) {
    return 64 * (pair / 4) + 8 * g + 2 * (pair % 4) + second;
  }
  __device__ __forceinline__ void request_keys(const bf16* low, const bf16* high) {
    int g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3;
#pragma unroll
    for (int j = 0; j < KEY_CHUNKS; j++) {
      int at = g * HEAD_DIM + 32 * j + 8 * c;
      bool inside = HEAD_DIM % 32 == 0 || 32 * j + 8 * c < HEAD_DIM;
      keys[j][0] = inside ? read16(low + at) : make_uint4(0, 0, 0, 0);
      keys[j][1] = inside ? read16(high + at) : make_uint4(0, 0, 0, 0);
    }
  }
  __device__ __forceinline__ void request_values(const bf16* low, const bf16* high) {
    int g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3;
#pragma unroll
    for (int j = 0; j < VALUE_CHUNKS; j++) {
      int at = 2 * c * HEAD_DIM + 64 * j + 8 * g;
      bool inside = HEAD_DIM % 64 == 0 || 64 * j + 8 * g < HEAD_DIM;
#pragma unroll
      for (int r = 0; r < 4; r++)
        values[j][r] = inside ? read16((r < 2 ? low : high) + at + (r & 1) * HEAD_DIM) : make_uint4(0, 0, 0, 0);
    }
  }
  __device__ __forceinline__ void score(float (&scores)[1][4], const uint4* queries) {
#pragma unroll
    for (int i = 0; i < 4; i++) scores[0][i] = 0.f;
#pragma unroll
    for (int j = 0; j < KEY_CHUNKS; j++) {
      uint4 low = keys[j][0], high = keys[j][1], q = read_shared(queries + j * 32 + (threadIdx.x & 31));
      mma(scores[0], low.x, high.x, low.y, high.y, q.x, q.y);
      mma(scores[0], low.z, high.z, low.w, high.w, q.z, q.w);
    }
  }
  __device__ __forceinline__ void add(Sums<1>& sums, const float (&weights)[1][4], int tokens) {
    int c = threadIdx.x & 3;
    // Values of tokens that are not there may be NaN, which a weight of zero does not silence.
    if (tokens < STEP) {
#pragma unroll
      for (int r = 0; r < 4; r++)
        if (2 * c + (r & 1) + 4 * (r & 2) >= tokens)
#pragma unroll
          for (int j = 0; j < VALUE_CHUNKS; j++) values[j][r] = make_uint4(0, 0, 0, 0);
    }
    u32 low = transposed(to_bf16x2(weights[0][0], weights[0][1])), high = transposed(to_bf16x2(weights[0][2], weights[0][3]));
#pragma unroll
    for (int j = 0; j < VALUE_CHUNKS; j++) {
#pragma unroll
      for (int t = 0; t < 4; t++) {
        u32 v0 = word(values[j][0], t), v1 = word(values[j][1], t), v2 = word(values[j][2], t), v3 = word(values[j][3], t);
        mma(sums.out[0][4 * j + t], __byte_perm(v0, v1, 0x5410), __byte_perm(v0, v1, 0x7632), __byte_perm(v2, v3, 0x5410),
            __byte_perm(v2, v3, 0x7632), low, high);
      }
    }
  }
  static __device__ __forceinline__ u32 word(const uint4& v, int at) {
    return at == 0 ? v.x : at == 1 ? v.y : at == 2 ? v.z : v.w;
  }
  // A thread's part of a team's queries, in the order in which `score` reads them.
  static __device__ __forceinline__ uint4 fetch(const Context& context, const Section& section, int kv_head) {
    static_assert(QUERIES <= TEAM, "a thread holds 16 bytes of the queries");
    int at = team_thread(), column = (at & 31) >> 2, dim = 32 * (at >> 5) + 8 * (at & 3);
    bool inside = column < section.columns && dim < HEAD_DIM;
    return inside ? *reinterpret_cast<const uint4*>(context.query(section, kv_head, column) + dim) : make_uint4(0, 0, 0, 0);
  }
  static __device__ __forceinline__ void stage(uint4* to, uint4 fetched, const Context&, const Section&, int, int) {
    if (team_thread() < QUERIES) to[team_thread()] = fetched;
  }
};

// In plain f32, for parity: the same threads hold the same numbers.
template <int TILES> struct Scalar {
  static constexpr int QUERIES = 8 * HEAD_DIM / 4;
  const elem *keys[2], *values[2];

  static __device__ __forceinline__ int dimension(int pair, int g, int second) {
    return 64 * (pair / 4) + 8 * g + 2 * (pair % 4) + second;
  }
  __device__ __forceinline__ void request_keys(const elem* low, const elem* high) { keys[0] = low, keys[1] = high; }
  __device__ __forceinline__ void request_values(const elem* low, const elem* high) { values[0] = low, values[1] = high; }
  __device__ __forceinline__ void score(float (&scores)[TILES][4], const uint4* staged) {
    const float* queries = reinterpret_cast<const float*>(staged);
    int g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3;
    for (int tile = 0; tile < TILES; tile++)
      for (int i = 0; i < 4; i++) {
        const elem* key = keys[i >> 1] + g * HEAD_DIM;
        const float* query = queries + (8 * tile + 2 * c + (i & 1)) * HEAD_DIM;
        float sum = 0.f;
        for (int dim = 0; dim < HEAD_DIM; dim++) sum += to_float(key[dim]) * query[dim];
        scores[tile][i] = sum;
      }
  }
  __device__ __forceinline__ void add(Sums<TILES>& sums, const float (&weights)[TILES][4], int tokens) {
    int g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
      for (int token = 0; token < min(tokens, STEP); token++) {
        int from = (token & 7) * 4 + c;
        float p0 = __shfl_sync(0xffffffffu, token < 8 ? weights[tile][0] : weights[tile][2], from);
        float p1 = __shfl_sync(0xffffffffu, token < 8 ? weights[tile][1] : weights[tile][3], from);
        const elem* value = values[token >> 3] + (token & 7) * HEAD_DIM;
#pragma unroll
        for (int pair = 0; pair < PAIRS; pair++) {
          int dim = dimension(pair, g, 0);
          if (HEAD_DIM % 64 != 0 && dim >= HEAD_DIM) continue;
          float(&out)[4] = sums.out[tile][pair];
          float first = to_float(value[dim]), second = to_float(value[dim + 1]);
          out[0] += p0 * first, out[1] += p1 * first, out[2] += p0 * second, out[3] += p1 * second;
        }
      }
  }
  static __device__ __forceinline__ uint4 fetch(const Context&, const Section&, int) { return make_uint4(0, 0, 0, 0); }
  static __device__ __forceinline__ void stage(uint4* to, uint4, const Context& context, const Section& section, int kv_head,
                                               int tiles) {
    float* queries = reinterpret_cast<float*>(to);
    for (int at = team_thread(); at < tiles * 8 * HEAD_DIM; at += TEAM) {
      int column = at / HEAD_DIM;
      queries[at] = column < section.columns ? to_float(context.query(section, kv_head, column)[at % HEAD_DIM]) : 0.f;
    }
  }
};

// What waits for the memory: 16 tokens after 16 tokens of a warp, `stride` apart.
template <typename Step, int TILES> struct Walk {
  const u32* table;
  int kv_head, token, end, stride;
  // Of the tokens that are requested next. Eight tokens lie in one block, sixteen may lie in two.
  u32 low_block, high_block;
  Step step;

  __device__ __forceinline__ void look_up(int at) {
    if (at >= end) return;
    low_block = __ldg(table + at / BLOCK_SIZE);
    // Past the end the last block stands in.
    high_block = BLOCK_SIZE >= STEP ? low_block : __ldg(table + min(at + 8, end - 1) / BLOCK_SIZE);
  }
  // Requests the first tokens.
  __device__ __forceinline__ void begin(const Context& context, const Section& section, int kv, int first, int last, int apart) {
    table = context.tables + (i64)section.row * context.max_blocks;
    kv_head = kv, token = first, end = last, stride = apart, low_block = 0, high_block = 0;
    look_up(token);
    if (token < end) {
      i64 low = context.place(low_block, kv_head, token), high = context.place(high_block, kv_head, token + 8);
      step.request_keys(context.keys + low, context.keys + high);
      step.request_values(context.values + low, context.values + high);
    }
    look_up(token + stride);
  }
  __device__ __forceinline__ void run(const Context& context, const uint4* queries, Sums<TILES>& sums) {
    for (; token < end; token += stride) {
      int next = token + stride;
      i64 low = context.place(low_block, kv_head, next), high = context.place(high_block, kv_head, next + 8);
      float scores[TILES][4];
      step.score(scores, queries);
      if (next < end) step.request_keys(context.keys + low, context.keys + high);
      look_up(next + stride);
      sums.weigh(scores, end - token, context.scale);
      step.add(sums, scores, end - token);
      if (next < end) step.request_values(context.values + low, context.values + high);
    }
  }
};

__device__ __forceinline__ void store_two(float* to, float a, float b) { *reinterpret_cast<float2*>(to) = make_float2(a, b); }
__device__ __forceinline__ void store_two(bf16* to, float a, float b) { *reinterpret_cast<u32*>(to) = to_bf16x2(a, b); }

template <typename T> struct Choose { typedef Tensor Step; };
template <> struct Choose<float> { typedef Scalar<1> Step; };

// Shared memory of a block on the line of rows.
struct Shared {
  float4 outputs[ROW_WARPS][PAIRS][32];
  float maxima[ROW_WARPS][8], sums[ROW_WARPS][8];
  uint4 queries[Choose<elem>::Step::QUERIES];
};

// Adds up the warps of a team, which did other tokens of the same row, and writes a partial result to `slot` or, where it is
// null, the result. Code that runs once is kept short: fetching it takes longer than running it.
__device__ __forceinline__ void write(const Context& context, Sums<1>& sums, int row, int kv_head, float* slot, Shared& shared,
                                      int team) {
  int lane = threadIdx.x & 31, warp = team_thread() >> 5, g = lane >> 2, c = lane & 3;
#pragma unroll
  for (int x = 0; x < 2; x++) {
#pragma unroll
    for (int offset = 4; offset < 32; offset <<= 1) sums.sum[0][x] += __shfl_xor_sync(0xffffffffu, sums.sum[0][x], offset);
  }
  if (g == 0) {
    *reinterpret_cast<float2*>(&shared.maxima[warp][2 * c]) = make_float2(sums.best[0][0], sums.best[0][1]);
    *reinterpret_cast<float2*>(&shared.sums[warp][2 * c]) = make_float2(sums.sum[0][0], sums.sum[0][1]);
  }
#pragma unroll
  for (int pair = 0; pair < PAIRS; pair++) {
    float(&out)[4] = sums.out[0][pair];
    shared.outputs[warp][pair][lane] = make_float4(out[0], out[1], out[2], out[3]);
  }
  team_wait(team);
  float2 most = make_float2(MINUS_INFINITY, MINUS_INFINITY);
#pragma unroll 4
  for (int other = 0; other < ROW_WARPS; other++) {
    float2 one = *reinterpret_cast<const float2*>(&shared.maxima[other][2 * c]);
    most.x = fmaxf(most.x, one.x), most.y = fmaxf(most.y, one.y);
  }
  i64 head = (i64)row * context.heads + kv_head * PER_KV + 2 * c;
#pragma unroll 1
  for (int pair = warp; pair < PAIRS; pair += ROW_WARPS) {
    float4 all = make_float4(0.f, 0.f, 0.f, 0.f);
    float2 total = make_float2(0.f, 0.f);
#pragma unroll 4
    for (int other = 0; other < ROW_WARPS; other++) {
      float2 one = *reinterpret_cast<const float2*>(&shared.maxima[other][2 * c]);
      float2 sum = *reinterpret_cast<const float2*>(&shared.sums[other][2 * c]);
      float4 out = shared.outputs[other][pair][lane];
      float share = rescale(one.x, most.x), next_share = rescale(one.y, most.y);
      total.x += sum.x * share, total.y += sum.y * next_share;
      all.x += out.x * share, all.y += out.y * next_share, all.z += out.z * share, all.w += out.w * next_share;
    }
    int dim = Choose<elem>::Step::dimension(pair, g, 0);
    if (HEAD_DIM % 64 != 0 && dim >= HEAD_DIM) continue;
#pragma unroll
    for (int x = 0; x < 2; x++) {
      if (2 * c + x >= PER_KV) continue;
      float a = x ? all.y : all.x, b = x ? all.w : all.z, largest = x ? most.y : most.x, sum = x ? total.y : total.x;
      bool first = pair == 0 && g == 0;
      if (slot) {
        store_two(slot + (2 * c + x) * HEAD_DIM + dim, a, b);
        if (first) slot[8 * HEAD_DIM + 2 * c + x] = largest, slot[8 * HEAD_DIM + 8 + 2 * c + x] = sum;
      } else {
        store_two(context.out + (head + x) * HEAD_DIM + dim, a / sum, b / sum);
        if (first && context.lse) context.lse[head + x] = (largest + __log2f(sum)) * 0.69314718f;
      }
    }
  }
}

// A team's share of the line of rows.
__device__ __forceinline__ void attend_rows(const Context& context, float* partials, const Section* sections,
                                            const Share* shares, int number, Shared& shared, int team) {
  typedef Choose<elem>::Step Step;
  Share share = shares[number];
  Section section = share.section;
  int at = share.begin, index = share.index, kv_head, first, last;
  Walk<Step, 1> walk;
  uint4 queries;
  auto begin = [&]() {
    int inside = at - section.start;
    kv_head = inside / section.units, first = inside % section.units, last = min(section.units, first + share.end - at);
    int token = section.begin + (first + (team_thread() >> 5)) * STEP;
    walk.begin(context, section, kv_head, token, min(section.begin + last * STEP, section.end), ROW_WARPS * STEP);
    queries = Step::fetch(context, section, kv_head);
  };
  if (at < share.end) begin();
  while (at < share.end) {
    Step::stage(shared.queries, queries, context, section, kv_head, 1);
    team_wait(team);
    Sums<1> sums;
    sums.clear();
    walk.run(context, shared.queries, sums);

    int row = section.row, head = kv_head;
    bool whole = section.alone && last - first == section.units;
    float* slot = whole ? nullptr : partials + (number + index * context.kv_heads + kv_head) * (i64)SLOT;
    // What comes next is on its way while this is written.
    at += last - first;
    if (at < share.end) {
      if (at == section.start + section.units * context.kv_heads) section = sections[++index];
      begin();
    }
    write(context, sums, row, head, slot, shared, team);
  }
}

// The line of rows, a block per share.
extern "C" __global__ void __launch_bounds__(TEAM, ROW_BLOCKS)
    paged_rows(const elem* q, const elem* keys, const elem* values, const u32* tables, elem* out, float* lse, float* partials,
               const Section* sections, const Share* shares, int heads, int kv_heads, int max_blocks, float scale) {
  extern __shared__ uint4 memory[];
  allow_next();
  wait_for_previous();
  Context context = {q, keys, values, tables, out, lse, heads, kv_heads, max_blocks, scale * 1.44269504f};
  attend_rows(context, partials, sections, shares, blockIdx.x, *reinterpret_cast<Shared*>(memory), 0);
}
