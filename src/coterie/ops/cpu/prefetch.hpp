// The order in which a thread reads the weights, and software prefetching along that order.
#pragma once
#include "workspace.hpp"

namespace COTERIE_ISA {

// Iterates over one thread's weights in runs of adjacent panel pairs of one expert. Within a tile
// of experts, each expert contributes one run in turn, then the next run of each follows. The
// gate-up phase of all tiles precedes the down phase. A run is long enough to be read at full speed
// and short enough to alternate experts of many and few tokens.
template <class Format>
struct WeightWalk {
  static constexpr int MAX_TILE_PAIRS = 512;  // pairs of a tile: their activations fit a cache
  static constexpr size_t RUN_BYTES = 512 << 10;
  const ExpertsArgs& c;
  const Workspace<Format>& d;
  struct Phase {
    int first, last, run_pairs;  // panel pairs of this thread [first, last), and of a run
    size_t pair, offset;         // bytes of a panel pair; of the phase within an expert
  } phases[2];
  int phase = 0, tile = 0, end = 0, pair = 0, i = 0;

  WeightWalk(const ExpertsArgs& c, const Workspace<Format>& d) : c(c), d(d) {
    int gate_up_pairs = padded(c.width, LANES) / LANES,
        down_pairs = padded(c.hidden, PAIR_COLUMNS) / PAIR_COLUMNS;
    phases[0] = make_phase(gate_up_pairs, Format::panel_bytes(c.hidden), 0);
    phases[1] = make_phase(down_pairs, Format::panel_bytes(c.width), gate_up_pairs * phases[0].pair);
    start();
  }

  bool is_done() const { return phase == 2; }
  int pairs_in_run() const { return min_int(phases[phase].run_pairs, phases[phase].last - pair); }
  size_t size() const { return pairs_in_run() * phases[phase].pair; }
  const uint8_t* run() const {
    const Phase& at = phases[phase];
    return c.panels + size_t(d.order[i]) * c.stride + at.offset + pair * at.pair;
  }

  void next() {
    if (++i < end) return;
    pair += phases[phase].run_pairs;
    if (pair < phases[phase].last) {
      i = tile;
    } else if (end < d.used) {
      next_tile();
    } else {
      phase++;
      start();
    }
  }

 private:
  static Phase make_phase(int pairs_in_run, size_t bytes, size_t offset) {
    ThreadRange part(pairs_in_run);
    return {part.first, part.last, RUN_BYTES > bytes ? int(RUN_BYTES / bytes) : 1, bytes, offset};
  }
  void start() {
    i = 0;
    while (phase < 2 && (phases[phase].first == phases[phase].last || !d.used)) phase++;
    if (phase < 2) next_tile();
  }
  void next_tile() {
    pair = phases[phase].first;
    tile = end = i;
    int token_pairs = d.count(end++);
    while (end < d.used && (token_pairs += d.count(end)) <= MAX_TILE_PAIRS) end++;
  }
};

// Spreads prefetches evenly over the arithmetic. While an expert of many tokens is computed, more
// than its own bytes are prefetched, so that experts of few tokens do not wait for memory.
template <class Format>
struct Prefetcher {
  static constexpr int MIN_TOKENS = PARTS == 1 ? 6 : 2;  // a pass of fewer is no faster
  static constexpr int64_t MIN_LEAD = 4 << 10, MAX_LEAD = 384 << 10;  // bytes ahead of the computation
  WeightWalk<Format> walk;  // the prefetch position, except `left_bytes` of its run
  int64_t left_bytes, lead = 0;
  float share[Format::TILE + 1];  // of a panel pair's bytes, by tokens of a pass

  explicit Prefetcher(const WeightWalk<Format>& start_walk)
      : walk(start_walk), left_bytes(start_walk.is_done() ? 0 : start_walk.size()) {
    float total = 0;
    for (int i = 0; i < walk.d.used; i++) {
      int count = walk.d.count(i), passes = (count + Format::TILE - 1) / Format::TILE;
      total += passes * cost(float(count) / passes);
    }
    for (int m = 0; m <= Format::TILE; m++) share[m] = walk.d.used * cost(m) / total;
  }

  // The prefetches of one pass of `tokens` tokens over `bytes` of weights; only the first pass
  // reads new bytes. In two rounds, one for each panel, the first round reads them at twice the pace
  // of the prefetches, which must be half of them ahead.
  PrefetchCursor advance(int64_t bytes, int steps, int rounds, int tokens, bool first) {
    int64_t min_lead = MIN_LEAD + (rounds - 1) * bytes / 2;
    steps *= rounds;
    if (walk.is_done()) return {walk.c.panels, walk.c.panels + 1, walk.c.panels, 0};
    if (first) lead -= bytes;
    int64_t amount = int64_t(bytes * share[tokens]);
    if (amount < min_lead - lead) amount = min_lead - lead;
    if (amount > MAX_LEAD - lead) amount = MAX_LEAD - lead;
    if (amount > PrefetchCursor::MAX_BYTES * steps) amount = PrefetchCursor::MAX_BYTES * steps;
    if (amount < 0) amount = 0;
    const uint8_t* end = walk.run() + walk.size();
    PrefetchCursor cursor{end - left_bytes, end, end, size_t((amount + steps - 1) / steps)};
    if (amount >= left_bytes) {
      amount -= left_bytes;
      lead += left_bytes;
      walk.next();
      left_bytes = walk.is_done() ? 0 : walk.size();
      if (amount > left_bytes) amount = left_bytes;
      if (left_bytes) cursor.next = walk.run();
    }
    left_bytes -= amount;
    lead += amount;
    return cursor;
  }

 private:
  // Relative time of a pass. Steps of few tokens wait for the latency of their sums.
  static float cost(float tokens) { return (tokens < MIN_TOKENS ? MIN_TOKENS : tokens) + 1; }
};

}  // namespace COTERIE_ISA
