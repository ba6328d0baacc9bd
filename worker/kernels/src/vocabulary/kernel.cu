// A block takes a row of a chunk of logits. Rows of the chunk are `stride` floats apart, a multiple of 8.
//
// Exponentials are 2^((z - m) c) with c = log2(e) / temperature: the difference is taken first, so that the highest logit's is
// exactly 1 and large logits lose nothing.

// A finite number in place of minus infinity: differences with it are not NaN.
static constexpr float LOWEST = -3.0e38f;
static constexpr float LOG2_E = 1.4426950408889634f;

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Of numbers z: the highest, Σ e^((z - m)/T), and Σ e^((z - m)/T) (z - m)/T, which gives the entropy.
struct Sums {
  float highest, mass, weighted;
};

// The sums of both, whose exponentials refer to the higher of the two highest.
__device__ __forceinline__ Sums merged(Sums a, Sums b, float scale) {
  float highest = fmaxf(a.highest, b.highest);
  float shift_a = (a.highest - highest) * scale, shift_b = (b.highest - highest) * scale;
  float factor_a = exp2_fast(shift_a), factor_b = exp2_fast(shift_b);
  // Where nothing has been summed the shift is far too large, but multiplies nothing.
  float weighted_a = a.mass == 0.f ? 0.f : factor_a * (a.weighted + shift_a * a.mass);
  float weighted_b = b.mass == 0.f ? 0.f : factor_b * (b.weighted + shift_b * b.mass);
  return {highest, factor_a * a.mass + factor_b * b.mass, weighted_a + weighted_b};
}

template <int N> __device__ __forceinline__ void add(Sums& sums, const float (&z)[N], float scale) {
  float highest = sums.highest;
#pragma unroll
  for (int i = 0; i < N; i++) highest = fmaxf(highest, z[i]);
  if (highest > sums.highest) sums = merged(sums, {highest, 0.f, 0.f}, scale);
#pragma unroll
  for (int i = 0; i < N; i++) {
    float y = (z[i] - highest) * scale;
    float e = exp2_fast(y);
    sums.mass += e;
    // Minus infinity times its probability, 0, is nothing.
    sums.weighted += e > 0.f ? e * y : 0.f;
  }
}

// Folds logits [gridDim.x, tokens] of the tokens from `first` on into `state` [gridDim.x] of (highest, mass, weighted, target's
// logit); with the last chunk of the vocabulary come the results.
extern "C" __global__ void __launch_bounds__(128)
    vocabulary_forward(const float* __restrict__ logits, int stride, int first, int tokens, int vocabulary,
                       float inverse_temperature, const int* __restrict__ targets, float4* __restrict__ state,
                       float* __restrict__ log_prob, float* __restrict__ entropy, float* __restrict__ lse) {
  __shared__ Sums parts[4];
  int row = blockIdx.x;
  const float* z = logits + (i64)row * stride;
  float scale = inverse_temperature * LOG2_E;
  Sums sums = {LOWEST, 0.f, 0.f};
  int vectors = tokens / 4;
  int at = threadIdx.x;
  for (; at + 3 * 128 < vectors; at += 4 * 128) {
    float values[16];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float4 v = reinterpret_cast<const float4*>(z)[at + i * 128];
      values[4 * i] = v.x, values[4 * i + 1] = v.y, values[4 * i + 2] = v.z, values[4 * i + 3] = v.w;
    }
    add(sums, values, scale);
  }
  for (; at < vectors; at += 128) {
    float values[4];
    load_vec(z + 4 * at, values);
    add(sums, values, scale);
  }
  if (4 * vectors + (int)threadIdx.x < tokens) {
    float value[1] = {z[4 * vectors + threadIdx.x]};
    add(sums, value, scale);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) {
    Sums other = {__shfl_xor_sync(0xffffffffu, sums.highest, offset), __shfl_xor_sync(0xffffffffu, sums.mass, offset),
                  __shfl_xor_sync(0xffffffffu, sums.weighted, offset)};
    sums = merged(sums, other, scale);
  }
  if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = sums;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sums = merged(merged(parts[0], parts[1], scale), merged(parts[2], parts[3], scale), scale);
  int target = targets[row];
  float target_logit = -__int_as_float(0x7f800000);
  if (first > 0) {
    float4 before = state[row];
    sums = merged({before.x, before.y, before.z}, sums, scale);
    target_logit = before.w;
  }
  if (target >= first && target < first + tokens) target_logit = z[target - first];
  if (first + tokens < vocabulary) {
    state[row] = make_float4(sums.highest, sums.mass, sums.weighted, target_logit);
    return;
  }
  float log_mass = logf(sums.mass);
  log_prob[row] = target < 0 ? 0.f : (target_logit - sums.highest) * inverse_temperature - log_mass;
  if (entropy) entropy[row] = target < 0 ? 0.f : log_mass - sums.weighted / (sums.mass * LOG2_E);
  lse[row] = sums.highest * inverse_temperature + log_mass;
}

#ifdef ELEM

// Gradients of a loss by the logits of a chunk: (d_log_prob (1[target] - p) - d_entropy p (ln p + H)) / T.
extern "C" __global__ void __launch_bounds__(128)
    vocabulary_backward(const float* __restrict__ logits, int stride, int first, int tokens, float inverse_temperature,
                        const int* __restrict__ targets, const float* __restrict__ lse,
                        const float* __restrict__ d_log_prob, const float* __restrict__ entropy,
                        const float* __restrict__ d_entropy, elem* __restrict__ d_logits) {
  int row = blockIdx.x;
  const float* z = logits + (i64)row * stride;
  elem* out = d_logits + (i64)row * stride;
  int target = targets[row];
  float by_log_prob = target < 0 ? 0.f : d_log_prob[row] * inverse_temperature;
  float by_entropy = target < 0 || !entropy ? 0.f : d_entropy[row] * inverse_temperature;
  float row_entropy = target < 0 || !entropy ? 0.f : entropy[row];
  float log_sum = lse[row];
  auto gradient = [&](float logit, int token) {
    float log_p = logit * inverse_temperature - log_sum;
    float p = exp2_fast(log_p * LOG2_E);
    float d = -p * by_log_prob;
    // Minus infinity times its probability, 0, is nothing.
    if (p > 0.f) d -= p * by_entropy * (log_p + row_entropy);
    if (first + token == target) d += by_log_prob;
    return target < 0 ? 0.f : d;
  };
  int vectors = tokens / VEC;
#pragma unroll 2
  for (int at = threadIdx.x; at < vectors; at += 128) {
    float values[VEC];
#pragma unroll
    for (int i = 0; i < VEC; i += 4) {
      float4 v = reinterpret_cast<const float4*>(z)[(at * VEC + i) / 4];
      values[i] = v.x, values[i + 1] = v.y, values[i + 2] = v.z, values[i + 3] = v.w;
    }
#pragma unroll
    for (int i = 0; i < VEC; i++) values[i] = gradient(values[i], at * VEC + i);
    store_vec(out + at * VEC, values);
  }
  int rest = vectors * VEC + threadIdx.x;
  if (rest < tokens) out[rest] = from_float<elem>(gradient(z[rest], rest));
}

// Sums in f32 to the format of activations. A thread takes eight numbers.
extern "C" __global__ void __launch_bounds__(256)
    vocabulary_round(const float* __restrict__ sums, elem* __restrict__ to, u64 length) {
  u64 at = ((u64)blockIdx.x * 256 + threadIdx.x) * 8;
  // Rows of odd width begin anywhere.
  bool aligned = ((u64)to & 15) == 0;
  if (at + 8 <= length && aligned) {
#pragma unroll
    for (int i = 0; i < 8; i += VEC) {
      float values[VEC];
#pragma unroll
      for (int j = 0; j < VEC; j += 4) {
        float4 v = *reinterpret_cast<const float4*>(sums + at + i + j);
        values[j] = v.x, values[j + 1] = v.y, values[j + 2] = v.z, values[j + 3] = v.w;
      }
      store_vec(to + at + i, values);
    }
    return;
  }
  for (u64 i = at; i < at + 8 && i < length; i++) to[i] = from_float<elem>(sums[i]);
}

#endif
