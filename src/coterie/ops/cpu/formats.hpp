// The weight formats: memory layout, activation encoding and dot product. A panel is sixteen rows.
// Panels come in pairs (gate and up of the same rows, or two adjacent panels of down), interleaved
// so that one contiguous stream feeds both. Included once per instruction set; the layout is the
// same for all of them.
#pragma once
#include "api.hpp"
#include "products.hpp"

namespace COTERIE_ISA {

constexpr int STEP = 128;                // bytes of a panel pair in one step: four of each row
constexpr int PAIR_COLUMNS = 2 * LANES;  // output columns of one panel pair of down

// Prefetches `pace` bytes per step from a stream of weights that is read later.
struct PrefetchCursor {
  static constexpr int MAX_BYTES = 192;  // bytes per step
  const uint8_t *at, *end, *next;        // at `end` it continues at `next`
  size_t pace;
  inline void advance() {
    prefetch(at);
    prefetch(at + 64);
    if (pace > 128) prefetch(at + 128);
    at += pace;
    if (at < end) return;
    at = next;
    end = reinterpret_cast<const uint8_t*>(UINTPTR_MAX);
  }
};

static inline int padded(int n, int to) { return (n + to - 1) / to * to; }

// Weights without scales, GROUP k of each row in a step: [K / GROUP][2 panels][16 rows][GROUP].
// `Step` adds the products of a step.
template <class Step>
struct FloatFormat {
  static constexpr int GROUP = Step::PER_STEP;
  static constexpr int WEIGHTS = 1;  // vectors of each panel in a step
  static constexpr int TILE = tile_of(2);
  static constexpr int ROW = LANES;                 // activation rows are padded to a multiple of this
  static constexpr int OF_X = LANES, OF_H = LANES;  // activations per encode call
  static int steps(int k) { return padded(k, GROUP) / GROUP; }
  static size_t panel_bytes(int k) { return size_t(steps(k)) * STEP; }
  template <int>
  static size_t row_bytes(int k) {
    return size_t(padded(k, ROW)) * Step::X_BYTES;
  }

  // Encodes sixteen activations from k on.
  template <int>
  static void encode(const F (&x)[1], int k, uint8_t* row) {
    Step::encode(x[0], row + Step::X_BYTES * k);
  }

  template <int, int M>
  NOINLINE static void dot(const uint8_t* w, const uint8_t* const (&rows)[M], int k, PrefetchCursor cursor,
                           F (&out)[2][M]) {
    constexpr int N = panels_of(M, WEIGHTS);
    for (int first = 0; first < 2; first += N) {
      F sum[N][M];
      UNROLL
      for (int i = 0; i < N * M; i++) sum[i / M][i % M] = F{};
      const uint8_t* at = w + 64 * first;
      for (int i = 0; i < steps(k); i++, at += STEP) {
        cursor.advance();
        Step::add(at, rows, i, sum);
      }
      UNROLL
      for (int i = 0; i < N * M; i++) out[first + i / M][i % M] = sum[i / M][i % M];
    }
  }
};

struct Bf16Step {
  static constexpr int PER_STEP = 2;
#ifdef __AVX512BF16__
  static constexpr int X_BYTES = 2;  // of an activation
  static void encode(F x, uint8_t* to) { store(to, _mm512_cvtneps_pbh((__m512)x)); }
#else
  static constexpr int X_BYTES = 4;
  static void encode(F x, uint8_t* to) { store(to, x); }
#endif

  template <int N, int M>
  static INLINE void add(const uint8_t* w, const uint8_t* const (&rows)[M], int i, F (&sum)[N][M]) {
#ifdef __AVX512BF16__
    add_bf16_products(w, [=](int m) { return load<int32_t>(rows[m] + 4 * i); }, sum);
#else
    add_bf16_products(w, [=](int m, int odd) { return load<float>(rows[m] + 8 * i + 4 * odd); }, sum);
#endif
  }
};

struct Fp32Step {
  static constexpr int PER_STEP = 1, X_BYTES = 4;
  static void encode(F x, uint8_t* to) { store(to, x); }

  template <int N, int M>
  static INLINE void add(const uint8_t* w, const uint8_t* const (&rows)[M], int i, F (&sum)[N][M]) {
    add_fp32_products(w, [=](int m) { return load<float>(rows[m] + 4 * i); }, sum);
  }
};

using Bf16 = FloatFormat<Bf16Step>;
using Fp32 = FloatFormat<Fp32Step>;

// Integer weights with one scale per G k of a row; integer activations with one scale per X
// elements of a token and per sixteen elements of h. Weights are stored unsigned, with a zero point
// of ZERO. The zero point is subtracted through the sum of the activations.
// Layout of a weight group: scales [2 panels][16 rows] in bf16, then [G /
// PER_STEP][2][16][PER_STEP].
// Layout of an activation group of A: A numbers, the fp32 scale, and -ZERO times the int32 sum.
template <int BITS, int G, int X>
struct IntFormat {
  using Products = ByteProducts<BITS>;
  static constexpr int GROUP = G;
  static constexpr int WEIGHTS = 2;
  static constexpr int ROW = G;
  static constexpr int OF_X = X, OF_H = LANES;
  static constexpr int PER_STEP = 32 / BITS;  // k of one row in a step
  static constexpr int STEPS = G / PER_STEP;
  static constexpr int ZERO = 1 << (BITS - 1);
  static constexpr int TILE = tile_of(4);  // accumulators per activation group and per weight group
  static constexpr size_t SCALES = 64, PANEL_GROUP = SCALES + STEPS * STEP;
  static int steps(int k) { return padded(k, G) / PER_STEP; }
  static size_t panel_bytes(int k) { return padded(k, G) / G * PANEL_GROUP; }
  template <int A>
  static size_t row_bytes(int k) {
    return padded(k, ROW) / A * (x_bytes(A) + 8);
  }
  static constexpr size_t x_bytes(int activations) { return activations / 4 * Products::X_BYTES; }

  // Encodes the A activations from k on, which share a scale.
  template <int A>
  static void encode(const F (&x)[A / LANES], int k, uint8_t* row) {
    row += k / A * (x_bytes(A) + 8);
    U max_bits = {};
    for (F part : x) {
      U magnitude = bits(part) & 0x7fffffffu;
      max_bits = select(magnitude > max_bits, magnitude, max_bits);
    }
    float scale = max_of_bits(max_bits) / 127, inverse = scale > 1e-30f ? 1 / scale : 0;
    I sums = {};
    for (int i = 0; i < A / LANES; i++) {
      I q = convert<I>(nearest(x[i] * inverse));
      sums += q;
      Products::encode(q, row + x_bytes(i * LANES));
    }
    int32_t sum = 0;
    for (int i = 0; i < LANES; i++) sum += sums[i];
    store(row + x_bytes(A), scale);
    store(row + x_bytes(A) + 4, -ZERO * sum);
  }

  template <int A, int M>
  NOINLINE static void dot(const uint8_t* w, const uint8_t* const (&rows)[M], int k, PrefetchCursor cursor,
                           F (&out)[2][M]) {
    constexpr int N = panels_of(M, WEIGHTS);
    for (int first = 0; first < 2; first += N) {
      F sum[N][M];
      UNROLL
      for (int i = 0; i < N * M; i++) sum[i / M][i % M] = F{};
      const uint8_t* group = w;
      size_t at = 0;
      for (int g = 0; g < padded(k, G) / G; g++, group += PANEL_GROUP)
        add_group<A>(group, first, rows, at, cursor, sum);
      UNROLL
      for (int i = 0; i < N * M; i++) out[first + i / M][i % M] = sum[i / M][i % M];
    }
  }

 private:
  // Adds one weight group of N panels.
  template <int A, int N, int M>
  static INLINE void add_group(const uint8_t* group, int first, const uint8_t* const (&rows)[M], size_t& at,
                               PrefetchCursor& cursor, F (&sum)[N][M]) {
    F group_sum[N][M];
    UNROLL
    for (int i = 0; i < N * M; i++) group_sum[i / M][i % M] = F{};
    const uint8_t* w = group + SCALES + 64 * first;
    for (int a = 0; a < G / A; a++, at += x_bytes(A) + 8) {
      I acc[N][M];
      UNROLL
      for (int i = 0; i < N * M; i++)
        acc[i / M][i % M] = Products::start(load<int32_t>(rows[i % M] + at + x_bytes(A) + 4));
      UNROLL_STEPS
      for (int s = 0; s < A / PER_STEP; s++, w += STEP) {
        cursor.advance();
        step(w, rows, at + x_bytes(PER_STEP) * s, acc);
      }
      UNROLL
      for (int m = 0; m < M; m++) {
        float scale = load<float>(rows[m] + at + x_bytes(A));
        int32_t offset = load<int32_t>(rows[m] + at + x_bytes(A) + 4);
        UNROLL
        for (int p = 0; p < N; p++) group_sum[p][m] += convert<F>(Products::total(acc[p][m], offset)) * scale;
      }
    }
    UNROLL
    for (int p = 0; p < N; p++) {
      F scale = widen(load<HalfVector>(group + 2 * LANES * (first + p)));
      UNROLL
      for (int m = 0; m < M; m++) sum[p][m] += group_sum[p][m] * scale;
    }
  }

  template <int N, int M>
  static INLINE void step(const uint8_t* w, const uint8_t* const (&rows)[M], size_t at, I (&acc)[N][M]) {
    UNROLL
    for (int part = 0; part < 8 / BITS; part++) {
      typename Products::Weights four[N];
      UNROLL
      for (int p = 0; p < N; p++) {
        U packed = load<U>(w + 64 * p);
        four[p] = Products::split(BITS == 4 ? (packed >> (4 * part)) & 0x0f0f0f0fu : packed);
      }
      UNROLL
      for (int m = 0; m < M; m++) {
        UNROLL
        for (int p = 0; p < N; p++)
          Products::add(acc[p][m], four[p], rows[m] + at + Products::X_BYTES * part);
      }
    }
  }
};

using Int8 = IntFormat<8, 64, 32>;
using Int4 = IntFormat<4, 32, 32>;

}  // namespace COTERIE_ISA
