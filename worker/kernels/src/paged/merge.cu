// MERGE_WARPS warps per query head of a row, of which a block has MERGE_HEADS (one, or those of a KV head): merges partial results,
// always in the order of the lines.
extern "C" __global__ void __launch_bounds__(MERGE_HEADS * MERGE_WARPS * 32)
    paged_merge(elem* out, float* lse, const float* partials, const float* wide_partials, const int* header, const Row* records,
                int heads, int kv_heads) {
  static constexpr int AT_ONCE = MERGE_WARPS == 1 ? 8 : 4;
  // The product that follows reads its weight first.
  allow_next();
  wait_for_previous();
  __shared__ float all_outputs[MERGE_HEADS][MERGE_WARPS][HEAD_DIM], all_maxima[MERGE_HEADS][MERGE_WARPS], all_sums[MERGE_HEADS][MERGE_WARPS];
  int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % MERGE_WARPS, of_block = threadIdx.x / 32 / MERGE_WARPS;
  int row = blockIdx.y, head = blockIdx.x * MERGE_HEADS + of_block, kv_head = head / PER_KV, column = head % PER_KV, wide_column = 0;
  float(&outputs)[MERGE_WARPS][HEAD_DIM] = all_outputs[of_block];
  float(&maxima)[MERGE_WARPS] = all_maxima[of_block], (&sums)[MERGE_WARPS] = all_sums[of_block];
  Row record = records[row];
  int4 lines = *reinterpret_cast<const int4*>(header);
  int line = record.column + column, tile = GROUPED ? line / record.width : 0;
  bool has_own = record.section >= 0, has_wide = GROUPED && record.tile >= 0;
  int start = record.start + kv_head * record.units;
  int wide_start = record.tile_start + (tile * kv_heads + kv_head) * record.tile_units;
  // Divisions are long: lanes 0 and 1 find the first and the last share of the row's own tokens, lanes 2 and 3
  // of its prefix.
  bool of_wide = lane & 2;
  int place = (of_wide ? wide_start : start) + (lane & 1) * ((of_wide ? record.tile_units : record.units) - 1), ends = 0;
  if (lane < 4 && (of_wide ? has_wide : has_own)) ends = share_of(place, of_wide ? lines.w : lines.y, of_wide ? lines.z : lines.x);
  int first = __shfl_sync(0xffffffffu, ends, 0), wide_first = __shfl_sync(0xffffffffu, ends, 2);
  int own = has_own ? __shfl_sync(0xffffffffu, ends, 1) - first + 1 : 0;
  int wide = has_wide ? __shfl_sync(0xffffffffu, ends, 3) - wide_first + 1 : 0;
  // Written by the team that had all of it.
  if (own == 1 && record.alone) return;
  const float* slots = partials + (i64)(first + record.section * kv_heads + kv_head) * SLOT;
  if (GROUPED && has_wide) wide_column = line % record.width;
  i64 slot = wide_first + (record.tile + tile) * kv_heads + kv_head;
  const float* wide_slots = wide_partials + (slot * WIDE_TILES + wide_column / 8) * SLOT;

  float most = MINUS_INFINITY, sum = 0.f, total[4] = {};
  for (int from = warp; from < own + wide; from += MERGE_WARPS * AT_ONCE) {
    float part_most[AT_ONCE], part_sum[AT_ONCE];
    float4 part[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      int at = from + i * MERGE_WARPS;
      part_most[i] = MINUS_INFINITY, part_sum[i] = 0.f, part[i] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (at >= own + wide) continue;
      const float* slot = at < own ? slots + (i64)at * SLOT : wide_slots + (i64)(at - own) * (WIDE_TILES * SLOT);
      int slot_column = at < own ? column : wide_column % 8;
      part_most[i] = slot[8 * HEAD_DIM + slot_column], part_sum[i] = slot[8 * HEAD_DIM + 8 + slot_column];
      if (4 * lane < HEAD_DIM) part[i] = *reinterpret_cast<const float4*>(slot + slot_column * HEAD_DIM + 4 * lane);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      float now = fmaxf(most, part_most[i]), before = rescale(most, now), share = rescale(part_most[i], now);
      most = now, sum = sum * before + part_sum[i] * share;
      total[0] = total[0] * before + part[i].x * share, total[1] = total[1] * before + part[i].y * share;
      total[2] = total[2] * before + part[i].z * share, total[3] = total[3] * before + part[i].w * share;
    }
  }
  i64 at = (i64)row * heads + head;
  if (MERGE_WARPS == 1) {
    // Of an unused row nothing was summed.
    float scale = sum == 0.f ? 0.f : 1.f / sum;
    elem* to = out + at * HEAD_DIM + 4 * lane;
    if (4 * lane < HEAD_DIM) store_two(to, total[0] * scale, total[1] * scale), store_two(to + 2, total[2] * scale, total[3] * scale);
    if (lse && lane == 0) lse[at] = (most + __log2f(sum)) * 0.69314718f;
    return;
  }
  if (lane == 0) maxima[warp] = most, sums[warp] = sum;
  if (4 * lane < HEAD_DIM)
    *reinterpret_cast<float4*>(&outputs[warp][4 * lane]) = make_float4(total[0], total[1], total[2], total[3]);
  __syncthreads();
  most = MINUS_INFINITY, sum = 0.f;
#pragma unroll
  for (int other = 0; other < MERGE_WARPS; other++) most = fmaxf(most, maxima[other]);
#pragma unroll
  for (int other = 0; other < MERGE_WARPS; other++) sum += sums[other] * rescale(maxima[other], most);
  // Of an unused row nothing was summed.
  float scale = sum == 0.f ? 0.f : 1.f / sum;
  for (int dim = warp * 32 + lane; dim < HEAD_DIM; dim += MERGE_WARPS * 32) {
    float all = 0.f;
#pragma unroll
    for (int other = 0; other < MERGE_WARPS; other++) all += outputs[other][dim] * rescale(maxima[other], most);
    out[at * HEAD_DIM + dim] = from_float<elem>(all * scale);
  }
  if (lse && warp == 0 && lane == 0) lse[at] = (most + __log2f(sum)) * 0.69314718f;
}
