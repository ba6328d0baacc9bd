// Activations of rows. A thread has UNROLL packs, with all their loads in flight before the first is used.
#ifndef UNROLL
#define UNROLL 2
#endif
static constexpr int THREADS = 256;

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }

// The packs of this thread among `total`, `f(which, pack)`.
template <typename F> __device__ __forceinline__ void each_pack(u32 total, F f) {
  const u32 first = blockIdx.x * (THREADS * UNROLL) + threadIdx.x;
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    if (first + u * THREADS < total) f(u, first + u * THREADS);
  }
}

// Where a pack of the gate is; that of the up projection is a row's `packs` packs later.
__device__ __forceinline__ size_t gate_at(u32 at, u32 packs) {
  return ((size_t)at + (size_t)(at / packs) * packs) * PACK;
}

// `packs` are those of a row of the output.
extern "C" __global__ void __launch_bounds__(THREADS)
    swiglu(const elem* __restrict__ gate_up, elem* __restrict__ out, u32 packs, u32 total) {
  raw gate[UNROLL], up[UNROLL];
  each_pack(total, [&](int u, u32 at) {
    const elem* from = gate_up + gate_at(at, packs);
    gate[u] = load_raw(from);
    up[u] = load_raw(from + (size_t)packs * PACK);
  });
  each_pack(total, [&](int u, u32 at) {
    float g[PACK], x[PACK];
    unpack(gate[u], g);
    unpack(up[u], x);
#pragma unroll
    for (int i = 0; i < PACK; i++) x[i] *= g[i] * sigmoid(g[i]);
    store_floats(out + (size_t)at * PACK, x);
  });
}

// Any of the outputs may be where an input was: a thread has read before it writes.
extern "C" __global__ void __launch_bounds__(THREADS)
    swiglu_backward(const elem* gate_up, const elem* dout, elem* d_gate_up, elem* out, u32 packs, u32 total) {
  raw gate[UNROLL], up[UNROLL], gradient[UNROLL];
  each_pack(total, [&](int u, u32 at) {
    const elem* from = gate_up + gate_at(at, packs);
    gate[u] = load_raw(from);
    up[u] = load_raw(from + (size_t)packs * PACK);
    gradient[u] = load_raw(dout + (size_t)at * PACK);
  });
  each_pack(total, [&](int u, u32 at) {
    float g[PACK], x[PACK], d[PACK], y[PACK];
    unpack(gate[u], g);
    unpack(up[u], x);
    unpack(gradient[u], d);
#pragma unroll
    for (int i = 0; i < PACK; i++) {
      const float s = sigmoid(g[i]);
      const float silu = g[i] * s;
      y[i] = silu * x[i];
      // silu' = s + g s (1 - s)
      g[i] = d[i] * x[i] * (s + silu * (1.f - s));
      x[i] = d[i] * silu;
    }
    elem* to = d_gate_up + gate_at(at, packs);
    store_floats(to, g);
    store_floats(to + (size_t)packs * PACK, x);
    if (out != nullptr) store_floats(out + (size_t)at * PACK, y);
  });
}

#define TANH 0
#define ERF 1
#define QUICK 2
#ifndef GELU
#define GELU TANH
#endif

// The share of x that passes, and its derivative: gelu(x) = x * share(x).
__device__ __forceinline__ float gelu_share(float x, float& derivative) {
#if GELU == ERF
  derivative = 0.3989422804014327f * __expf(-0.5f * x * x);
  return 0.5f + 0.5f * erff(x * 0.7071067811865476f);
#else
  // 0.5 + 0.5 tanh(u) = sigmoid(2 u).
#if GELU == TANH
  const float argument = 1.5957691216057308f * x * (1.f + 0.044715f * x * x);
  const float slope = 1.5957691216057308f * (1.f + 3.f * 0.044715f * x * x);
#else
  const float argument = 1.702f * x, slope = 1.702f;
#endif
  const float share = sigmoid(argument);
  derivative = share * (1.f - share) * slope;
  return share;
#endif
}

__device__ __forceinline__ void add_bias_to(float (&x)[PACK], const elem* bias, u32 at, u32 packs) {
  if (bias == nullptr) return;
  float b[PACK];
  unpack(load_raw(bias + (size_t)(at % packs) * PACK), b);
#pragma unroll
  for (int i = 0; i < PACK; i++) x[i] += b[i];
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gelu(const elem* x, const elem* __restrict__ bias, elem* out, u32 packs, u32 total) {
  raw input[UNROLL];
  each_pack(total, [&](int u, u32 at) { input[u] = load_raw(x + (size_t)at * PACK); });
  each_pack(total, [&](int u, u32 at) {
    float a[PACK], derivative;
    unpack(input[u], a);
    add_bias_to(a, bias, at, packs);
#pragma unroll
    for (int i = 0; i < PACK; i++) a[i] *= gelu_share(a[i], derivative);
    store_floats(out + (size_t)at * PACK, a);
  });
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gelu_backward(const elem* x, const elem* __restrict__ bias, const elem* dout, elem* dx, u32 packs, u32 total) {
  raw input[UNROLL], gradient[UNROLL];
  each_pack(total, [&](int u, u32 at) {
    input[u] = load_raw(x + (size_t)at * PACK);
    gradient[u] = load_raw(dout + (size_t)at * PACK);
  });
  each_pack(total, [&](int u, u32 at) {
    float a[PACK], d[PACK];
    unpack(input[u], a);
    unpack(gradient[u], d);
    add_bias_to(a, bias, at, packs);
#pragma unroll
    for (int i = 0; i < PACK; i++) {
      float derivative;
      const float share = gelu_share(a[i], derivative);
      d[i] *= share + a[i] * derivative;
    }
    store_floats(dx + (size_t)at * PACK, d);
  });
}

extern "C" __global__ void __launch_bounds__(THREADS)
    add_bias(const elem* __restrict__ bias, elem* x, u32 packs, u32 total) {
  raw input[UNROLL];
  each_pack(total, [&](int u, u32 at) { input[u] = load_raw(x + (size_t)at * PACK); });
  each_pack(total, [&](int u, u32 at) {
    float a[PACK];
    unpack(input[u], a);
    add_bias_to(a, bias, at, packs);
    store_floats(x + (size_t)at * PACK, a);
  });
}
