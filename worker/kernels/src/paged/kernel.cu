// Attention of one new token per sequence over paged keys and values.
//
// The work of a step is a line, on which 16 tokens of one row and KV head cost 1. It is cut into equal shares for as many
// blocks of threads as are resident at once, so that one long row and many short ones load the card alike. A block walks
// through its share; a row that lies in several shares leaves a partial result in each, which a second kernel merges in a
// fixed order.
//
// Scores and outputs are computed transposed: tokens (then dimensions) are the 16 rows of mma.m16n8k16, and the 7 or 8 query
// heads of a KV head its 8 columns, so that no row of the tensor core is padding. Its operands come straight from global
// memory: a thread reads 16 bytes of a key or value, and which dimension meets which index of the product is free as long as
// both sides agree. Nothing is staged in shared memory, and a warp waits for no other until its share of a row is done.
//
// Compiled for ELEM, HEAD_DIM, BLOCK_SIZE (tokens of a block), PER_KV (query heads per KV head), GROUPED, WIDE (tiles
// of 8 columns of a warp over a prefix), RESIDENT (blocks of a multiprocessor).

static constexpr int WARPS = 4;
// Tokens that a warp takes at once.
static constexpr int STEP = 16;
// A tile of 8 columns for a row, up to 4 warps with WIDE such tiles each for rows that share a prefix.
static constexpr int WIDE_TILES = WIDE * WARPS, WIDE_COLUMNS = 8 * WIDE_TILES;
// What a step of all warps of a block costs there.
#ifndef WIDE_COST
#define WIDE_COST 4
#endif
static constexpr int KEY_CHUNKS = (HEAD_DIM + 31) / 32, VALUE_CHUNKS = (HEAD_DIM + 63) / 64;
// Pairs of dimensions that a thread sums for two heads.
static constexpr int PAIRS = 4 * VALUE_CHUNKS;
// Floats of a partial result of 8 columns: unscaled outputs, maxima, sums.
static constexpr int SLOT = 8 * HEAD_DIM + 16;
#define MINUS_INFINITY __int_as_float(0xff800000)

// A stretch of the line: a row, or a tile of columns (query heads of several rows) over a prefix; for each KV head in turn.
struct __align__(16) Section {
  int start;       // on the line
  int units;       // of each KV head: 16 tokens of a row, or a step of all warps over a prefix
  int row;         // whose table is read, and from which columns count
  int column;      // first query head of the tile, counted through the rows: (row - first) * PER_KV + head
  int columns;     // of the tile
  int begin, end;  // tokens
  int across;      // warps side by side over the columns of a prefix; 0: a row's own tokens
  int alone;       // a row without a prefix
  int unused[3];

  __device__ __forceinline__ int cost() const { return across ? WIDE_COST : 1; }
};

// A block's part of the line, with the section in which it begins.
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

// Sums of all threads before this one, and of all; `parts` has 33 numbers.
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

// One block. Sections of prefix tiles come first, then those of rows with tokens of their own.
extern "C" __global__ void __launch_bounds__(1024) paged_plan(const int* lengths, const int* groups, int rows, int kv_heads,
                                                              int group_count, int most_tiles, int most_shares, int* header,
                                                              Section* sections, Row* records, Share* shares) {
  __shared__ u64 parts[33];
  int thread = threadIdx.x;
  for (int row = thread; row < rows; row += blockDim.x) records[row] = Row{-1, 0, 0, 1, -1};
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
    int across = width <= 8 * WIDE ? 1 : width <= 16 * WIDE ? 2 : 4, tokens = STEP * WARPS / across;
    int units = shared ? (prefix + tokens - 1) / tokens : 0, length = units * kv_heads * WIDE_COST;
    u64 before = carry + scan(((u64)(tiles * length) << 32) | (u64)tiles, total, parts);
    carry += total;
    int section = (int)(u32)before, start = (int)(before >> 32);
    for (int tile = 0; tile < tiles && section + tile < most_tiles; tile++)
      sections[section + tile] = Section{start + tile * length, units,  row,    tile * width, min(columns - tile * width, width),
                                         0,                     prefix, across, 0};
    for (int member = 0; shared && member < count; member++)
      records[row + member] = Row{-1, 0, 0, 0, section, start, units, width, member * PER_KV, prefix};
  }
  __syncthreads();
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
      sections[record.section] = Section{record.start,  units,  row, 0, PER_KV,
                                         record.prefix, length, 0,   record.alone};
    }
    if (row < rows) records[row] = record;
  }
  __syncthreads();
  int length = (int)(carry >> 32), count = (int)(u32)carry;
  // A share is at least a step of all warps. So none is empty: every one between two that hold parts of a row holds a part.
  int used = min(most_shares, max(length / WARPS, min(length, 1)));
  if (thread == 0) header[0] = length, header[1] = used;
  for (int share = thread; share < most_shares; share += blockDim.x) {
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

__device__ __forceinline__ float power(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// What a sum of powers relative to `from` is worth relative to the larger `to`. Nothing has been summed at minus infinity.
__device__ __forceinline__ float rescale(float from, float to) { return from == MINUS_INFINITY ? 0.f : power(from - to); }

template <bool KEEP> __device__ __forceinline__ uint4 read16(const bf16* from) {
  uint4 v;
  if (KEEP)
    asm volatile("ld.global.nc.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  else
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
  return v;
}

// From shared memory, each time anew: kept in registers over the loop, queries would push sums out of them.
__device__ __forceinline__ uint4 read_shared(const uint4* from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"((u32)__cvta_generic_to_shared(from)));
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

// Sixteen tokens of a warp, `low` and `high` pointing to the first and to the ninth of them. Of the scores, thread (g, c) =
// (lane / 4, lane % 4) holds those of tokens g (numbers 0, 1) and g + 8 (numbers 2, 3) with heads 2c and 2c + 1. Of the
// output, for pair p = 4j + t, it holds dimensions 64j + 8g + 2t (numbers 0, 1) and the next (2, 3) of the same heads.

// On tensor cores. Keys and values wait in registers, requested before the sixteen tokens before them are computed.
template <int TILES> struct Tensor {
  uint4 keys[KEY_CHUNKS][2];
  uint4 values[VALUE_CHUNKS][4];

  __device__ __forceinline__ void request_keys(const bf16* low, const bf16* high) {
    int g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3;
#pragma unroll
    for (int j = 0; j < KEY_CHUNKS; j++) {
      int at = g * HEAD_DIM + 32 * j + 8 * c;
      bool inside = HEAD_DIM % 32 == 0 || 32 * j + 8 * c < HEAD_DIM;
      keys[j][0] = inside ? read16<(TILES > 1)>(low + at) : make_uint4(0, 0, 0, 0);
      keys[j][1] = inside ? read16<(TILES > 1)>(high + at) : make_uint4(0, 0, 0, 0);
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
        values[j][r] = inside ? read16<(TILES > 1)>((r < 2 ? low : high) + at + (r & 1) * HEAD_DIM) : make_uint4(0, 0, 0, 0);
    }
  }
  // Values of tokens that are not there may be NaN, which a weight of zero does not silence.
  __device__ __forceinline__ void drop_values(int tokens) {
    int c = threadIdx.x & 3;
#pragma unroll
    for (int r = 0; r < 4; r++)
      if (2 * c + (r & 1) + 4 * (r & 2) >= tokens)
#pragma unroll
        for (int j = 0; j < VALUE_CHUNKS; j++) values[j][r] = make_uint4(0, 0, 0, 0);
  }
  __device__ __forceinline__ void score(float (&scores)[TILES][4], const uint4* queries) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int i = 0; i < 4; i++) scores[tile][i] = 0.f;
    // Neighbouring products go into different sums: none waits for the one before it.
#pragma unroll
    for (int j = 0; j < KEY_CHUNKS; j++) {
      uint4 low = keys[j][0], high = keys[j][1], q[TILES];
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) q[tile] = read_shared(queries + (tile * KEY_CHUNKS + j) * 32 + lane);
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) mma(scores[tile], low.x, high.x, low.y, high.y, q[tile].x, q[tile].y);
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) mma(scores[tile], low.z, high.z, low.w, high.w, q[tile].z, q[tile].w);
    }
  }
  __device__ __forceinline__ void add(float (&out)[TILES][PAIRS][4], const float (&weights)[TILES][4], int) {
    u32 low[TILES], high[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      low[tile] = transposed(to_bf16x2(weights[tile][0], weights[tile][1]));
      high[tile] = transposed(to_bf16x2(weights[tile][2], weights[tile][3]));
    }
#pragma unroll
    for (int j = 0; j < VALUE_CHUNKS; j++) {
#pragma unroll
      for (int t = 0; t < 4; t++) {
        u32 v0 = word(values[j][0], t), v1 = word(values[j][1], t), v2 = word(values[j][2], t), v3 = word(values[j][3], t);
        u32 a0 = __byte_perm(v0, v1, 0x5410), a1 = __byte_perm(v0, v1, 0x7632);
        u32 a2 = __byte_perm(v2, v3, 0x5410), a3 = __byte_perm(v2, v3, 0x7632);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) mma(out[tile][4 * j + t], a0, a1, a2, a3, low[tile], high[tile]);
      }
    }
  }
  static __device__ __forceinline__ u32 word(const uint4& v, int at) {
    return at == 0 ? v.x : at == 1 ? v.y : at == 2 ? v.z : v.w;
  }
  // A block's queries in the order in which `score` reads them.
  static __device__ __forceinline__ void stage(uint4* to, const bf16* q, int tiles, int column, int columns, int row_stride) {
    for (int at = threadIdx.x; at < tiles * KEY_CHUNKS * 32; at += WARPS * 32) {
      int lane = at & 31, j = (at >> 5) % KEY_CHUNKS, head = 8 * ((at >> 5) / KEY_CHUNKS) + (lane >> 2);
      int dim = 32 * j + 8 * (lane & 3);
      uint4 v = make_uint4(0, 0, 0, 0);
      if (head < columns && dim < HEAD_DIM) {
        int line = column + head;
        v = *reinterpret_cast<const uint4*>(q + (i64)(line / PER_KV) * row_stride + (line % PER_KV) * HEAD_DIM + dim);
      }
      to[at] = v;
    }
  }
};

// In plain f32, for parity: the same threads hold the same numbers.
template <int TILES> struct Scalar {
  const float *keys[2], *values[2];

  __device__ __forceinline__ void request_keys(const float* low, const float* high) { keys[0] = low, keys[1] = high; }
  __device__ __forceinline__ void request_values(const float* low, const float* high) { values[0] = low, values[1] = high; }
  __device__ __forceinline__ void drop_values(int) {}
  __device__ __forceinline__ void score(float (&scores)[TILES][4], const uint4* staged) {
    const float* queries = reinterpret_cast<const float*>(staged);
    int g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3;
    for (int tile = 0; tile < TILES; tile++)
      for (int i = 0; i < 4; i++) {
        const float *key = keys[i >> 1] + g * HEAD_DIM, *query = queries + (8 * tile + 2 * c + (i & 1)) * HEAD_DIM;
        float sum = 0.f;
        for (int dim = 0; dim < HEAD_DIM; dim++) sum += key[dim] * query[dim];
        scores[tile][i] = sum;
      }
  }
  __device__ __forceinline__ void add(float (&out)[TILES][PAIRS][4], const float (&weights)[TILES][4], int tokens) {
    int g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
      for (int token = 0; token < min(tokens, STEP); token++) {
        int from = (token & 7) * 4 + c;
        float p0 = __shfl_sync(0xffffffffu, token < 8 ? weights[tile][0] : weights[tile][2], from);
        float p1 = __shfl_sync(0xffffffffu, token < 8 ? weights[tile][1] : weights[tile][3], from);
        const float* value = values[token >> 3] + (token & 7) * HEAD_DIM + 8 * g;
#pragma unroll
        for (int pair = 0; pair < PAIRS; pair++) {
          int dim = 64 * (pair / 4) + 2 * (pair % 4);
          if (HEAD_DIM % 64 != 0 && dim + 8 * g >= HEAD_DIM) continue;
          out[tile][pair][0] += p0 * value[dim], out[tile][pair][1] += p1 * value[dim];
          out[tile][pair][2] += p0 * value[dim + 1], out[tile][pair][3] += p1 * value[dim + 1];
        }
      }
  }
  static __device__ __forceinline__ void stage(uint4* to, const float* q, int tiles, int column, int columns, int row_stride) {
    float* queries = reinterpret_cast<float*>(to);
    for (int at = threadIdx.x; at < tiles * 8 * HEAD_DIM; at += WARPS * 32) {
      int head = at / HEAD_DIM, line = column + head;
      queries[at] = head < columns ? q[(i64)(line / PER_KV) * row_stride + (line % PER_KV) * HEAD_DIM + at % HEAD_DIM] : 0.f;
    }
  }
};

template <typename T, int TILES> struct Choose;
template <int TILES> struct Choose<bf16, TILES> { typedef Tensor<TILES> Step; };
template <int TILES> struct Choose<float, TILES> { typedef Scalar<TILES> Step; };

__device__ __forceinline__ void store_two(float* to, float a, float b) { *reinterpret_cast<float2*>(to) = make_float2(a, b); }
__device__ __forceinline__ void store_two(bf16* to, float a, float b) { *reinterpret_cast<u32*>(to) = to_bf16x2(a, b); }

struct Context {
  const elem *q, *keys, *values;
  const u32* tables;
  elem* out;
  float* lse;
  float* partials;
  int heads, kv_heads, max_blocks;
  float scale;  // times log2(e)
};

// Units [first, last) of a section and one of its KV heads. `slots` is where partial results go; null: this is all of the row.
template <int TILES>
__device__ __forceinline__ void attend_units(const Context& context, const Section& section, int kv_head, int first, int last,
                                             float* slots, uint4* shared) {
  typedef typename Choose<elem, TILES>::Step Step;
  // Behind the queries or the outputs, whichever are more.
  static constexpr int QUERIES = (sizeof(elem) == 2 ? 32 * KEY_CHUNKS * 8 : 8 * HEAD_DIM) * sizeof(elem);
  static constexpr int OUTPUTS = WARPS * PAIRS * 32 * sizeof(float4), ALL = (GROUPED ? WIDE_TILES : 1) * QUERIES;
  float(*maxima)[8 * TILES] = reinterpret_cast<float(*)[8 * TILES]>(shared + (ALL > OUTPUTS ? ALL : OUTPUTS) / 16);
  float(*sums)[8 * TILES] = maxima + WARPS;
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3;
  // Warps side by side over columns, the rest of them over tokens.
  int across = TILES == 1 ? 1 : section.across;
  int along = WARPS / across, strip = warp % across, part = warp / across;

  // Whoever still reads the results of the units before is waited for.
  __syncthreads();
  const elem* q = context.q + ((i64)section.row * context.heads + kv_head * PER_KV) * HEAD_DIM;
  Step::stage(shared, q, across * TILES, section.column, section.columns, context.heads * HEAD_DIM);
  __syncthreads();
  const uint4* queries = shared + strip * TILES * (QUERIES / 16);

  float out[TILES][PAIRS][4], best[TILES][2], sum[TILES][2];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
    for (int x = 0; x < 2; x++) best[tile][x] = MINUS_INFINITY, sum[tile][x] = 0.f;
#pragma unroll
    for (int pair = 0; pair < PAIRS; pair++)
#pragma unroll
      for (int i = 0; i < 4; i++) out[tile][pair][i] = 0.f;
  }

  int stride = along * STEP, unit = TILES == 1 ? STEP : stride;
  int end = min(section.begin + last * unit, section.end), token = section.begin + first * unit + part * STEP;
  const u32* table = context.tables + (i64)section.row * context.max_blocks;
  int last_block = (end - 1) / BLOCK_SIZE;
  // Eight tokens lie in one block, sixteen may lie in two. Past the end the last block stands in.
  u32 low_block = 0, high_block = 0;
  auto look_up = [&](int at) {
    if (at >= end) return;
    low_block = __ldg(table + at / BLOCK_SIZE);
    high_block = BLOCK_SIZE >= STEP ? low_block : __ldg(table + min((at + 8) / BLOCK_SIZE, last_block));
  };
  i64 head_offset = (i64)kv_head * BLOCK_SIZE * HEAD_DIM, block_stride = (i64)context.kv_heads * BLOCK_SIZE * HEAD_DIM;
  auto low_offset = [&](int at) { return low_block * block_stride + head_offset + at % BLOCK_SIZE * HEAD_DIM; };
  auto high_offset = [&](int at) { return high_block * block_stride + head_offset + (at + 8) % BLOCK_SIZE * HEAD_DIM; };

  Step step;
  look_up(token);
  if (token < end) {
    i64 low = low_offset(token), high = high_offset(token);
    step.request_keys(context.keys + low, context.keys + high);
    step.request_values(context.values + low, context.values + high);
  }
  look_up(token + stride);
  for (; token < end; token += stride) {
    int next = token + stride, tokens = end - token;
    i64 low = low_offset(next), high = high_offset(next);
    float scores[TILES][4];
    step.score(scores, queries);
    if (next < end) step.request_keys(context.keys + low, context.keys + high);
    look_up(next + stride);
    if (tokens < STEP) step.drop_values(tokens);

    float factor[TILES][2];
    bool grew = false;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int x = 0; x < 2; x++) {
        float a = g < tokens ? scores[tile][x] * context.scale : MINUS_INFINITY;
        float b = g + 8 < tokens ? scores[tile][2 + x] * context.scale : MINUS_INFINITY;
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
    step.add(out, scores, tokens);
    if (next < end) step.request_values(context.values + low, context.values + high);
  }

#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int x = 0; x < 2; x++) {
#pragma unroll
      for (int offset = 4; offset < 32; offset <<= 1) sum[tile][x] += __shfl_xor_sync(0xffffffffu, sum[tile][x], offset);
      if (g == 0) maxima[warp][8 * tile + 2 * c + x] = best[tile][x], sums[warp][8 * tile + 2 * c + x] = sum[tile][x];
    }
  __syncthreads();
  float4* outputs = reinterpret_cast<float4*>(shared);
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    float most[2], total[2], own[2];
#pragma unroll
    for (int x = 0; x < 2; x++) {
      int column = 8 * tile + 2 * c + x;
      most[x] = MINUS_INFINITY, total[x] = 0.f;
#pragma unroll 1
      for (int other = strip; other < WARPS; other += across) most[x] = fmaxf(most[x], maxima[other][column]);
#pragma unroll 1
      for (int other = strip; other < WARPS; other += across)
        total[x] += sums[other][column] * rescale(maxima[other][column], most[x]);
      own[x] = rescale(best[tile][x], most[x]);
    }
    if (tile > 0) __syncthreads();
#pragma unroll
    for (int pair = 0; pair < PAIRS; pair++)
      outputs[(warp * PAIRS + pair) * 32 + lane] = make_float4(out[tile][pair][0] * own[0], out[tile][pair][1] * own[1],
                                                               out[tile][pair][2] * own[0], out[tile][pair][3] * own[1]);
    __syncthreads();
    int column = 8 * (strip * TILES + tile) + 2 * c;
    float* slot = slots ? slots + (i64)(strip * TILES + tile) * SLOT : nullptr;
    i64 head = (i64)section.row * context.heads + kv_head * PER_KV + column;
#pragma unroll 1
    for (int pair = part * (PAIRS / along); pair < (part + 1) * (PAIRS / along); pair++) {
      float4 all = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
      for (int other = strip; other < WARPS; other += across) {
        float4 one = outputs[(other * PAIRS + pair) * 32 + lane];
        all.x += one.x, all.y += one.y, all.z += one.z, all.w += one.w;
      }
      int dim = 64 * (pair / 4) + 8 * g + 2 * (pair % 4);
      if (HEAD_DIM % 64 != 0 && dim >= HEAD_DIM) continue;
#pragma unroll
      for (int x = 0; x < 2; x++) {
        if (column + x >= section.columns) continue;
        float a = x ? all.y : all.x, b = x ? all.w : all.z;
        if (slot) store_two(slot + (2 * c + x) * HEAD_DIM + dim, a, b);
        else store_two(context.out + (head + x) * HEAD_DIM + dim, a / total[x], b / total[x]);
      }
    }
    if (part == 0 && g == 0) {
#pragma unroll
      for (int x = 0; x < 2; x++) {
        if (column + x >= section.columns) continue;
        if (slot) slot[8 * HEAD_DIM + 2 * c + x] = most[x], slot[8 * HEAD_DIM + 8 + 2 * c + x] = total[x];
        else if (context.lse) context.lse[head + x] = (most[x] + __log2f(total[x])) * 0.69314718f;
      }
    }
  }
}

// A block per share. `wide_partials` begins where the partial results of prefixes do.
extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT)
    paged_attend(const elem* q, const elem* keys, const elem* values, const u32* tables, elem* out, float* lse, float* partials,
                 float* wide_partials, const Section* sections, const Share* shares, int heads, int kv_heads, int max_blocks,
                 float scale) {
  extern __shared__ uint4 shared[];
  Context context = {q, keys, values, tables, out, lse, partials, heads, kv_heads, max_blocks, scale * 1.44269504f};
  Share share = shares[blockIdx.x];
  Section section = share.section;
  for (int at = share.begin, index = share.index; at < share.end;) {
    int cost = section.cost(), length = section.units * cost, inside = at - section.start;
    int kv_head = inside / length, from = inside % length, to = min(length, from + share.end - at);
    // A unit belongs to the share in which it begins.
    int first = (from + cost - 1) / cost, last = (to + cost - 1) / cost;
    i64 place = (int)blockIdx.x + index * kv_heads + kv_head;
    if (GROUPED && section.across) {
      if (first < last)
        attend_units<WIDE>(context, section, kv_head, first, last, wide_partials + place * WIDE_TILES * SLOT, shared);
    } else {
      bool whole = section.alone && last - first == section.units;
      attend_units<1>(context, section, kv_head, first, last, whole ? nullptr : partials + place * SLOT, shared);
    }
    at += to - from;
    if (at == section.start + length * kv_heads && at < share.end) section = sections[++index];
  }
}

// A block per query head of a row: merges partial results, always in the order of the line.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    paged_merge(elem* out, float* lse, const float* partials, const float* wide_partials, const int* header,
                const Row* records, int heads, int kv_heads) {
  static constexpr int PARTS = 4, VECTORS = (HEAD_DIM + 127) / 128;
  __shared__ float outputs[WARPS][HEAD_DIM], maxima[WARPS], sums[WARPS];
  int row = blockIdx.y, head = blockIdx.x, kv_head = head / PER_KV, column = head % PER_KV;
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  Row record = records[row];
  int length = header[0], shares = header[1], own = 0, wide = 0, wide_column = 0;
  const float *own_slots = nullptr, *wide_slots = nullptr;
  if (record.section >= 0) {
    int start = record.start + kv_head * record.units, first = share_of(start, shares, length);
    own = share_of(start + record.units - 1, shares, length) - first + 1;
    own_slots = partials + (i64)(first + record.section * kv_heads + kv_head) * SLOT;
    if (own == 1 && record.alone) return;
  }
  if (GROUPED && record.tile >= 0) {
    int line = record.column + column, tile = line / record.width;
    int start = record.tile_start + (tile * kv_heads + kv_head) * record.tile_units * WIDE_COST;
    int first = share_of(start, shares, length);
    wide = share_of(start + (record.tile_units - 1) * WIDE_COST, shares, length) - first + 1;
    i64 place = first + (record.tile + tile) * kv_heads + kv_head;
    wide_column = line % record.width;
    wide_slots = wide_partials + (place * WIDE_TILES + wide_column / 8) * SLOT;
  }

  float most = MINUS_INFINITY, sum = 0.f, total[VECTORS][4] = {};
  for (int part = warp; part < own + wide; part += WARPS * PARTS) {
    float part_most[PARTS], part_sum[PARTS];
    float4 part_out[PARTS][VECTORS];
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
      int at = part + i * WARPS;
      part_most[i] = MINUS_INFINITY, part_sum[i] = 0.f;
#pragma unroll
      for (int v = 0; v < VECTORS; v++) part_out[i][v] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (at >= own + wide) continue;
      const float* slot = at < own ? own_slots + (i64)at * SLOT : wide_slots + (i64)(at - own) * WIDE_TILES * SLOT;
      int slot_column = at < own ? column : wide_column % 8;
      part_most[i] = slot[8 * HEAD_DIM + slot_column], part_sum[i] = slot[8 * HEAD_DIM + 8 + slot_column];
#pragma unroll
      for (int v = 0; v < VECTORS; v++)
        if (4 * lane + 128 * v < HEAD_DIM)
          part_out[i][v] = *reinterpret_cast<const float4*>(slot + slot_column * HEAD_DIM + 4 * lane + 128 * v);
    }
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
      float now = fmaxf(most, part_most[i]), before = rescale(most, now), share = rescale(part_most[i], now);
      most = now, sum = sum * before + part_sum[i] * share;
#pragma unroll
      for (int v = 0; v < VECTORS; v++) {
        total[v][0] = total[v][0] * before + part_out[i][v].x * share;
        total[v][1] = total[v][1] * before + part_out[i][v].y * share;
        total[v][2] = total[v][2] * before + part_out[i][v].z * share;
        total[v][3] = total[v][3] * before + part_out[i][v].w * share;
      }
    }
  }
  if (lane == 0) maxima[warp] = most, sums[warp] = sum;
#pragma unroll
  for (int v = 0; v < VECTORS; v++)
    if (4 * lane + 128 * v < HEAD_DIM)
      *reinterpret_cast<float4*>(&outputs[warp][4 * lane + 128 * v]) =
          make_float4(total[v][0], total[v][1], total[v][2], total[v][3]);
  __syncthreads();
  most = MINUS_INFINITY, sum = 0.f;
#pragma unroll
  for (int other = 0; other < WARPS; other++) most = fmaxf(most, maxima[other]);
#pragma unroll
  for (int other = 0; other < WARPS; other++) sum += sums[other] * rescale(maxima[other], most);
  i64 at = (i64)row * heads + head;
  // An unused row: nothing was summed.
  float scale = sum > 0.f ? 1.f / sum : sum == 0.f ? 0.f : sum;
  for (int dim = threadIdx.x; dim < HEAD_DIM; dim += WARPS * 32) {
    float all = 0.f;
#pragma unroll
    for (int other = 0; other < WARPS; other++) all += outputs[other][dim] * rescale(maxima[other], most);
    out[at * HEAD_DIM + dim] = from_float<elem>(all * scale);
  }
  if (lse && threadIdx.x == 0) lse[at] = (most + __log2f(sum)) * 0.69314718f;
}
