// One layer's experts over the tokens routed to them. Included once per instruction set.
#pragma once
#include "desk.hpp"
#include "feed.hpp"

namespace COTERIE_ISA {

// Calls body.run<M>(first) over tiles of tokens, as even as can be: 14 are 7 and 7, not 13 and 1.
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

template <int TILE, class Body>
static void tiles(int count, const Body& body) {
  int parts = (count + TILE - 1) / TILE;
  for (int i = 0, first = 0; i < parts; i++) {
    int size = count / parts + (i < count % parts);
    tile<TILE>(size, first, body);
    first += size;
  }
}

// A couple of panels against the tokens of one expert.
template <class Format>
struct Couple {
  const Way<Format>& here;
  Feed<Format>& feed;
  int k, number, begin;  // the first pair of a token and this expert

  template <int A, int M>
  void dot(int first, const uint8_t* const (&rows)[M], F (&sum)[2][M]) const {
    size_t size = here.legs[here.leg].couple;
    const uint8_t* w = here.run() + (number - here.couple) * size;
    Format::template dot<A, M>(w, rows, k, feed.ask(size, Format::steps(k), M, first == 0), sum);
  }
};

// silu(gate) * up: sixteen columns of h.
template <class Format>
struct GateUp {
  Couple<Format> couple;

  template <int M>
  void run(int first) const {
    const Desk<Format>& d = couple.here.d;
    int pair = couple.begin + first;
    const uint8_t* rows[M];
    for (int m = 0; m < M; m++) rows[m] = d.x + d.token[pair + m] * d.x_row;
    F sum[2][M];
    couple.template dot<Format::OF_X>(first, rows, sum);
    for (int m = 0; m < M; m++) {
      F y[1] = {silu_times(sum[0][m], sum[1][m])};
      Format::template take<Format::OF_H>(y, couple.number * LANES, d.h + (pair + m) * d.h_row);
    }
  }
};

// Up to 32 columns of the output, weighted and added.
template <class Format>
struct Down {
  Couple<Format> couple;

  template <int M>
  void run(int first) const {
    const Call& c = couple.here.c;
    const Desk<Format>& d = couple.here.d;
    int pair = couple.begin + first, column = couple.number * COUPLE;
    const uint8_t* rows[M];
    for (int m = 0; m < M; m++) rows[m] = d.h + (pair + m) * d.h_row;
    F sum[2][M];
    couple.template dot<Format::OF_H>(first, rows, sum);
    for (int m = 0; m < M; m++) {
      float* to = c.out + d.token[pair + m] * size_t(c.hidden) + column;
      for (int p = 0; p < 2; p++)
        add(to + p * LANES, d.weight[pair + m] * sum[p][m], c.hidden - column - p * LANES);
    }
  }

  static void add(float* to, F part, int there) {
    if (there >= LANES) return store(to, load<F>(to) + part);
    for (int i = 0; i < there; i++) to[i] += part[i];
  }
};

template <template <class> class Body, class Format>
static void meet_run(const Way<Format>& here, Feed<Format>& feed, int k) {
  int begin = here.d.begin[here.d.order[here.i]], last = here.couple + here.couples();
  for (int number = here.couple; number < last; number++)
    tiles<Format::TILE>(here.d.count(here.i), Body<Format>{{here, feed, k, number, begin}});
}

// Sixteen numbers of a token from column k on; zeros past the end.
static inline F sixteen(const Call& c, size_t token, int k) {
  size_t at = token * c.hidden + k;
  int there = smaller(LANES, c.hidden - k);
  if (c.x_is_bf16) {
    const uint16_t* from = static_cast<const uint16_t*>(c.x) + at;
    if (there == LANES) return widen(load<Half>(from));
    Half some = {};
    for (int i = 0; i < there; i++) some[i] = from[i];
    return widen(some);
  }
  const float* from = static_cast<const float*>(c.x) + at;
  if (there == LANES) return load<F>(from);
  F some = {};
  for (int i = 0; i < there; i++) some[i] = from[i];
  return some;
}

// This thread's part of the tokens, as the weights' format meets them, and of the output, empty.
template <class Format>
static void take_tokens(const Call& c, const Desk<Format>& d) {
  constexpr int A = Format::OF_X;
  Part part(c.tokens);
  for (int t = part.first; t < part.last; t++) {
    memset(c.out + size_t(t) * c.hidden, 0, size_t(c.hidden) * 4);
    for (int k = 0; k < padded(c.hidden, Format::ROW); k += A) {
      F x[A / LANES];
      for (int i = 0; i < A / LANES; i++) x[i] = sixteen(c, t, k + i * LANES);
      Format::template take<A>(x, k, d.x + t * d.x_row);
    }
  }
  if (padded(c.width, LANES) == padded(c.width, Format::ROW)) return;
  Part pairs(d.begin[c.slots]);  // the ends of rows that no column of h fills
  memset(d.h + pairs.first * d.h_row, 0, (pairs.last - pairs.first) * d.h_row);
}

template <class Format>
static int32_t run(const Call& c) {
  static thread_local Room room;
  uint8_t* memory = room.of(Desk<Format>(c, 0).bytes);
  if (!memory) return NO_MEMORY;
  Desk<Format> d(c, reinterpret_cast<uintptr_t>(memory));
  if (!sort_by_slot(c, d)) return NO_SUCH_EXPERT;
  weave(d, d.order + c.slots + 1);
  int arrived[2] = {};
#pragma omp parallel num_threads(c.threads)
  {
    take_tokens(c, d);
    meet(arrived);
    Way<Format> here(c, d);
    Feed<Format> feed(here);
    for (; here.leg == 0; here.next()) meet_run<GateUp>(here, feed, c.hidden);
    meet(arrived + 1);
    for (; here.leg == 1; here.next()) meet_run<Down>(here, feed, c.width);
  }
  return DONE;
}

}  // namespace COTERIE_ISA
