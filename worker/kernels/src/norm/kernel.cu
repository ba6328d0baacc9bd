// Norms of rows. A block of THREADS threads has one row, of which each thread holds VECTORS packs in registers: a row
// is read once, whatever is computed from it. With THREADS = 32 there is no barrier; with more a row has less latency.
#ifndef THREADS
#define THREADS 128
#endif
#ifndef VECTORS
#define VECTORS 4
#endif
// Whether what is normed is the sum of matrices of f32.
#ifndef IN_PARTS
#define IN_PARTS 0
#endif

// Where a pack of this thread begins in a row.
__device__ __forceinline__ int column(int vector) { return (vector * THREADS + (int)threadIdx.x) * PACK; }

// Of the whole block, given to each of its threads. `parts` must not be in use by another sum.
__device__ __forceinline__ float row_sum(float x, float (&parts)[(THREADS + 31) / 32]) {
  x = warp_sum(x);
  if constexpr (THREADS > 32) {
    const int lane = threadIdx.x & 31;
    if (lane == 0) parts[threadIdx.x >> 5] = x;
    __syncthreads();
    x = warp_sum(lane < THREADS / 32 ? parts[lane] : 0.f);
  }
  return x;
}

__device__ __forceinline__ void load_row(const elem* row, int width, raw (&to)[VECTORS]) {
#pragma unroll
  for (int v = 0; v < VECTORS; v++) {
    if (column(v) < width) to[v] = load_raw(row + column(v));
  }
}

// Loads a row of x, unless it is there. With a residual, it becomes their sum in the format of the residual, which is also stored.
__device__ __forceinline__ void load_sum(const elem* x, elem* residual, int width, raw (&row)[VECTORS]) {
  if (x != nullptr) load_row(x, width, row);
  if (residual == nullptr) return;
  raw past[VECTORS];
  load_row(residual, width, past);
#pragma unroll
  for (int v = 0; v < VECTORS; v++) {
    if (column(v) >= width) continue;
    float a[PACK], b[PACK];
    unpack(row[v], a);
    unpack(past[v], b);
#pragma unroll
    for (int i = 0; i < PACK; i++) a[i] += b[i];
    pack(a, row[v]);
    store_raw(residual + column(v), row[v]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm(const elem* x, const float* sums, int count, elem* residual, const elem* __restrict__ weight, elem* out,
             float* inverse_rms, int width, float eps) {
  __shared__ float parts[(THREADS + 31) / 32];
  // The product that follows reads its weight first.
  allow_next();
  wait_for_previous();
  const size_t start = (size_t)blockIdx.x * width;
  raw row[VECTORS];
  if (IN_PARTS) {
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
      if (column(v) < width) row[v] = add_parts(sums + start + column(v), count, (size_t)gridDim.x * width);
    }
  }
  load_sum(IN_PARTS ? nullptr : x + start, residual == nullptr ? nullptr : residual + start, width, row);
  float squares = 0.f;
#pragma unroll
  for (int v = 0; v < VECTORS; v++) {
    if (column(v) >= width) continue;
    float a[PACK];
    unpack(row[v], a);
#pragma unroll
    for (int i = 0; i < PACK; i++) squares += a[i] * a[i];
  }
  const float inverse = rsqrtf(row_sum(squares, parts) / (float)width + eps);
  if (inverse_rms != nullptr && threadIdx.x == 0) inverse_rms[blockIdx.x] = inverse;
#pragma unroll
  for (int v = 0; v < VECTORS; v++) {
    if (column(v) >= width) continue;
    float a[PACK], w[PACK];
    unpack(row[v], a);
    unpack(load_raw(weight + column(v)), w);
#pragma unroll
    for (int i = 0; i < PACK; i++) a[i] = rounded(a[i] * inverse) * w[i];
    store_floats(out + start + column(v), a);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    layer_norm(const elem* x, elem* residual, const elem* __restrict__ weight, const elem* __restrict__ bias, elem* out,
               int width, float eps) {
  __shared__ float sum_parts[(THREADS + 31) / 32], square_parts[(THREADS + 31) / 32];
  const size_t start = (size_t)blockIdx.x * width;
  raw row[VECTORS];
  load_sum(x + start, residual == nullptr ? nullptr : residual + start, width, row);
  float sum = 0.f;
#pragma unroll
  for (int v = 0; v < VECTORS; v++) {
    if (column(v) >= width) continue;
    float a[PACK];
    unpack(row[v], a);
#pragma unroll
    for (int i = 0; i < PACK; i++) sum += a[i];
  }
  const float mean = row_sum(sum, sum_parts) / (float)width;
  float squares = 0.f;
#pragma unroll
  for (int v = 0; v < VECTORS; v++) {
    if (column(v) >= width) continue;
    float a[PACK];
    unpack(row[v], a);
#pragma unroll
    for (int i = 0; i < PACK; i++) squares += (a[i] - mean) * (a[i] - mean);
  }
  const float inverse = rsqrtf(row_sum(squares, square_parts) / (float)width + eps);
#pragma unroll
  for (int v = 0; v < VECTORS; v++) {
    if (column(v) >= width) continue;
    float a[PACK], w[PACK], b[PACK];
    unpack(row[v], a);
    unpack(load_raw(weight + column(v)), w);
    unpack(load_raw(bias + column(v)), b);
#pragma unroll
    for (int i = 0; i < PACK; i++) a[i] = (a[i] - mean) * inverse * w[i] + b[i];
    store_floats(out + start + column(v), a);
  }
}

// Blocks take rows in turn, so that each sums its part of the weight's gradient in registers; the loads of the next row
// are in flight while a row is summed. WEIGHT_GRADIENT = 0 leaves `partials` out.
extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm_backward(const elem* dy, const elem* __restrict__ x, const elem* __restrict__ weight,
                      const float* __restrict__ inverse_rms, elem* dx, int accumulate, float* partials, int rows,
                      int width) {
#ifndef WEIGHT_GRADIENT
#define WEIGHT_GRADIENT 1
#endif
  __shared__ float parts[2][(THREADS + 31) / 32];
  raw w[VECTORS], next_dy[VECTORS], next_x[VECTORS], next_dx[VECTORS];
  float next_inverse = 0.f;
  float dweight[VECTORS][PACK] = {};
  load_row(weight, width, w);
  int row = blockIdx.x;
  auto prefetch = [&](int row) {
    const size_t start = (size_t)row * width;
    load_row(dy + start, width, next_dy);
    load_row(x + start, width, next_x);
    if (accumulate) load_row(dx + start, width, next_dx);
    next_inverse = inverse_rms[row];
  };
  if (row < rows) prefetch(row);
  for (int turn = 0; row < rows; row += gridDim.x, turn ^= 1) {
    raw this_dy[VECTORS], this_x[VECTORS], this_dx[VECTORS];
#pragma unroll
    for (int v = 0; v < VECTORS; v++) this_dy[v] = next_dy[v], this_x[v] = next_x[v], this_dx[v] = next_dx[v];
    const float inverse = next_inverse;
    if (row + (int)gridDim.x < rows) prefetch(row + gridDim.x);
    float dot = 0.f;
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
      if (column(v) >= width) continue;
      float a[PACK], d[PACK], scale[PACK];
      unpack(this_x[v], a);
      unpack(this_dy[v], d);
      unpack(w[v], scale);
#pragma unroll
      for (int i = 0; i < PACK; i++) {
        dot += d[i] * scale[i] * a[i];
        if (WEIGHT_GRADIENT) dweight[v][i] += d[i] * rounded(a[i] * inverse);
      }
    }
    // With normed n = x / rms and g = dy * weight: dx = (g - n * mean(g * n)) / rms.
    const float along = row_sum(dot, parts[turn]) / (float)width * inverse * inverse;
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
      if (column(v) >= width) continue;
      float a[PACK], d[PACK], scale[PACK], past[PACK];
      unpack(this_x[v], a);
      unpack(this_dy[v], d);
      unpack(w[v], scale);
      unpack(this_dx[v], past);
#pragma unroll
      for (int i = 0; i < PACK; i++) {
        const float gradient = (d[i] * scale[i] - a[i] * along) * inverse;
        a[i] = accumulate ? past[i] + gradient : gradient;
      }
      store_floats(dx + (size_t)row * width + column(v), a);
    }
  }
  if (WEIGHT_GRADIENT) {
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
      if (column(v) >= width) continue;
      store_numbers(partials + (size_t)blockIdx.x * width + column(v), dweight[v]);
    }
  }
}
