// What is done to every row by itself: norms, gates, and what a row of logits says. Included once per
// instruction set.
#pragma once
#include "linear.hpp"

namespace COTERIE_ISA {

// 1 / the root mean square of a row of bf16.
static inline float inverse_root(const uint16_t* x, int width, float epsilon) {
  F squares = {};
  for (int i = 0; i < width; i += LANES) {
    F wide = widen(some<Half>(x + i, width - i));
    squares += wide * wide;
  }
  float square = 0;
  for (int lane = 0; lane < LANES; lane++) square += squares[lane];
  return 1 / sqrtf(square / width + epsilon);
}

// Sixteen of them, rounded before the weight multiplies.
static inline F normed(const uint16_t* x, const uint16_t* weight, float scale, int there) {
  return widen(narrow(widen(some<Half>(x, there)) * scale)) * widen(some<Half>(weight, there));
}

// This thread's part of the rows.
static void norm(const Norming& n) {
  Part part(n.rows);
  for (int64_t row = part.first; row < part.last; row++) {
    const uint16_t* x = n.x + row * n.width;
    if (n.more) {
      const uint16_t* more = n.more + row * n.width;
      uint16_t* sum = n.sum + row * n.width;
      for (int i = 0; i < n.width; i += LANES) {
        int there = n.width - i;
        F both = widen(some<Half>(x + i, there)) + widen(some<Half>(more + i, there));
        put_some(sum + i, narrow(both), there);
      }
      x = sum;
    }
    float scale = inverse_root(x, n.width, n.epsilon);
    for (int i = 0; i < n.width; i += LANES)
      put_some(n.out + row * n.width + i, narrow(normed(x + i, n.weight + i, scale, n.width - i)),
               n.width - i);
  }
}

// silu of the first half of a row times the second: this thread's part of the rows.
static void gate(const Gating& g) {
  Part part(g.rows);
  for (int64_t row = part.first; row < part.last; row++) {
    const uint16_t *first = g.both + 2 * row * g.width, *second = first + g.width;
    for (int i = 0; i < g.width; i += LANES) {
      int there = g.width - i;
      F y = silu_times(widen(some<Half>(first + i, there)), widen(some<Half>(second + i, there)));
      put_some(g.out + row * g.width + i, narrow(y), there);
    }
  }
}

constexpr float LOWEST = -__builtin_inff();

// The place of the greatest number of a row, the first of equals, without place `but`; -1 where there
// is none that is more than minus infinity.
static int64_t greatest(const float* x, int width, int64_t but) {
  F best = F{} + LOWEST;
  I place = I{} - 1, here;
  for (int lane = 0; lane < LANES; lane++) here[lane] = lane;
  for (int i = 0; i < width; i += LANES, here += LANES) {
    F there = some<F>(x + i, width - i);
    I more = (there > best) & (here < width) & (here != int32_t(but));
    best = more ? there : best;
    place = more ? here : place;
  }
  int found = -1;
  float most = LOWEST;
  for (int lane = 0; lane < LANES; lane++) {
    if (place[lane] < 0) continue;
    if (found < 0 || best[lane] > most || (best[lane] == most && place[lane] < found))
      found = place[lane], most = best[lane];
  }
  return found;
}

// log of the sum of e**x, for numbers none of which is more than `most`.
static float log_sum(const float* x, int width, float most) {
  F sum = {};
  for (int i = 0; i < width; i += LANES) {
    int there = width - i;
    F e = exponential(some<F>(x + i, there) - most);
    if (there < LANES)
      for (int lane = there; lane < LANES; lane++) e[lane] = 0;
    sum += e;
  }
  double total = 0;
  for (int lane = 0; lane < LANES; lane++) total += double(sum[lane]);
  return float(log(total)) + most;
}

static int32_t survey(const Surveying& s) {
#pragma omp parallel for num_threads(s.threads) schedule(static)
  for (int64_t row = 0; row < s.rows; row++) {
    const float* x = s.logits + row * s.width;
    int64_t best = greatest(x, s.width, -1);
    s.best[row] = best;
    s.unmasked[row] = best == s.mask ? greatest(x, s.width, s.mask) : best;
    s.total[row] = log_sum(x, s.width, best < 0 ? LOWEST : x[best]);
  }
  return DONE;
}

}  // namespace COTERIE_ISA
