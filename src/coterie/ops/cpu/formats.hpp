// How a weight lies in memory and meets an activation. Rows are read sixteen at a time, two such panels
// (gate and up of the same rows, or two neighbours of down) side by side, so that one contiguous run
// of bytes feeds both. Included once per instruction set; the layout is the same for all of them.
#pragma once
#include "api.hpp"
#include "simd.hpp"

namespace COTERIE_ISA {

#ifndef COTERIE_AHEAD
#define COTERIE_AHEAD 2048
#endif
constexpr int AHEAD = COTERIE_AHEAD;  // bytes that memory is asked for before they are needed
constexpr int STEP = 128;             // bytes of both panels in one step: four of each row

// Tokens in a tile, each with so many vectors of sums that stay in registers.
static constexpr int tile_of(int vectors) {
#if defined(__AVX512F__)
  return 26 / vectors;
#elif defined(__AVX2__)
  return vectors > 2 ? 2 : 3;  // two registers to a vector, and only sixteen of them
#else
  return 4 + 0 * vectors;
#endif
}

static inline int padded(int n, int to) { return (n + to - 1) / to * to; }

// bf16 weights, two k's a step: [K / 2][2 panels][16 rows][2 k's].
struct Bf16 {
  static constexpr int GROUP = 2;
  static constexpr int TILE = tile_of(2);
#ifdef __AVX512BF16__
  using Activation = uint16_t;
#else
  using Activation = float;
#endif
  static size_t row_bytes(int k) { return size_t(padded(k, GROUP)) * sizeof(Activation); }
  static size_t panel_bytes(int k) { return size_t(padded(k, GROUP)) / 2 * STEP; }

  static void take(const float* x, int k, uint8_t* row) {
#ifdef __AVX512BF16__
    int i = 0;
    for (; i + LANES <= k; i += LANES)
      store(row + 2 * i, _mm512_cvtneps_pbh(load<__m512>(x + i)));
    for (; i < padded(k, GROUP); i++) store(row + 2 * i, i < k ? narrow(x[i]) : uint16_t(0));
#else
    memcpy(row, x, size_t(k) * 4);
    if (k % GROUP) store(row + size_t(k) * 4, 0.0f);
#endif
  }

  template <int M>
  static void dot(const uint8_t* w, const uint8_t* const* rows, int k, F (&sum)[2][M]) {
    WRITTEN_OUT
    for (int m = 0; m < M; m++) sum[0][m] = sum[1][m] = F{};
    for (int i = 0; i < padded(k, GROUP) / 2; i++, w += STEP) {
      prefetch(w + AHEAD);
      prefetch(w + AHEAD + 64);
      U first = load<U>(w), second = load<U>(w + 64);
#ifdef __AVX512BF16__
      WRITTEN_OUT
      for (int m = 0; m < M; m++) {
        auto pair = (__m512bh)_mm512_set1_epi32(load<int32_t>(rows[m] + 4 * i));
        sum[0][m] = (F)_mm512_dpbf16_ps((__m512)sum[0][m], (__m512bh)first, pair);
        sum[1][m] = (F)_mm512_dpbf16_ps((__m512)sum[1][m], (__m512bh)second, pair);
      }
#else
      F low[2] = {bits(first << 16), bits(second << 16)};
      F high[2] = {bits(first & 0xffff0000u), bits(second & 0xffff0000u)};
      WRITTEN_OUT
      for (int m = 0; m < M; m++) {
        float even = load<float>(rows[m] + 8 * i), odd = load<float>(rows[m] + 8 * i + 4);
        WRITTEN_OUT
        for (int p = 0; p < 2; p++) sum[p][m] += low[p] * even;
        WRITTEN_OUT
        for (int p = 0; p < 2; p++) sum[p][m] += high[p] * odd;
      }
#endif
    }
  }
};

// acc + the four products of bytes in each lane: unsigned w, signed x (the same four in every lane).
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

// Whole-number weights, G k's of a row to a scale, against whole-number activations, A k's to a scale.
// A group in memory: 2 x 16 scales in bf16, then its steps for both panels. Weights are stored
// unsigned, `ZERO` more than they are.
// An activation's group in memory: A bytes, its scale, and minus the weights' zero times its sum.
template <int BITS, int G, int A>
struct Whole {
  static constexpr int GROUP = G;
  static constexpr int PER_STEP = 32 / BITS;  // k's of one row in a step
  static constexpr int STEPS = G / PER_STEP;
  static constexpr int ZERO = 1 << (BITS - 1);
  static constexpr int TILE = tile_of(4);  // the group's whole sums and the scaled ones
  static constexpr size_t ROW_GROUP = A + 8, SCALES = 64, PANEL_GROUP = SCALES + STEPS * STEP;
  static size_t row_bytes(int k) { return padded(k, G) / A * ROW_GROUP; }
  static size_t panel_bytes(int k) { return padded(k, G) / G * PANEL_GROUP; }

  static void take(const float* x, int k, uint8_t* row) {
    for (int start = 0; start < padded(k, G); start += A, row += ROW_GROUP) {
      int there = k - start;
      if (there >= A) {
        take_group(x + start, row);
        continue;
      }
      float padding[A] = {};
      if (there > 0) memcpy(padding, x + start, there * 4);
      take_group(padding, row);
    }
  }

  static inline void take_group(const float* x, uint8_t* row) {
    U most = {};
    for (int i = 0; i < A; i += LANES) {
      U here = load<U>(x + i) & 0x7fffffffu;
      most = here > most ? here : most;
    }
    float scale = largest(most) / 127, inverse = scale > 1e-30f ? 1 / scale : 0;
    I sum = {};
    for (int i = 0; i < A; i += LANES) {
      I q = __builtin_convertvector(nearest(load<F>(x + i) * inverse), I);
      sum += q;
      using Bytes = int8_t __attribute__((vector_size(16), may_alias));
      store(row + i, __builtin_convertvector(q, Bytes));
    }
    int32_t total = 0;
    for (int i = 0; i < LANES; i++) total += sum[i];
    store(row + A, scale);
    store(row + A + 4, -ZERO * total);
  }

  template <int M>
  static void dot(const uint8_t* w, const uint8_t* const* rows, int k, F (&sum)[2][M]) {
    WRITTEN_OUT
    for (int m = 0; m < M; m++) sum[0][m] = sum[1][m] = F{};
    size_t at = 0;
    for (int g = 0; g < padded(k, G) / G; g++) {
      prefetch(w + AHEAD);
      F scale[2] = {widen(load<Half>(w)), widen(load<Half>(w + 2 * LANES))};
      w += SCALES;
      for (int a = 0; a < G / A; a++, at += ROW_GROUP) {
        I acc[2][M];
        WRITTEN_OUT
        for (int m = 0; m < M; m++)
          acc[0][m] = acc[1][m] = I{} + load<int32_t>(rows[m] + at + A + 4);
        WRITTEN_OUT
        for (int s = 0; s < A / PER_STEP; s++, w += STEP)
          step<M>(w, rows, at + PER_STEP * s, acc);
        WRITTEN_OUT
        for (int m = 0; m < M; m++) {
          float own = load<float>(rows[m] + at + A);
          WRITTEN_OUT
          for (int p = 0; p < 2; p++) sum[p][m] += to_float(acc[p][m]) * (scale[p] * own);
        }
      }
    }
  }

  template <int M>
  static inline void step(const uint8_t* w, const uint8_t* const* rows, size_t at, I (&acc)[2][M]) {
    prefetch(w + AHEAD);
    prefetch(w + AHEAD + 64);
    U panel[2] = {load<U>(w), load<U>(w + 64)};
    WRITTEN_OUT
    for (int part = 0; part < 8 / BITS; part++) {
      U four[2] = {panel[0], panel[1]};
      if (BITS == 4)
        WRITTEN_OUT
        for (int p = 0; p < 2; p++) four[p] = (panel[p] >> (4 * part)) & 0x0f0f0f0fu;
      WRITTEN_OUT
      for (int m = 0; m < M; m++) {
        int32_t x = load<int32_t>(rows[m] + at + 4 * part);
        WRITTEN_OUT
        for (int p = 0; p < 2; p++) acc[p][m] = dot4(acc[p][m], four[p], x);
      }
    }
  }
};

using Int8 = Whole<8, 64, 16>;
using Int4 = Whole<4, 32, 32>;

}  // namespace COTERIE_ISA
