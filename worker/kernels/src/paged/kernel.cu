// Attention of one new token per sequence over paged keys and values.
//
// The work of a step is a line of units: 16 tokens of one row and KV head. It is cut into equal shares for as many blocks of
// threads as are resident at once, so that one long row and many short ones load the card alike. A block walks through its
// share; a row that lies in several shares leaves a partial result in each, which a last kernel merges in a fixed order.
// Prefixes that groups of rows share are a line of their own, of 64 tokens for a tile of up to 128 query heads of the group.
//
// Scores and outputs are computed transposed: tokens (then dimensions) are the 16 rows of mma.m16n8k16, and the 7 or 8 query
// heads of a KV head its 8 columns, so that no row of the tensor core is padding. Of a row, keys and values come straight from
// global memory: a thread reads 16 bytes of one, and which dimension meets which index of the product is free as long as both
// sides agree. A warp waits for no other until its share of a row is done. Over a prefix the warps of a block do the same
// tokens for different heads, and these tokens wait in shared memory.
//
// Compiled for ELEM, HEAD_DIM, BLOCK_SIZE (tokens of a block), PER_KV (query heads per KV head), GROUPED, MERGE_WARPS (of a
// block that merges).

// Warps of a block, and blocks of a multiprocessor: of rows, and of prefixes.
static constexpr int ROW_WARPS = 4, ROW_BLOCKS = 3, PREFIX_WARPS = 4, PREFIX_BLOCKS = 2;
// Tokens that a warp takes at once, and those of a prefix that a block has in shared memory.
static constexpr int STEP = 16, CHUNK = 64;
// Tiles of 8 columns (query heads): one for a row, up to four for each warp of a block over a prefix.
static constexpr int WIDE = 4, WIDE_TILES = WIDE * PREFIX_WARPS, WIDE_COLUMNS = 8 * WIDE_TILES;
static constexpr int KEY_CHUNKS = (HEAD_DIM + 31) / 32, VALUE_CHUNKS = (HEAD_DIM + 63) / 64;
// Pairs of dimensions that a thread sums for two heads.
static constexpr int PAIRS = 4 * VALUE_CHUNKS;
// Floats of a partial result of 8 columns: unscaled outputs, maxima, sums.
static constexpr int SLOT = 8 * HEAD_DIM + 16;
#define MINUS_INFINITY __int_as_float(0xff800000)

// A stretch of a line: a row, or a tile of columns over a prefix; for each KV head in turn.
struct __align__(16) Section {
  int start;       // on the line
  int units;       // of each KV head
  int row;         // whose table is read, and from which columns count
  int column;      // first query head of the tile, counted through the rows: (row - first) * PER_KV + head
  int columns;     // of the tile
  int begin, end;  // tokens
  int alone;       // a row without a prefix
};

// A block's part of a line, with the section in which it begins.
struct __align__(16) Share {
  int begin, end, index, unused;
  Section section;
};

// Where the parts of a row are.
struct __align__(16) Row {
  int section, start, units, alone;  // of its own tokens; -1: there are none
  int tile, tile_start, tile_units;  // the first of its group's tiles, or -1
  int width;                         // columns of each tile
  int column;                        // its first head among the group's columns
  int prefix;                        // tokens that it shares
  int unused[2];
};

__device__ __forceinline__ int share_begin(int share, int shares, int length) {
  return (int)((i64)share * length / shares);
}
// The share that holds a place on the line.
__device__ __forceinline__ int share_of(int place, int shares, int length) {
  return (int)((((i64)place + 1) * shares - 1) / length);
}

// Sums of all threads before this one, and of all; `parts` has 32 numbers.
__device__ __forceinline__ u64 scan(u64 value, u64& total, u64* parts) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  u64 sum = value;
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    u64 other = __shfl_up_sync(0xffffffffu, sum, offset);
    if (lane >= offset) sum += other;
  }
  __syncthreads();
  if (lane == 31) parts[warp] = sum;
  __syncthreads();
  u64 before = 0, all = 0;
  for (int other = 0; other < (int)(blockDim.x >> 5); other++) {
    if (other == warp) before = all;
    all += parts[other];
  }
  total = all;
  return before + sum - value;
}

// How many shares a line is cut into, of at least so many units each. Where it costs few of them, a multiple of the stretches
// between ends of rows: with rows of one length no share has an end inside.
__device__ __forceinline__ int shares_for(int length, int stretches, int most, int least) {
  int used = min(most, max(length / least, min(length, 1))), each = stretches > 0 ? used / stretches : 0;
  return 8 * each * stretches >= 7 * used ? each * stretches : used;
}

// Cuts a line of `count` sections. No share is empty: every one between two that hold parts of a row holds a part of it.
__device__ __forceinline__ void cut(int length, int count, int used, int most, int* header, const Section* sections,
                                    Share* shares) {
  if (threadIdx.x == 0) header[0] = length, header[1] = used;
  for (int share = threadIdx.x; share < most; share += blockDim.x) {
    if (share >= used) {
      shares[share] = Share{0, 0};
      continue;
    }
    int begin = share_begin(share, used, length);
    // The last section that starts at or before it. None is empty, so it holds the place.
    int low = 0, high = count;
    while (high - low > 1) {
      int middle = (low + high) / 2;
      if (sections[middle].start <= begin) low = middle;
      else high = middle;
    }
    shares[share] = Share{begin, share_begin(share + 1, used, length), low, 0, sections[low]};
  }
}

// One block. `header` has length and shares of the line of rows, then of prefixes; `tile_` is of prefixes.
extern "C" __global__ void __launch_bounds__(1024)
    paged_plan(const int* lengths, const int* groups, int rows, int kv_heads, int group_count, int most_tiles, int most_shares,
               int most_tile_shares, int* header, Section* sections, Section* tile_sections, Row* records, Share* shares,
               Share* tile_shares) {
  __shared__ u64 parts[32];
  int thread = threadIdx.x;
  for (int row = thread; row < rows; row += blockDim.x) records[row] = Row{-1, 0, 0, 1, -1, 0, 0, 1};
  __syncthreads();
  // Length of the line in the upper half, sections in the lower.
  u64 carry = 0, total;
  for (int first = 0; first < group_count; first += blockDim.x) {
    int at = first + thread, row = 0, count = 0, prefix = 0;
    if (at < group_count) row = groups[3 * at], count = groups[3 * at + 1], prefix = groups[3 * at + 2];
    bool shared = row >= 0 && count > 1 && count <= rows - row && prefix > 0;
    int columns = shared ? count * PER_KV : 0, tiles = (columns + WIDE_COLUMNS - 1) / WIDE_COLUMNS;
    // Tiles of equal width, in whole columns of tensor core products.
    int width = shared ? ((columns + tiles - 1) / tiles + 7) / 8 * 8 : 1;
    int units = shared ? (prefix + CHUNK - 1) / CHUNK : 0, length = units * kv_heads;
    u64 before = carry + scan(((u64)(tiles * length) << 32) | (u64)tiles, total, parts);
    carry += total;
    int section = (int)(u32)before, start = (int)(before >> 32);
    for (int tile = 0; tile < tiles && section + tile < most_tiles; tile++)
      tile_sections[section + tile] =
          Section{start + tile * length, units, row, tile * width, min(columns - tile * width, width), 0, prefix, 0};
    for (int member = 0; shared && member < count; member++)
      records[row + member] = Row{-1, 0, 0, 0, section, start, units, width, member * PER_KV, prefix};
  }
  __syncthreads();
  if (group_count > 0) {
    int length = (int)(carry >> 32), count = (int)(u32)carry, used = shares_for(length, count * kv_heads, most_tile_shares, 1);
    cut(length, count, used, most_tile_shares, header + 2, tile_sections, tile_shares);
  }
  carry = 0;
  for (int first = 0; first < rows; first += blockDim.x) {
    int row = first + thread, length = 0;
    Row record = {-1};
    if (row < rows) length = lengths[row], record = records[row];
    int units = max(length - record.prefix + STEP - 1, 0) / STEP;
    if (length <= 0) units = 0, record.tile = -1;
    u64 before = carry + scan(((u64)(units * kv_heads) << 32) | (u64)(units > 0), total, parts);
    carry += total;
    if (units > 0) {
      record.section = (int)(u32)before, record.start = (int)(before >> 32), record.units = units;
      sections[record.section] = Section{record.start, units, row, 0, PER_KV, record.prefix, length, record.alone};
    }
    if (row < rows) records[row] = record;
  }
  __syncthreads();
  int length = (int)(carry >> 32), count = (int)(u32)carry;
  // A unit for each warp.
  int used = shares_for(length, count * kv_heads, most_shares, ROW_WARPS);
  cut(length, count, used, most_shares, header, sections, shares);
}

__device__ __forceinline__ float power(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// What a sum of powers relative to `from` is worth relative to the larger `to`. Nothing has been summed at minus infinity.
__device__ __forceinline__ float rescale(float from, float to) { return from == MINUS_INFINITY ? 0.f : power(from - to); }

__device__ __forceinline__ uint4 read16(const bf16* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}
__device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }
// Each time anew: kept in registers over a loop, queries would push sums out of them.
__device__ __forceinline__ uint4 read_shared(const uint4* from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(shared_address(from)));
  return v;
}
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
  // A block's queries in the order in which `score` reads them.
  static __device__ __forceinline__ void stage(uint4* to, const Context& context, const Section& section, int kv_head, int) {
    for (int at = threadIdx.x; at < QUERIES; at += blockDim.x) {
      int column = (at & 31) >> 2, dim = 32 * (at >> 5) + 8 * (at & 3);
      bool inside = column < section.columns && dim < HEAD_DIM;
      to[at] = inside ? *reinterpret_cast<const uint4*>(context.query(section, kv_head, column) + dim) : make_uint4(0, 0, 0, 0);
    }
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
  static __device__ __forceinline__ void stage(uint4* to, const Context& context, const Section& section, int kv_head,
                                               int tiles) {
    float* queries = reinterpret_cast<float*>(to);
    for (int at = threadIdx.x; at < tiles * 8 * HEAD_DIM; at += blockDim.x) {
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

// Adds up the warps of a block, which did other tokens of the same row, and writes a partial result to `slot` or, where it is
// null, the result. Code that runs once is kept short: fetching it takes longer than running it.
__device__ __forceinline__ void write(const Context& context, Sums<1>& sums, int row, int kv_head, float* slot, Shared& shared) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3;
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
  __syncthreads();
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

// The line of rows, a block per share.
extern "C" __global__ void __launch_bounds__(ROW_WARPS * 32, ROW_BLOCKS)
    paged_rows(const elem* q, const elem* keys, const elem* values, const u32* tables, elem* out, float* lse, float* partials,
               const Section* sections, const Share* shares, int heads, int kv_heads, int max_blocks, float scale) {
  typedef Choose<elem>::Step Step;
  extern __shared__ uint4 memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  Context context = {q, keys, values, tables, out, lse, heads, kv_heads, max_blocks, scale * 1.44269504f};
  Share share = shares[blockIdx.x];
  Section section = share.section;
  int at = share.begin, index = share.index, kv_head, first, last;
  Walk<Step, 1> walk;
  auto begin = [&]() {
    int inside = at - section.start;
    kv_head = inside / section.units, first = inside % section.units, last = min(section.units, first + share.end - at);
    int token = section.begin + (first + (int)(threadIdx.x >> 5)) * STEP;
    walk.begin(context, section, kv_head, token, min(section.begin + last * STEP, section.end), ROW_WARPS * STEP);
  };
  if (at < share.end) begin();
  while (at < share.end) {
    Step::stage(shared.queries, context, section, kv_head, 1);
    __syncthreads();
    Sums<1> sums;
    sums.clear();
    walk.run(context, shared.queries, sums);

    int row = section.row, head = kv_head;
    bool whole = section.alone && last - first == section.units;
    float* slot = whole ? nullptr : partials + ((int)blockIdx.x + index * kv_heads + kv_head) * (i64)SLOT;
    // What comes next is on its way while this is written.
    at += last - first;
    if (at < share.end) {
      if (at == section.start + section.units * kv_heads) section = sections[++index];
      begin();
    }
    write(context, sums, row, head, slot, shared);
  }
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
  Step::stage(shared, context, section, kv_head, TILES * PREFIX_WARPS);
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

// A block per query head of a row: merges partial results, always in the order of the lines.
extern "C" __global__ void __launch_bounds__(MERGE_WARPS * 32)
    paged_merge(elem* out, float* lse, const float* partials, const float* wide_partials, const int* header, const Row* records,
                int heads, int kv_heads) {
  static constexpr int AT_ONCE = 4;
  __shared__ float outputs[MERGE_WARPS][HEAD_DIM], maxima[MERGE_WARPS], sums[MERGE_WARPS];
  int row = blockIdx.y, head = blockIdx.x, kv_head = head / PER_KV, column = head % PER_KV, wide_column = 0;
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  Row record = records[row];
  int4 lines = *reinterpret_cast<const int4*>(header);
  int own = 0, wide = 0;
  const float *slots = nullptr, *wide_slots = nullptr;
  if (record.section >= 0) {
    int start = record.start + kv_head * record.units, first = share_of(start, lines.y, lines.x);
    own = share_of(start + record.units - 1, lines.y, lines.x) - first + 1;
    slots = partials + (i64)(first + record.section * kv_heads + kv_head) * SLOT;
    // Written by the block that had all of it.
    if (own == 1 && record.alone) return;
  }
  if (GROUPED && record.tile >= 0) {
    int line = record.column + column, tile = line / record.width;
    int start = record.tile_start + (tile * kv_heads + kv_head) * record.tile_units;
    int first = share_of(start, lines.w, lines.z);
    wide = share_of(start + record.tile_units - 1, lines.w, lines.z) - first + 1;
    wide_column = line % record.width;
    i64 slot = first + (record.tile + tile) * kv_heads + kv_head;
    wide_slots = wide_partials + (slot * WIDE_TILES + wide_column / 8) * SLOT;
  }

  float most = MINUS_INFINITY, sum = 0.f, total[4] = {};
  for (int from = warp; from < own + wide; from += MERGE_WARPS * AT_ONCE) {
    float part_most[AT_ONCE], part_sum[AT_ONCE];
    float4 part[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      int at = from + i * MERGE_WARPS;
      part_most[i] = MINUS_INFINITY, part_sum[i] = 0.f, part[i] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (at >= own + wide) continue;
      const float* slot = at < own ? slots + (i64)at * SLOT : wide_slots + (i64)(at - own) * (WIDE_TILES * SLOT);
      int slot_column = at < own ? column : wide_column % 8;
      part_most[i] = slot[8 * HEAD_DIM + slot_column], part_sum[i] = slot[8 * HEAD_DIM + 8 + slot_column];
      if (4 * lane < HEAD_DIM) part[i] = *reinterpret_cast<const float4*>(slot + slot_column * HEAD_DIM + 4 * lane);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      float now = fmaxf(most, part_most[i]), before = rescale(most, now), share = rescale(part_most[i], now);
      most = now, sum = sum * before + part_sum[i] * share;
      total[0] = total[0] * before + part[i].x * share, total[1] = total[1] * before + part[i].y * share;
      total[2] = total[2] * before + part[i].z * share, total[3] = total[3] * before + part[i].w * share;
    }
  }
  if (lane == 0) maxima[warp] = most, sums[warp] = sum;
  if (4 * lane < HEAD_DIM)
    *reinterpret_cast<float4*>(&outputs[warp][4 * lane]) = make_float4(total[0], total[1], total[2], total[3]);
  __syncthreads();
  most = MINUS_INFINITY, sum = 0.f;
#pragma unroll
  for (int other = 0; other < MERGE_WARPS; other++) most = fmaxf(most, maxima[other]);
#pragma unroll
  for (int other = 0; other < MERGE_WARPS; other++) sum += sums[other] * rescale(maxima[other], most);
  i64 at = (i64)row * heads + head;
  // Of an unused row nothing was summed.
  float scale = sum == 0.f ? 0.f : 1.f / sum;
  for (int dim = threadIdx.x; dim < HEAD_DIM; dim += MERGE_WARPS * 32) {
    float all = 0.f;
#pragma unroll
    for (int other = 0; other < MERGE_WARPS; other++) all += outputs[other][dim] * rescale(maxima[other], most);
    out[at * HEAD_DIM + dim] = from_float<elem>(all * scale);
  }
  if (lse && threadIdx.x == 0) lse[at] = (most + __log2f(sum)) * 0.69314718f;
}
