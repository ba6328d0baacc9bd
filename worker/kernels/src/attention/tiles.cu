// Before each source of this folder: which tile is a block's, and where its keys are.
#define FULL 0xffffffffu
static constexpr float LOG2E = 1.4426950408889634f;
static constexpr float LN2 = 0.6931471805599453f;
#define INFINITE __int_as_float(0x7f800000)

// Keys and values are rows of tokens, or in the blocks of a pool.
#if PAGED
#define KEY_OPERANDS                                                                              \
  const elem *__restrict__ k, const elem *__restrict__ v, const u32 *__restrict__ tables,         \
      const int *__restrict__ kv_lengths, int max_blocks, int block_bits
#else
#define KEY_OPERANDS                                                                              \
  const elem *__restrict__ k, const elem *__restrict__ v, int k_stride, int v_stride,             \
      const u32 *__restrict__ k_offsets
#endif

// Tiles of `rows` rows that a segment has.
__device__ __forceinline__ int tiles_of(int segment, const u32* offsets, int segments, int rows) {
  return segment < segments ? (int)(offsets[segment + 1] - offsets[segment] + rows - 1) / rows : 0;
}

// The tile of this rank: its segment, and its level, which is its number in the segment. False after the last tile. Each warp
// finds it on its own; all its threads must call.
#if CAUSAL
// Tiles whose level is this or more.
__device__ __forceinline__ int tiles_from(int level, const u32* offsets, int segments, int rows) {
  int sum = 0;
  for (int s = threadIdx.x & 31; s < segments; s += 32) sum += max(0, tiles_of(s, offsets, segments, rows) - level);
  return __reduce_add_sync(FULL, sum);
}

// The order goes through the levels of all segments from the highest down to 0: work grows with the level, so that the longest
// tiles are begun first, and the last blocks are short. `levels` is more than the highest.
__device__ __forceinline__ bool find_tile(int rank, const u32* offsets, int segments, int rows, int levels, int& segment,
                                          int& level) {
  if (segments == 1) {
    segment = 0, level = tiles_of(0, offsets, 1, rows) - 1 - rank;
    return level >= 0;
  }
  if (rank >= tiles_from(0, offsets, segments, rows)) return false;
  int low = 0, high = levels;
  while (high - low > 1) {
    int middle = (low + high) >> 1;
    if (tiles_from(middle, offsets, segments, rows) > rank) low = middle;
    else high = middle;
  }
  rank -= tiles_from(low + 1, offsets, segments, rows);
  level = low;
  int lane = threadIdx.x & 31;
  for (int first = 0; first < segments; first += 32) {
    bool has = tiles_of(first + lane, offsets, segments, rows) > level;
    u32 those = __ballot_sync(FULL, has);
    if (rank < __popc(those)) {
      u32 it = __ballot_sync(FULL, has && __popc(those & ((1u << lane) - 1)) == rank);
      segment = first + __ffs(it) - 1;
      return true;
    }
    rank -= __popc(those);
  }
  return false;
}
#else
// All tiles of a segment are equal work: the order is that of the segments.
__device__ __forceinline__ bool find_tile(int rank, const u32* offsets, int segments, int rows, int, int& segment, int& level) {
  int lane = threadIdx.x & 31;
  for (int first = 0; first < segments; first += 32) {
    int tiles = tiles_of(first + lane, offsets, segments, rows), through = tiles;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      int before = __shfl_up_sync(FULL, through, offset);
      if (lane >= offset) through += before;
    }
    u32 after = __ballot_sync(FULL, rank < through);
    if (after) {
      int it = __ffs(after) - 1;
      segment = first + it, level = rank - __shfl_sync(FULL, through - tiles, it);
      return true;
    }
    rank -= __shfl_sync(FULL, through, 31);
  }
  return false;
}
#endif

// The keys of one segment and head.
struct Keys {
  const elem *k, *v;
  int length;
#if PAGED
  const u32* table;
  int block_bits, block_stride;
  __device__ __forceinline__ i64 at(int row) const {
    return (i64)table[row >> block_bits] * block_stride + (row & ((1 << block_bits) - 1)) * HEAD_DIM;
  }
  __device__ __forceinline__ const elem* key(int row) const { return k + at(row); }
  __device__ __forceinline__ const elem* value(int row) const { return v + at(row); }
#else
  int k_stride, v_stride;
  __device__ __forceinline__ const elem* key(int row) const { return k + (i64)row * k_stride; }
  __device__ __forceinline__ const elem* value(int row) const { return v + (i64)row * v_stride; }
#endif
};

#if PAGED
#define KEYS_OF(segment, head, kv_heads)                                                                          \
  Keys {                                                                                                          \
    k + ((i64)(head) << block_bits) * HEAD_DIM, v + ((i64)(head) << block_bits) * HEAD_DIM, kv_lengths[segment],  \
        tables + (i64)(segment) * max_blocks, block_bits, ((kv_heads) << block_bits) * HEAD_DIM                       \
  }
#else
#define KEYS_OF(segment, head, kv_heads)                                                                          \
  Keys {                                                                                                          \
    k + (i64)k_offsets[segment] * k_stride + (head) * HEAD_DIM,                                                   \
        v + (i64)k_offsets[segment] * v_stride + (head) * HEAD_DIM,                                               \
        (int)(k_offsets[(segment) + 1] - k_offsets[segment]), k_stride, v_stride                                  \
  }
#endif
