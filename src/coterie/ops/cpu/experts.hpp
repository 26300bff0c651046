// Runs one layer's experts on the tokens routed to them. Included once per instruction set.
#pragma once
#include "workspace.hpp"
#include "prefetch.hpp"

namespace COTERIE_ISA {

constexpr int32_t GELU_TANH = 1;

// Calls body.run<count>(first): turns a runtime tile size of at most M into a template argument.
template <int M, class Body>
static void tile(int count, int first, const Body& body) {
  if constexpr (M > 0) {
    if (count == M) {
      body.template run<M>(first);
    } else {
      tile<M - 1>(count, first, body);
    }
  }
}

// Calls body.run<M>(first) over tiles of at most TILE tokens of nearly equal size: 14 become 7 and
// 7, not 13 and 1.
template <int TILE, class Body>
static void tiles(int count, const Body& body) {
  int parts = (count + TILE - 1) / TILE;
  for (int i = 0, first = 0; i < parts; i++) {
    int size = count / parts + (i < count % parts);
    tile<TILE>(size, first, body);
    first += size;
  }
}

// Multiplies a pair of panels with the tokens of one expert.
template <class Format>
struct PanelPair {
  const WeightWalk<Format>& walk;
  Prefetcher<Format>& prefetcher;
  int k, pair_index, begin;  // begin: the expert's first token-expert pair

  template <int A, int M>
  void dot(int first, const uint8_t* const (&rows)[M], F (&sum)[2][M]) const {
    constexpr int ROUNDS = 2 / panels_of(M, Format::WEIGHTS);
    size_t size = walk.phases[walk.phase].pair;
    const uint8_t* w = walk.run() + (pair_index - walk.pair) * size;
    PrefetchCursor cursor = prefetcher.advance(size, Format::steps(k), ROUNDS, M, first == 0);
    Format::template dot<A, M>(w, rows, k, cursor, sum);
  }
};

// Computes sixteen columns of h = activation(gate) * up.
template <class Format>
struct GateUp {
  PanelPair<Format> panel_pair;

  template <int M>
  void run(int first) const {
    const Workspace<Format>& d = panel_pair.walk.d;
    bool gelu = panel_pair.walk.c.activation == GELU_TANH;
    int pair = panel_pair.begin + first;
    const uint8_t* rows[M];
    for (int m = 0; m < M; m++) rows[m] = d.x + d.token[pair + m] * d.x_row;
    F sum[2][M];
    panel_pair.template dot<Format::OF_X>(first, rows, sum);
    for (int m = 0; m < M; m++) {
      F y[1] = {gelu ? gelu_times(sum[0][m], sum[1][m]) : silu_times(sum[0][m], sum[1][m])};
      Format::template encode<Format::OF_H>(y, panel_pair.pair_index * LANES, d.h + (pair + m) * d.h_row);
    }
  }
};

// Computes up to 32 columns of the output and adds them, weighted.
template <class Format>
struct Down {
  PanelPair<Format> panel_pair;

  template <int M>
  void run(int first) const {
    const ExpertsArgs& c = panel_pair.walk.c;
    const Workspace<Format>& d = panel_pair.walk.d;
    int pair = panel_pair.begin + first, column = panel_pair.pair_index * PAIR_COLUMNS;
    const uint8_t* rows[M];
    for (int m = 0; m < M; m++) rows[m] = d.h + (pair + m) * d.h_row;
    F sum[2][M];
    panel_pair.template dot<Format::OF_H>(first, rows, sum);
    for (int m = 0; m < M; m++) {
      float* to = c.out + d.token[pair + m] * size_t(c.hidden) + column;
      for (int p = 0; p < 2; p++)
        add(to + p * LANES, d.weight[pair + m] * sum[p][m], c.hidden - column - p * LANES);
    }
  }

  static void add(float* to, F part, int count) {
    if (count >= LANES) return store(to, load<F>(to) + part);
    for (int i = 0; i < count; i++) to[i] += part[i];
  }
};

template <template <class> class Body, class Format>
static void multiply_run(const WeightWalk<Format>& walk, Prefetcher<Format>& prefetcher, int k) {
  int begin = walk.d.begin[walk.d.order[walk.i]], last = walk.pair + walk.pairs_in_run();
  for (int pair_index = walk.pair; pair_index < last; pair_index++)
    tiles<Format::TILE>(walk.d.count(walk.i), Body<Format>{{walk, prefetcher, k, pair_index, begin}});
}

// Tokens as float or bf16 rows of `width` numbers.
struct ActivationRows {
  const void* x;
  int width, is_bf16;

  // Encodes a token for a weight format, in groups of A.
  template <class Format, int A>
  void encode(int token, uint8_t* row) const {
    for (int k = 0; k < padded(width, Format::ROW); k += A) {
      F part[A / LANES];
      for (int i = 0; i < A / LANES; i++) part[i] = load_from(size_t(token), k + i * LANES);
      Format::template encode<A>(part, k, row);
    }
  }

 private:
  // Sixteen numbers from column k on, zero past the end.
  F load_from(size_t token, int k) const {
    size_t at = token * width + k;
    int count = min_int(LANES, width - k);
    if (is_bf16) {
      const uint16_t* from = static_cast<const uint16_t*>(x) + at;
      if (count == LANES) return widen(load<HalfVector>(from));
      HalfVector values = {};
      for (int i = 0; i < count; i++) values[i] = from[i];
      return widen(values);
    }
    const float* from = static_cast<const float*>(x) + at;
    if (count == LANES) return load<F>(from);
    F values = {};
    for (int i = 0; i < count; i++) values[i] = from[i];
    return values;
  }
};

// Encodes this thread's share of the tokens for the weight format, and zeroes its share of the
// output.
template <class Format>
static void encode_tokens(const ExpertsArgs& c, const Workspace<Format>& d) {
  ActivationRows source{c.x, c.hidden, c.x_is_bf16};
  ThreadRange part(c.tokens);
  for (int t = part.first; t < part.last; t++) {
    memset(c.out + size_t(t) * c.hidden, 0, size_t(c.hidden) * 4);
    source.encode<Format, Format::OF_X>(t, d.x + t * d.x_row);
  }
  if (padded(c.width, LANES) == padded(c.width, Format::ROW)) return;
  ThreadRange pairs(d.begin[c.slots]);  // zero the padding of h that no column fills
  memset(d.h + pairs.first * d.h_row, 0, (pairs.last - pairs.first) * d.h_row);
}

template <class Format>
static int32_t run(const ExpertsArgs& c) {
  static thread_local ScratchBuffer scratch;
  uint8_t* memory = scratch.get(Workspace<Format>(c, 0).bytes);
  if (!memory) return NO_MEMORY;
  Workspace<Format> d(c, reinterpret_cast<uintptr_t>(memory));
  if (!sort_by_slot(c, d)) return NO_SUCH_EXPERT;
  interleave_by_load(d, d.order + c.slots + 1);
  int arrivals[2] = {};
#pragma omp parallel num_threads(c.threads)
  {
    encode_tokens(c, d);
    barrier(arrivals);
    WeightWalk<Format> walk(c, d);
    Prefetcher<Format> prefetcher(walk);
    for (; walk.phase == 0; walk.next()) multiply_run<GateUp>(walk, prefetcher, c.hidden);
    barrier(arrivals + 1);
    for (; walk.phase == 1; walk.next()) multiply_run<Down>(walk, prefetcher, c.width);
  }
  return STATUS_OK;
}

}  // namespace COTERIE_ISA
