// The start of every source of rows: `PACK` numbers are moved by one access, 16 bytes where width and addresses allow.
#ifdef ELEM
#ifndef PACK
#define PACK VEC
#endif
template <int BYTES> struct RawOf;
template <> struct RawOf<16> { typedef uint4 type; };
template <> struct RawOf<8> { typedef uint2 type; };
template <> struct RawOf<4> { typedef u32 type; };
template <> struct RawOf<2> { typedef u16 type; };
// What is held in registers between a load and its use: half the registers of floats where `elem` is bf16.
typedef RawOf<PACK * sizeof(elem)>::type raw;
#endif

__device__ __forceinline__ void unpack(uint4 v, float (&x)[8]) {
  x[0] = low_float(v.x), x[1] = high_float(v.x), x[2] = low_float(v.y), x[3] = high_float(v.y);
  x[4] = low_float(v.z), x[5] = high_float(v.z), x[6] = low_float(v.w), x[7] = high_float(v.w);
}
__device__ __forceinline__ void unpack(uint2 v, float (&x)[4]) {
  x[0] = low_float(v.x), x[1] = high_float(v.x), x[2] = low_float(v.y), x[3] = high_float(v.y);
}
__device__ __forceinline__ void unpack(u32 v, float (&x)[2]) { x[0] = low_float(v), x[1] = high_float(v); }
__device__ __forceinline__ void unpack(u16 v, float (&x)[1]) { x[0] = __uint_as_float((u32)v << 16); }
__device__ __forceinline__ void unpack(uint4 v, float (&x)[4]) {
  x[0] = __uint_as_float(v.x), x[1] = __uint_as_float(v.y), x[2] = __uint_as_float(v.z), x[3] = __uint_as_float(v.w);
}
__device__ __forceinline__ void unpack(uint2 v, float (&x)[2]) {
  x[0] = __uint_as_float(v.x), x[1] = __uint_as_float(v.y);
}
__device__ __forceinline__ void unpack(u32 v, float (&x)[1]) { x[0] = __uint_as_float(v); }

__device__ __forceinline__ void pack(const float (&x)[8], uint4& v) {
  v = make_uint4(to_bf16x2(x[0], x[1]), to_bf16x2(x[2], x[3]), to_bf16x2(x[4], x[5]), to_bf16x2(x[6], x[7]));
}
__device__ __forceinline__ void pack(const float (&x)[4], uint2& v) {
  v = make_uint2(to_bf16x2(x[0], x[1]), to_bf16x2(x[2], x[3]));
}
__device__ __forceinline__ void pack(const float (&x)[2], u32& v) { v = to_bf16x2(x[0], x[1]); }
__device__ __forceinline__ void pack(const float (&x)[1], u16& v) { v = to_bf16(x[0]).bits; }
__device__ __forceinline__ void pack(const float (&x)[4], uint4& v) {
  v = make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
}
__device__ __forceinline__ void pack(const float (&x)[2], uint2& v) {
  v = make_uint2(__float_as_uint(x[0]), __float_as_uint(x[1]));
}
__device__ __forceinline__ void pack(const float (&x)[1], u32& v) { v = __float_as_uint(x[0]); }

#ifdef ELEM
__device__ __forceinline__ raw load_raw(const elem* from) { return *reinterpret_cast<const raw*>(from); }
__device__ __forceinline__ void store_raw(elem* to, raw v) { *reinterpret_cast<raw*>(to) = v; }
__device__ __forceinline__ void store_floats(elem* to, const float (&x)[PACK]) {
  raw v;
  pack(x, v);
  store_raw(to, v);
}
// PACK numbers of the sum of `count` matrices of f32 with so many numbers, in their order, rounded: what products in parts leave.
__device__ __forceinline__ raw add_parts(const float* from, int count, size_t matrix) {
  static constexpr int AT_ONCE = 2;
  float sum[PACK] = {};
  for (int first = 0; first < count; first += AT_ONCE, from += AT_ONCE * matrix) {
    float parts[AT_ONCE][PACK];
#pragma unroll
    for (int part = 0; part < AT_ONCE; part++)
#pragma unroll
      for (int i = 0; i < PACK; i += PACK % 4 == 0 ? 4 : 1) {
        if (first + part >= count) continue;
        if constexpr (PACK % 4 == 0) {
          const float4 four = *reinterpret_cast<const float4*>(from + part * matrix + i);
          parts[part][i] = four.x, parts[part][i + 1] = four.y, parts[part][i + 2] = four.z, parts[part][i + 3] = four.w;
        } else {
          parts[part][i] = from[part * matrix + i];
        }
      }
#pragma unroll
    for (int part = 0; part < AT_ONCE; part++)
#pragma unroll
      for (int i = 0; i < PACK; i++)
        if (first + part < count) sum[i] += parts[part][i];
  }
  raw v;
  pack(sum, v);
  return v;
}
// PACK numbers of another format than `elem`, by as few accesses as there can be.
template <typename T> struct Chunk {
  static constexpr int SIZE = PACK < 16 / (int)sizeof(T) ? PACK : 16 / (int)sizeof(T);
  typedef typename RawOf<SIZE * sizeof(T)>::type type;
};
template <typename T> __device__ __forceinline__ void load_numbers(const T* from, float (&x)[PACK]) {
  constexpr int SIZE = Chunk<T>::SIZE;
#pragma unroll
  for (int c = 0; c < PACK; c += SIZE) {
    float part[SIZE];
    unpack(*reinterpret_cast<const typename Chunk<T>::type*>(from + c), part);
#pragma unroll
    for (int i = 0; i < SIZE; i++) x[c + i] = part[i];
  }
}
template <typename T> __device__ __forceinline__ void store_numbers(T* to, const float (&x)[PACK]) {
  constexpr int SIZE = Chunk<T>::SIZE;
#pragma unroll
  for (int c = 0; c < PACK; c += SIZE) {
    float part[SIZE];
#pragma unroll
    for (int i = 0; i < SIZE; i++) part[i] = x[c + i];
    typename Chunk<T>::type v;
    pack(part, v);
    *reinterpret_cast<typename Chunk<T>::type*>(to + c) = v;
  }
}
// As the format `elem` would hold it.
__device__ __forceinline__ float rounded(float x) { return to_float(from_float<elem>(x)); }
#endif
