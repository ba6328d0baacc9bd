// Linear layers of 1 to 16 rows: out[m, n] = x[m, k] · weight[n, k]ᵀ, bound by reading the weight.
//
// Computed transposed: 16 outputs are the rows of mma.m16n8k16, and 8 rows of x its columns. The operands come straight from
// global memory: a thread reads 16 bytes of a row of the weight, and which input meets which index of the product is free as
// long as x is read alike. The warps of a block divide the inputs among themselves; a block walks over tiles of outputs, and
// requests the next tile's weights before it has added up the last one's sums.
//
// Compiled for ELEM, TILES (of 8 rows of x), WARPS, STAGES (chunks of inputs in flight per warp), RESIDENT (blocks of a
// multiprocessor), SWIGLU.

// Inputs of a chunk.
static constexpr int CHUNK = 64;
// Outputs of a tile. With SwiGLU a tile is 8 rows of the gate and the 8 rows of up that belong to them.
static constexpr int OUTPUTS = SWIGLU ? 8 : 16;

__device__ __forceinline__ float swish(float x) { return x / (1.f + __expf(-x)); }

// A sum, with SwiGLU those of gate and up, to a result.
template <typename T>
__device__ __forceinline__ void finish(float gate, float up, int row, int output, const T* bias, const T* residual, T* out,
                                       int outputs) {
  if (bias) {
    gate += to_float(bias[output]);
    if (SWIGLU) up += to_float(bias[outputs + output]);
  }
  float result = SWIGLU ? swish(gate) * up : gate;
  i64 at = (i64)row * outputs + output;
  if (residual) result += to_float(residual[at]);
  out[at] = from_float<T>(result);
}

__device__ __forceinline__ void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// 16 bytes, or zeros where there are none. Weights are read once; x stays in the cache.
__device__ __forceinline__ uint4 read_weight(const void* from, bool inside) {
  uint4 v;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@p ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(from), "r"((int)inside));
  return v;
}
__device__ __forceinline__ uint4 read_x(const void* from, bool inside) {
  uint4 v;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(from), "r"((int)inside));
  return v;
}

struct Stage {
  uint4 low[CHUNK / 32], high[CHUNK / 32], x[TILES][CHUNK / 32];
};

__device__ __forceinline__ void linear(const bf16* x, const bf16* weight, const bf16* bias, const bf16* residual, bf16* out,
                                       int rows, int outputs, int inputs) {
  __shared__ float4 sums[WARPS][TILES][32];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3;
  int tiles = (outputs + OUTPUTS - 1) / OUTPUTS, chunks = (inputs + CHUNK - 1) / CHUNK;
  // Chunks of a warp for each tile: as many as fill its stages evenly. Those that are not there are zeros and cost no traffic.
  int turns = ((chunks + WARPS - 1) / WARPS + STAGES - 1) / STAGES * STAGES;

  // What is requested next.
  int tile = blockIdx.x, turn = 0;
  const bf16 *low_row, *high_row;
  auto enter = [&]() {
    int output = min(tile * OUTPUTS + g, outputs - 1);
    low_row = weight + (i64)output * inputs;
    high_row = weight + (i64)(SWIGLU ? outputs + output : min(tile * OUTPUTS + g + 8, outputs - 1)) * inputs;
  };
  enter();
  auto request = [&](Stage& stage) {
#pragma unroll
    for (int j = 0; j < CHUNK / 32; j++) {
      int k = (turn * WARPS + warp) * CHUNK + 32 * j + 8 * c;
      bool inside = k < inputs && tile < tiles;
      stage.low[j] = read_weight(low_row + k, inside);
      stage.high[j] = read_weight(high_row + k, inside);
#pragma unroll
      for (int t = 0; t < TILES; t++) stage.x[t][j] = read_x(x + (i64)(8 * t + g) * inputs + k, inside && 8 * t + g < rows);
    }
    if (++turn == turns) {
      turn = 0, tile += gridDim.x;
      enter();
    }
  };

  Stage stages[STAGES];
#pragma unroll
  for (int s = 0; s < STAGES; s++) request(stages[s]);
  for (int now = blockIdx.x; now < tiles; now += gridDim.x) {
    float sum[TILES][4] = {};
    for (int at = 0; at < turns; at += STAGES) {
#pragma unroll
      for (int s = 0; s < STAGES; s++) {
#pragma unroll
        for (int j = 0; j < CHUNK / 32; j++) {
          uint4 low = stages[s].low[j], high = stages[s].high[j];
#pragma unroll
          for (int t = 0; t < TILES; t++) {
            uint4 v = stages[s].x[t][j];
            mma(sum[t], low.x, high.x, low.y, high.y, v.x, v.y);
            mma(sum[t], low.z, high.z, low.w, high.w, v.z, v.w);
          }
        }
        request(stages[s]);
      }
    }
#pragma unroll
    for (int t = 0; t < TILES; t++) sums[warp][t][lane] = make_float4(sum[t][0], sum[t][1], sum[t][2], sum[t][3]);
    __syncthreads();
    for (int at = threadIdx.x; at < rows * OUTPUTS; at += WARPS * 32) {
      int row = at / OUTPUTS, column = at % OUTPUTS, output = now * OUTPUTS + column;
      // Thread (g, c) holds outputs g and g + 8 of rows 2c and 2c + 1.
      const float* first = reinterpret_cast<const float*>(&sums[0][row / 8][(column % 8) * 4 + row % 8 / 2]) + row % 2;
      float gate = 0.f, up = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const float* one = first + w * TILES * 128;
        gate += one[SWIGLU || column < 8 ? 0 : 2];
        if (SWIGLU) up += one[2];
      }
      if (output < outputs) finish(gate, up, row, output, bias, residual, out, outputs);
    }
    __syncthreads();
  }
}

// In plain f32, for parity: a warp per output, its lanes over inputs.
__device__ __forceinline__ void linear(const float* x, const float* weight, const float* bias, const float* residual,
                                       float* out, int rows, int outputs, int inputs) {
  int lane = threadIdx.x & 31;
  int step = gridDim.x * WARPS;
  for (int output = blockIdx.x * WARPS + (threadIdx.x >> 5); output < outputs; output += step) {
    for (int row = 0; row < rows; row++) {
      float gate = 0.f, up = 0.f;
      for (int k = lane; k < inputs; k += 32) {
        float v = x[(i64)row * inputs + k];
        gate += v * weight[(i64)output * inputs + k];
        if (SWIGLU) up += v * weight[(i64)(outputs + output) * inputs + k];
      }
      gate = warp_sum(gate), up = warp_sum(up);
      if (lane == 0) finish(gate, up, row, output, bias, residual, out, outputs);
    }
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT)
    skinny_linear(const elem* x, const elem* weight, const elem* bias, const elem* residual, elem* out, int rows, int outputs,
                  int inputs) {
  linear(x, weight, bias, residual, out, rows, outputs, inputs);
}
