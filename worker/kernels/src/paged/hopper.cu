// Prefixes by wgmma, and rows in the same launch: some blocks do the one and the others do the other, so that tensor cores and
// memory are busy at the same time. Of the three teams of a block that does prefixes, two compute 64 columns each (queries by
// heads, the rows of their products) of a tile over 128 tokens at a time, which the third loads. Where a tile has no more than
// 64 columns, each of the two takes half of the tokens.
//
// A matrix in shared memory is panels of 64 numbers: 128 rows of 128 bytes, whose 16-byte parts are permuted by the row's number
// as wgmma's 128-byte swizzle has it.
static constexpr int PANELS = HEAD_DIM / 64, PANEL = CHUNK * 128, MATRIX = PANELS * PANEL, STAGES = 3;
static constexpr int COMPUTING = 2 * TEAM, TEAMS = 3;
// Threads that load a row, and rows that a team loads at once: eight or sixteen, so that they are permuted alike.
static constexpr int PARTS = HEAD_DIM / 8, AT_ONCE = TEAM / PARTS;

// Shared memory of a block that does prefixes.
struct Tiles {
  u8 queries[MATRIX], keys[STAGES][MATRIX], values[STAGES][MATRIX];
};
// Barriers: of the queries, and of each stage of keys and of values.
struct Barriers {
  u32 q_full, q_free, k_full, k_free, v_full, v_free;
};

__device__ __forceinline__ u32 place_of(int row, int part) { return part / 8 * PANEL + row * 128 + ((part ^ row) & 7) * 16; }

// The queries of a section, zeros where there are none.
__device__ __forceinline__ void load_queries(u32 to, const Context& context, const Section& section, int kv_head) {
  int part = team_thread() % PARTS, row = team_thread() / PARTS;
  to += place_of(row, part);
#pragma unroll 4
  for (int i = 0; i < WIDE_COLUMNS; i += AT_ONCE) {
    bool inside = row + i < section.columns;
    const elem* from = inside ? context.query(section, kv_head, row + i) + 8 * part : context.q;
    copy16(to + i * 128, from, inside);
  }
}
// Where the tokens of a chunk lie in the pool, in parts of 16 bytes: lane i has the place of the eight tokens from 8i on.
__device__ __forceinline__ u32 look_up(const Context& context, const u32* table, int kv_head, int token, int end) {
  int at = token + 8 * (threadIdx.x & 31);
  if (at >= min(token + CHUNK, end)) return 0;
  return (__ldg(table + at / BLOCK_SIZE) * context.kv_heads + kv_head) * (BLOCK_SIZE * PARTS) + at % BLOCK_SIZE * PARTS;
}
// Keys or values of a chunk of which `tokens` are there; zeros after them. Copies must keep up with the products: each takes a
// shuffle, a sum, and itself.
__device__ __forceinline__ void load_chunk(u32 to, const elem* pool, u32 places, int tokens) {
  int part = team_thread() % PARTS, row = team_thread() / PARTS;
  to += place_of(row, part);
  const uint4* from = reinterpret_cast<const uint4*>(pool) + row % 8 * PARTS + part;
  if (tokens >= CHUNK) {
#pragma unroll 8
    for (int i = 0; i < CHUNK; i += AT_ONCE)
      copy16(to + i * 128, from + __shfl_sync(0xffffffffu, places, row / 8 + i / 8), true);
  } else {
#pragma unroll 4
    for (int i = 0; i < CHUNK; i += AT_ONCE)
      copy16(to + i * 128, from + __shfl_sync(0xffffffffu, places, row / 8 + i / 8), row + i < tokens);
  }
}

// Of the teams that compute: each waits until the other has given its products to the tensor cores, and computes its
// exponentials while those of the other run.
__device__ __forceinline__ void my_turn(int team) { asm volatile("bar.sync %0, %1;" ::"r"(4 + team), "n"(COMPUTING) : "memory"); }
__device__ __forceinline__ void your_turn(int team) {
  asm volatile("bar.arrive %0, %1;" ::"r"(5 - team), "n"(COMPUTING) : "memory");
}
__device__ __forceinline__ void both() { asm volatile("bar.sync 6, %0;" ::"n"(COMPUTING) : "memory"); }

// score[64, TOKENS] = queries · keysᵀ
template <int TOKENS> __device__ __forceinline__ void multiply_keys(float (&score)[TOKENS / 2], u32 queries, u32 keys) {
#pragma unroll
  for (int d = 0; d < HEAD_DIM / 16; d++)
    wgmma(score, across(queries + d / 4 * PANEL + d % 4 * 32), across(keys + d / 4 * PANEL + d % 4 * 32), d > 0);
}
// sum[64, HEAD_DIM] += weights · values
template <int TOKENS>
__device__ __forceinline__ void multiply_values(float (&sum)[HEAD_DIM / 2], const u32 (&weights)[TOKENS / 16][4], u32 values) {
#pragma unroll
  for (int k = 0; k < TOKENS / 16; k++) wgmma(sum, weights[k], along<CHUNK>(values + k * 16 * 128));
}

// What a thread has of a team's product, whose rows are columns of the section: of row 16 * warp + lane / 4 and the eighth after
// it, numbers 2 * (lane % 4) and the next of every eight.
struct Wide {
  float sum[HEAD_DIM / 2], most[2], total[2];
};

// Weights of the scores relative to the largest yet, of which only the first `tokens` are there; what has been summed fades.
template <int TOKENS>
__device__ __forceinline__ void weigh(float (&score)[TOKENS / 2], Wide& wide, float (&faded)[2], int tokens, float scale) {
  int column = (threadIdx.x & 3) * 2;
  if (tokens < TOKENS) {
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++)
      if (i / 4 * 8 + column + i % 2 >= tokens) score[i] = MINUS_INFINITY;
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float most = MINUS_INFINITY;
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n++) most = fmaxf(most, fmaxf(score[4 * n + 2 * half], score[4 * n + 2 * half + 1]));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
    most = fmaxf(most * scale, wide.most[half]);
    // A team that has seen no token yet: any finite number will do.
    float shift = most == MINUS_INFINITY ? 0.f : most, part = 0.f;
    faded[half] = power(wide.most[half] - shift), wide.most[half] = most;
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        float weight = power(score[4 * n + 2 * half + j] * scale - shift);
        score[4 * n + 2 * half + j] = weight, part += weight;
      }
    wide.total[half] = wide.total[half] * faded[half] + part;
  }
}

template <int TOKENS>
__device__ __forceinline__ void to_left(u32 (&weights)[TOKENS / 16][4], const float (&score)[TOKENS / 2]) {
#pragma unroll
  for (int n = 0; n < TOKENS / 16; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) weights[n][i] = to_bf16x2(score[8 * n + 2 * i], score[8 * n + 2 * i + 1]);
}

// The assembler moves a wait for products upwards, before the exponentials that are meant to run beside them, but not across a
// store of what they add up to.
__device__ __forceinline__ void after(float x, float* unused) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(shared_address(unused + threadIdx.x / 32)), "f"(x) : "memory");
}

// Adds the second team's sums to those of the first, which did other tokens of the same columns. Queries are no longer read:
// their memory is where they meet.
__device__ __forceinline__ void join(Wide& wide, u8* queries, float4* tops, int team) {
  float4* place = reinterpret_cast<float4*>(queries) + team_thread();
  both();
  if (team == 1) {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; i++)
      place[i * TEAM] = make_float4(wide.sum[4 * i], wide.sum[4 * i + 1], wide.sum[4 * i + 2], wide.sum[4 * i + 3]);
    tops[team_thread()] = make_float4(wide.most[0], wide.most[1], wide.total[0], wide.total[1]);
  }
  both();
  if (team == 0) {
    float4 top = tops[team_thread()];
    float most[2] = {fmaxf(wide.most[0], top.x), fmaxf(wide.most[1], top.y)};
    float mine[2] = {rescale(wide.most[0], most[0]), rescale(wide.most[1], most[1])};
    float other[2] = {rescale(top.x, most[0]), rescale(top.y, most[1])};
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; i++) {
      float4 sum = place[i * TEAM];
      wide.sum[4 * i] = wide.sum[4 * i] * mine[0] + sum.x * other[0];
      wide.sum[4 * i + 1] = wide.sum[4 * i + 1] * mine[0] + sum.y * other[0];
      wide.sum[4 * i + 2] = wide.sum[4 * i + 2] * mine[1] + sum.z * other[1];
      wide.sum[4 * i + 3] = wide.sum[4 * i + 3] * mine[1] + sum.w * other[1];
    }
    wide.total[0] = wide.total[0] * mine[0] + top.z * other[0], wide.total[1] = wide.total[1] * mine[1] + top.w * other[1];
    wide.most[0] = most[0], wide.most[1] = most[1];
  }
}

// A team's sums to the slots of their tiles, from the column `first` on. `columns` are there.
__device__ __forceinline__ void store(const Wide& wide, float* slots, int first, int columns) {
  int lane = threadIdx.x & 31, row = first + (team_thread() >> 5) * 16 + (lane >> 2);
#pragma unroll
  for (int half = 0; half < 2; half++, row += 8) {
    float total = wide.total[half];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    if (row >= columns) continue;
    float *slot = slots + row / 8 * SLOT, *to = slot + row % 8 * HEAD_DIM + 2 * (lane & 3);
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n++)
      *reinterpret_cast<float2*>(to + 8 * n) = make_float2(wide.sum[4 * n + 2 * half], wide.sum[4 * n + 2 * half + 1]);
    if ((lane & 3) == 0) slot[8 * HEAD_DIM + row % 8] = wide.most[half], slot[8 * HEAD_DIM + 8 + row % 8] = total;
  }
}

// Chunks [used, used + chunks) of all that a block does, from the token `begin` of a section on, by a team that computes. Few
// columns are SPLIT: each team does its half of the tokens of every chunk.
template <bool SPLIT>
__device__ __forceinline__ void compute(const Context& context, const Section& section, int begin, int used, int chunks, int part,
                                        const Tiles& tiles, const Barriers& barriers, int team, float* unused, Wide& wide) {
  static constexpr int TOKENS = SPLIT ? CHUNK / 2 : CHUNK;
  u32 queries = shared_address(tiles.queries) + (SPLIT ? 0 : team * 64 * 128);
  u32 keys = shared_address(tiles.keys) + (SPLIT ? team * TOKENS * 128 : 0);
  u32 values = shared_address(tiles.values) + (SPLIT ? team * TOKENS * 128 : 0);
  int tokens = section.end - begin - (SPLIT ? team * TOKENS : 0);
  auto release = [&](u32 barrier) {
    __syncwarp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(barrier);
  };
  float score[TOKENS / 2], faded[2];
  u32 weights[TOKENS / 16][4];
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 2; i++) wide.sum[i] = 0.f;
#pragma unroll
  for (int half = 0; half < 2; half++) wide.most[half] = MINUS_INFINITY, wide.total[half] = 0.f;

  int stage = used % STAGES, phase = used / STAGES & 1;
  wait_loaded(barriers.q_full, part & 1);
  wait_loaded(barriers.k_full + 8 * stage, phase);
  my_turn(team);
  wgmma_begin();
  multiply_keys<TOKENS>(score, queries, keys + stage * MATRIX);
  wgmma_commit();
  your_turn(team);
  wgmma_wait<0>();
  pin(score);
  release(barriers.k_free + 8 * stage);
  weigh<TOKENS>(score, wide, faded, tokens, context.scale);
  to_left<TOKENS>(weights, score);
  for (int chunk = 1; chunk < chunks; chunk++) {
    int old = stage, old_phase = phase;
    if (++stage == STAGES) stage = 0, phase ^= 1;
    barrier_wait(barriers.k_full + 8 * stage, phase);
    wait_loaded(barriers.v_full + 8 * old, old_phase);
    pin(score), pin(weights), pin(wide.sum);
    my_turn(team);
    wgmma_begin();
    multiply_keys<TOKENS>(score, queries, keys + stage * MATRIX);
    wgmma_commit();
    multiply_values<TOKENS>(wide.sum, weights, values + old * MATRIX);
    wgmma_commit();
    your_turn(team);
    wgmma_wait<1>();
    pin(score);
    release(barriers.k_free + 8 * stage);
    weigh<TOKENS>(score, wide, faded, tokens - chunk * CHUNK, context.scale);
    after(wide.total[0] + wide.total[1], unused);
    wgmma_wait<0>();
    pin(wide.sum), pin(weights);
    release(barriers.v_free + 8 * old);
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; i++) wide.sum[i] *= faded[i / 2 % 2];
    to_left<TOKENS>(weights, score);
  }
  // The next section's queries may come.
  if (!SPLIT) release(barriers.q_free);
  wait_loaded(barriers.v_full + 8 * stage, phase);
  pin(weights), pin(wide.sum);
  wgmma_begin();
  multiply_values<TOKENS>(wide.sum, weights, values + stage * MATRIX);
  wgmma_commit();
  wgmma_wait<0>();
  pin(wide.sum);
  release(barriers.v_free + 8 * stage);
}

// Calls `each` for the parts of a block's share of prefixes: of a section and KV head, chunks [first, first + chunks).
template <typename Each>
__device__ __forceinline__ void each_part(const Share& share, const Section* sections, int kv_heads, const Each& each) {
  Section section = share.section;
  int part = 0, used = 0;
  for (int at = share.begin, index = share.index; at < share.end; part++) {
    int inside = at - section.start, kv_head = inside / section.units, first = inside % section.units;
    int chunks = min(section.units - first, share.end - at);
    each(section, index, kv_head, section.begin + first * CHUNK, chunks, part, used);
    used += chunks, at += chunks;
    if (at == section.start + section.units * kv_heads && at < share.end) section = sections[++index];
  }
}

// The line of prefixes, one share for each of the first blocks, and that of rows, a share for each team of the others.
extern "C" __global__ void __launch_bounds__(TEAMS * TEAM, 1)
    paged_together(const elem* q, const elem* keys, const elem* values, const u32* tables, elem* out, float* lse,
                   float* partials, float* wide_partials, const int* header, const Section* sections,
                   const Section* tile_sections, const Share* shares, const Share* tile_shares, int heads, int kv_heads,
                   int max_blocks, float scale) {
  extern __shared__ __align__(1024) u8 tiles_memory[];
  __shared__ __align__(8) u64 barrier_memory[2 + 4 * STAGES];
  __shared__ float4 tops[TEAM];
  __shared__ float unused[COMPUTING / 32];
  Context context = {q, keys, values, tables, out, lse, heads, kv_heads, max_blocks, scale * 1.44269504f};
  allow_next();
  wait_for_previous();
  int team = threadIdx.x / TEAM, block = blockIdx.x, others = header[3];
  if (block >= others) {
    Shared& shared = reinterpret_cast<Shared*>(tiles_memory)[team];
    attend_rows(context, partials, sections, shares, (block - others) * TEAMS + team, shared, 1 + team);
    return;
  }
  Tiles& tiles = *reinterpret_cast<Tiles*>(tiles_memory);
  Barriers barriers;
  barriers.q_full = shared_address(barrier_memory), barriers.q_free = barriers.q_full + 8;
  barriers.k_full = barriers.q_free + 8, barriers.k_free = barriers.k_full + 8 * STAGES;
  barriers.v_full = barriers.k_free + 8 * STAGES, barriers.v_free = barriers.v_full + 8 * STAGES;
  if (threadIdx.x == 0) {
    barrier_init(barriers.q_full, TEAM), barrier_init(barriers.q_free, COMPUTING / 32);
    for (int stage = 0; stage < STAGES; stage++) {
      barrier_init(barriers.k_full + 8 * stage, TEAM), barrier_init(barriers.k_free + 8 * stage, COMPUTING / 32);
      barrier_init(barriers.v_full + 8 * stage, TEAM), barrier_init(barriers.v_free + 8 * stage, COMPUTING / 32);
    }
  }
  __syncthreads();
  Share share = tile_shares[block];
  if (team == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    u32 query_tile = shared_address(tiles.queries), key_tiles = shared_address(tiles.keys), value_tiles = shared_address(tiles.values);
    each_part(share, tile_sections, kv_heads, [&](const Section& section, int, int kv_head, int begin, int chunks, int part, int used) {
      const u32* table = tables + (i64)section.row * max_blocks;
      u32 places = 0, next = look_up(context, table, kv_head, begin, section.end);
      barrier_wait(barriers.q_free, (part & 1) ^ 1);
      load_queries(query_tile, context, section, kv_head);
      tell_when_loaded(barriers.q_full);
      // Keys are loaded before the values of the chunk before them, as they are used.
      for (int chunk = 0; chunk <= chunks; chunk++) {
        int token = begin + chunk * CHUNK;
        if (chunk < chunks) {
          int stage = (used + chunk) % STAGES;
          barrier_wait(barriers.k_free + 8 * stage, ((used + chunk) / STAGES & 1) ^ 1);
          load_chunk(key_tiles + stage * MATRIX, keys, next, section.end - token);
          tell_when_loaded(barriers.k_full + 8 * stage);
        }
        if (chunk > 0) {
          int stage = (used + chunk - 1) % STAGES;
          barrier_wait(barriers.v_free + 8 * stage, ((used + chunk - 1) / STAGES & 1) ^ 1);
          load_chunk(value_tiles + stage * MATRIX, values, places, section.end - token + CHUNK);
          tell_when_loaded(barriers.v_full + 8 * stage);
        }
        places = next, next = look_up(context, table, kv_head, token + CHUNK, section.end);
      }
    });
    asm volatile("cp.async.wait_all;" ::: "memory");
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    if (team == 1) your_turn(team);
    each_part(share, tile_sections, kv_heads, [&](const Section& section, int index, int kv_head, int begin, int chunks, int part, int used) {
      bool split = section.columns <= WIDE_COLUMNS / 2;
      Wide wide;
      if (split) {
        compute<true>(context, section, begin, used, chunks, part, tiles, barriers, team, unused, wide);
        join(wide, tiles.queries, tops, team);
        __syncwarp();
        if ((threadIdx.x & 31) == 0) barrier_arrive(barriers.q_free);
      } else {
        compute<false>(context, section, begin, used, chunks, part, tiles, barriers, team, unused, wide);
      }
      float* slots = wide_partials + (block + index * kv_heads + kv_head) * (i64)(WIDE_TILES * SLOT);
      if (!split || team == 0) store(wide, slots, split ? 0 : team * 64, section.columns);
    });
  }
}
