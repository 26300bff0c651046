// One layer's experts over the tokens routed to them. Included once per instruction set.
#pragma once
#include <math.h>
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#include "api.hpp"
#include "formats.hpp"

namespace COTERIE_ISA {

constexpr int COUPLE = 2 * LANES;  // columns of the output that a couple of panels of down makes

// This thread's part of n. Columns are shared out, never experts: no thread waits for the last one.
struct Part {
  int first, last;
  explicit Part(int n) : first(0), last(n) {
#ifdef _OPENMP
    int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
    first = int(n * me / all);
    last = int(n * (me + 1) / all);
#endif
  }
};

// Working memory that a thread keeps from call to call.
struct Room {
  uint8_t* begin = nullptr;
  size_t size = 0;
  Room() = default;
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;
  ~Room() { free(begin); }
  uint8_t* of(size_t wanted) {
    if (wanted > size) {
      free(begin);
      begin = static_cast<uint8_t*>(aligned_alloc(64, (wanted + 63) / 64 * 64));
      size = begin ? wanted : 0;
    }
    return begin;
  }
};

// Where things lie in the room: the same walk measures and places.
template <class Format>
struct Desk {
  int *begin, *token, *slot;  // token-expert pairs by slot; the slots that have any
  float *weight, *wide, *h;   // of each pair; a row of x a thread; [pairs, width]
  uint8_t *x, *taken;         // activations as the weights' format meets them
  size_t bytes = 0;

  Desk(const Call& c, uintptr_t room) {
    size_t pairs = size_t(c.tokens) * c.k;
    begin = place<int>(room, size_t(c.slots) + 1);
    slot = place<int>(room, size_t(c.slots) + 1);
    token = place<int>(room, pairs);
    weight = place<float>(room, pairs);
    wide = place<float>(room, size_t(c.threads) * c.hidden);
    x = place<uint8_t>(room, c.tokens * Format::row_bytes(c.hidden));
    h = place<float>(room, pairs * c.width);
    taken = place<uint8_t>(room, pairs * Format::row_bytes(c.width));
  }

 private:
  template <class T>
  T* place(uintptr_t room, size_t count) {
    T* here = reinterpret_cast<T*>(room + bytes);
    bytes += (count * sizeof(T) + 63) / 64 * 64;
    return here;
  }
};

// Pairs of each slot one after the other, lower tokens first. The number of slots in use; -1 where
// a slot or an expert is told that is not there.
template <class Format>
static int sort_by_slot(const Call& c, const Desk<Format>& d) {
  int all = c.tokens * c.k, used = 0;
  auto slot_at = [&c](int i) -> int64_t {
    if (c.ids[i] >= c.experts) return c.slots;
    return c.ids[i] < 0 ? -1 : c.slot_of[c.ids[i]];
  };
  for (int s = 0; s <= c.slots; s++) d.begin[s] = 0;
  for (int i = 0; i < all; i++) {
    int64_t slot = slot_at(i);
    if (slot >= c.slots) return -1;
    if (slot >= 0) d.begin[slot + 1]++;
  }
  for (int s = 0; s < c.slots; s++) {
    if (d.begin[s + 1]) d.slot[used++] = s;
    d.begin[s + 1] += d.begin[s];
  }
  for (int i = 0; i < all; i++) {
    int64_t slot = slot_at(i);
    if (slot < 0) continue;
    int at = d.begin[slot]++;
    d.token[at] = i / c.k;
    d.weight[at] = c.weights[i];
  }
  for (int s = c.slots; s > 0; s--) d.begin[s] = d.begin[s - 1];
  d.begin[0] = 0;
  return used;
}

// A couple of panels against the tokens of one expert: silu(gate) * up of sixteen columns of h.
template <class Format>
struct GateUp {
  const uint8_t *w, *x;
  const int* token;
  float* h;  // at its first column
  int k, width, columns;

  template <int M>
  void run(int first) const {
    const uint8_t* rows[M];
    for (int m = 0; m < M; m++) rows[m] = x + size_t(token[first + m]) * Format::row_bytes(k);
    F sum[2][M];
    Format::template dot<M>(w, rows, k, sum);
    for (int m = 0; m < M; m++) {
      F y = silu_times(sum[0][m], sum[1][m]);
      memcpy(h + size_t(first + m) * width, &y, size_t(columns) * 4);
    }
  }
};

// The same for down: up to 32 columns of the output, weighted and added.
template <class Format>
struct Down {
  const uint8_t *w, *h;
  const int* token;
  const float* weight;
  float* out;  // at its first column
  int k, hidden, columns;

  template <int M>
  void run(int first) const {
    const uint8_t* rows[M];
    for (int m = 0; m < M; m++) rows[m] = h + size_t(first + m) * Format::row_bytes(k);
    F sum[2][M];
    Format::template dot<M>(w, rows, k, sum);
    for (int m = 0; m < M; m++) {
      float* to = out + size_t(token[first + m]) * hidden;
      for (int p = 0; p < 2; p++) {
        size_t bytes = size_t(smaller(LANES, columns - p * LANES)) * 4;
        if (columns <= p * LANES) break;
        F old = {};
        memcpy(&old, to + p * LANES, bytes);
        old += weight[first + m] * sum[p][m];
        memcpy(to + p * LANES, &old, bytes);
      }
    }
  }
};

// Calls body.run<M>(first) over tiles of tokens, as even as can be: 13 are 7 and 6, not 12 and 1.
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

// A run of panels ends, the next one is elsewhere: no hardware guesses where.
static inline void warm(const uint8_t* next) {
  for (int at = 0; at < AHEAD; at += 64) prefetch(next + at);
}

template <class Format>
static void take_tokens(const Call& c, const Desk<Format>& d) {
  Part part(c.tokens);
  float* wide = d.wide;
#ifdef _OPENMP
  wide += size_t(omp_get_thread_num()) * c.hidden;
#endif
  for (int t = part.first; t < part.last; t++) {
    const float* row = static_cast<const float*>(c.x) + size_t(t) * c.hidden;
    if (c.x_is_bf16) {
      const uint16_t* narrow = static_cast<const uint16_t*>(c.x) + size_t(t) * c.hidden;
      int i = 0;
      for (; i + LANES <= c.hidden; i += LANES) store(wide + i, widen(load<Half>(narrow + i)));
      for (; i < c.hidden; i++) wide[i] = widen(narrow[i]);
      row = wide;
    }
    Format::take(row, c.hidden, d.x + t * Format::row_bytes(c.hidden));
  }
}

template <class Format>
static void gate_up(const Call& c, const Desk<Format>& d, int used) {
  Part part(padded(c.width, LANES) / LANES);
  size_t bytes = Format::panel_bytes(c.hidden);
  for (int i = 0; i < used && part.first < part.last; i++) {
    int begin = d.begin[d.slot[i]], count = d.begin[d.slot[i] + 1] - begin;
    const uint8_t* panels = c.panels + size_t(d.slot[i]) * c.stride;
    for (int p = part.first; p < part.last; p++) {
      if (p + 1 == part.last && i + 1 < used)
        warm(c.panels + size_t(d.slot[i + 1]) * c.stride + part.first * bytes);
      float* h = d.h + size_t(begin) * c.width + p * LANES;
      tiles<Format::TILE>(count, GateUp<Format>{panels + p * bytes, d.x, d.token + begin, h, c.hidden, c.width,
                                  smaller(LANES, c.width - p * LANES)});
    }
  }
}

template <class Format>
static void take_pairs(const Call& c, const Desk<Format>& d) {
  Part part(d.begin[c.slots]);
  for (int i = part.first; i < part.last; i++)
    Format::take(d.h + size_t(i) * c.width, c.width, d.taken + i * Format::row_bytes(c.width));
}

template <class Format>
static void down(const Call& c, const Desk<Format>& d, int used) {
  Part part(padded(c.hidden, COUPLE) / COUPLE);
  int left = part.first * COUPLE, right = smaller(part.last * COUPLE, c.hidden);
  if (left >= right) return;
  size_t bytes = Format::panel_bytes(c.width);
  size_t skipped = padded(c.width, LANES) / LANES * Format::panel_bytes(c.hidden);
  for (int t = 0; t < c.tokens; t++)
    memset(c.out + size_t(t) * c.hidden + left, 0, size_t(right - left) * 4);
  for (int i = 0; i < used; i++) {
    int begin = d.begin[d.slot[i]], count = d.begin[d.slot[i] + 1] - begin;
    const uint8_t* panels = c.panels + size_t(d.slot[i]) * c.stride + skipped;
    for (int q = part.first; q < part.last; q++) {
      if (q + 1 == part.last && i + 1 < used)
        warm(c.panels + size_t(d.slot[i + 1]) * c.stride + skipped + part.first * bytes);
      tiles<Format::TILE>(count, Down<Format>{panels + q * bytes, d.taken + begin * Format::row_bytes(c.width),
                                d.token + begin, d.weight + begin, c.out + q * COUPLE, c.width,
                                c.hidden, smaller(COUPLE, c.hidden - q * COUPLE)});
    }
  }
}

template <class Format>
static int32_t run(const Call& c) {
  static thread_local Room room;
  uint8_t* memory = room.of(Desk<Format>(c, 0).bytes);
  if (!memory) return NO_MEMORY;
  Desk<Format> d(c, reinterpret_cast<uintptr_t>(memory));
  int used = sort_by_slot(c, d);
  if (used < 0) return NO_SUCH_EXPERT;
#pragma omp parallel num_threads(c.threads)
  {
    take_tokens(c, d);
#pragma omp barrier
    gate_up(c, d, used);
#pragma omp barrier
    take_pairs(c, d);
#pragma omp barrier
    down(c, d, used);
  }
  return DONE;
}

}  // namespace COTERIE_ISA
