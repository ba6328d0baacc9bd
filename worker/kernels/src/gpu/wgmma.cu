// Products by wgmma. Before sources for Hopper alone, after barriers.cu.

__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Nothing that reads or writes these registers is moved across.
template <int N> __device__ __forceinline__ void pin(float (&c)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(c[i])::"memory");
}
template <int M, int N> __device__ __forceinline__ void pin(u32 (&c)[M][N]) {
#pragma unroll
  for (int i = 0; i < M; i++)
#pragma unroll
    for (int j = 0; j < N; j++) asm volatile("" : "+r"(c[i][j])::"memory");
}

// A swizzled matrix for wgmma: rows as they are multiplied (8 rows of 128 bytes are 1,024), or the same matrix transposed,
// whose panels of `rows` rows follow one another.
static constexpr u64 SWIZZLED = 1ull << 62 | 64ull << 32;
__device__ __forceinline__ u64 across(u32 address) { return SWIZZLED | 1ull << 16 | (address >> 4); }
template <int ROWS> __device__ __forceinline__ u64 along(u32 address) {
  return SWIZZLED | (u64)(ROWS * 128 / 16) << 16 | (address >> 4);
}

// The registers of a product's sum: as PTX counts them, and as it is given them.
#define NAMES_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define NAMES_16 NAMES_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define NAMES_24 NAMES_16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define NAMES_32 NAMES_24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES_40 NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define NAMES_48 NAMES_40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define NAMES_56 NAMES_48 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define NAMES_64 NAMES_56 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define NAMES_72 NAMES_64 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define EIGHT(i) \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define SUM_8 EIGHT(0)
#define SUM_16 SUM_8, EIGHT(8)
#define SUM_24 SUM_16, EIGHT(16)
#define SUM_32 SUM_24, EIGHT(24)
#define SUM_40 SUM_32, EIGHT(32)
#define SUM_48 SUM_40, EIGHT(40)
#define SUM_56 SUM_48, EIGHT(48)
#define SUM_64 SUM_56, EIGHT(56)
#define SUM_72 SUM_64, EIGHT(64)

// Products of 64 rows and 16 columns of a left operand with a right one of [WIDTH, 16], both in shared memory: what scores are made
// of. They are added to the sum, or are the first of it. The last three are the operands' numbers, which follow the sum's.
#define SHARED_TIMES_SHARED(COUNT, WIDTH, A, B, ADD)                                   \
  __device__ __forceinline__ void wgmma(float (&c)[COUNT], u64 a, u64 b, int add) {   \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\n"                     \
                 "wgmma.mma_async.sync.aligned.m64n" WIDTH "k16.f32.bf16.bf16 "       \
                 "{" NAMES_##COUNT "}, " A ", " B ", p, 1, 1, 0, 0;\n}\n"             \
                 : SUM_##COUNT                                                        \
                 : "l"(a), "l"(b), "r"(add));                                         \
  }
SHARED_TIMES_SHARED(8, "16", "%8", "%9", "%10")
SHARED_TIMES_SHARED(16, "32", "%16", "%17", "%18")
SHARED_TIMES_SHARED(24, "48", "%24", "%25", "%26")
SHARED_TIMES_SHARED(32, "64", "%32", "%33", "%34")
SHARED_TIMES_SHARED(40, "80", "%40", "%41", "%42")
SHARED_TIMES_SHARED(48, "96", "%48", "%49", "%50")
SHARED_TIMES_SHARED(56, "112", "%56", "%57", "%58")
SHARED_TIMES_SHARED(64, "128", "%64", "%65", "%66")
SHARED_TIMES_SHARED(72, "144", "%72", "%73", "%74")

// With the left operand in registers and a right one of [16, WIDTH]: what weights are multiplied with. Always added.
#define REGISTERS_TIMES_SHARED(COUNT, WIDTH, A, B)                                          \
  __device__ __forceinline__ void wgmma(float (&c)[COUNT], const u32 (&a)[4], u64 b) {     \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" WIDTH "k16.f32.bf16.bf16 "            \
                 "{" NAMES_##COUNT "}, {" A "}, " B ", 1, 1, 1, 1;\n"                      \
                 : SUM_##COUNT                                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                    \
  }
REGISTERS_TIMES_SHARED(32, "64", "%32,%33,%34,%35", "%36")
REGISTERS_TIMES_SHARED(40, "80", "%40,%41,%42,%43", "%44")
REGISTERS_TIMES_SHARED(64, "128", "%64,%65,%66,%67", "%68")
