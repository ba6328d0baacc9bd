// AdamW in one pass: parameter, gradient and moments are read once and written once.
//
// A warp updates 256 neighbours, which share the units of their 8-bit moments: lane l holds four from 4 l and four from
// 128 + 4 l, so that loads of one to four bytes a number are contiguous across the warp alike. Operations are rounded one by
// one (no contraction of the compiler's choosing): the reference computes the same bits.
#if GRADIENT_F32
typedef float gradient_elem;
#else
typedef elem gradient_elem;
#endif
#if STATE == 0
typedef float m_elem;
typedef float v_elem;
#elif STATE == 1
typedef bf16 m_elem;
typedef bf16 v_elem;
#else
typedef i8 m_elem;
typedef u8 v_elem;
#endif

static constexpr int SPAN = 256;
[[maybe_unused]] static constexpr float M_STEPS = 127.f * 127.f;
[[maybe_unused]] static constexpr float V_STEPS = 255.f * 255.f;
// A unit below this is 0: its inverse would overflow.
[[maybe_unused]] static constexpr float LEAST_UNIT = 1e-30f;
// Roots of less are roots of this, 2^-100, where they are exact: the sequence below is, from here on.
[[maybe_unused]] static constexpr float LEAST_V = 7.88860905e-31f;
// Keeps the largest of a block just below its code, so that nothing is rounded past it.
static constexpr float BELOW_ONE = 1.f - 9.5367431640625e-7f;

// Four numbers from memory, those past the end as 0; the streams of memory do not meet again, so the cache need not keep them.
template <bool WHOLE> __device__ __forceinline__ void load(const float* from, int left, u32 (&to)[4]) {
  if (WHOLE) {
    uint4 v = __ldcs(reinterpret_cast<const uint4*>(from));
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) to[i] = i < left ? __float_as_uint(from[i]) : 0u;
  }
}
template <bool WHOLE> __device__ __forceinline__ void load(const bf16* from, int left, u32 (&to)[2]) {
  if (WHOLE) {
    uint2 v = __ldcs(reinterpret_cast<const uint2*>(from));
    to[0] = v.x, to[1] = v.y;
  } else {
    to[0] = to[1] = 0u;
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (i < left) to[i / 2] |= (u32)from[i].bits << (i % 2 * 16);
  }
}
template <bool WHOLE, typename Byte> __device__ __forceinline__ void load_bytes(const Byte* from, int left, u32 (&to)[1]) {
  if (WHOLE) {
    to[0] = __ldcs(reinterpret_cast<const u32*>(from));
  } else {
    to[0] = 0u;
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (i < left) to[0] |= (u32)(u8)from[i] << (i * 8);
  }
}
template <bool WHOLE> __device__ __forceinline__ void load(const i8* from, int left, u32 (&to)[1]) { load_bytes<WHOLE>(from, left, to); }
template <bool WHOLE> __device__ __forceinline__ void load(const u8* from, int left, u32 (&to)[1]) { load_bytes<WHOLE>(from, left, to); }

template <bool WHOLE> __device__ __forceinline__ void store(float* to, int left, const u32 (&from)[4]) {
  if (WHOLE) {
    __stcs(reinterpret_cast<uint4*>(to), make_uint4(from[0], from[1], from[2], from[3]));
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (i < left) to[i] = __uint_as_float(from[i]);
  }
}
template <bool WHOLE> __device__ __forceinline__ void store(bf16* to, int left, const u32 (&from)[2]) {
  if (WHOLE) {
    __stcs(reinterpret_cast<uint2*>(to), make_uint2(from[0], from[1]));
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (i < left) to[i].bits = (u16)(from[i / 2] >> (i % 2 * 16));
  }
}
template <bool WHOLE, typename Byte> __device__ __forceinline__ void store_bytes(Byte* to, int left, const u32 (&from)[1]) {
  if (WHOLE) {
    __stcs(reinterpret_cast<u32*>(to), from[0]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (i < left) to[i] = (Byte)(from[0] >> (i * 8));
  }
}
template <bool WHOLE> __device__ __forceinline__ void store(i8* to, int left, const u32 (&from)[1]) { store_bytes<WHOLE>(to, left, from); }
template <bool WHOLE> __device__ __forceinline__ void store(u8* to, int left, const u32 (&from)[1]) { store_bytes<WHOLE>(to, left, from); }

// The `i`th of four numbers that were loaded.
__device__ __forceinline__ float number(const u32 (&words)[4], int i) { return __uint_as_float(words[i]); }
__device__ __forceinline__ float number(const u32 (&words)[2], int i) { return i % 2 ? high_float(words[i / 2]) : low_float(words[i / 2]); }

// Random bits for the `j`th of a lane's eight numbers: an even one has the lower half of its word, an odd one the upper. From
// those 16 bits, odd factors make three numbers, for p, m and v: each as evenly distributed as the bits, and any two or three of
// them spread evenly over the square or the cube (the factors are chosen for the distance of the planes that the triples lie in).
// In the upper half; what an odd one has below it is as random.
enum Factor : u32 { OF_P = 1u, OF_M = 0x870bu, OF_V = 0x40c9u };
template <Factor FACTOR> __device__ __forceinline__ u32 draw(const uint4& words, int j) {
  u32 word = j / 2 == 0 ? words.x : j / 2 == 1 ? words.y : j / 2 == 2 ? words.z : words.w;
  return word * (j % 2 ? FACTOR : FACTOR << 16);
}

// The bits of a float whose upper half is the stochastically rounded bf16: a carry happens with the probability of the part cut
// off. Infinities stay by themselves.
__device__ __forceinline__ u32 round_up(float x, u32 chance) {
  u32 bits = __float_as_uint(x) + (chance >> 16);
  return x != x ? 0x7fff0000u : bits;
}
__device__ __forceinline__ u32 pack(u32 low, u32 high) { return __byte_perm(low, high, 0x7632); }

// Four numbers, the `quad`th of a lane's two, as they are stored. Only bf16 is rounded, at random or to the nearest.
template <bool RANDOM, Factor OF> __device__ __forceinline__ void encode(const float* x, const uint4&, int, u32 (&words)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) words[i] = __float_as_uint(x[i]);
}
template <bool RANDOM, Factor OF> __device__ __forceinline__ void encode(const float* x, const uint4& random, int quad, u32 (&words)[2]) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    int j = quad * 4 + i;
    words[i / 2] = RANDOM ? pack(round_up(x[i], draw<OF>(random, j)), round_up(x[i + 1], draw<OF>(random, j + 1)))
                          : to_bf16x2(x[i], x[i + 1]);
  }
}

__device__ __forceinline__ float approximate_root(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float approximate_inverse(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Root and quotient rounded to nearest, as the compiler's own but without its branches for operands that do not occur here:
// divisors are neither tiny nor huge. Where moments are codes of 8 bits, time is short and the last bit is of no use.
__device__ __forceinline__ float root(float x) {
#if STATE == 2
  return approximate_root(x);
#else
  x = fmaxf(x, LEAST_V);
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  float s = __fmul_rn(x, y), half = __fmul_rn(0.5f, y);
  return __fmaf_rn(__fmaf_rn(-s, s, x), half, s);
#endif
}
__device__ __forceinline__ float quotient(float a, float b) {
  float r = approximate_inverse(b);
#if STATE == 2
  return __fmul_rn(a, r);
#else
  r = __fmaf_rn(r, __fmaf_rn(-b, r, 1.f), r);
  float q = __fmul_rn(a, r);
  q = __fmaf_rn(r, __fmaf_rn(-b, q, a), q);
  return __fmaf_rn(r, __fmaf_rn(-b, q, a), q);
#endif
}
__device__ __forceinline__ float inverse(float unit) { return unit > 0.f ? __fmul_rn(approximate_inverse(unit), BELOW_ONE) : 0.f; }
// The largest of a warp, of numbers that are not negative: their order is that of their bits.
__device__ __forceinline__ float largest(float x) { return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(x))); }

// The adder rounds what is added to this to an integer, which is then in the lowest bits, in two's complement.
static constexpr float MAGIC = 12582912.f;

// A code q stands for q^2 steps; x lies between those of q and q + 1. With `low` = q^2 and `step` = 2 q + 1.
struct Code {
  float q, low, step;
};
__device__ __forceinline__ Code code_below(float x) {
  // Where x is a square, q may be one too low, by the rounding to even or by that of the root: it then goes up for sure.
  float q = __fsub_rn(__fadd_rn(__fsub_rn(approximate_root(x), 0.5f), MAGIC), MAGIC);
  return Code{q, __fmul_rn(q, q), __fmaf_rn(2.f, q, 1.f)};
}
// Whether chance / 2^32 of `step` is less than `above`.
__device__ __forceinline__ bool goes_up(float above, float step, u32 chance) {
  // A number from 1 to 2: the exponent of 1 is shifted in.
  float one_and = __uint_as_float(__funnelshift_r(chance, 0x7fu, 9));
  return __fmaf_rn(one_and, step, -step) < above;
}
// m = unit q |q|; at random between the two codes around it, so that the mean is m. In the lowest byte.
__device__ __forceinline__ u32 encode_m(float m, float per_unit, u32 chance) {
  float x = __fmul_rn(fabsf(m), per_unit);
  Code code = code_below(x);
  float q = code.q;
  if (goes_up(__fsub_rn(x, code.low), code.step, chance)) q = __fadd_rn(q, 1.f);
  return __float_as_uint(__fadd_rn(MAGIC, copysignf(q, m)));
}
// v = (unit q^2)^2; likewise so that the mean is v, but never 0. In the lowest byte.
__device__ __forceinline__ u32 encode_v(float u, float per_unit, u32 chance) {
  float x = __fmul_rn(u, per_unit);
  Code code = code_below(x);
  float above = __fmul_rn(__fsub_rn(x, code.low), __fadd_rn(x, code.low));
  float step = __fmul_rn(code.step, __fmaf_rn(2.f, code.low, code.step));
  float q = code.q;
  if (goes_up(above, step, chance)) q = __fadd_rn(q, 1.f);
  return __float_as_uint(__fadd_rn(MAGIC, fmaxf(q, 1.f)));
}
// The `i`th byte of a word as a float of 2^23 and more: no conversion, which few lanes do at a time.
__device__ __forceinline__ float byte_above(u32 word, int i) { return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440u | i)); }
__device__ __forceinline__ u32 pack_bytes(u32 a, u32 b, u32 c, u32 d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

struct Operands {
  elem* parameters;
  gradient_elem* gradients;
  m_elem* m;
  v_elem* v;
  float2* units;
  u64 length;
  const float* clip;
  const float* factors;
  const u32* updates;
  float step_size, decay, correction, beta2, rest1, rest2, epsilon;
  u64 seed;
  u32 step, tensor, zero_gradients;
};

// The 256 numbers from `base`; WHOLE: none of them is past the end.
template <bool WHOLE> __device__ __forceinline__ void update(Operands o, u64 base) {
  int lane = threadIdx.x & 31;
  // Everything is asked for before anything is waited for.
  u64 at[2] = {base + lane * 4, base + 128 + lane * 4};
  int left[2];
  u32 p_words[2][sizeof(elem)], g_words[2][sizeof(gradient_elem)], m_words[2][sizeof(m_elem)], v_words[2][sizeof(v_elem)];
#pragma unroll
  for (int k = 0; k < 2; k++) {
    left[k] = WHOLE || at[k] + 4 <= o.length ? 4 : at[k] < o.length ? (int)(o.length - at[k]) : 0;
    load<WHOLE>(o.gradients + at[k], left[k], g_words[k]);
    load<WHOLE>(o.parameters + at[k], left[k], p_words[k]);
    load<WHOLE>(o.m + at[k], left[k], m_words[k]);
    load<WHOLE>(o.v + at[k], left[k], v_words[k]);
  }
#if STATE == 2
  float2 unit = o.units[base / SPAN];
#endif
  float scale = 1.f;
  if (o.clip) scale = o.clip[1];
  if (o.factors) {
    o.step_size = o.factors[0], o.decay = o.factors[1], o.correction = o.factors[2];
    o.step = o.updates[0];
  }
  // At the end: a store to a line that is still being loaded would wait for it and hold up what comes after.
  auto zero = [&] {
    u32 zeros[sizeof(gradient_elem)] = {};
#pragma unroll
    for (int k = 0; k < 2; k++) store<WHOLE>(o.gradients + at[k], left[k], zeros);
  };
  if (scale == 0.f) {
    if (o.zero_gradients) zero();
    return;
  }

  float p[8], m[8], v[8], u[8];
#pragma unroll
  for (int j = 0; j < 8; j++) {
    float g = __fmul_rn(number(g_words[j / 4], j % 4), scale);
#if STATE == 2
    float m_code = __fsub_rn(byte_above(m_words[j / 4][0] ^ 0x80808080u, j % 4), 8388608.f + 128.f);
    float v_code = __fsub_rn(byte_above(v_words[j / 4][0], j % 4), 8388608.f);
    m[j] = __fmul_rn(unit.x, __fmul_rn(m_code, fabsf(m_code)));
    u[j] = __fmul_rn(unit.y, __fmul_rn(v_code, v_code));
    v[j] = __fmul_rn(u[j], u[j]);
#else
    m[j] = number(m_words[j / 4], j % 4);
    v[j] = number(v_words[j / 4], j % 4);
#endif
    m[j] = __fmaf_rn(o.rest1, __fsub_rn(g, m[j]), m[j]);
    v[j] = __fmaf_rn(__fmul_rn(o.rest2, g), g, __fmul_rn(o.beta2, v[j]));
    u[j] = root(v[j]);
    float change = quotient(m[j], __fmaf_rn(u[j], o.correction, o.epsilon));
    p[j] = __fmaf_rn(-o.step_size, change, __fmul_rn(number(p_words[j / 4], j % 4), o.decay));
  }

#if STATE != 0 || STOCHASTIC
  uint4 random = philox(base / 8 + lane, (u64)o.tensor << 32 | o.step, o.seed);
#else
  uint4 random = {};
#endif
#pragma unroll
  for (int k = 0; k < 2; k++) {
    u32 words[sizeof(elem)];
    encode<STOCHASTIC, OF_P>(p + 4 * k, random, k, words);
    store<WHOLE>(o.parameters + at[k], left[k], words);
  }
#if STATE == 2
  float most_m = 0.f, most_u = 0.f;
#pragma unroll
  for (int j = 0; j < 8; j++) most_m = fmaxf(most_m, fabsf(m[j])), most_u = fmaxf(most_u, u[j]);
  unit.x = __fmul_rn(largest(most_m), 1.f / M_STEPS), unit.y = __fmul_rn(largest(most_u), 1.f / V_STEPS);
  if (unit.x < LEAST_UNIT) unit.x = 0.f;
  float per_m = inverse(unit.x), per_u = inverse(unit.y);
  if (lane == 0) o.units[base / SPAN] = unit;
#endif
#pragma unroll
  for (int k = 0; k < 2; k++) {
    u32 m_out[sizeof(m_elem)], v_out[sizeof(v_elem)];
#if STATE == 2
    u32 m_codes[4], v_codes[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int j = 4 * k + i;
      m_codes[i] = encode_m(m[j], per_m, draw<OF_M>(random, j));
      v_codes[i] = encode_v(u[j], per_u, draw<OF_V>(random, j));
    }
    m_out[0] = pack_bytes(m_codes[0], m_codes[1], m_codes[2], m_codes[3]);
    v_out[0] = pack_bytes(v_codes[0], v_codes[1], v_codes[2], v_codes[3]);
#else
    encode<true, OF_M>(m + 4 * k, random, k, m_out);
    encode<true, OF_V>(v + 4 * k, random, k, v_out);
#endif
    store<WHOLE>(o.m + at[k], left[k], m_out);
    store<WHOLE>(o.v + at[k], left[k], v_out);
  }
  if (o.zero_gradients) zero();
}

// Blocks on a multiprocessor at once. Arithmetic on codes takes as long as memory does: more warps with fewer registers hide more
// of it, at the price of a few spilled words.
static constexpr int RESIDENT = STATE == 2 ? 6 : 4;

extern "C" __global__ void __launch_bounds__(256, RESIDENT)
    adamw(elem* parameters, gradient_elem* gradients, m_elem* m, v_elem* v, float2* units, u64 length, const float* clip,
          const float* factors, const u32* updates, float step_size, float decay, float correction, float beta2, float rest1,
          float rest2, float epsilon, u64 seed, u32 step, u32 tensor, u32 zero_gradients) {
  Operands operands = {parameters, gradients, m,     v,     units, length,  clip, factors, updates, step_size,
                       decay,      correction, beta2, rest1, rest2, epsilon, seed, step,    tensor,  zero_gradients};
  u64 base = ((u64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * SPAN;
  if (base + SPAN <= length)
    update<true>(operands, base);
  else if (base < length)
    update<false>(operands, base);
}
