// The norm of a gradient that lies in many buffers, and the factor that clips it.
#ifndef CHUNK
#define CHUNK 32768
#endif

__device__ __forceinline__ float sum_of_squares(const float (&x)[VEC]) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < VEC; i++) sum = fmaf(x[i], x[i], sum);
  return sum;
}

// One block a chunk. The order of the sum depends on the length alone.
extern "C" __global__ void __launch_bounds__(256) squares(const elem* __restrict__ gradient, u64 length, float* __restrict__ partials) {
  const elem* from = gradient + (u64)blockIdx.x * CHUNK;
  u64 left = length - (u64)blockIdx.x * CHUNK;
  float sum = 0.f;
  if (left >= CHUNK) {
    // As many loads in flight as registers allow: nothing else is to be done.
    constexpr int FLIGHT = 8;
#pragma unroll 1
    for (int base = 0; base < CHUNK / VEC; base += FLIGHT * 256) {
      float x[FLIGHT][VEC];
#pragma unroll
      for (int k = 0; k < FLIGHT; k++) load_vec(from + (u64)(base + k * 256 + threadIdx.x) * VEC, x[k]);
#pragma unroll
      for (int k = 0; k < FLIGHT; k++) sum += sum_of_squares(x[k]);
    }
  } else {
    int vectors = (int)left / VEC;
    for (int i = threadIdx.x; i < vectors; i += 256) {
      float x[VEC];
      load_vec(from + i * VEC, x);
      sum += sum_of_squares(x);
    }
    for (int i = vectors * VEC + threadIdx.x; i < (int)left; i += 256) {
      float x = to_float(from[i]);
      sum = fmaf(x, x, sum);
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// Of one block of 1,024 threads, in a fixed order.
__device__ __forceinline__ double sum_all(const float* partials, u64 count) {
  __shared__ double parts[32];
  double sum = 0.;
#pragma unroll 4
  for (u64 i = threadIdx.x; i < count; i += 1024) sum += (double)partials[i];
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = sum;
  __syncthreads();
  sum = parts[threadIdx.x & 31];
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  return sum;
}

extern "C" __global__ void __launch_bounds__(1024) sum_partials(const float* __restrict__ partials, u64 count, float* __restrict__ sum) {
  double all = sum_all(partials, count);
  if (threadIdx.x == 0) sum[0] = (float)all;
}

// [norm, scale]; a scale of 0 says that the norm is no number.
extern "C" __global__ void __launch_bounds__(1024) clip(const float* __restrict__ partials, u64 count, float factor, float max_norm, float* __restrict__ out) {
  double all = sum_all(partials, count);
  if (threadIdx.x != 0) return;
  float norm = (float)((double)factor * sqrt(all));
  float scale = (float)((double)factor * fmin(1., (double)max_norm / ((double)norm + 1e-6)));
  bool finite = fabsf(norm) < __int_as_float(0x7f800000);
  out[0] = norm;
  out[1] = finite ? scale : 0.f;
}

// Counts an update that is not skipped, and computes what depends on learning rate and count.
extern "C" __global__ void pace(const float* __restrict__ clip, const float* __restrict__ learning_rate, double beta1, double beta2,
                                double weight_decay, u32* __restrict__ updates, float* __restrict__ factors) {
  if (threadIdx.x != 0 || clip[1] == 0.f) return;
  u32 step = updates[0] + 1;
  double rate = (double)learning_rate[0];
  updates[0] = step;
  factors[0] = (float)(rate / (1. - pow(beta1, (double)step)));
  factors[1] = (float)(1. - rate * weight_decay);
  factors[2] = (float)(1. / sqrt(1. - pow(beta2, (double)step)));
}
