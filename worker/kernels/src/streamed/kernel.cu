// Linear layers of 17 to 128 rows on Hopper: out[m, n] = x[m, k] · weight[n, k]ᵀ, bound by reading the weight.
//
// A tile is all rows of x and as many rows of the weight as let all multiprocessors begin and end together: each has one block, and
// a block one tile. Chunks of 64 inputs are copied to shared memory by the tensor memory accelerator, asked by one thread; each four
// warps multiply 64 rows of x with the whole chunk. (A warp of its own that asks would leave the others too few registers.) Where
// there are too few outputs for that, several blocks divide the inputs of a tile among themselves, and what each has summed is left
// to the next kernel to add up.
//
// Compiled for ROW_BLOCKS (of 64 rows of x), PARTS (of a tile; with SwiGLU the gate and what belongs to it of up), WIDTH (rows of the
// weight of a part), SPLITS (blocks that divide inputs), STAGES (chunks in shared memory), SWIGLU.

static constexpr int CHUNK = 64, ROWS = 64 * ROW_BLOCKS, WARPS = 4 * ROW_BLOCKS, THREADS = 32 * WARPS;
// Bytes of a chunk of one row: what the swizzle is made for.
static constexpr int LINE = 2 * CHUNK;
static constexpr int X_BYTES = ROWS * LINE, PART_BYTES = WIDTH * LINE, STAGE_BYTES = X_BYTES + PARTS * PART_BYTES;
// Floats of a row of sums in shared memory: four rows that a warp writes at once are in different banks.
static constexpr int SUMS = PARTS * WIDTH, STRIDE = SUMS + (40 - SUMS % 32) % 32;
// Outputs of a tile.
static constexpr int OUTPUTS = SWIGLU ? WIDTH : SUMS;

__device__ __forceinline__ void read_eight(float (&to)[8], const float* from) {
  float4 low = *reinterpret_cast<const float4*>(from), high = *reinterpret_cast<const float4*>(from + 4);
  to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w, to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
}
__device__ __forceinline__ float swish(float x) { return __fdividef(x, 1.f + __expf(-x)); }

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    streamed_linear(const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap x_map, bf16* out, float* sums, int rows,
                    int outputs, int chunks) {
  extern __shared__ __align__(1024) u8 memory[];
  __shared__ __align__(8) u64 barriers[2 * STAGES];
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  int split = blockIdx.x % SPLITS, first = blockIdx.x / SPLITS * OUTPUTS;
  int each = (chunks + SPLITS - 1) / SPLITS, begin = split * each, count = min(each, chunks - begin);
  u32 full = shared_address(barriers), empty = full + 8 * STAGES, stages = shared_address(memory);
  auto copy_weight = [&](int chunk, int stage) {
    u64 once;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
    barrier_expect(full + 8 * stage, STAGE_BYTES);
#pragma unroll
    for (int part = 0; part < PARTS; part++)
      copy_box(stages + stage * STAGE_BYTES + X_BYTES + part * PART_BYTES, weight_map, (begin + chunk) * CHUNK,
               first + part * (SWIGLU ? outputs : WIDTH), full + 8 * stage, once);
  };
  auto copy_x = [&](int chunk, int stage) {
    u64 often;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(often));
    copy_box(stages + stage * STAGE_BYTES, x_map, (begin + chunk) * CHUNK, 0, full + 8 * stage, often);
  };
  allow_next();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; stage++) barrier_init(full + 8 * stage, 1), barrier_init(empty + 8 * stage, WARPS);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    // The weight does not depend on the kernels before this one.
    for (int chunk = 0; chunk < min(count, STAGES); chunk++) copy_weight(chunk, chunk);
    wait_for_previous();
    for (int chunk = 0; chunk < min(count, STAGES); chunk++) copy_x(chunk, chunk);
  }
  __syncthreads();
  float sum[PARTS][WIDTH / 2];
#pragma unroll
  for (int part = 0; part < PARTS; part++)
#pragma unroll
    for (int i = 0; i < WIDTH / 2; i++) sum[part][i] = 0.f;
  int stage = 0, phase = 0, old = 0, old_phase = 0;
  for (int chunk = 0; chunk < count; chunk++) {
    barrier_wait(full + 8 * stage, phase);
    u32 x = stages + stage * STAGE_BYTES + warp / 4 * 64 * LINE, weight = stages + stage * STAGE_BYTES + X_BYTES;
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < CHUNK / 16; k++)
#pragma unroll
      for (int part = 0; part < PARTS; part++)
        wgmma(sum[part], across(x + 32 * k), across(weight + part * PART_BYTES + 32 * k), 1);
    wgmma_commit();
    // The products of the chunk before are done. Where all warps say so, its memory is free for another.
    wgmma_wait<1>();
    if (chunk > 0 && lane == 0) {
      barrier_arrive(empty + 8 * old);
      int next = chunk - 1 + STAGES;
      if (warp == 0 && next < count) {
        barrier_wait(empty + 8 * old, old_phase);
        copy_weight(next, old), copy_x(next, old);
      }
    }
    __syncwarp();
    old = stage, old_phase = phase;
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
  wgmma_wait<0>();
#pragma unroll
  for (int part = 0; part < PARTS; part++) pin(sum[part]);
  int row = warp * 16 + (lane >> 2), column = 2 * (lane & 3);
  if (SPLITS > 1) {
    // A quad of threads has the 32 bytes that memory is written by.
#pragma unroll
    for (int part = 0; part < PARTS; part++)
#pragma unroll
      for (int i = 0; i < WIDTH / 8; i++) {
        int output = first + part * WIDTH + 8 * i + column;
        float* to = sums + ((i64)split * rows + row) * outputs + output;
        if (output >= outputs) continue;
        if (row < rows) *reinterpret_cast<float2*>(to) = make_float2(sum[part][4 * i], sum[part][4 * i + 1]);
        if (row + 8 < rows) *reinterpret_cast<float2*>(to + 8 * outputs) = make_float2(sum[part][4 * i + 2], sum[part][4 * i + 3]);
      }
    return;
  }
  // All chunks have come and been multiplied: their memory is that of the sums now, which leave it by rows.
  __syncthreads();
  float* all = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int part = 0; part < PARTS; part++)
#pragma unroll
    for (int i = 0; i < WIDTH / 8; i++) {
      float* to = all + row * STRIDE + part * WIDTH + 8 * i + column;
      *reinterpret_cast<float2*>(to) = make_float2(sum[part][4 * i], sum[part][4 * i + 1]);
      *reinterpret_cast<float2*>(to + 8 * STRIDE) = make_float2(sum[part][4 * i + 2], sum[part][4 * i + 3]);
    }
  __syncthreads();
  static constexpr int PACKS = OUTPUTS / 8;
  for (int at = threadIdx.x; at < rows * PACKS; at += THREADS) {
    int to_row = at / PACKS, output = at % PACKS * 8;
    if (first + output >= outputs) continue;
    const float* from = all + to_row * STRIDE + output;
    float result[8];
    read_eight(result, from);
    if (SWIGLU) {
      float up[8];
      read_eight(up, from + WIDTH);
#pragma unroll
      for (int i = 0; i < 8; i++) result[i] = swish(result[i]) * up[i];
    }
    store_vec(out + (i64)to_row * outputs + first + output, result);
  }
}
