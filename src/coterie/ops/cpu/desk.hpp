// What threads share while they compute one layer's experts: who has which tokens, and working memory.
#pragma once
#include <math.h>
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#include <sched.h>
#endif
#include "api.hpp"
#include "formats.hpp"

namespace COTERIE_ISA {

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

// Working memory that a thread keeps from call to call; what a long prompt took, a short call gives
// back.
struct Room {
  static constexpr size_t KEPT = 64 << 20;  // bytes, whatever was needed once
  uint8_t* begin = nullptr;
  size_t size = 0;
  Room() = default;
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;
  ~Room() { free(begin); }
  uint8_t* of(size_t wanted) {
    if (wanted > size || (size > KEPT && wanted <= KEPT)) {
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
  int *begin, *token, *order;  // token-expert pairs by slot; the slots that have any, twice as long
  float* weight;               // of each pair
  uint8_t *x, *h;              // activations as the weights' format meets them
  size_t x_row, h_row, bytes = 0;
  int used = 0;

  Desk(const Call& c, uintptr_t room)
      : x_row(Format::template row_bytes<Format::OF_X>(c.hidden)),
        h_row(Format::template row_bytes<Format::OF_H>(c.width)) {
    size_t pairs = size_t(c.tokens) * c.k;
    begin = place<int>(room, size_t(c.slots) + 1);
    order = place<int>(room, 2 * (size_t(c.slots) + 1));
    token = place<int>(room, pairs);
    weight = place<float>(room, pairs);
    x = place<uint8_t>(room, c.tokens * x_row);
    h = place<uint8_t>(room, pairs * h_row);
  }

  int count(int i) const { return begin[order[i] + 1] - begin[order[i]]; }

 private:
  template <class T>
  T* place(uintptr_t room, size_t count) {
    T* here = reinterpret_cast<T*>(room + bytes);
    bytes += (count * sizeof(T) + 63) / 64 * 64;
    return here;
  }
};

// Pairs of each slot one after the other, lower tokens first. False where a slot or an expert is told
// that is not there.
template <class Format>
static bool sort_by_slot(const Call& c, Desk<Format>& d) {
  int all = c.tokens * c.k;
  auto slot_at = [&c](int i) -> int64_t {
    if (c.ids[i] >= c.experts) return c.slots;
    return c.ids[i] < 0 ? -1 : c.slot_of[c.ids[i]];
  };
  for (int s = 0; s <= c.slots; s++) d.begin[s] = 0;
  for (int i = 0; i < all; i++) {
    int64_t slot = slot_at(i);
    if (slot >= c.slots) return false;
    if (slot >= 0) d.begin[slot + 1]++;
  }
  for (int s = 0; s < c.slots; s++) {
    if (d.begin[s + 1]) d.order[d.used++] = s;
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
  return true;
}

// Experts of many tokens among those of few: memory brings the ones while others are computed. `sorted`
// is room for them.
template <class Format>
static void weave(const Desk<Format>& d, int* sorted) {
  auto count = [&d](int slot) { return d.begin[slot + 1] - d.begin[slot]; };
  int64_t all = 0, seen = 0;
  for (int i = 0; i < d.used; i++) {
    int at = i, slot = d.order[i];
    for (; at > 0 && count(sorted[at - 1]) < count(slot); at--) sorted[at] = sorted[at - 1];
    sorted[at] = slot;
    all += count(slot);
  }
  for (int i = 0, many = 0, few = d.used; i < d.used; i++) {
    d.order[i] = seen * d.used <= all * i ? sorted[many++] : sorted[--few];
    seen += d.count(i);
  }
}

// Threads meet: they look around for a moment before they let others run.
static inline void meet(int* arrived) {
#ifdef _OPENMP
  constexpr int MOMENT = 4000;
  __atomic_fetch_add(arrived, 1, __ATOMIC_ACQ_REL);
  for (int i = 0; __atomic_load_n(arrived, __ATOMIC_ACQUIRE) < omp_get_num_threads(); i++)
    i < MOMENT ? pause() : void(sched_yield());
#else
  (void)arrived;
#endif
}

}  // namespace COTERIE_ISA
