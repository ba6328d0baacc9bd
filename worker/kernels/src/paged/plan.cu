// Attention of one new token per sequence over paged keys and values.
//
// The work of a step is a line of units: 16 tokens of one row and KV head. It is cut into equal shares for as many teams of
// four warps as are resident at once, so that one long row and many short ones load the card alike. A team walks through its
// share; a row that lies in several shares leaves a partial result in each, which a last kernel merges in a fixed order.
// Prefixes that groups of rows share are a line of their own, of CHUNK tokens for a tile of up to 128 query heads of the group.
//
// rows.cu computes the line of rows; prefixes.cu that of prefixes by mma.sync or plainly, hopper.cu by wgmma and the rows in the
// same launch; merge.cu adds up.
//
// Compiled for ELEM, HEAD_DIM, BLOCK_SIZE (tokens of a block), PER_KV (query heads per KV head), GROUPED, TOGETHER (prefixes and
// rows in one launch), MERGE_WARPS (that merge a query head), MERGE_HEADS (of a block that merges).

// Warps of a block, and blocks of a multiprocessor: of rows, and of prefixes.
static constexpr int ROW_WARPS = 4, ROW_BLOCKS = 3, PREFIX_WARPS = 4, PREFIX_BLOCKS = 2;
// Tokens that a warp takes at once, and those of a prefix that a block has in shared memory.
static constexpr int STEP = 16, CHUNK = TOGETHER ? 128 : 64;
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

// How many blocks of `most` do prefixes while the others do rows: so many that both take equally long by what their units cost,
// and no stretch is cut unless it must be, since a share more is a partial result more. A block does two units or more.
__device__ __forceinline__ int blocks_for(int length, int stretches, u64 cost, u64 other_cost, int most) {
  if (length == 0) return 0;
  int wanted = max((int)(most * cost / (cost + other_cost)), 1);
  if (other_cost > 0) wanted = min(wanted, most - 1);
  wanted = min(wanted, max(length / 2, 1));
  int whole = (wanted + stretches / 2) / stretches * stretches;
  if (whole == 0) {
    int each = (stretches + wanted - 1) / wanted;
    whole = (stretches + each - 1) / each;
  }
  return 8 * abs(whole - wanted) <= wanted && whole < most ? whole : wanted;
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
               int most_tile_shares, int section_cost, int row_cost, int narrow_cost, int wide_cost, int* header,
               Section* sections, Section* tile_sections, Row* records, Share* shares, Share* tile_shares) {
  __shared__ u64 parts[32];
  int thread = threadIdx.x;
  for (int row = thread; row < rows; row += blockDim.x) records[row] = Row{-1, 0, 0, 1, -1, 0, 0, 1};
  __syncthreads();
  // Length of the line in the upper half, sections in the lower.
  u64 prefixes = 0, line = 0, prefix_cost = 0, total;
  for (int first = 0; first < group_count; first += blockDim.x) {
    int at = first + thread, row = 0, count = 0, prefix = 0;
    if (at < group_count) row = groups[3 * at], count = groups[3 * at + 1], prefix = groups[3 * at + 2];
    bool shared = row >= 0 && count > 1 && count <= rows - row && prefix > 0;
    int columns = shared ? count * PER_KV : 0, tiles = (columns + WIDE_COLUMNS - 1) / WIDE_COLUMNS;
    // Tiles of equal width, in whole columns of tensor core products.
    int width = shared ? ((columns + tiles - 1) / tiles + 7) / 8 * 8 : 1;
    int units = shared ? (prefix + CHUNK - 1) / CHUNK : 0, length = units * kv_heads;
    u64 before = prefixes + scan(((u64)(tiles * length) << 32) | (u64)tiles, total, parts);
    prefixes += total;
    if (TOGETHER) {
      scan((u64)(tiles * length) * (width > WIDE_COLUMNS / 2 ? wide_cost : narrow_cost), total, parts);
      prefix_cost += total;
    }
    int section = (int)(u32)before, start = (int)(before >> 32);
    for (int tile = 0; tile < tiles && section + tile < most_tiles; tile++)
      tile_sections[section + tile] =
          Section{start + tile * length, units, row, tile * width, min(columns - tile * width, width), 0, prefix, 0};
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
    u64 before = line + scan(((u64)(units * kv_heads) << 32) | (u64)(units > 0), total, parts);
    line += total;
    if (units > 0) {
      record.section = (int)(u32)before, record.start = (int)(before >> 32), record.units = units;
      sections[record.section] = Section{record.start, units, row, 0, PER_KV, record.prefix, length, record.alone};
    }
    if (row < rows) records[row] = record;
  }
  __syncthreads();
  int length = (int)(line >> 32), count = (int)(u32)line;
  int row_shares = most_shares;
  if (group_count > 0) {
    int prefix_length = (int)(prefixes >> 32), prefix_count = (int)(u32)prefixes, stretches = prefix_count * kv_heads, used;
    if (TOGETHER) {
      u64 row_costs = (u64)length * row_cost + (u64)(count * kv_heads) * section_cost;
      used = blocks_for(prefix_length, stretches, prefix_cost, row_costs, most_tile_shares);
      row_shares -= used * ROW_BLOCKS;
    } else {
      used = shares_for(prefix_length, stretches, most_tile_shares, 1);
    }
    cut(prefix_length, prefix_count, used, most_tile_shares, header + 2, tile_sections, tile_shares);
  }
  // A unit for each warp.
  int used = shares_for(length, count * kv_heads, row_shares, ROW_WARPS);
  cut(length, count, used, most_shares, header, sections, shares);
}
