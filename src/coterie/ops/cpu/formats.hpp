// The weight formats: memory layout, activation encoding and dot product. A panel is sixteen rows.
// Panels come in pairs (gate and up of the same rows, or two adjacent panels of down), interleaved
// so that one contiguous stream feeds both. Included once per instruction set; the layout is the
// same for all of them.
#pragma once
#include "api.hpp"
#include "simd.hpp"

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

// Tokens in a tile such that `vectors` accumulators per token stay in registers. COTERIE_SMALL
// compiles faster.
static constexpr int tile_of(int vectors) {
#if defined(COTERIE_SMALL)
  return 2 + 0 * vectors;
#elif defined(__AVX512F__)
  return 26 / vectors;
#elif defined(__AVX2__)
  return vectors > 2 ? 2 : 3;  // a vector takes two of only sixteen registers
#else
  return 4 + 0 * vectors;
#endif
}

static inline int padded(int n, int to) { return (n + to - 1) / to * to; }

// bf16 weights, two k per step: [K / 2][2 panels][16 rows][2 k].
struct Bf16 {
  static constexpr int GROUP = 2;
  static constexpr int TILE = tile_of(2);
  static constexpr int ROW = LANES;                 // activation rows are padded to a multiple of this
  static constexpr int OF_X = LANES, OF_H = LANES;  // activations per encode call; bf16 has no scales
#ifdef __AVX512BF16__
  using Activation = uint16_t;
#else
  using Activation = float;
#endif
  static int steps(int k) { return padded(k, GROUP) / 2; }
  static size_t panel_bytes(int k) { return size_t(steps(k)) * STEP; }
  template <int>
  static size_t row_bytes(int k) {
    return size_t(padded(k, ROW)) * sizeof(Activation);
  }

  // Encodes sixteen activations from k on.
  template <int>
  static void encode(const F (&x)[1], int k, uint8_t* row) {
#ifdef __AVX512BF16__
    store(row + 2 * k, _mm512_cvtneps_pbh((__m512)x[0]));
#else
    store(row + 4 * k, x[0]);
#endif
  }

  template <int, int M>
  static void dot(const uint8_t* w, const uint8_t* const (&rows)[M], int k, PrefetchCursor cursor,
                  F (&out)[2][M]) {
    F sum[2][M];
    UNROLL
    for (int m = 0; m < M; m++) sum[0][m] = sum[1][m] = F{};
    for (int i = 0; i < steps(k); i++, w += STEP) {
      cursor.advance();
      U first = load<U>(w), second = load<U>(w + 64);
#ifdef __AVX512BF16__
      UNROLL
      for (int m = 0; m < M; m++) {
        auto pair = (__m512bh)_mm512_set1_epi32(load<int32_t>(rows[m] + 4 * i));
        sum[0][m] = (F)_mm512_dpbf16_ps((__m512)sum[0][m], (__m512bh)first, pair);
        sum[1][m] = (F)_mm512_dpbf16_ps((__m512)sum[1][m], (__m512bh)second, pair);
      }
#else
      F low[2] = {bits(first << 16), bits(second << 16)};
      F high[2] = {bits(first & 0xffff0000u), bits(second & 0xffff0000u)};
      UNROLL
      for (int m = 0; m < M; m++) {
        float even = load<float>(rows[m] + 8 * i), odd = load<float>(rows[m] + 8 * i + 4);
        UNROLL
        for (int p = 0; p < 2; p++) sum[p][m] += low[p] * even;
        UNROLL
        for (int p = 0; p < 2; p++) sum[p][m] += high[p] * odd;
      }
#endif
    }
    UNROLL
    for (int i = 0; i < 2 * M; i++) out[i / M][i % M] = sum[i / M][i % M];
  }
};

// acc + the dot product of four bytes in each lane: unsigned w, signed x (the same four bytes in
// every lane).
static inline I dot4(I acc, U w, int32_t x) {
#if defined(__AVX512VNNI__)
  return (I)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
#else
  int32_t x0 = int8_t(x), x1 = int8_t(x >> 8), x2 = int8_t(x >> 16), x3 = int8_t(x >> 24);
  U even = w & 0x00ff00ffu, odd = (w >> 8) & 0x00ff00ffu;
#if defined(__AVX512BW__) || defined(__AVX2__)
  int32_t pair02 = int32_t(uint32_t(x0 & 0xffff) | uint32_t(x2) << 16);
  int32_t pair13 = int32_t(uint32_t(x1 & 0xffff) | uint32_t(x3) << 16);
#endif
#if defined(__AVX512BW__)
  __m512i a = _mm512_madd_epi16((__m512i)even, _mm512_set1_epi32(pair02));
  __m512i b = _mm512_madd_epi16((__m512i)odd, _mm512_set1_epi32(pair13));
  return acc + (I)_mm512_add_epi32(a, b);
#elif defined(__AVX2__)
  for (int half = 0; half < 2; half++) {
    auto part = [half](void* v) { return static_cast<char*>(v) + 32 * half; };
    __m256i c = load<__m256i>(part(&acc));
    __m256i e = _mm256_madd_epi16(load<__m256i>(part(&even)), _mm256_set1_epi32(pair02));
    __m256i o = _mm256_madd_epi16(load<__m256i>(part(&odd)), _mm256_set1_epi32(pair13));
    store(part(&acc), _mm256_add_epi32(c, _mm256_add_epi32(e, o)));
  }
  return acc;
#else
  I e0 = (I)(even & 0xffffu), e1 = (I)(even >> 16), o0 = (I)(odd & 0xffffu), o1 = (I)(odd >> 16);
  return acc + e0 * x0 + o0 * x1 + e1 * x2 + o1 * x3;
#endif
#endif
}

// Integer weights with one scale per G k of a row; integer activations with one scale per X
// elements of a token and per sixteen elements of h. Weights are stored unsigned, with a zero point
// of ZERO. The zero point is subtracted through the sum of the activations.
// Layout of a weight group: scales [2 panels][16 rows] in bf16, then [G /
// PER_STEP][2][16][PER_STEP].
// Layout of an activation group of A: A bytes, the fp32 scale, and -ZERO times the int32 sum.
template <int BITS, int G, int X>
struct IntFormat {
  static constexpr int GROUP = G;
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
    return padded(k, ROW) / A * size_t(A + 8);
  }

  // Encodes the A activations from k on, which share a scale.
  template <int A>
  static void encode(const F (&x)[A / LANES], int k, uint8_t* row) {
    row += k / A * (A + 8);
    U max_bits = {};
    for (F part : x) {
      U magnitude = bits(part) & 0x7fffffffu;
      max_bits = magnitude > max_bits ? magnitude : max_bits;
    }
    float scale = max_of_bits(max_bits) / 127, inverse = scale > 1e-30f ? 1 / scale : 0;
    I sums = {};
    for (int i = 0; i < A / LANES; i++) {
      I q = __builtin_convertvector(nearest(x[i] * inverse), I);
      sums += q;
      using Bytes = int8_t __attribute__((vector_size(16), may_alias));
      store(row + i * LANES, __builtin_convertvector(q, Bytes));
    }
    int32_t sum = 0;
    for (int i = 0; i < LANES; i++) sum += sums[i];
    store(row + A, scale);
    store(row + A + 4, -ZERO * sum);
  }

  template <int A, int M>
  static void dot(const uint8_t* w, const uint8_t* const (&rows)[M], int k, PrefetchCursor cursor,
                  F (&out)[2][M]) {
    F sum[2][M];
    UNROLL
    for (int i = 0; i < 2 * M; i++) sum[i / M][i % M] = F{};
    size_t at = 0;
    for (int g = 0; g < padded(k, G) / G; g++) {
      F scale[2] = {widen(load<HalfVector>(w)), widen(load<HalfVector>(w + 2 * LANES))}, group_sum[2][M];
      w += SCALES;
      UNROLL
      for (int i = 0; i < 2 * M; i++) group_sum[i / M][i % M] = F{};
      for (int a = 0; a < G / A; a++, at += A + 8) {
        I acc[2][M];
        UNROLL
        for (int m = 0; m < M; m++) acc[0][m] = acc[1][m] = I{} + load<int32_t>(rows[m] + at + A + 4);
        UNROLL
        for (int s = 0; s < A / PER_STEP; s++, w += STEP) {
          cursor.advance();
          step<M>(w, rows, at + PER_STEP * s, acc);
        }
        UNROLL
        for (int m = 0; m < M; m++) {
          float activation_scale = load<float>(rows[m] + at + A);
          UNROLL
          for (int p = 0; p < 2; p++) group_sum[p][m] += to_float(acc[p][m]) * activation_scale;
        }
      }
      UNROLL
      for (int i = 0; i < 2 * M; i++) sum[i / M][i % M] += group_sum[i / M][i % M] * scale[i / M];
    }
    UNROLL
    for (int i = 0; i < 2 * M; i++) out[i / M][i % M] = sum[i / M][i % M];
  }

  template <int M>
  static inline void step(const uint8_t* w, const uint8_t* const (&rows)[M], size_t at, I (&acc)[2][M]) {
    U panel[2] = {load<U>(w), load<U>(w + 64)};
    UNROLL
    for (int part = 0; part < 8 / BITS; part++) {
      U four[2] = {panel[0], panel[1]};
      if (BITS == 4) {
        UNROLL
        for (int p = 0; p < 2; p++) four[p] = (panel[p] >> (4 * part)) & 0x0f0f0f0fu;
      }
      UNROLL
      for (int m = 0; m < M; m++) {
        int32_t x = load<int32_t>(rows[m] + at + 4 * part);
        UNROLL
        for (int p = 0; p < 2; p++) acc[p][m] = dot4(acc[p][m], four[p], x);
      }
    }
  }
};

using Int8 = IntFormat<8, 64, 32>;
using Int4 = IntFormat<4, 32, 32>;

}  // namespace COTERIE_ISA
