// What threads share while they compute one layer's experts: sorted token-expert pairs and working
// memory.
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

// This thread's share of n items. Work is split by columns, never by experts, so that shares are
// equal.
struct ThreadRange {
  int first, last;
  explicit ThreadRange(int n) : first(0), last(n) {
#ifdef _OPENMP
    int64_t thread = omp_get_thread_num(), total = omp_get_num_threads();
    first = int(n * thread / total);
    last = int(n * (thread + 1) / total);
#endif
  }
};

// Working memory that a thread reuses from call to call. After a long prompt a short call releases
// the excess.
struct ScratchBuffer {
  static constexpr size_t MAX_RETAINED = 64 << 20;  // bytes; larger buffers are released
  uint8_t* begin = nullptr;
  size_t size = 0;
  ScratchBuffer() = default;
  ScratchBuffer(const ScratchBuffer&) = delete;
  ScratchBuffer& operator=(const ScratchBuffer&) = delete;
  ~ScratchBuffer() { free(begin); }
  uint8_t* get(size_t needed) {
    if (needed > size || (size > MAX_RETAINED && needed <= MAX_RETAINED)) {
      free(begin);
      begin = static_cast<uint8_t*>(aligned_alloc(64, (needed + 63) / 64 * 64));
      size = begin ? needed : 0;
    }
    return begin;
  }
};

// Arrays carved from one buffer. Constructed with memory 0 it only computes `bytes`.
template <class Format>
struct Workspace {
  int *begin, *token, *order;  // first pair of each slot; token of each pair; slots with pairs
  float* weight;               // of each pair
  uint8_t *x, *h;              // activations in the encoding of the weight format
  size_t x_row, h_row, bytes = 0;
  int used = 0;

  Workspace(const ExpertsArgs& c, uintptr_t memory)
      : x_row(Format::template row_bytes<Format::OF_X>(c.hidden)),
        h_row(Format::template row_bytes<Format::OF_H>(c.width)) {
    size_t pairs = size_t(c.tokens) * c.k;
    begin = carve<int>(memory, size_t(c.slots) + 1);
    order = carve<int>(memory, 2 * (size_t(c.slots) + 1));
    token = carve<int>(memory, pairs);
    weight = carve<float>(memory, pairs);
    x = carve<uint8_t>(memory, c.tokens * x_row);
    h = carve<uint8_t>(memory, pairs * h_row);
  }

  int count(int i) const { return begin[order[i] + 1] - begin[order[i]]; }

 private:
  template <class T>
  T* carve(uintptr_t memory, size_t count) {
    T* array = reinterpret_cast<T*>(memory + bytes);
    bytes += (count * sizeof(T) + 63) / 64 * 64;
    return array;
  }
};

// Sorts token-expert pairs by slot, then token. Returns false if an expert or a slot is out of
// range.
template <class Format>
static bool sort_by_slot(const ExpertsArgs& c, Workspace<Format>& d) {
  int total = c.tokens * c.k;
  auto slot_at = [&c](int i) -> int64_t {
    if (c.ids[i] >= c.experts) return c.slots;
    return c.ids[i] < 0 ? -1 : c.slot_of[c.ids[i]];
  };
  for (int s = 0; s <= c.slots; s++) d.begin[s] = 0;
  for (int i = 0; i < total; i++) {
    int64_t slot = slot_at(i);
    if (slot >= c.slots) return false;
    if (slot >= 0) d.begin[slot + 1]++;
  }
  for (int s = 0; s < c.slots; s++) {
    if (d.begin[s + 1]) d.order[d.used++] = s;
    d.begin[s + 1] += d.begin[s];
  }
  for (int i = 0; i < total; i++) {
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

// Interleaves experts of many tokens with experts of few, so that weights of the latter load while
// the former are computed. `sorted` is scratch memory for the slots.
template <class Format>
static void interleave_by_load(const Workspace<Format>& d, int* sorted) {
  auto count = [&d](int slot) { return d.begin[slot + 1] - d.begin[slot]; };
  int64_t total = 0, done_pairs = 0;
  for (int i = 0; i < d.used; i++) {
    int at = i, slot = d.order[i];
    for (; at > 0 && count(sorted[at - 1]) < count(slot); at--) sorted[at] = sorted[at - 1];
    sorted[at] = slot;
    total += count(slot);
  }
  for (int i = 0, heaviest = 0, lightest = d.used; i < d.used; i++) {
    d.order[i] = done_pairs * d.used <= total * i ? sorted[heaviest++] : sorted[--lightest];
    done_pairs += d.count(i);
  }
}

// Waits until all threads arrive: spins briefly, then yields.
static inline void barrier(int* arrivals) {
#ifdef _OPENMP
  constexpr int MAX_SPINS = 4000;
  __atomic_fetch_add(arrivals, 1, __ATOMIC_ACQ_REL);
  for (int i = 0; __atomic_load_n(arrivals, __ATOMIC_ACQUIRE) < omp_get_num_threads(); i++)
    i < MAX_SPINS ? pause() : void(sched_yield());
#else
  (void)arrivals;
#endif
}

}  // namespace COTERIE_ISA
