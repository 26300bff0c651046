// The experts that each block of a sequence admits (LLaDA2.2). Included once per instruction set. See
// `routing/router.py: admitted_experts`.
#pragma once
#include <math.h>
#include "selection.hpp"

namespace COTERIE_ISA::routing {

// An expert's place in an election: before votes count, by its votes, or not at all.
enum Tier : uint8_t { PROTECTED = 0, CANDIDATE = 1, EXCLUDED = 2 };

// The best score of each expert over the tokens with a positive vote weight (null: all tokens).
static void best_scores(const RouteArgs& e, size_t begin, size_t end, const float* vote_weight, float* best) {
  for (int i = 0; i < e.experts; i++) best[i] = -INFINITY;
  for (size_t t = begin; t < end; t++) {
    const float* p = e.p + t * e.stride;
    if (vote_weight && !(vote_weight[t] > 0)) continue;
    int i = 0;
    for (; WIDTH > 2 && i + WIDTH <= e.experts; i += WIDTH) {
      Scores mine = load<Scores>(p + i), old = load<Scores>(best + i);
      if (e.bias) mine += load<Scores>(e.bias + i);
      store(best + i, mine > old ? mine : old);
    }
    for (; i < e.experts; i++) {
      float mine = e.bias ? p[i] + e.bias[i] : p[i];
      best[i] = mine > best[i] ? mine : best[i];
    }
  }
}

// Marks the `size` experts of tiers up to `last` with the largest keys, PROTECTED ones first; lower
// indices win ties. There are at least `size`. A bisection finds the smallest selected key.
static void select_largest(const RouteArgs& e, const SelectionScratch& scratch, const Code* key, int size,
                           Tier last, uint8_t* coreset) {
  Code low = INT64_MAX, high = LOWEST_CODE;
  int count = 0;  // experts with a key of at least `low`
  for (int i = 0; i < e.experts; i++) {
    if (scratch.tier[i] > last) continue;
    low = key[i] < low ? key[i] : low;
    high = key[i] > high ? key[i] : high;
    count++;
  }
  for (int i = 0; i < padded_codes(e.experts); i++) {
    bool eligible = i < e.experts && scratch.tier[i] <= last;
    bool first = last > PROTECTED && scratch.tier[i] == PROTECTED;
    scratch.candidates[i] = !eligible ? LOWEST_CODE : first ? high + 1 : key[i];
  }
  high++;
  while (low < high && count != size) {
    Code middle = low + Code((uint64_t(high) - uint64_t(low) + 1) / 2);
    Codes reach_lanes = {};
    for (int i = 0; i < padded_codes(e.experts); i += WIDTH)
      reach_lanes -= load<Codes>(scratch.candidates + i) >= middle;
    Code lanes[WIDTH], reach_count = 0;
    store(lanes, reach_lanes);
    for (Code each : lanes) reach_count += each;
    if (reach_count >= size) {
      low = middle;
      count = int(reach_count);
    } else {
      high = middle - 1;
    }
  }
  for (int i = e.experts - 1; i >= 0; i--) {
    coreset[i] = scratch.candidates[i] >= low;
    if (scratch.candidates[i] == low && count > size) coreset[i] = 0, count--;
  }
}

// Admits the experts with the best score of any token, for each block of every sequence. Blocks lie at
// multiples of their size; a sequence may hold parts of them.
static void admit(const RouteArgs& e, const SelectionScratch& scratch) {
  memset(scratch.tier, CANDIDATE, size_t(e.experts));
  int64_t begin = 0, block = 0;
  for (int row = 0; row < e.sequences; row++) {
    int64_t offset = e.starts ? e.starts[row] % e.block : 0, row_end = begin + e.tokens;
    int64_t end = begin - (offset < 0 ? offset + e.block : offset);
    for (; begin < row_end; begin = end, block++) {
      end = end + e.block < row_end ? end + e.block : row_end;
      for (int64_t t = begin; t < end; t++) scratch.block[t] = block;
      best_scores(e, size_t(begin), size_t(end), nullptr, scratch.score);
      write_codes(scratch.score, nullptr, scratch.tie_break, e.experts, scratch.code);
      select_largest(e, scratch, scratch.code, e.capacity, CANDIDATE, scratch.coreset);
      Code* outside = scratch.outside_of(size_t(begin));
      for (int i = 0; i < padded_codes(e.experts); i++)
        outside[i] = i < e.experts && !scratch.coreset[i] ? OUTSIDE_PENALTY : 0;
    }
  }
}

// Sorts the experts of one sequence into tiers: protected ones, and those that no block admits.
static void set_tiers(const RouteArgs& e, const SelectionScratch& scratch, int row, const uint8_t* is_protected) {
  Code* penalty = scratch.other;  // of the block that admits the expert, if one does
  for (int i = 0; i < e.experts; i++) penalty[i] = e.capacity ? OUTSIDE_PENALTY : 0;
  size_t first = size_t(row) * e.tokens, end = first + size_t(e.tokens);
  for (size_t t = first; t < end && e.capacity; t++) {
    if (t > first && scratch.block[t] == scratch.block[t - 1]) continue;
    const Code* outside = scratch.outside_of(t);
    for (int i = 0; i < e.experts; i++) penalty[i] &= outside[i];
  }
  for (int i = 0; i < e.experts; i++)
    scratch.tier[i] = is_protected[i] ? PROTECTED : penalty[i] ? EXCLUDED : CANDIDATE;
}

}  // namespace COTERIE_ISA::routing
