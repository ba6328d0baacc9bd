// A cluster of eight blocks takes a row: each loads an eighth of the logits once, keeps it in shared memory as f32, and does
// everything else from there. Blocks tell each other sums by writing into each other's shared memory. Cards before Hopper have
// no clusters: there one block takes a row and reads logits again from global memory.
//
// A weight is e^((x - peak)/T), at most 1. A thread adds those of its tokens, which are consecutive, in f32; sums over threads
// are fixed-point numbers of 44 fractional bits, so that they and the cumulated sums agree bit for bit in every order.

static constexpr int THREADS = 512;
static constexpr int WARPS = THREADS / 32;
static constexpr int GRID_BLOCKS = 8;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
static constexpr int BLOCKS = GRID_BLOCKS;
#define CLUSTER __cluster_dims__(GRID_BLOCKS, 1, 1)
#else
static constexpr int BLOCKS = 1;
#define CLUSTER
#endif
static constexpr bool IN_SHARED = BLOCKS > 1;
// Tokens that are sorted.
static constexpr int CANDIDATES = 1024;
// Pivots that a pass measures.
static constexpr int PIVOTS = 8;
static constexpr int SLOTS = 2 * PIVOTS;
static constexpr u32 BROKEN = 0xffffffffu;
static constexpr float LOG2_E = 1.4426950408889634f;
static constexpr float ONE = 17592186044416.f;  // 2^44
static constexpr u32 FULL = 0xffffffffu;

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Numbers in the order of the logits: minus zero is below zero, as in the order of the host's sort.
__device__ __forceinline__ int to_key(float x) {
  int bits = __float_as_int(x);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
__device__ __forceinline__ float from_key(int key) { return __int_as_float(key ^ ((key >> 31) & 0x7fffffff)); }
static constexpr int LOWEST_KEY = (int)0x807fffffu;  // of minus infinity
static constexpr int NAN_KEY = 0x7fffffff;           // above that of infinity

__device__ __forceinline__ u64 fixed(float mass) { return (u64)(mass * ONE); }
__device__ __forceinline__ float log_fixed(u64 mass) { return logf((float)mass * (1.f / ONE)); }

__device__ __forceinline__ u32 warp_add(u32 x) {
  u32 y;
  asm volatile("redux.sync.add.u32 %0, %1, 0xffffffff;" : "=r"(y) : "r"(x));
  return y;
}
__device__ __forceinline__ int warp_highest(int x) {
  int y;
  asm volatile("redux.sync.max.s32 %0, %1, 0xffffffff;" : "=r"(y) : "r"(x));
  return y;
}
// Of numbers below 2^54.
__device__ __forceinline__ u64 warp_total(u64 x) {
  return ((u64)warp_add((u32)(x >> 27)) << 27) + warp_add((u32)x & 0x7ffffffu);
}
// Of this lane and those before it.
__device__ __forceinline__ u64 warp_cumulated(u64 x) {
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    u64 before = __shfl_up_sync(FULL, x, offset);
    if ((threadIdx.x & 31) >= offset) x += before;
  }
  return x;
}

// Everything that blocks tell each other waits here; a barrier makes it visible.
__device__ __forceinline__ void cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
// The address in the shared memory of another block.
__device__ __forceinline__ u32 in_block(const void* p, u32 block) {
  u32 address = shared_address(p);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(address), "r"(block));
#endif
  return address;
}
__device__ __forceinline__ void put(u32 address, u64 value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(address), "l"(value) : "memory");
#else
  asm volatile("st.shared.u64 [%0], %1;" ::"r"(address), "l"(value) : "memory");
#endif
}
__device__ __forceinline__ u64 get(u32 address) {
  u64 value;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(value) : "r"(address) : "memory");
#else
  asm volatile("ld.shared.u64 %0, [%1];" : "=l"(value) : "r"(address) : "memory");
#endif
  return value;
}

struct Shared {
  // What the blocks have told this one. Twice: a block may tell the next numbers while another reads the last.
  u64 told[2][BLOCKS][SLOTS];
  u64 warps[WARPS][SLOTS];
  u64 found_count;
  // Tokens between two pivots: this block's, all of them sorted, and their cumulated weight.
  u64 found[CANDIDATES];
  u64 sorted[CANDIDATES];
  u64 cumulated[CANDIDATES];
};

// How much lies at a key or above.
struct Totals {
  u64 mass;
  u32 count;
};

// The last token that is kept has a key of at least `low` and below `high`.
struct Bracket {
  int low, high;
  Totals from_low, from_high;
};

// Tokens above a key are kept, and of those with the key itself the first `ties`.
struct Cut {
  int key;
  u32 ties;
  // How many have it.
  u32 equal;
  // Weight of what is kept.
  u64 mass;
};

struct Row {
  Shared& shared;
  const elem* logits;  // of this block
  const float* kept;   // the same in shared memory
  int first, tokens;   // of this block
  int begin, end;      // of this thread, in those of the block
  int vocabulary;
  u32 rank;
  int phase;
  int gathers;
  float peak;
  float scale;  // log2(e) / T

  __device__ __forceinline__ Row(Shared& shared, float* kept, const elem* all, int row, int vocabulary, int part,
                                 u32 rank)
      : shared(shared), kept(kept), vocabulary(vocabulary), rank(rank), phase(0), gathers(0), peak(0.f), scale(0.f) {
    if (BLOCKS == 1) part = vocabulary;
    first = min((int)rank * part, vocabulary);
    tokens = min(part, vocabulary - first);
    logits = all + (i64)row * vocabulary + first;
    // An odd number of floats for each thread: no two threads of a warp use the same bank.
    int each = ((part + THREADS - 1) / THREADS) | 1;
    begin = min((int)threadIdx.x * each, tokens);
    end = min(begin + each, tokens);
  }

  __device__ __forceinline__ float at(int i) const {
    if (IN_SHARED) return kept[i];
    return to_float(logits[i]);
  }
  __device__ __forceinline__ float weight(float x) const { return exp2_fast((x - peak) * scale); }

  // Loads this block's logits. Gives the key of the highest that this thread has seen, or NAN_KEY.
  __device__ __forceinline__ int load(float* to) const {
    float highest = -__int_as_float(0x7f800000);
    bool nan = false;
    auto see = [&](float x) {
      highest = fmaxf(highest, x);
      nan |= x != x;
    };
    int vectors = ((u64)logits & 15) == 0 ? tokens / VEC : 0;
    constexpr int BATCH = 5;
    for (int base = threadIdx.x; base < vectors; base += BATCH * THREADS) {
      uint4 raw[BATCH];
#pragma unroll
      for (int i = 0; i < BATCH; i++)
        if (base + i * THREADS < vectors) raw[i] = reinterpret_cast<const uint4*>(logits)[base + i * THREADS];
#pragma unroll
      for (int i = 0; i < BATCH; i++) {
        if (base + i * THREADS >= vectors) break;
        float values[VEC];
        load_vec(reinterpret_cast<const elem*>(&raw[i]), values);
#pragma unroll
        for (int j = 0; j < VEC; j++) see(values[j]);
        if (IN_SHARED) {
#pragma unroll
          for (int j = 0; j < VEC; j += 4)
            *reinterpret_cast<float4*>(to + (base + i * THREADS) * VEC + j) =
                make_float4(values[j], values[j + 1], values[j + 2], values[j + 3]);
        }
      }
    }
    for (int i = vectors * VEC + threadIdx.x; i < tokens; i += THREADS) {
      float x = to_float(logits[i]);
      see(x);
      if (IN_SHARED) to[i] = x;
    }
    return nan ? NAN_KEY : to_key(highest);
  }

  // The highest of all threads of all blocks.
  __device__ __forceinline__ int highest(int key) {
    key = warp_highest(key);
    if ((threadIdx.x & 31) == 0) shared.warps[threadIdx.x >> 5][0] = (u64)(u32)key;
    __syncthreads();
    if (threadIdx.x < 32) {
      key = warp_highest((int)(u32)shared.warps[threadIdx.x % WARPS][0]);
      if (threadIdx.x < BLOCKS) put(in_block(&shared.told[phase][rank][0], threadIdx.x), (u64)(u32)key);
    }
    cluster_barrier();
    key = (int)(u32)shared.told[phase][0][0];
#pragma unroll
    for (int block = 1; block < BLOCKS; block++) key = max(key, (int)(u32)shared.told[phase][block][0]);
    phase ^= 1;
    return key;
  }

  // Sums over all threads of all blocks, read by `total` and the like until the next.
  template <int N> __device__ __forceinline__ void add_up(const u64 (&values)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      u64 sum = warp_total(values[i]);
      if ((threadIdx.x & 31) == 0) shared.warps[threadIdx.x >> 5][i] = sum;
    }
    __syncthreads();
    if (threadIdx.x < N * BLOCKS) {
      u64 sum = 0;
#pragma unroll
      for (int warp = 0; warp < WARPS; warp++) sum += shared.warps[warp][threadIdx.x % N];
      put(in_block(&shared.told[phase][rank][threadIdx.x % N], threadIdx.x / N), sum);
    }
    cluster_barrier();
    phase ^= 1;
  }
  __device__ __forceinline__ u64 told(u32 block, int slot) const { return shared.told[phase ^ 1][block][slot]; }
  __device__ __forceinline__ u64 total(int slot) const {
    u64 sum = 0;
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) sum += told(block, slot);
    return sum;
  }
  // Of the warps before this one, in this block and those before it.
  __device__ __forceinline__ u64 before_warp(int slot) const {
    u64 sum = 0;
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) sum += block < rank ? told(block, slot) : 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) sum += warp < (threadIdx.x >> 5) ? shared.warps[warp][slot] : 0;
    return sum;
  }

  // Pivots between the ends of a bracket, rising. Guesses first, then equal parts of the bracket as logits, then as keys, which
  // ends after eleven rounds whatever the logits are.
  __device__ __forceinline__ void choose(int (&pivots)[PIVOTS], const Bracket& bracket, int round, float unit) const {
    const float guesses[PIVOTS] = {17.f, 12.5f, 9.5f, 7.f, 5.f, 3.f, 1.5f, 0.7f};
    u32 width = (u32)bracket.high - (u32)bracket.low;
    float low = from_key(bracket.low), high = from_key(bracket.high);
#pragma unroll
    for (int j = 0; j < PIVOTS; j++) {
      int key;
      if (round == 0)
        key = to_key(peak - guesses[j] * unit);
      else if (round == 1 && bracket.low == LOWEST_KEY)
        key = to_key(peak - 17.f * (float)(1 << (PIVOTS - j)) * unit);
      else if (round < 3 && bracket.low != LOWEST_KEY)
        key = to_key(low + (high - low) * ((j + 1) * (1.f / (PIVOTS + 1))));
      else
        key = (int)((u32)bracket.low + (u32)(((u64)width * (j + 1)) / (PIVOTS + 1)));
      pivots[j] = min(max(key, bracket.low + 1), bracket.high - 1);
    }
  }

  // Narrows a bracket to at most CANDIDATES tokens, or to one key. `reached` says whether totals include the last kept token.
  template <typename Reached>
  __device__ __forceinline__ void narrow(Bracket& bracket, float unit, bool massless_too, Reached reached) {
    for (int round = 0;; round++) {
      if (bracket.from_low.count <= CANDIDATES) {
        // All of them: what follows then finds everything in one list.
        bracket.high = to_key(peak) + 1;
        bracket.from_high = {0, 0};
        return;
      }
      if (bracket.from_low.count - bracket.from_high.count <= CANDIDATES) return;
      if ((u32)bracket.high - (u32)bracket.low == 1) return;
      if (!massless_too && bracket.from_low.mass <= bracket.from_high.mass) return;
      int pivots[PIVOTS];
      choose(pivots, bracket, round, unit);
      float mass[PIVOTS] = {};
      u32 count[PIVOTS] = {};
      for (int i = begin; i < end; i++) {
        float x = at(i);
        int key = to_key(x);
        if (key < pivots[0] || key >= bracket.high) continue;
        float w = weight(x);
#pragma unroll
        for (int j = 0; j < PIVOTS; j++) {
          if (key >= pivots[j]) {
            mass[j] += w;
            count[j]++;
          }
        }
      }
      u64 values[SLOTS];
#pragma unroll
      for (int j = 0; j < PIVOTS; j++) values[j] = fixed(mass[j]), values[PIVOTS + j] = count[j];
      add_up(values);
      Totals above = bracket.from_high;
      bool done = false;
#pragma unroll
      for (int j = 0; j < PIVOTS; j++) {
        Totals here = {above.mass + total(j), above.count + (u32)total(PIVOTS + j)};
        if (done) continue;
        if (reached(here)) {
          bracket.low = pivots[j], bracket.from_low = here;
        } else {
          bracket.high = pivots[j], bracket.from_high = here;
          done = true;
        }
      }
    }
  }

  // Brings the tokens for which `wanted` holds, `count` of all blocks together and at most CANDIDATES, into `sorted`: in falling
  // order of keys, of equals the lower id first.
  template <typename Wanted> __device__ __forceinline__ void gather(int count, Wanted wanted) {
    // Others may still read what was found before.
    if (gathers++ > 0) cluster_barrier();
    if (threadIdx.x == 0) shared.found_count = 0;
    __syncthreads();
    for (int i = begin; i < end; i++) {
      int key = to_key(at(i));
      if (!wanted(key)) continue;
      u32 slot = atomicAdd(reinterpret_cast<u32*>(&shared.found_count), 1u);
      if (slot < CANDIDATES) shared.found[slot] = (u64)(~((u32)key ^ 0x80000000u)) << 32 | (u32)(first + i);
    }
    cluster_barrier();
    int starts[BLOCKS];
    int start = 0;
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
      starts[block] = start;
      start += (int)get(in_block(&shared.found_count, block));
    }
    int padded = 32;
    while (padded < count) padded *= 2;
    for (int i = threadIdx.x; i < padded; i += THREADS) {
      u64 entry = ~0ull;
      if (i < start) {
        int block = 0, offset = i;
#pragma unroll
        for (int b = 1; b < BLOCKS; b++)
          if (i >= starts[b]) block = b, offset = i - starts[b];
        entry = get(in_block(&shared.found[offset], block));
      }
      shared.sorted[i] = entry;
    }
    __syncthreads();
    for (int size = 2; size <= padded; size *= 2) {
      for (int stride = size / 2; stride > 0; stride /= 2) {
        int t = threadIdx.x;
        if (t < padded / 2) {
          int i = 2 * t - (t & (stride - 1));
          u64 a = shared.sorted[i], b = shared.sorted[i + stride];
          if ((a > b) == ((i & size) == 0)) shared.sorted[i] = b, shared.sorted[i + stride] = a;
        }
        __syncthreads();
      }
    }
  }

  __device__ __forceinline__ int sorted_key(int i) const {
    return (int)(~(u32)(shared.sorted[i] >> 32) ^ 0x80000000u);
  }

  // Cumulated weights of the sorted tokens, after `above`.
  __device__ __forceinline__ void cumulate(int count, u64 above) {
    int i = 2 * threadIdx.x;
    u64 one = i < count ? fixed(weight(from_key(sorted_key(i)))) : 0;
    u64 two = i + 1 < count ? fixed(weight(from_key(sorted_key(i + 1)))) : 0;
    u64 cumulated = warp_cumulated(one + two);
    if ((threadIdx.x & 31) == 31) shared.warps[threadIdx.x >> 5][0] = cumulated;
    __syncthreads();
    for (int warp = 0; warp < (threadIdx.x >> 5); warp++) above += shared.warps[warp][0];
    if (i < CANDIDATES) {
      shared.cumulated[i] = above + cumulated - two;
      shared.cumulated[i + 1] = above + cumulated;
    }
    __syncthreads();
  }

  // The cut after the sorted token `last`, of `count`.
  __device__ __forceinline__ Cut cut_at(int last, int count) const {
    int key = sorted_key(last);
    // The first with this key, and the first after them.
    int from = 0, to = last;
    while (from < to) {
      int middle = (from + to) / 2;
      if (sorted_key(middle) > key)
        from = middle + 1;
      else
        to = middle;
    }
    int begin_equal = from;
    from = last + 1, to = count;
    while (from < to) {
      int middle = (from + to) / 2;
      if (sorted_key(middle) >= key)
        from = middle + 1;
      else
        to = middle;
    }
    return {key, (u32)(last - begin_equal + 1), (u32)(from - begin_equal), shared.cumulated[last]};
  }

  // The first of the sorted tokens, but at most `most`, whose cumulated weight reaches `mass`.
  __device__ __forceinline__ int first_reaching(u64 mass, int most) const {
    int from = 0, to = most;
    while (from < to) {
      int middle = (from + to) / 2;
      if (shared.cumulated[middle] >= mass)
        to = middle;
      else
        from = middle + 1;
    }
    return from;
  }

  // What `top_k` (0: everything) and then `top_p` leave of tokens that weigh `mass`.
  __device__ __forceinline__ Cut select(u32 top_k, float top_p, u64 mass, bool massless_too) {
    Bracket bracket = {LOWEST_KEY, to_key(peak) + 1, {mass, (u32)vocabulary}, {0, 0}};
    Cut cut = {LOWEST_KEY, (u32)vocabulary, 0, mass};
    if (top_k > 0 && top_k < (u32)vocabulary) {
      narrow(bracket, 1.f, massless_too, [&](const Totals& totals) { return totals.count >= top_k; });
      u32 count = bracket.from_low.count - bracket.from_high.count;
      u32 wanted = top_k - bracket.from_high.count;
      bool listed = count <= CANDIDATES;
      bool one_key = !listed && (u32)bracket.high - (u32)bracket.low == 1;
      u64 each = fixed(weight(from_key(bracket.low)));
      if (listed) {
        gather(count, [&](int key) { return key >= bracket.low && key < bracket.high; });
        cumulate(count, bracket.from_high.mass);
        cut = cut_at(wanted - 1, count);
      } else if (one_key) {
        cut = {bracket.low, wanted, count, bracket.from_high.mass + wanted * each};
      } else {
        // The rest weighs nothing.
        cut = {bracket.high - 1, 0, 0, bracket.from_high.mass};
      }
      if (top_p >= 1.f) return cut;
      u64 nucleus = max((u64)((double)top_p * (double)cut.mass), 1ull);
      if (nucleus > bracket.from_high.mass) {
        if (listed) return cut_at(first_reaching(nucleus, wanted - 1), count);
        if (one_key && each > 0) {
          u64 needed = (nucleus - bracket.from_high.mass + each - 1) / each;
          cut.ties = (u32)min((u64)wanted, needed);
        }
        return cut;
      }
      bracket = {bracket.high, to_key(peak) + 1, bracket.from_high, {0, 0}};
    }
    if (top_p >= 1.f) return cut;
    u64 nucleus = max((u64)((double)top_p * (double)cut.mass), 1ull);
    narrow(bracket, LOG2_E / scale, true,
           [&](const Totals& totals) { return totals.mass >= nucleus; });
    u32 count = bracket.from_low.count - bracket.from_high.count;
    if (count <= CANDIDATES) {
      gather(count, [&](int key) { return key >= bracket.low && key < bracket.high; });
      cumulate(count, bracket.from_high.mass);
      return cut_at(first_reaching(nucleus, count - 1), count);
    }
    u64 each = max(fixed(weight(from_key(bracket.low))), 1ull);
    u64 short_of = nucleus > bracket.from_high.mass ? nucleus - bracket.from_high.mass : 1;
    u64 needed = (short_of + each - 1) / each;
    return {bracket.low, (u32)min((u64)count, needed), count, 0};
  }

  // How many of this thread's tokens with the key of the cut are kept.
  __device__ __forceinline__ u32 quota(const Cut& cut) {
    if (cut.ties >= cut.equal) return FULL;
    u64 mine[1] = {0};
    for (int i = begin; i < end; i++) mine[0] += to_key(at(i)) == cut.key;
    add_up(mine);
    u64 before = before_warp(0) + warp_cumulated(mine[0]) - mine[0];
    // The next sums overwrite those of the warps.
    __syncthreads();
    return before < cut.ties ? (u32)(cut.ties - before) : 0;
  }
};

extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, 2)
    sampling_draw(const elem* __restrict__ logits, int vocabulary, int part, const float* __restrict__ temperatures,
                  const u32* __restrict__ top_ks, const float* __restrict__ top_ps, const float* __restrict__ min_ps,
                  const float* __restrict__ uniforms, u32* __restrict__ tokens, float* __restrict__ log_probs,
                  float* __restrict__ model_log_probs) {
  __shared__ Shared shared;
  extern __shared__ float4 memory[];
  float* kept = reinterpret_cast<float*>(memory);
  int index = blockIdx.x / GRID_BLOCKS;
  u32 rank = blockIdx.x % GRID_BLOCKS;
  if (rank >= BLOCKS) return;
  Row row(shared, kept, logits, index, vocabulary, part, rank);
  float temperature = temperatures[index];
  u32 top_k = top_ks[index];
  float top_p = top_ps[index];
  float min_p = fminf(min_ps[index], 1.f);
  float uniform = uniforms[index];
  bool greedy = temperature == 0.f;
  // Not infinite: the peak's difference is 0.
  float inverse = greedy ? 1.f : fminf(1.f / temperature, 1e30f);

  row.peak = from_key(row.highest(row.load(kept)));
  float peak = row.peak;
  if (!(fabsf(peak) < __int_as_float(0x7f800000))) {
    if (rank == 0 && threadIdx.x == 0) {
      tokens[index] = BROKEN;
      log_probs[index] = model_log_probs[index] = __int_as_float(0x7fffffff);
    }
    return;
  }
  row.scale = inverse * LOG2_E;

  // Weights of all tokens, at this temperature and at 1.
  float mass = 0.f, model_mass = 0.f;
  if (inverse == 1.f) {
#pragma unroll 4
    for (int i = row.begin; i < row.end; i++) mass += row.weight(row.at(i));
    model_mass = mass;
  } else {
#pragma unroll 4
    for (int i = row.begin; i < row.end; i++) {
      float below = row.at(i) - peak;
      mass += exp2_fast(below * row.scale);
      model_mass += exp2_fast(below * LOG2_E);
    }
  }
  u64 masses[2] = {fixed(mass), fixed(model_mass)};
  row.add_up(masses);
  u64 whole = row.total(0);
  float log_mass = log_fixed(whole), log_model_mass = log_fixed(row.total(1));

  if (greedy) {
    int lowest = vocabulary;
    for (int i = row.end - 1; i >= row.begin; i--)
      if (row.at(i) == peak) lowest = row.first + i;
    lowest = -row.highest(-lowest);
    if (rank == 0 && threadIdx.x == 0) {
      tokens[index] = lowest;
      log_probs[index] = model_log_probs[index] = -log_model_mass;
    }
    return;
  }

  Cut cut = {LOWEST_KEY, (u32)vocabulary, 0, whole};
  u32 quota = FULL;
  bool cuts = top_p < 1.f || (top_k > 0 && top_k < (u32)vocabulary);
  if (cuts) {
    cut = row.select(top_k, top_p, whole, false);
    quota = row.quota(cut);
  }
  auto weight_of_kept = [&](float x, u32& left) {
    float w = row.weight(x);
    int key = to_key(x);
    if (key > cut.key) return w >= min_p ? w : 0.f;
    if (key < cut.key || left == 0) return 0.f;
    left--;
    return w >= min_p ? w : 0.f;
  };
  if (cuts || min_p > 0.f) {
    u32 left = quota;
    mass = 0.f;
    for (int i = row.begin; i < row.end; i++) mass += weight_of_kept(row.at(i), left);
    masses[0] = fixed(mass);
    u64 values[1] = {masses[0]};
    row.add_up(values);
    whole = row.total(0);
  }

  // The one thread in whose cumulated weight the target lies finds the token.
  u64 target = min((u64)((double)uniform * (double)whole), whole - 1);
  u64 before = row.before_warp(0);
  u64 of_warp = shared.warps[threadIdx.x >> 5][0];
  if (target < before || target - before >= of_warp) return;
  before += warp_cumulated(masses[0]) - masses[0];
  if (target < before || target - before >= masses[0]) return;
  float wanted = (float)(target - before) * (1.f / ONE);
  float cumulated = 0.f;
  u32 left = quota;
  int last = row.begin;
  for (int i = row.begin; i < row.end; i++) {
    float w = weight_of_kept(row.at(i), left);
    if (w == 0.f) continue;
    cumulated += w;
    last = i;
    if (cumulated > wanted) break;
  }
  float below = row.at(last) - peak;
  tokens[index] = row.first + last;
  log_probs[index] = below * inverse - log_mass;
  model_log_probs[index] = below - log_model_mass;
}

// The `count` most likely tokens of each row at temperature 1.
extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, 2)
    sampling_top(const elem* __restrict__ logits, int vocabulary, int part, int count, u32* __restrict__ ids,
                 float* __restrict__ log_probs) {
  __shared__ Shared shared;
  extern __shared__ float4 memory[];
  float* kept = reinterpret_cast<float*>(memory);
  int index = blockIdx.x / GRID_BLOCKS;
  u32 rank = blockIdx.x % GRID_BLOCKS;
  if (rank >= BLOCKS) return;
  Row row(shared, kept, logits, index, vocabulary, part, rank);
  ids += (i64)index * count;
  log_probs += (i64)index * count;
  bool writes = rank == 0 && (int)threadIdx.x < count;

  row.peak = from_key(row.highest(row.load(kept)));
  row.scale = LOG2_E;
  if (!(fabsf(row.peak) < __int_as_float(0x7f800000))) {
    if (writes) ids[threadIdx.x] = BROKEN, log_probs[threadIdx.x] = __int_as_float(0x7fffffff);
    return;
  }
  float mass = 0.f;
#pragma unroll 4
  for (int i = row.begin; i < row.end; i++) mass += row.weight(row.at(i));
  u64 masses[1] = {fixed(mass)};
  row.add_up(masses);
  u64 whole = row.total(0);
  int found = min(count, vocabulary);
  Cut cut = row.select(found, 1.f, whole, true);
  u32 left = row.quota(cut);
  row.gather(found, [&](int key) { return key > cut.key || (key == cut.key && left > 0 && left-- > 0); });
  if (writes) {
    bool exists = (int)threadIdx.x < found;
    float x = from_key(row.sorted_key(threadIdx.x));
    ids[threadIdx.x] = exists ? (u32)shared.sorted[threadIdx.x] : BROKEN;
    log_probs[threadIdx.x] = exists ? (x - row.peak) - log_fixed(whole) : __int_as_float(0x7fffffff);
  }
  // Others may still read what this block found.
  cluster_barrier();
}
