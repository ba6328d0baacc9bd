// Rows moved, summed and filled.
static constexpr int THREADS = 256;

#ifdef ELEM

// `to[target_at[i]] = from[source_at[i]]` for `total` packs of rows of `packs`; a null list is 0, 1, 2, … What is not
// in `from` becomes zeros, what is not in `to` is left out.
static constexpr int MOVES = 4;
extern "C" __global__ void __launch_bounds__(THREADS)
    move_rows(const elem* __restrict__ from, int from_rows, const int* __restrict__ source_at, elem* __restrict__ to,
              int to_rows, const int* __restrict__ target_at, u32 packs, u32 total) {
  const u32 first = blockIdx.x * (THREADS * MOVES) + threadIdx.x;
  raw held[MOVES];
  int target[MOVES];
  u32 column[MOVES];
#pragma unroll
  for (int m = 0; m < MOVES; m++) {
    const u32 at = first + m * THREADS, row = at / packs;
    column[m] = (at - row * packs) * PACK;
    target[m] = -1;
    if (at >= total) continue;
    const int source = source_at == nullptr ? (int)row : source_at[row];
    target[m] = target_at == nullptr ? (int)row : target_at[row];
    held[m] = raw{};
    if (source >= 0 && source < from_rows) held[m] = load_raw(from + (size_t)source * packs * PACK + column[m]);
  }
#pragma unroll
  for (int m = 0; m < MOVES; m++) {
    if (target[m] >= 0 && target[m] < to_rows) store_raw(to + (size_t)target[m] * packs * PACK + column[m], held[m]);
  }
}

// GRADIENT: the format of the table's gradient, 0 for float and 1 for bf16.
#if GRADIENT == 1
typedef bf16 gradient;
#else
typedef float gradient;
#endif

// Sums a pack of the rows of some tokens in their order, `stride` apart.
__device__ __forceinline__ void sum_tokens(const elem* __restrict__ dy, const u32* __restrict__ order, u32 begin,
                                           u32 end, int stride, int packs, int at, u32 tokens, float (&sum)[PACK]) {
  static constexpr int AHEAD = 8;
  for (u32 next = begin; next < end; next += AHEAD * stride) {
    raw rows[AHEAD];
    u32 token[AHEAD];
#pragma unroll
    for (int a = 0; a < AHEAD; a++) token[a] = next + a * stride < end ? order[next + a * stride] : tokens;
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
      if (token[a] < tokens) rows[a] = load_raw(dy + ((size_t)token[a] * packs + at) * PACK);
    }
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
      if (token[a] >= tokens) continue;
      float x[PACK];
      unpack(rows[a], x);
#pragma unroll
      for (int i = 0; i < PACK; i++) sum[i] += x[i];
    }
  }
}

// The first `many` ids have many tokens: a block has 32 packs of columns of one, and its warps take tokens in turn.
// Each other block has THREADS packs of one with few tokens.
static constexpr int WARPS = THREADS / 32;
extern "C" __global__ void __launch_bounds__(THREADS)
    embedding_gradient(const elem* __restrict__ dy, const u32* __restrict__ ids, const u32* __restrict__ starts,
                       const u32* __restrict__ order, gradient* __restrict__ dtable, int packs, u32 vocabulary,
                       u32 tokens, int many) {
  __shared__ float parts[WARPS][PACK][32];
  const int chunks = (packs + 31) / 32, of_many = many * chunks;
  const bool has_many = (int)blockIdx.x < of_many;
  const int few_chunks = (packs + THREADS - 1) / THREADS, few = blockIdx.x - of_many;
  const int group = has_many ? blockIdx.x / chunks : many + few / few_chunks;
  const u32 id = ids[group], begin = starts[group], end = starts[group + 1];
  if (id >= vocabulary) return;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int at = has_many ? blockIdx.x % chunks * 32 + lane : few % few_chunks * THREADS + (int)threadIdx.x;
  gradient* to = dtable + ((size_t)id * packs + at) * PACK;
  float past[PACK], sum[PACK] = {};
  if (at < packs) {
    // In flight with the first rows.
    if (!has_many || warp == 0) load_numbers(to, past);
    sum_tokens(dy, order, begin + (has_many ? warp : 0), end, has_many ? WARPS : 1, packs, at, tokens, sum);
  }
  if (has_many) {
#pragma unroll
    for (int i = 0; i < PACK; i++) parts[warp][i][lane] = sum[i];
    __syncthreads();
    if (warp != 0) return;
#pragma unroll
    for (int i = 0; i < PACK; i++) {
      sum[i] = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) sum[i] += parts[w][i][lane];
    }
  }
  if (at >= packs) return;
#pragma unroll
  for (int i = 0; i < PACK; i++) sum[i] += past[i];
  store_numbers(to, sum);
}

// Sums of columns, first pass: a block has 32 packs of columns and `part` rows, its 8 warps take rows in turn.
extern "C" __global__ void __launch_bounds__(THREADS)
    column_parts(const elem* __restrict__ x, float* __restrict__ partials, int rows, int width, int part) {
  static constexpr int AHEAD = 4;
  __shared__ float sums[WARPS][32 * PACK + 1];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int column = (blockIdx.x * 32 + lane) * PACK;
  const int begin = blockIdx.y * part, end = min(rows, begin + part);
  float sum[PACK] = {};
  if (column < width) {
    for (int row = begin + warp; row < end; row += WARPS * AHEAD) {
      raw held[AHEAD];
#pragma unroll
      for (int a = 0; a < AHEAD; a++) {
        if (row + a * WARPS < end) held[a] = load_raw(x + (size_t)(row + a * WARPS) * width + column);
      }
#pragma unroll
      for (int a = 0; a < AHEAD; a++) {
        if (row + a * WARPS >= end) continue;
        float y[PACK];
        unpack(held[a], y);
#pragma unroll
        for (int i = 0; i < PACK; i++) sum[i] += y[i];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < PACK; i++) sums[warp][lane * PACK + i] = sum[i];
  __syncthreads();
  for (int at = threadIdx.x; at < 32 * PACK; at += THREADS) {
    const int to = blockIdx.x * 32 * PACK + at;
    if (to >= width) break;
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) total += sums[w][at];
    partials[(size_t)blockIdx.y * width + to] = total;
  }
}

// TARGET: the format that numbers are cast to, 0 for float and 1 for bf16.
#if TARGET == 1
typedef bf16 target;
#else
typedef float target;
#endif

// Flat vectors: each thread has some packs; the last pack may be a part.
static constexpr int FLAT = 4;
template <typename F> __device__ __forceinline__ void each_flat(u64 length, F f) {
  const u64 first = (u64)blockIdx.x * (THREADS * FLAT) + threadIdx.x;
#pragma unroll
  for (int p = 0; p < FLAT; p++) {
    const u64 at = (first + p * THREADS) * PACK;
    if (at < length) f(p, at, at + PACK <= length ? PACK : (int)(length - at));
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    cast(const elem* __restrict__ from, target* __restrict__ to, u64 length) {
  raw held[FLAT];
  each_flat(length, [&](int p, u64 at, int count) {
    if (count == PACK) held[p] = load_raw(from + at);
  });
  each_flat(length, [&](int p, u64 at, int count) {
    if (count < PACK) {
      for (int i = 0; i < count; i++) to[at + i] = from_float<target>(to_float(from[at + i]));
      return;
    }
    float x[PACK];
    unpack(held[p], x);
    store_numbers(to + at, x);
  });
}

// ADDEND: the format of what is added, 0 for float and 1 for bf16.
#if ADDEND == 1
typedef bf16 addend;
#else
typedef float addend;
#endif

extern "C" __global__ void __launch_bounds__(THREADS) add(elem* a, const addend* b, u64 length) {
  raw left[FLAT];
  float right[FLAT][PACK];
  each_flat(length, [&](int p, u64 at, int count) {
    if (count == PACK) left[p] = load_raw(a + at), load_numbers(b + at, right[p]);
  });
  each_flat(length, [&](int p, u64 at, int count) {
    if (count < PACK) {
      for (int i = 0; i < count; i++) a[at + i] = from_float<elem>(to_float(a[at + i]) + to_float(b[at + i]));
      return;
    }
    float x[PACK];
    unpack(left[p], x);
#pragma unroll
    for (int i = 0; i < PACK; i++) x[i] += right[p][i];
    store_floats(a + at, x);
  });
}

extern "C" __global__ void __launch_bounds__(THREADS) scale(elem* x, float factor, u64 length) {
  raw held[FLAT];
  each_flat(length, [&](int p, u64 at, int count) {
    if (count == PACK) held[p] = load_raw(x + at);
  });
  each_flat(length, [&](int p, u64 at, int count) {
    if (count < PACK) {
      for (int i = 0; i < count; i++) x[at + i] = from_float<elem>(to_float(x[at + i]) * factor);
      return;
    }
    float y[PACK];
    unpack(held[p], y);
#pragma unroll
    for (int i = 0; i < PACK; i++) y[i] *= factor;
    store_floats(x + at, y);
  });
}

// Numbers 4 * counter to 4 * counter + 3 of a seed.
__device__ __forceinline__ void draw_normal(u64 counter, u64 seed, float (&x)[4]) {
  const uint4 bits = philox(counter, 0, seed);
  // Box and Muller. The first of each pair is in (0, 1], the second an angle in half turns.
  const float first = sqrtf(-2.f * logf((float)((bits.x >> 8) + 1) * 0x1p-24f));
  const float second = sqrtf(-2.f * logf((float)((bits.z >> 8) + 1) * 0x1p-24f));
  sincospif((float)(bits.y >> 8) * 0x1p-23f, &x[1], &x[0]);
  sincospif((float)(bits.w >> 8) * 0x1p-23f, &x[3], &x[2]);
  x[0] *= first, x[1] *= first, x[2] *= second, x[3] *= second;
}
__device__ __forceinline__ void draw_uniform(u64 counter, u64 seed, float (&x)[4]) {
  const uint4 bits = philox(counter, 0, seed);
  x[0] = (float)(bits.x >> 8) * 0x1p-24f, x[1] = (float)(bits.y >> 8) * 0x1p-24f;
  x[2] = (float)(bits.z >> 8) * 0x1p-24f, x[3] = (float)(bits.w >> 8) * 0x1p-24f;
}

// A thread has 8 numbers, stored together where the address allows (`ALIGNED`).
template <typename F> __device__ __forceinline__ void fill(elem* out, u64 length, F number) {
  const u64 at = ((u64)blockIdx.x * THREADS + threadIdx.x) * 8;
  if (at >= length) return;
  float x[2][4];
  number(at / 4, x[0]);
  number(at / 4 + 1, x[1]);
  if (PACK == VEC && at + 8 <= length) {
    if constexpr (sizeof(elem) == 2) {
      const float y[8] = {x[0][0], x[0][1], x[0][2], x[0][3], x[1][0], x[1][1], x[1][2], x[1][3]};
      store_vec((bf16*)(out + at), y);
    } else {
      store_vec((float*)(out + at), x[0]);
      store_vec((float*)(out + at + 4), x[1]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; i++) {
    if (at + i < length) out[at + i] = from_float<elem>(x[i / 4][i % 4]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) fill_normal(elem* out, float deviation, u64 seed, u64 length) {
  fill(out, length, [&](u64 counter, float (&x)[4]) {
    draw_normal(counter, seed, x);
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] *= deviation;
  });
}

extern "C" __global__ void __launch_bounds__(THREADS)
    fill_uniform(elem* out, float low, float high, u64 seed, u64 length) {
  fill(out, length, [&](u64 counter, float (&x)[4]) {
    draw_uniform(counter, seed, x);
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = low + x[i] * (high - low);
  });
}

// Blocks of the grid: chunks of a pool block, pairs, keys and values.
extern "C" __global__ void __launch_bounds__(THREADS)
    copy_blocks(elem* keys, elem* values, const u32* __restrict__ pairs, u32 packs, u32 blocks) {
  static constexpr int AHEAD = 4;
  const u32 from = pairs[2 * blockIdx.y], to = pairs[2 * blockIdx.y + 1];
  if (from >= blocks || to >= blocks || from == to) return;
  elem* pool = blockIdx.z == 0 ? keys : values;
  const u32 first = blockIdx.x * (THREADS * AHEAD) + threadIdx.x;
  raw held[AHEAD];
#pragma unroll
  for (int a = 0; a < AHEAD; a++) {
    const u32 at = first + a * THREADS;
    if (at < packs) held[a] = load_raw(pool + ((size_t)from * packs + at) * PACK);
  }
#pragma unroll
  for (int a = 0; a < AHEAD; a++) {
    const u32 at = first + a * THREADS;
    if (at < packs) store_raw(pool + ((size_t)to * packs + at) * PACK, held[a]);
  }
}

#else

// Second pass: a block has 32 columns, its warps take parts in turn, few enough that all loads are in flight; the sum
// of a column is of theirs in order.
static constexpr int WARPS = 32;
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    add_partials(const float* __restrict__ partials, float* __restrict__ sums, int parts, int width) {
  __shared__ float shared[WARPS][32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, column = blockIdx.x * 32 + lane;
  float sum = 0.f;
  if (column < width) {
#pragma unroll 8
    for (int part = warp; part < parts; part += WARPS) sum += partials[(size_t)part * width + column];
  }
  shared[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= width) return;
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < WARPS; w++) total += shared[w][lane];
  sums[column] += total;
}

#endif
