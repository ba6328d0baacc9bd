// Attention on plain cores, one warp per row: every width and format, for parity and for shapes that are rare. Sums are of f32.
static constexpr int EACH = (HEAD_DIM + 31) / 32;

__device__ __forceinline__ void load_row(const elem* from, float (&to)[EACH]) {
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    int at = j * 32 + (threadIdx.x & 31);
    to[j] = at < HEAD_DIM ? to_float(from[at]) : 0.f;
  }
}
__device__ __forceinline__ void store_row(elem* to, const float (&from)[EACH], float factor) {
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    int at = j * 32 + (threadIdx.x & 31);
    if (at < HEAD_DIM) to[at] = from_float<elem>(from[j] * factor);
  }
}
__device__ __forceinline__ float dot(const float (&a)[EACH], const float (&b)[EACH]) {
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < EACH; j++) sum += a[j] * b[j];
  return warp_sum(sum);
}
__device__ __forceinline__ void add(float (&sum)[EACH], const float (&x)[EACH], float factor) {
#pragma unroll
  for (int j = 0; j < EACH; j++) sum[j] += factor * x[j];
}

extern "C" __global__ void forward_simple(elem* __restrict__ out, float* __restrict__ lse, const elem* __restrict__ q,
                                          int q_stride, const u32* __restrict__ q_offsets, int segments, int tokens,
                                          KEY_OPERANDS, int heads, int kv_heads, float scale) {
  int rank = blockIdx.y * (blockDim.x >> 5) + (threadIdx.x >> 5), head = blockIdx.x;
  int segment, row;
  if (!find_tile(rank, q_offsets, segments, 1, tokens, segment, row)) return;
  int begin = q_offsets[segment], queries = q_offsets[segment + 1] - begin;
  Keys keys = KEYS_OF(segment, head / (heads / kv_heads), kv_heads);
  int end = CAUSAL ? min(keys.length, keys.length - queries + row + 1) : keys.length;
  float query[EACH], other[EACH], sum[EACH] = {};
  load_row(q + (i64)(begin + row) * q_stride + head * HEAD_DIM, query);
  float most = -INFINITE, total = 0.f;
  for (int key = 0; key < end; key++) {
    load_row(keys.key(key), other);
    float score = dot(query, other) * scale;
    float now = fmaxf(most, score), faded = expf(most - now), weight = expf(score - now);
    most = now, total = total * faded + weight;
    load_row(keys.value(key), other);
#pragma unroll
    for (int j = 0; j < EACH; j++) sum[j] = sum[j] * faded + weight * other[j];
  }
  store_row(out + ((i64)(begin + row) * heads + head) * HEAD_DIM, sum, end > 0 ? 1.f / total : 0.f);
  if (lse && (threadIdx.x & 31) == 0) lse[(i64)head * tokens + begin + row] = end > 0 ? most + logf(total) : -INFINITE;
}

#if !PAGED
// delta[heads, tokens]: the sum of dout · out of each query and head. Half a warp each.
extern "C" __global__ void sums_of_products(float* __restrict__ delta, const elem* __restrict__ dout,
                                            const elem* __restrict__ out, int tokens, int heads, int vectors) {
  i64 row = ((i64)blockIdx.x * blockDim.x + threadIdx.x) >> 4;
  int lane = threadIdx.x & 15;
  bool is = row < (i64)tokens * heads;
  float sum = 0.f;
  if (is) {
    const elem *a = dout + row * HEAD_DIM, *b = out + row * HEAD_DIM;
    if (vectors) {
      for (int at = lane * VEC; at < HEAD_DIM; at += 16 * VEC) {
        float x[VEC], y[VEC];
        load_vec(a + at, x), load_vec(b + at, y);
#pragma unroll
        for (int j = 0; j < VEC; j++) sum += x[j] * y[j];
      }
    } else {
      for (int at = lane; at < HEAD_DIM; at += 16) sum += to_float(a[at]) * to_float(b[at]);
    }
  }
#pragma unroll
  for (int offset = 8; offset > 0; offset >>= 1) sum += __shfl_xor_sync(FULL, sum, offset);
  if (is && lane == 0) delta[(row % heads) * tokens + row / heads] = sum;
}

extern "C" __global__ void backward_query_simple(elem* __restrict__ dq, int dq_stride, const elem* __restrict__ dout,
                                                 const float* __restrict__ lse, const float* __restrict__ delta,
                                                 const elem* __restrict__ q, int q_stride,
                                                 const u32* __restrict__ q_offsets, int segments, int tokens,
                                                 KEY_OPERANDS, int heads, int kv_heads, float scale) {
  int rank = blockIdx.y * (blockDim.x >> 5) + (threadIdx.x >> 5), head = blockIdx.x;
  int segment, row;
  if (!find_tile(rank, q_offsets, segments, 1, tokens, segment, row)) return;
  int begin = q_offsets[segment], queries = q_offsets[segment + 1] - begin;
  Keys keys = KEYS_OF(segment, head / (heads / kv_heads), kv_heads);
  int end = CAUSAL ? min(keys.length, keys.length - queries + row + 1) : keys.length;
  float query[EACH], gradient[EACH], other[EACH], value[EACH], sum[EACH] = {};
  load_row(q + (i64)(begin + row) * q_stride + head * HEAD_DIM, query);
  load_row(dout + ((i64)(begin + row) * heads + head) * HEAD_DIM, gradient);
  float norm = lse[(i64)head * tokens + begin + row], mean = delta[(i64)head * tokens + begin + row];
  for (int key = 0; key < end; key++) {
    load_row(keys.key(key), other), load_row(keys.value(key), value);
    float weight = expf(dot(query, other) * scale - norm);
    add(sum, other, weight * (dot(gradient, value) - mean));
  }
  store_row(dq + (i64)(begin + row) * dq_stride + head * HEAD_DIM, sum, scale);
}

extern "C" __global__ void backward_key_simple(elem* __restrict__ dk, int dk_stride, elem* __restrict__ dv, int dv_stride,
                                               const elem* __restrict__ dout, const float* __restrict__ lse,
                                               const float* __restrict__ delta, const elem* __restrict__ q, int q_stride,
                                               const u32* __restrict__ q_offsets, int segments, int tokens,
                                               KEY_OPERANDS, int key_tokens, int heads, int kv_heads, float scale) {
  int rank = blockIdx.y * (blockDim.x >> 5) + (threadIdx.x >> 5), kv_head = blockIdx.x;
  int segment, row;
  if (!find_tile(rank, k_offsets, segments, 1, key_tokens, segment, row)) return;
  int begin = q_offsets[segment], queries = q_offsets[segment + 1] - begin;
  int group = heads / kv_heads;
  Keys keys = KEYS_OF(segment, kv_head, kv_heads);
  float key[EACH], value[EACH], query[EACH], gradient[EACH], key_sum[EACH] = {}, value_sum[EACH] = {};
  load_row(keys.key(row), key), load_row(keys.value(row), value);
  int first = CAUSAL ? max(0, row - (keys.length - queries)) : 0;
  for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
    for (int i = first; i < queries; i++) {
      load_row(q + (i64)(begin + i) * q_stride + head * HEAD_DIM, query);
      load_row(dout + ((i64)(begin + i) * heads + head) * HEAD_DIM, gradient);
      i64 at = (i64)head * tokens + begin + i;
      float weight = expf(dot(query, key) * scale - lse[at]);
      add(value_sum, gradient, weight);
      add(key_sum, query, weight * (dot(gradient, value) - delta[at]));
    }
  }
  i64 token = k_offsets[segment] + row;
  store_row(dk + token * dk_stride + kv_head * HEAD_DIM, key_sum, scale);
  store_row(dv + token * dv_stride + kv_head * HEAD_DIM, value_sum, 1.f);
}
#endif
