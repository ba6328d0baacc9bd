// Squares cut into patches, and rows mixed of rows.
static constexpr int THREADS = 256;

#ifdef PATCH
// A thread has a pack of one patch: `out` is [patches, packs * PACK], of which the columns after the patch's numbers are
// zeros. A warp reads runs of PATCH pixels and writes 32 packs side by side.
extern "C" __global__ void __launch_bounds__(THREADS)
    patches(const float* __restrict__ pixels, elem* __restrict__ out, u32 side, u32 grid, u32 packs, u32 total) {
  static constexpr u32 AREA = PATCH * PATCH, WIDTH = CHANNELS * AREA;
  const u32 at = blockIdx.x * THREADS + threadIdx.x;
  if (at >= total) return;
  const u32 patch = at / packs, first = (at - patch * packs) * PACK;
  const u32 square = patch / (grid * grid), inside = patch - square * (grid * grid);
  const u32 down = inside / grid, across = inside - down * grid;
  const float* corner = pixels + (size_t)square * CHANNELS * side * side + down * PATCH * side + across * PATCH;
  float x[PACK];
#pragma unroll
  for (int i = 0; i < PACK; i++) {
    const u32 column = first + i, channel = column / AREA, pixel = column - channel * AREA;
    x[i] = column < WIDTH ? corner[(channel * side + pixel / PATCH) * side + pixel % PATCH] : 0.f;
  }
  store_floats(out + (size_t)at * PACK, x);
}
#endif

// A thread has a pack of one row: `out[i]` is the sum of `weights[i][t] * from[at[i][t]]` over the four `t`, in f32 and rounded
// once. What is not in `from` adds nothing and is not read.
extern "C" __global__ void __launch_bounds__(THREADS)
    mix_rows(const elem* __restrict__ from, u32 from_rows, const int4* __restrict__ at, const float4* __restrict__ weights,
             elem* __restrict__ out, u32 packs, u32 total) {
  const u32 mine = blockIdx.x * THREADS + threadIdx.x;
  if (mine >= total) return;
  const u32 row = mine / packs, column = (mine - row * packs) * PACK;
  const int4 rows = at[row];
  const float4 factors = weights[row];
  const u32 source[4] = {(u32)rows.x, (u32)rows.y, (u32)rows.z, (u32)rows.w};
  const float weight[4] = {factors.x, factors.y, factors.z, factors.w};
  raw held[4];
#pragma unroll
  for (int t = 0; t < 4; t++) {
    if (source[t] < from_rows) held[t] = load_raw(from + (size_t)source[t] * packs * PACK + column);
  }
  float sum[PACK] = {};
#pragma unroll
  for (int t = 0; t < 4; t++) {
    if (source[t] >= from_rows) continue;
    float x[PACK];
    unpack(held[t], x);
#pragma unroll
    for (int i = 0; i < PACK; i++) sum[i] += weight[t] * x[i];
  }
  store_floats(out + (size_t)mine * PACK, sum);
}
