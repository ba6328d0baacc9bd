// Before every source. No header of the toolkit is needed: a container has NVRTC, but may not have headers.
typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct __align__(2) bf16 {
  u16 bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float((u32)x.bits << 16); }

// Rounded to nearest, ties to even; a NaN stays one.
__device__ __forceinline__ bf16 to_bf16(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
// Two at once; `low` comes first in memory.
__device__ __forceinline__ u32 to_bf16x2(float low, float high) {
  u32 y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
__device__ __forceinline__ float low_float(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_float(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return to_bf16(x); }

// `elem` is what the source is compiled for: -DELEM=float or -DELEM=bf16.
#ifdef ELEM
typedef ELEM elem;
// Numbers in 16 bytes.
static constexpr int VEC = 16 / sizeof(elem);
#endif

// 16 bytes as floats and back.
__device__ __forceinline__ void load_vec(const float* from, float (&to)[4]) {
  float4 v = *reinterpret_cast<const float4*>(from);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
__device__ __forceinline__ void load_vec(const bf16* from, float (&to)[8]) {
  uint4 v = *reinterpret_cast<const uint4*>(from);
  to[0] = low_float(v.x), to[1] = high_float(v.x), to[2] = low_float(v.y), to[3] = high_float(v.y);
  to[4] = low_float(v.z), to[5] = high_float(v.z), to[6] = low_float(v.w), to[7] = high_float(v.w);
}
__device__ __forceinline__ void store_vec(float* to, const float (&from)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
}
__device__ __forceinline__ void store_vec(bf16* to, const float (&from)[8]) {
  *reinterpret_cast<uint4*>(to) = make_uint4(to_bf16x2(from[0], from[1]), to_bf16x2(from[2], from[3]),
                                             to_bf16x2(from[4], from[5]), to_bf16x2(from[6], from[7]));
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// Of all threads of a block of at most 1,024, given to each of them. Safe to call repeatedly.
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float parts[32];
  x = warp_sum(x);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = x;
  __syncthreads();
  int warps = (blockDim.x + 31) >> 5;
  float sum = (threadIdx.x & 31) < warps ? parts[threadIdx.x & 31] : 0.f;
  return warp_sum(sum);
}
__device__ __forceinline__ float block_max(float x) {
  __shared__ float parts[32];
  x = warp_max(x);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = x;
  __syncthreads();
  int warps = (blockDim.x + 31) >> 5;
  float best = (threadIdx.x & 31) < warps ? parts[threadIdx.x & 31] : -__int_as_float(0x7f800000);
  return warp_max(best);
}

// Where kernels overlap (`Grid::early`): lets the next one's blocks begin, though it may not yet read what this one writes; and
// waits until all kernels before this one have ended.
__device__ __forceinline__ void allow_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A counter-based generator (Philox 4x32-10, Salmon et al. 2011): equal counters and keys give equal numbers.
__device__ __forceinline__ uint4 philox(u64 counter, u64 stream, u64 seed) {
  u32 c0 = (u32)counter, c1 = (u32)(counter >> 32), c2 = (u32)stream, c3 = (u32)(stream >> 32);
  u32 k0 = (u32)seed, k1 = (u32)(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    u32 h0 = __umulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
    u32 h1 = __umulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
    c0 = h1 ^ c1 ^ k0, c1 = l1, c2 = h0 ^ c3 ^ k1, c3 = l0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

// Where something is in shared memory, as instructions name it.
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
