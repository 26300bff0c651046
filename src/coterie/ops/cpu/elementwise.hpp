// Row-wise operations: RMS norm, silu_and_mul, logits summary. Included once per instruction set.
#pragma once
#include "linear.hpp"

namespace COTERIE_ISA {

// 1 / sqrt(mean(x^2) + epsilon) of a bf16 row; NaN, rather than 0, if the mean overflows.
static inline float inverse_rms(const uint16_t* x, int width, float epsilon) {
  F squares = {};
  for (int i = 0; i < width; i += LANES) {
    F wide = widen(load_some<HalfVector>(x + i, width - i));
    squares += wide * wide;
  }
  float square = 0;
  for (int lane = 0; lane < LANES; lane++) square += squares[lane];
  return 1 / sqrtf(square / width + epsilon) + (square - square);
}

// Up to sixteen normalised elements: rounded to bf16, then multiplied by the weight.
static inline F rms_normed(const uint16_t* x, const uint16_t* weight, float scale, int count) {
  return widen(narrow(widen(load_some<HalfVector>(x, count)) * scale)) *
         widen(load_some<HalfVector>(weight, count));
}

// Norms this thread's share of the rows.
static void rms_norm(const RmsNormArgs& n) {
  ThreadRange part(n.rows);
  for (int64_t row = part.first; row < part.last; row++) {
    const uint16_t* x = n.x + row * n.width;
    if (n.residual) {
      const uint16_t* residual = n.residual + row * n.width;
      uint16_t* sum = n.sum + row * n.width;
      for (int i = 0; i < n.width; i += LANES) {
        int count = n.width - i;
        F total =
            widen(load_some<HalfVector>(x + i, count)) + widen(load_some<HalfVector>(residual + i, count));
        store_some(sum + i, narrow(total), count);
      }
      x = sum;
    }
    float scale = inverse_rms(x, n.width, n.epsilon);
    for (int i = 0; i < n.width; i += LANES)
      store_some(n.out + row * n.width + i, narrow(rms_normed(x + i, n.weight + i, scale, n.width - i)),
                 n.width - i);
  }
}

// silu(first half) * second half, for this thread's share of the rows.
static void silu_and_mul(const SiluMulArgs& g) {
  ThreadRange part(g.rows);
  for (int64_t row = part.first; row < part.last; row++) {
    const uint16_t *first = g.gate_up + 2 * row * g.width, *second = first + g.width;
    for (int i = 0; i < g.width; i += LANES) {
      int count = g.width - i;
      F y = silu_times(widen(load_some<HalfVector>(first + i, count)),
                       widen(load_some<HalfVector>(second + i, count)));
      store_some(g.out + row * g.width + i, narrow(y), count);
    }
  }
}

constexpr float NEG_INF = -__builtin_inff();

// Index of the row's largest number, skipping index `excluded`; the lowest index on ties; -1 if no
// number is greater than minus infinity.
static int64_t argmax(const float* x, int width, int64_t excluded) {
  F best = F{} + NEG_INF;
  I best_index = I{} - 1, index;
  for (int lane = 0; lane < LANES; lane++) index[lane] = lane;
  for (int i = 0; i < width; i += LANES, index += LANES) {
    F lanes = load_some<F>(x + i, width - i);
    I greater = (lanes > best) & (index < width) & (index != int32_t(excluded));
    best = select(greater, lanes, best);
    best_index = select(greater, index, best_index);
  }
  int result = -1;
  float peak = NEG_INF;
  for (int lane = 0; lane < LANES; lane++) {
    if (best_index[lane] < 0) continue;
    if (result < 0 || best[lane] > peak || (best[lane] == peak && best_index[lane] < result))
      result = best_index[lane], peak = best[lane];
  }
  return result;
}

// log(sum(e**x)), given the maximum `peak` of x.
static float log_sum_exp(const float* x, int width, float peak) {
  F sum = {};
  for (int i = 0; i < width; i += LANES) {
    int count = width - i;
    F e = exponential(load_some<F>(x + i, count) - peak);
    if (count < LANES)
      for (int lane = count; lane < LANES; lane++) e[lane] = 0;
    sum += e;
  }
  double total = 0;
  for (int lane = 0; lane < LANES; lane++) total += double(sum[lane]);
  return float(log(total)) + peak;
}

static int32_t summarize_logits(const LogitsSummaryArgs& s) {
#pragma omp parallel for num_threads(s.threads) schedule(static)
  for (int64_t row = 0; row < s.rows; row++) {
    const float* x = s.logits + row * s.width;
    int64_t best = argmax(x, s.width, -1);
    s.best[row] = best;
    s.unmasked[row] = best == s.mask_id ? argmax(x, s.width, s.mask_id) : best;
    s.logsumexp[row] = log_sum_exp(x, s.width, best < 0 ? NEG_INF : x[best]);
  }
  return STATUS_OK;
}

}  // namespace COTERIE_ISA
