// A cluster of eight blocks takes a row: each loads an eighth of the logits once, by a bulk copy into shared memory, and does
// everything else from there, while another block of the multiprocessor loads. Blocks tell each other sums by asynchronous
// stores into each other's shared memory, whose bytes a barrier of the receiver counts: nobody waits for a fence. Cards before
// Hopper have no clusters: there one block takes a row and reads logits again from global memory.
//
// A weight is e^((x - peak)/T), at most 1. A thread adds those of its tokens, which are consecutive, in f32; sums over threads
// are fixed-point numbers of 44 fractional bits, so that they and the cumulated sums agree bit for bit in every order.

static constexpr int THREADS = 512;
static constexpr int WARPS = THREADS / 32;
static constexpr int GRID_BLOCKS = 8;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define HOPPER 1
#define CLUSTER __cluster_dims__(GRID_BLOCKS, 1, 1)
static constexpr int BLOCKS = GRID_BLOCKS;
#else
#define HOPPER 0
#define CLUSTER
static constexpr int BLOCKS = 1;
#endif
// Tokens that are sorted.
static constexpr int CANDIDATES = 1024;
// Those that a block may send to the first without being asked.
static constexpr int SENT = CANDIDATES / BLOCKS;
// Groups of threads whose highest logits are compared, in a block and in all.
static constexpr int GROUPS = 16;
static constexpr int ALL_GROUPS = GROUPS * BLOCKS;
// Of that many of the highest of groups the lowest is a bound that some 250 of 152,064 tokens reach.
static constexpr int HIGHEST = ALL_GROUPS * 110 / 128;
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
// Of any whose sum is below 2^64.
__device__ __forceinline__ u64 warp_total_wide(u64 x) {
  u64 high = warp_add((u32)(x >> 44)), middle = warp_add((u32)(x >> 22) & 0x3fffffu);
  return (high << 44) + (middle << 22) + warp_add((u32)x & 0x3fffffu);
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

// What blocks have found is there after it.
__device__ __forceinline__ void cluster_barrier() {
#if HOPPER
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}
// Its halves: what lies between them need not wait.
__device__ __forceinline__ void cluster_arrive() {
#if HOPPER
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if HOPPER
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
// The address in the shared memory of another block.
__device__ __forceinline__ u32 in_block(const void* p, u32 block) {
  u32 address = shared_address(p);
#if HOPPER
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(address), "r"(block));
#endif
  return address;
}
#if HOPPER
#define SPACE "shared::cluster"
#else
#define SPACE "shared"
#endif
// Stores a number in another block, and counts its bytes at the barrier there, both as addresses in that block.
__device__ __forceinline__ void put(u32 address, u64 value, u32 barrier) {
#if HOPPER
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u64 [%0], %1, [%2];" ::"r"(address),
               "l"(value), "r"(barrier)
               : "memory");
#else
  asm volatile("st.shared.u64 [%0], %1;" ::"r"(address), "l"(value) : "memory");
#endif
}
__device__ __forceinline__ void put(u32 address, u32 value, u32 barrier) {
#if HOPPER
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(address),
               "r"(value), "r"(barrier)
               : "memory");
#else
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
#endif
}
// One thread says how many bytes a barrier of its block is to count.
__device__ __forceinline__ void expect(const u64* barrier, u32 bytes) {
#if HOPPER
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}
// Every thread waits for them.
__device__ __forceinline__ void await(const u64* barrier, u32 parity) {
#if HOPPER
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n@!done bra AGAIN;\n}" ::"r"(
          shared_address(barrier)),
      "r"(parity)
      : "memory");
#else
  __syncthreads();
#endif
}
__device__ __forceinline__ u64 get(u32 address) {
  u64 value;
  asm volatile("ld." SPACE ".u64 %0, [%1];" : "=l"(value) : "r"(address) : "memory");
  return value;
}

struct Shared {
  // What the blocks have told this one. Twice: a block may tell the next numbers while another reads the last.
  u64 told[2][BLOCKS][SLOTS];
  __align__(16) int maxima[2][BLOCKS][GROUPS];
  u64 warps[WARPS][SLOTS];
  u64 found_count;
  int bound;
  // Count the bytes of the bulk copy, of what is told, and of tokens sent to the first block.
  u64 loaded, heard[2], received;
  // Tokens between two pivots: this block's, all of them sorted, and their cumulated weight.
  u64 found[CANDIDATES];
  u64 sorted[CANDIDATES];
  u64 cumulated[CANDIDATES];
};

// The logits come after them, in the same dynamic shared memory; the launcher knows where.
static constexpr int SHARED_BYTES = 30 * 1024;
static_assert(sizeof(Shared) <= SHARED_BYTES, "the launcher must leave more space");

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

// Tokens above a key are kept, and of those with the key itself the first `ties` of `equal`: `count` together.
struct Cut {
  int key;
  u32 ties, equal, count;
  // Whether they are the first of the sorted tokens.
  bool sorted;
};

// What a thread's tokens weigh.
struct Weighed {
  float mass, model_mass, from_bound;
  // How many there are from the bound on, and which is the first.
  u32 count;
  int first;
};

struct Row {
  Shared& shared;
  const elem* logits;  // of this block
  const elem* kept;    // the same in shared memory
  int first, tokens;   // of this block
  int begin, end;      // of this thread, in those of the block
  int vocabulary;
  u32 rank;
  int phase;    // which of the two places is told into next
  u32 parities; // of the barriers of both
  int gathers;
  float peak;
  float scale;  // log2(e) / T

  __device__ __forceinline__ Row(Shared& shared, const elem* all, elem* buffer, int row, int vocabulary, int part,
                                 u32 rank)
      : shared(shared), kept(buffer), vocabulary(vocabulary), rank(rank), phase(0), parities(0), gathers(0),
        peak(0.f), scale(0.f) {
    if (BLOCKS == 1) part = vocabulary;
    first = min((int)rank * part, vocabulary);
    tokens = min(part, vocabulary - first);
    logits = all + (i64)row * vocabulary + first;
    // An odd number for each thread: no two threads of a warp use the same bank.
    int each = ((part + THREADS - 1) / THREADS) | 1;
    begin = min((int)threadIdx.x * each, tokens);
    end = min(begin + each, tokens);
  }

  __device__ __forceinline__ float at(int i) const { return to_float(BLOCKS > 1 ? kept[i] : logits[i]); }
  __device__ __forceinline__ float weight(float x) const { return exp2_fast((x - peak) * scale); }

  // Weighs this thread's tokens: at this temperature, at 1 if it is another, and those with a key of at least `bound`.
  template <bool TEMPERED, bool BOUNDED> __device__ __forceinline__ Weighed weigh(int bound) const {
    Weighed sums = {0.f, 0.f, 0.f, 0, end};
#pragma unroll 4
    for (int i = begin; i < end; i++) {
      float x = at(i), w = weight(x);
      sums.mass += w;
      if (TEMPERED) sums.model_mass += exp2_fast((x - peak) * LOG2_E);
      if (BOUNDED) {
        bool above = to_key(x) >= bound;
        sums.from_bound += above ? w : 0.f;
        sums.first = above & (sums.count == 0) ? i : sums.first;
        sums.count += above;
      }
    }
    if (!TEMPERED) sums.model_mass = sums.mass;
    return sums;
  }

  // Loads this block's part of the row. Gives the key of the highest logit that this thread has seen, or NAN_KEY.
  __device__ __forceinline__ int load(elem* to) {
    float highest = -__int_as_float(0x7f800000);
    bool nan = false;
    auto see = [&](float x) {
      highest = fmaxf(highest, x);
      nan |= x != x;
    };
#if HOPPER
    if (threadIdx.x == 0) {
      u64* const barriers[] = {&shared.loaded, &shared.heard[0], &shared.heard[1], &shared.received};
      for (u64* barrier : barriers)
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
#endif
    // Other blocks must have come so far before anything is written into their memory.
    cluster_arrive();
#if HOPPER
    // A bulk copy begins and ends at a multiple of 16 bytes.
    if (((u64)logits & 15) == 0 && tokens % VEC == 0 && tokens > 0) {
      u32 bytes = tokens * sizeof(elem);
      if (threadIdx.x == 0) {
        expect(&shared.loaded, bytes);
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                shared_address(to)),
            "l"(logits), "r"(bytes), "r"(shared_address(&shared.loaded))
            : "memory");
      }
      __syncthreads();
      await(&shared.loaded, 0);
#pragma unroll 5
      for (int i = threadIdx.x; i < tokens / VEC; i += THREADS) {
        float values[VEC];
        load_vec(kept + i * VEC, values);
#pragma unroll
        for (int j = 0; j < VEC; j++) see(values[j]);
      }
      cluster_wait();
      return nan ? NAN_KEY : to_key(highest);
    }
#endif
    for (int i = threadIdx.x; i < tokens; i += THREADS) {
      elem x = logits[i];
      see(to_float(x));
      if (BLOCKS > 1) to[i] = x;
    }
    cluster_wait();
    return nan ? NAN_KEY : to_key(highest);
  }

  // Waits until all blocks have told this one what they have to tell, so many bytes together.
  __device__ __forceinline__ void hear(u32 bytes) {
    if (threadIdx.x == 0) expect(&shared.heard[phase], bytes);
    await(&shared.heard[phase], parities >> phase & 1);
    parities ^= 1u << phase;
    phase ^= 1;
  }

  // The highest of all threads of all blocks. The highest of groups stay in `maxima` of the phase that is given back.
  __device__ __forceinline__ int highest(int key, int& in_phase) {
    key = warp_highest(key);
    if ((threadIdx.x & 31) == 0) shared.warps[threadIdx.x >> 5][0] = (u64)(u32)key;
    __syncthreads();
    if (threadIdx.x < ALL_GROUPS) {
      int group = threadIdx.x % GROUPS;
      key = (int)(u32)shared.warps[group][0];
#pragma unroll
      for (int warp = group + GROUPS; warp < WARPS; warp += GROUPS) key = max(key, (int)(u32)shared.warps[warp][0]);
      u32 block = threadIdx.x / GROUPS;
      put(in_block(&shared.maxima[phase][rank][group], block), (u32)key, in_block(&shared.heard[phase], block));
    }
    hear(ALL_GROUPS * sizeof(int));
    const int* maxima = shared.maxima[phase ^ 1][0];
    int lane = threadIdx.x & 31;
    key = maxima[lane % ALL_GROUPS];
#pragma unroll
    for (int i = 32; i < ALL_GROUPS; i += 32) key = max(key, maxima[i + lane]);
    in_phase = phase ^ 1;
    return warp_highest(key);
  }

  // The `wanted`-th highest of the groups' highest: at least so many tokens have its key or a higher one. They can be sent now.
  __device__ __forceinline__ int bound(int wanted, int in_phase) {
    if (threadIdx.x == 0) shared.found_count = 0;
    // Four threads look at a quarter of the others each.
    static_assert(THREADS == 4 * GROUPS * GRID_BLOCKS, "four threads for each of the groups");
    const int* maxima = shared.maxima[in_phase][0];
    int group = threadIdx.x / 4, mine = maxima[group % ALL_GROUPS], higher = 0, no_lower = 0;
#pragma unroll
    for (int i = 0; i < ALL_GROUPS; i += 16) {
      int4 other = *reinterpret_cast<const int4*>(maxima + i + 4 * (threadIdx.x % 4));
      higher += (other.x > mine) + (other.y > mine) + (other.z > mine) + (other.w > mine);
      no_lower += (other.x >= mine) + (other.y >= mine) + (other.z >= mine) + (other.w >= mine);
    }
#pragma unroll
    for (int offset = 1; offset < 4; offset <<= 1) {
      higher += __shfl_xor_sync(FULL, higher, offset);
      no_lower += __shfl_xor_sync(FULL, no_lower, offset);
    }
    // Equal ones write the same.
    if (higher < wanted && wanted <= no_lower) shared.bound = mine;
    __syncthreads();
    return shared.bound;
  }

  // Sums over all threads of all blocks, read by `totals` and the like until the next.
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
      u32 block = threadIdx.x / N;
      put(in_block(&shared.told[phase][rank][threadIdx.x % N], block), sum, in_block(&shared.heard[phase], block));
    }
    hear(N * BLOCKS * sizeof(u64));
  }
  __device__ __forceinline__ u64 told(u32 block, int slot) const { return shared.told[phase ^ 1][block][slot]; }
  // Of a slot; lanes may ask for different ones.
  __device__ __forceinline__ u64 total(int slot) const {
    u64 sum = 0;
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) sum += told(block, slot);
    return sum;
  }
  // Of the first slots.
  template <int N> __device__ __forceinline__ void totals(u64 (&sums)[N]) const {
    u64 mine = total(threadIdx.x % N);
#pragma unroll
    for (int i = 0; i < N; i++) sums[i] = __shfl_sync(FULL, mine, i);
  }
  // Of the first slot: of the warps before this one, in this block and those before it.
  __device__ __forceinline__ u64 before_warp() const {
    u32 lane = threadIdx.x & 31;
    u64 sum = lane < (threadIdx.x >> 5) ? shared.warps[lane][0] : 0;
    if (lane < BLOCKS && lane < rank) sum += told(lane, 0);
    return warp_total_wide(sum);
  }

  // A pivot between the ends of a bracket; they rise. Guesses first, then equal parts of the bracket as logits, then as keys,
  // which ends after eleven rounds whatever the logits are.
  __device__ __forceinline__ int pivot(int j, const Bracket& bracket, int round, float unit) const {
    int key;
    if (round == 0 && bracket.low == LOWEST_KEY) {
      // 1 to 15 below, closer at first.
      float below = (PIVOTS - j) * (1.f + 0.125f * (PIVOTS - 1 - j));
      key = to_key(from_key(bracket.high) - below * unit);
    } else if (round == 1 && bracket.low == LOWEST_KEY) {
      key = to_key(from_key(bracket.high) - 15.f * (float)(1 << (PIVOTS - j)) * unit);
    } else if (round < 3 && bracket.low != LOWEST_KEY) {
      float low = from_key(bracket.low), high = from_key(bracket.high);
      key = to_key(low + (high - low) * ((j + 1) * (1.f / (PIVOTS + 1))));
    } else {
      u32 width = (u32)bracket.high - (u32)bracket.low;
      key = (int)((u32)bracket.low + (u32)(((u64)width * (j + 1)) / (PIVOTS + 1)));
    }
    return min(max(key, bracket.low + 1), bracket.high - 1);
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
      int lane = threadIdx.x & 31;
      int mine = pivot(lane % PIVOTS, bracket, round, unit);
      int pivots[PIVOTS];
#pragma unroll
      for (int j = 0; j < PIVOTS; j++) pivots[j] = __shfl_sync(FULL, mine, j);
      float mass[PIVOTS] = {};
      // A float: integers are added at half the rate.
      float count[PIVOTS] = {};
#pragma unroll 2
      for (int i = begin; i < end; i++) {
        float x = at(i), w = weight(x);
        int key = to_key(x);
        // Those above the bracket count below it, which is nowhere. Predicates in place of jumps.
        key = key < bracket.high ? key : LOWEST_KEY;
#pragma unroll
        for (int j = 0; j < PIVOTS; j++)
          asm("{\n.reg .pred above;\nsetp.ge.s32 above, %2, %3;\n"
              "@above add.f32 %0, %0, %4;\n@above add.f32 %1, %1, 0f3f800000;\n}"
              : "+f"(mass[j]), "+f"(count[j])
              : "r"(key), "r"(pivots[j]), "f"(w));
      }
      u64 values[SLOTS];
#pragma unroll
      for (int j = 0; j < PIVOTS; j++) values[j] = fixed(mass[j]), values[PIVOTS + j] = (u32)count[j];
      add_up(values);
      // Lanes look at one pivot each.
      Totals here = {bracket.from_high.mass + total(lane % PIVOTS),
                     bracket.from_high.count + (u32)total(PIVOTS + lane % PIVOTS)};
      int most = __popc(__ballot_sync(FULL, lane < PIVOTS && reached(here)));
      Totals below = {__shfl_sync(FULL, here.mass, most - 1), __shfl_sync(FULL, here.count, most - 1)};
      Totals above = {__shfl_sync(FULL, here.mass, most), __shfl_sync(FULL, here.count, most)};
      int low = __shfl_sync(FULL, mine, most - 1), high = __shfl_sync(FULL, mine, most);
      if (most > 0) bracket.low = low, bracket.from_low = below;
      if (most < PIVOTS) bracket.high = high, bracket.from_high = above;
    }
  }

  __device__ __forceinline__ u64 entry(int i, int key) const {
    return (u64)(~((u32)key ^ 0x80000000u)) << 32 | (u32)(first + i);
  }

  // Sends this thread's tokens with a key of at least `bound` to the first block.
  __device__ __forceinline__ void send(const Weighed& sums, int bound) {
    u32 left = sums.count;
    for (int i = sums.first; left > 0; i++) {
      int key = to_key(at(i));
      if (key < bound) continue;
      u32 slot = atomicAdd(reinterpret_cast<u32*>(&shared.found_count), 1u);
      u32 to = in_block(&shared.found[rank * SENT + slot], 0), barrier = in_block(&shared.received, 0);
      if (slot < SENT) put(to, entry(i, key), barrier);
      left--;
    }
  }

  // Whether all of them have been sent; the first block waits until they are there. Slot 3 tells how many there were.
  __device__ __forceinline__ bool receive() {
    u32 there = (u32)told(threadIdx.x % BLOCKS, 3);
    if (rank == 0) {
      u32 sent = 0;
#pragma unroll
      for (int block = 0; block < BLOCKS; block++) sent += min((u32)__shfl_sync(FULL, there, block), (u32)SENT);
      if (threadIdx.x == 0) expect(&shared.received, sent * sizeof(u64));
      await(&shared.received, 0);
    }
    return !__any_sync(FULL, there > SENT);
  }

  // In the first block: sorts what has been sent, as many by each block as slot 3 tells.
  __device__ __forceinline__ void sort_sent(int count) {
    for (int i = threadIdx.x; i < count; i += THREADS) {
      int start = 0, from = 0;
#pragma unroll
      for (int block = 0; block < BLOCKS; block++) {
        int sent = (int)told(block, 3);
        if (i >= start) from = block * SENT + i - start;
        start += sent;
      }
      shared.cumulated[i] = shared.found[from];
    }
    sort(count);
  }

  // Brings the tokens for which `wanted` holds, at most CANDIDATES of all blocks, into `sorted` of every block: in falling order
  // of keys, of equals the lower id first. Gives their number. A block must not end before others have read what it found.
  template <typename Wanted> __device__ __forceinline__ int gather(Wanted wanted) {
    // Others may still read what was found before.
    if (gathers++ > 0) cluster_barrier();
    __syncthreads();
    if (threadIdx.x == 0) shared.found_count = 0;
    __syncthreads();
#pragma unroll 4
    for (int i = begin; i < end; i++) {
      int key = to_key(at(i));
      if (!wanted(key)) continue;
      u32 slot = atomicAdd(reinterpret_cast<u32*>(&shared.found_count), 1u);
      if (slot < CANDIDATES) shared.found[slot] = entry(i, key);
    }
    cluster_barrier();
    int there = (int)get(in_block(&shared.found_count, threadIdx.x % BLOCKS));
    int counts[BLOCKS], count = 0;
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) count += counts[b] = __shfl_sync(FULL, there, b);
    for (int i = threadIdx.x; i < count; i += THREADS) {
      int start = 0, block = 0, offset = 0;
#pragma unroll
      for (int b = 0; b < BLOCKS; b++) {
        if (i >= start) block = b, offset = i - start;
        start += counts[b];
      }
      shared.cumulated[i] = get(in_block(&shared.found[offset], block));
    }
    sort(count);
    return count;
  }

  // From `cumulated` into `sorted`.
  __device__ __forceinline__ void sort(int count) {
    __syncthreads();
    if (count <= THREADS / 2) {
      // A few threads for each token count those before it.
      int share = count <= THREADS / 8 ? 8 : count <= THREADS / 4 ? 4 : 2;
      int token = threadIdx.x / share, before = 0;
      u64 mine = token < count ? shared.cumulated[token] : 0;
#pragma unroll 4
      for (int i = threadIdx.x % share; i < count; i += share) before += shared.cumulated[i] < mine;
      for (int offset = 1; offset < share; offset <<= 1) before += __shfl_xor_sync(FULL, before, offset);
      if (token < count) shared.sorted[before] = mine;
      __syncthreads();
      return;
    }
    // Bitonic. Of numbers less than 64 apart each warp has its own in registers, two for each lane.
    int padded = count <= THREADS ? THREADS : CANDIDATES;
    for (int i = threadIdx.x; i < padded; i += THREADS) shared.sorted[i] = i < count ? shared.cumulated[i] : ~0ull;
    __syncthreads();
    int at_low = (threadIdx.x >> 5) * 64 + (threadIdx.x & 31), at_high = at_low + 32;
    bool has = at_low < padded;
    u64 low = has ? shared.sorted[at_low] : 0, high = has ? shared.sorted[at_high] : 0;
    auto exchange = [](u64 mine, int i, int stride, int size) {
      u64 other = __shfl_xor_sync(FULL, mine, stride);
      bool smaller = ((i & stride) == 0) == ((i & size) == 0);
      return smaller == (other < mine) ? other : mine;
    };
    for (int size = 2; size <= padded; size *= 2) {
      if (size > 64) {
        if (has) shared.sorted[at_low] = low, shared.sorted[at_high] = high;
        __syncthreads();
        for (int stride = size / 2; stride >= 64; stride /= 2) {
          int t = threadIdx.x;
          if (t < padded / 2) {
            int i = 2 * t - (t & (stride - 1));
            u64 a = shared.sorted[i], b = shared.sorted[i + stride];
            if ((a > b) == ((i & size) == 0)) shared.sorted[i] = b, shared.sorted[i + stride] = a;
          }
          __syncthreads();
        }
        if (has) low = shared.sorted[at_low], high = shared.sorted[at_high];
      }
      if (size >= 64 && (low > high) == ((at_low & size) == 0)) {
        u64 other = low;
        low = high, high = other;
      }
      for (int stride = min(16, size / 2); stride > 0; stride /= 2) {
        low = exchange(low, at_low, stride, size);
        high = exchange(high, at_high, stride, size);
      }
    }
    if (has) shared.sorted[at_low] = low, shared.sorted[at_high] = high;
    __syncthreads();
  }

  __device__ __forceinline__ int sorted_key(int i) const {
    return (int)(~(u32)(shared.sorted[i] >> 32) ^ 0x80000000u);
  }

  // Cumulated weights of the sorted tokens, after `above`.
  __device__ __forceinline__ void cumulate(int count, u64 above) {
    static_assert(CANDIDATES == 2 * THREADS, "a thread takes two");
    int i = 2 * threadIdx.x;
    u64 first = i < count ? fixed(weight(from_key(sorted_key(i)))) : 0;
    u64 second = i + 1 < count ? fixed(weight(from_key(sorted_key(i + 1)))) : 0;
    u64 cumulated = warp_cumulated(first + second);
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    if (lane == 31) shared.warps[warp][0] = cumulated;
    __syncthreads();
    above += warp_total_wide(lane < warp ? shared.warps[lane][0] : 0);
    shared.cumulated[i] = above + cumulated - second;
    shared.cumulated[i + 1] = above + cumulated;
    __syncthreads();
  }

  // The first of `count` that holds, or `count`; where one holds, all after it do.
  template <typename Holds> __device__ __forceinline__ int first_that(int count, Holds holds) const {
    int before = 0;
    for (int i = 0; i < count; i += THREADS)
      before += __syncthreads_count(i + (int)threadIdx.x < count && !holds(i + threadIdx.x));
    return before;
  }
  // Of the first `count` sorted tokens the first whose cumulated weight reaches `mass`, or the last.
  __device__ __forceinline__ int reaching(u64 mass, int count) const {
    return first_that(count - 1, [&](int i) { return shared.cumulated[i] >= mass; });
  }

  // The cut after the sorted token `last`, of `count` that come after `above` others.
  __device__ __forceinline__ Cut cut_at(int last, int count, u32 above) const {
    int key = sorted_key(last);
    int begin_equal = first_that(last, [&](int i) { return sorted_key(i) <= key; });
    int end_equal = first_that(count, [&](int i) { return sorted_key(i) < key; });
    return {key, (u32)(last - begin_equal + 1), (u32)(end_equal - begin_equal), above + last + 1, above == 0};
  }

  __device__ __forceinline__ u64 nucleus(float top_p, u64 mass) const {
    return max((u64)((double)top_p * (double)mass), 1ull);
  }

  // What `top_k` (0: everything) and then `top_p` leave of tokens that weigh `mass`, of which those from `bound` on are known.
  __device__ __forceinline__ Cut select(u32 top_k, float top_p, u64 mass, int bound, Totals from_bound,
                                        bool massless_too) {
    Bracket bracket = {LOWEST_KEY, to_key(peak) + 1, {mass, (u32)vocabulary}, {0, 0}};
    auto begin_at = [&](bool reached) {
      if (reached)
        bracket.low = bound, bracket.from_low = from_bound;
      else
        bracket.high = bound, bracket.from_high = from_bound;
    };
    Cut cut = {LOWEST_KEY, (u32)vocabulary, 0, (u32)vocabulary, false};
    if (top_k > 0 && top_k < (u32)vocabulary) {
      begin_at(from_bound.count >= top_k);
      narrow(bracket, 1.f, massless_too, [&](const Totals& totals) { return totals.count >= top_k; });
      Totals above = bracket.from_high;
      u32 count = bracket.from_low.count - above.count;
      u32 wanted = top_k - above.count;
      bool listed = count <= CANDIDATES;
      bool one_key = !listed && (u32)bracket.high - (u32)bracket.low == 1;
      u64 each = fixed(weight(from_key(bracket.low)));
      if (listed) {
        gather([&](int key) { return key >= bracket.low && key < bracket.high; });
        cumulate(count, above.mass);
        cut = cut_at(wanted - 1, count, above.count);
        mass = shared.cumulated[wanted - 1];
      } else if (one_key) {
        cut = {bracket.low, wanted, count, top_k, false};
        mass = above.mass + wanted * each;
      } else {
        // The rest weighs nothing.
        cut = {bracket.high - 1, 0, 1, top_k, false};
        mass = above.mass;
      }
      if (top_p >= 1.f) return cut;
      u64 goal = nucleus(top_p, mass);
      if (goal > above.mass) {
        if (listed) return cut_at(reaching(goal, wanted), count, above.count);
        if (one_key && each > 0) {
          cut.ties = (u32)min((u64)wanted, (goal - above.mass + each - 1) / each);
          cut.count = above.count + cut.ties;
        }
        return cut;
      }
      bracket = {bracket.high, to_key(peak) + 1, above, {0, 0}};
    } else {
      begin_at(from_bound.mass >= nucleus(top_p, mass));
    }
    if (top_p >= 1.f) return cut;
    u64 goal = nucleus(top_p, mass);
    narrow(bracket, LOG2_E / scale, true, [&](const Totals& totals) { return totals.mass >= goal; });
    Totals above = bracket.from_high;
    u32 count = bracket.from_low.count - above.count;
    if (count <= CANDIDATES) {
      gather([&](int key) { return key >= bracket.low && key < bracket.high; });
      cumulate(count, above.mass);
      return cut_at(reaching(goal, count), count, above.count);
    }
    u64 each = max(fixed(weight(from_key(bracket.low))), 1ull);
    u64 short_of = goal > above.mass ? goal - above.mass : 1;
    u32 ties = (u32)min((u64)count, (short_of + each - 1) / each);
    return {bracket.low, ties, count, above.count + ties, false};
  }

  // How many of this thread's tokens with the key of the cut are kept.
  __device__ __forceinline__ u32 quota(const Cut& cut) {
    if (cut.ties >= cut.equal) return FULL;
    u64 mine[1] = {0};
    for (int i = begin; i < end; i++) mine[0] += to_key(at(i)) == cut.key;
    add_up(mine);
    u64 before = before_warp() + warp_cumulated(mine[0]) - mine[0];
    // The next sums overwrite those of the warps.
    __syncthreads();
    return before < cut.ties ? (u32)(cut.ties - before) : 0;
  }
};

extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, 2)
    sampling_draw(const elem* __restrict__ logits, int vocabulary, int part,
                  const float* __restrict__ temperatures, const u32* __restrict__ top_ks,
                  const float* __restrict__ top_ps, const float* __restrict__ min_ps,
                  const float* __restrict__ uniforms, u32* __restrict__ tokens, float* __restrict__ log_probs,
                  float* __restrict__ model_log_probs) {
  extern __shared__ uint4 memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  elem* buffer = reinterpret_cast<elem*>(memory + SHARED_BYTES / 16);
  int index = blockIdx.x / GRID_BLOCKS;
  u32 rank = blockIdx.x % GRID_BLOCKS;
  if (rank >= BLOCKS) return;
  Row row(shared, logits, buffer, index, vocabulary, part, rank);
  float temperature = temperatures[index];
  u32 top_k = min(top_ks[index], (u32)vocabulary);
  float top_p = top_ps[index];
  float min_p = fminf(min_ps[index], 1.f);
  float uniform = uniforms[index];
  bool greedy = temperature == 0.f;
  // Not infinite: the peak's difference is 0.
  float inverse = greedy ? 1.f : fminf(1.f / temperature, 1e30f);
  bool by_count = top_k > 0;
  bool cuts = !greedy && (top_p < 1.f || by_count);

  int in_phase;
  float peak = row.peak = from_key(row.highest(row.load(buffer), in_phase));
  if (!(fabsf(peak) < __int_as_float(0x7f800000))) {
    if (rank == 0 && threadIdx.x == 0) {
      tokens[index] = BROKEN;
      log_probs[index] = model_log_probs[index] = __int_as_float(0x7fffffff);
    }
    return;
  }
  row.scale = inverse * LOG2_E;

  // Weights of all tokens, at this temperature and at 1; and where a few are kept, tokens that may be of them.
  int bound = NAN_KEY;
  Weighed weighed;
  u64 masses[2], sums[4];
  if (cuts) {
    bound = row.bound(by_count ? min(top_k, (u32)HIGHEST) : HIGHEST, in_phase);
    weighed = inverse == 1.f ? row.weigh<false, true>(bound) : row.weigh<true, true>(bound);
    row.send(weighed, bound);
    u64 values[4] = {fixed(weighed.mass), fixed(weighed.model_mass), fixed(weighed.from_bound), weighed.count};
    masses[0] = values[0];
    row.add_up(values);
  } else {
    weighed = inverse == 1.f ? row.weigh<false, false>(bound) : row.weigh<true, false>(bound);
    masses[0] = fixed(weighed.mass), masses[1] = fixed(weighed.model_mass);
    row.add_up(masses);
  }
  row.totals(sums);
  u64 whole = sums[0];
  auto write = [&](u32 id, float x) {
    tokens[index] = id;
    log_probs[index] = (x - peak) * inverse - log_fixed(sums[0]);
    model_log_probs[index] = (x - peak) - log_fixed(sums[1]);
  };

  if (greedy) {
    int lowest = vocabulary;
    for (int i = row.end - 1; i >= row.begin; i--)
      if (row.at(i) == peak) lowest = row.first + i;
    lowest = -row.highest(-lowest, in_phase);
    if (rank == 0 && threadIdx.x == 0) write(lowest, peak);
    return;
  }

  // From the `count` sorted tokens in falling probability, as the host does.
  auto from_sorted = [&](int count) {
    int kept = count;
    auto too_unlikely = [&](int i) { return row.weight(from_key(row.sorted_key(i))) < min_p; };
    if (min_p > 0.f) kept = row.first_that(count, too_unlikely);
    u64 weighs = shared.cumulated[kept - 1];
    u64 target = min((u64)((double)uniform * (double)weighs), weighs - 1);
    int drawn = row.first_that(kept - 1, [&](int i) { return shared.cumulated[i] > target; });
    if (rank == 0 && threadIdx.x == 0) write((u32)shared.sorted[drawn], from_key(row.sorted_key(drawn)));
  };

  Cut cut = {LOWEST_KEY, (u32)vocabulary, 0, (u32)vocabulary, false};
  u32 quota = FULL;
  if (cuts) {
    Totals from_bound = {sums[2], (u32)sums[3]};
    bool enough = by_count ? from_bound.count >= top_k : from_bound.mass >= row.nucleus(top_p, whole);
    bool sent = row.receive();
    if (enough && sent) {
      // The first block does the rest.
      if (rank != 0) return;
      int count = from_bound.count;
      row.sort_sent(count);
      row.cumulate(count, 0);
      u64 left = whole;
      if (by_count) count = top_k, left = shared.cumulated[count - 1];
      if (top_p < 1.f) count = row.reaching(row.nucleus(top_p, left), count) + 1;
      from_sorted(count);
      return;
    }
    cut = row.select(top_k, top_p, whole, bound, from_bound, false);
    if (!cut.sorted) quota = row.quota(cut);
    if (cut.count <= CANDIDATES) {
      int count = cut.count;
      if (!cut.sorted) {
        u32 left = quota;
        count = row.gather([&](int key) { return key > cut.key || (key == cut.key && left > 0 && left-- > 0); });
        row.cumulate(count, 0);
      }
      from_sorted(count);
      cluster_barrier();
      return;
    }
  }
  if (cuts || min_p > 0.f) {
    u32 left = quota;
    float mass = 0.f;
#pragma unroll 4
    for (int i = row.begin; i < row.end; i++) {
      float x = row.at(i), w = row.weight(x);
      int key = to_key(x);
      bool tie = (key == cut.key) & (left > 0);
      left -= tie;
      mass += ((key > cut.key) | tie) & (w >= min_p) ? w : 0.f;
    }
    masses[0] = fixed(mass);
    u64 values[1] = {masses[0]};
    row.add_up(values);
    row.totals(values);
    whole = values[0];
  }

  // The thread in whose cumulated weight the target lies has the token; its warp looks for it together.
  u64 target = min((u64)((double)uniform * (double)whole), whole - 1);
  u64 before = row.before_warp() + warp_cumulated(masses[0]) - masses[0];
  u32 owner = __ballot_sync(FULL, target >= before && target - before < masses[0]);
  if (owner == 0) return;
  int source = __ffs(owner) - 1, lane = threadIdx.x & 31;
  int begin = __shfl_sync(FULL, row.begin, source), end = __shfl_sync(FULL, row.end, source);
  u32 left = __shfl_sync(FULL, quota, source);
  before = __shfl_sync(FULL, before, source);
  int drawn = begin;
  for (int i = begin; i < end; i += 32) {
    float x = i + lane < end ? row.at(i + lane) : -__int_as_float(0x7f800000);
    int key = to_key(x);
    float w = row.weight(x);
    u32 ties = __ballot_sync(FULL, key == cut.key);
    bool kept = key > cut.key || (key == cut.key && __popc(ties & ((1u << lane) - 1)) < left);
    left -= min(left, (u32)__popc(ties));
    u64 mine = kept && w >= min_p ? fixed(w) : 0;
    u64 cumulated = before + warp_cumulated(mine);
    u32 possible = __ballot_sync(FULL, mine > 0), beyond = __ballot_sync(FULL, mine > 0 && cumulated > target);
    if (beyond != 0) {
      drawn = i + __ffs(beyond) - 1;
      break;
    }
    if (possible != 0) drawn = i + 31 - __clz(possible);
    before = __shfl_sync(FULL, cumulated, 31);
  }
  if (lane == 0) write(row.first + drawn, row.at(drawn));
}

// The `wanted` most likely tokens of each row at temperature 1.
extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, 2)
    sampling_top(const elem* __restrict__ logits, int vocabulary, int part, int wanted,
                 u32* __restrict__ ids, float* __restrict__ log_probs) {
  extern __shared__ uint4 memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  elem* buffer = reinterpret_cast<elem*>(memory + SHARED_BYTES / 16);
  int index = blockIdx.x / GRID_BLOCKS;
  u32 rank = blockIdx.x % GRID_BLOCKS;
  if (rank >= BLOCKS) return;
  Row row(shared, logits, buffer, index, vocabulary, part, rank);
  row.scale = LOG2_E;
  i64 slot = (i64)index * wanted + threadIdx.x;
  bool writes = rank == 0 && (int)threadIdx.x < wanted;
  int in_phase;
  float peak = row.peak = from_key(row.highest(row.load(buffer), in_phase));
  if (!(fabsf(peak) < __int_as_float(0x7f800000))) {
    if (writes) ids[slot] = BROKEN, log_probs[slot] = __int_as_float(0x7fffffff);
    return;
  }
  int count = min(wanted, vocabulary);
  int bound = row.bound(min(count, HIGHEST), in_phase);
  Weighed weighed = row.weigh<false, true>(bound);
  row.send(weighed, bound);
  u64 sums[4] = {fixed(weighed.mass), 0, fixed(weighed.from_bound), weighed.count};
  row.add_up(sums);
  row.totals(sums);
  bool sent = row.receive();
  bool listed = sums[3] >= count && sent;
  if (listed) {
    if (rank != 0) return;
    row.sort_sent((int)sums[3]);
  } else {
    // Without their weights `select` only counts.
    Cut cut = row.select(count, 1.f, sums[0], bound, {sums[2], (u32)sums[3]}, true);
    u32 left = row.quota(cut);
    row.gather([&](int key) { return key > cut.key || (key == cut.key && left > 0 && left-- > 0); });
  }
  if (writes) {
    bool exists = (int)threadIdx.x < count;
    float x = from_key(row.sorted_key(threadIdx.x));
    ids[slot] = exists ? (u32)shared.sorted[threadIdx.x] : BROKEN;
    log_probs[slot] = exists ? (x - peak) - log_fixed(sums[0]) : __int_as_float(0x7fffffff);
  }
  if (!listed) cluster_barrier();
}
