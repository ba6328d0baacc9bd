// A block has TOKENS tokens: their angles are computed once, into shared memory, for all heads. A thread has one pack
// of pairs of one head in each of these tokens: the loads of all are in flight before the angles are there.
#ifndef TOKENS
#define TOKENS 1
#endif
// Whether what is split is the sum of matrices of f32.
#ifndef IN_PARTS
#define IN_PARTS 0
#endif

// cos and sin of TOKENS tokens times `pairs` pairs. The angle is the rounded f32 product, as in Hugging Face; `sincosf`
// reduces it exactly whatever its size.
__device__ __forceinline__ void prepare_angles(float* cosines, float* sines, const int* positions,
                                               const float* __restrict__ frequencies, const u8* __restrict__ axis_of,
                                               int axes, int first, int tokens, int pairs) {
  for (int at = threadIdx.x; at < TOKENS * pairs; at += blockDim.x) {
    const int token = first + at / pairs, pair = at % pairs;
    if (token >= tokens) break;
    const int axis = axis_of[pair], position = axis < axes ? positions[(size_t)axis * tokens + token] : 0;
    // Not contracted into the reduction.
    sincosf(__fmul_rn((float)position, frequencies[pair]), &sines[at], &cosines[at]);
  }
}

// Turns PACK pairs by their angles; `direction` is 1, or -1 to turn back.
__device__ __forceinline__ void turn(float (&low)[PACK], float (&high)[PACK], const float* cosines, const float* sines,
                                     float direction) {
#pragma unroll
  for (int i = 0; i < PACK; i++) {
    const float c = cosines[i], s = direction * sines[i], x = low[i], y = high[i];
    low[i] = x * c - y * s;
    high[i] = y * c + x * s;
  }
}

__device__ __forceinline__ void add_to(float (&x)[PACK], raw more) {
  float b[PACK];
  unpack(more, b);
#pragma unroll
  for (int i = 0; i < PACK; i++) x[i] += b[i];
}

// What kernels before this one write is not `__restrict__`: of that the compiler may fetch it before the wait.
extern "C" __global__ void rotary_split(const elem* qkv, const float* sums, int count, const elem* __restrict__ bias,
                                        const int* positions, const float* __restrict__ frequencies,
                                        const u8* __restrict__ axis_of, int axes, elem* q, elem* k, elem* v, elem* keys,
                                        elem* values, const int* slots, int tokens, int heads,
                                        int kv_heads, int pairs, int block_bits, int capacity) {
  extern __shared__ __align__(16) float angles[];
  allow_next();
  wait_for_previous();
  float *cosines = angles, *sines = angles + TOKENS * pairs;
  const int first = blockIdx.x * TOKENS, packs = pairs / PACK, head_dim = 2 * pairs;
  const int all_heads = heads + 2 * kv_heads, items = all_heads * packs;
  bool ready = frequencies == nullptr;
  // All threads go as often through the loop: there is a barrier in it.
  for (int begin = 0; begin < items; begin += blockDim.x) {
    const int item = begin + threadIdx.x;
    const int head = item / packs, pair = item % packs * PACK;
    const bool works = item < items;
    raw low[TOKENS], high[TOKENS], bias_low, bias_high;
    int slot[TOKENS];
    if (works) {
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
        if (first + t >= tokens) continue;
        slot[t] = slots == nullptr || head < heads ? -1 : slots[first + t];
        const size_t at = ((size_t)(first + t) * all_heads + head) * head_dim + pair;
        const size_t matrix = (size_t)tokens * all_heads * head_dim;
        low[t] = IN_PARTS ? add_parts(sums + at, count, matrix) : load_raw(qkv + at);
        high[t] = IN_PARTS ? add_parts(sums + at + pairs, count, matrix) : load_raw(qkv + at + pairs);
      }
      if (bias != nullptr) {
        bias_low = load_raw(bias + (size_t)head * head_dim + pair);
        bias_high = load_raw(bias + (size_t)head * head_dim + pair + pairs);
      }
    }
    if (!ready) {
      prepare_angles(cosines, sines, positions, frequencies, axis_of, axes, first, tokens, pairs);
      __syncthreads();
      ready = true;
    }
    if (!works) continue;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      const int token = first + t;
      if (token >= tokens) continue;
      float x[PACK], y[PACK];
      unpack(low[t], x);
      unpack(high[t], y);
      if (bias != nullptr) add_to(x, bias_low), add_to(y, bias_high);
      if (frequencies != nullptr && head < heads + kv_heads)
        turn(x, y, cosines + t * pairs + pair, sines + t * pairs + pair, 1.f);
      raw first_half, second_half;
      pack(x, first_half);
      pack(y, second_half);
      auto put = [&](elem* to) {
        store_raw(to + pair, first_half);
        store_raw(to + pair + pairs, second_half);
      };
      if (head < heads) {
        put(q + ((size_t)token * heads + head) * head_dim);
        continue;
      }
      const bool is_key = head < heads + kv_heads;
      const int kv_head = head - heads - (is_key ? 0 : kv_heads);
      elem *rows = is_key ? k : v, *pool = is_key ? keys : values;
      if (rows != nullptr) put(rows + ((size_t)token * kv_heads + kv_head) * head_dim);
      if (slot[t] >= 0 && slot[t] < capacity) {
        const int block = slot[t] >> block_bits, offset = slot[t] & ((1 << block_bits) - 1);
        put(pool + ((((size_t)block * kv_heads + kv_head) << block_bits) + offset) * head_dim);
      }
    }
  }
}

extern "C" __global__ void rotary_backward(const elem* __restrict__ dq, const elem* __restrict__ dk,
                                           const elem* __restrict__ dv, const int* __restrict__ positions,
                                           const float* __restrict__ frequencies, const u8* __restrict__ axis_of,
                                           int axes, elem* __restrict__ d_qkv, int tokens, int heads, int kv_heads,
                                           int pairs) {
  extern __shared__ __align__(16) float angles[];
  float *cosines = angles, *sines = angles + TOKENS * pairs;
  const int first = blockIdx.x * TOKENS, packs = pairs / PACK, head_dim = 2 * pairs;
  const int all_heads = heads + 2 * kv_heads, items = all_heads * packs;
  bool ready = frequencies == nullptr;
  for (int begin = 0; begin < items; begin += blockDim.x) {
    const int item = begin + threadIdx.x;
    const int head = item / packs, pair = item % packs * PACK;
    const bool works = item < items, turned = head < heads + kv_heads;
    const elem* from = head < heads ? dq : turned ? dk : dv;
    const int from_heads = head < heads ? heads : kv_heads;
    const int from_head = head < heads ? head : turned ? head - heads : head - heads - kv_heads;
    raw low[TOKENS], high[TOKENS];
    if (works) {
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
        if (first + t >= tokens) continue;
        const elem* source = from + ((size_t)(first + t) * from_heads + from_head) * head_dim + pair;
        low[t] = load_raw(source);
        high[t] = load_raw(source + pairs);
      }
    }
    if (!ready) {
      prepare_angles(cosines, sines, positions, frequencies, axis_of, axes, first, tokens, pairs);
      __syncthreads();
      ready = true;
    }
    if (!works) continue;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      if (first + t >= tokens) continue;
      elem* to = d_qkv + ((size_t)(first + t) * all_heads + head) * head_dim + pair;
      if (frequencies == nullptr || !turned) {
        store_raw(to, low[t]);
        store_raw(to + pairs, high[t]);
        continue;
      }
      float x[PACK], y[PACK];
      unpack(low[t], x);
      unpack(high[t], y);
      turn(x, y, cosines + t * pairs + pair, sines + t * pairs + pair, -1.f);
      store_floats(to, x);
      store_floats(to + pairs, y);
    }
  }
}
