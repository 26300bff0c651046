// Products of panels with a tile of tokens, added to sums in registers. Included once per
// instruction set.
#pragma once
#include "simd.hpp"

namespace COTERIE_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif

// Tokens in a tile such that `vectors` accumulators per token stay in registers. COTERIE_SMALL
// compiles faster.
static constexpr int tile_of(int vectors) {
#if defined(COTERIE_SMALL)
  return 2 + 0 * vectors;
#elif defined(__AVX512F__)
  return 26 / vectors;
#elif defined(__AVX2__)
  return vectors > 2 ? 4 : 6;
#else
  return REGISTERS / 8 + 0 * vectors;
#endif
}

// Panels of a pair that one pass over k multiplies with a tile of tokens: both, or one if the sums
// and `weights` vectors of both need too many registers.
static constexpr int panels_of(int tokens, int weights = 1) {
  return 2 * PARTS * (tokens + weights) < REGISTERS ? 2 : 1;
}

// Adds two k of `N` panels of bf16 weights. x(m) is a pair of bf16 where instructions for them
// exist; else x(m, odd) is one number in fp32.
template <int N, int M, class Activations>
static INLINE void add_bf16_products(const uint8_t* w, const Activations& x, F (&sum)[N][M]) {
  U words[N];
  UNROLL
  for (int p = 0; p < N; p++) words[p] = load<U>(w + 64 * p);
#ifdef __AVX512BF16__
  UNROLL
  for (int m = 0; m < M; m++) {
    auto pair = (__m512bh)_mm512_set1_epi32(x(m));
    UNROLL
    for (int p = 0; p < N; p++)
      sum[p][m] = (F)_mm512_dpbf16_ps((__m512)sum[p][m], (__m512bh)words[p], pair);
  }
#else
  // Half of the weights at a time where registers are few; else all, so that each token's address
  // is needed once.
  constexpr int HALVES = REGISTERS == 16 ? 1 : 2;
  UNROLL
  for (int begin = 0; begin < 2; begin += HALVES) {
    F weights[HALVES][N];
    UNROLL
    for (int i = 0; i < HALVES * N; i++) weights[i / N][i % N] = half_of(words[i % N], begin + i / N);
    UNROLL
    for (int i = 0; i < HALVES * M; i++) {
      int m = i / HALVES, half = i % HALVES;
      auto one = x(m, begin + half);
      UNROLL
      for (int p = 0; p < N; p++) sum[p][m] += weights[half][p] * one;
    }
  }
#endif
}

// Adds one k of `N` panels of fp32 weights; x(m) is one number.
template <int N, int M, class Activations>
static INLINE void add_fp32_products(const uint8_t* w, const Activations& x, F (&sum)[N][M]) {
  F weights[N];
  UNROLL
  for (int p = 0; p < N; p++) weights[p] = load<F>(w + 64 * p);
  UNROLL
  for (int m = 0; m < M; m++) {
    float one = x(m);
    UNROLL
    for (int p = 0; p < N; p++) sum[p][m] += weights[p] * one;
  }
}

// Dot products of four bytes in each lane: unsigned weights and signed activations, of which all
// lanes have the same four. A sum goes from `start` over `add` to `total`, which includes `offset`.
#if defined(__AVX512VNNI__)
template <int BITS>
struct ByteProducts {
  static constexpr int X_BYTES = 4;  // of four activations
  using Weights = U;

  static void encode(I q, uint8_t* to) { store(to, convert<ByteVector>(q)); }
  static INLINE Weights split(U w) { return w; }
  static INLINE I start(int32_t offset) { return I{} + offset; }
  static INLINE void add(I& sum, Weights w, const uint8_t* x) {
    sum = (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(load<int32_t>(x)));
  }
  static INLINE I total(I sum, int32_t) { return sum; }
};
#else
// Sums of the products of two adjacent signed 16-bit numbers.
static INLINE I multiply_words(I a, I b) {
#if defined(__AVX512BW__)
  return (I)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  EACH_PART a.part[i] = (I::Part)_mm256_madd_epi16((__m256i)a.part[i], (__m256i)b.part[i]);
  return a;
#elif defined(__SSE2__)
  EACH_PART a.part[i] = (I::Part)_mm_madd_epi16((__m128i)a.part[i], (__m128i)b.part[i]);
  return a;
#else
  return (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

template <int BITS>
struct ByteProducts {
  static constexpr int X_BYTES = 8;  // of four activations: the even two as words, then the odd two
  struct Weights {
    I even, odd;
  };

  static void encode(I q, uint8_t* to) {
    for (int i = 0; i < LANES; i++) store(to + i / 4 * 8 + i % 2 * 4 + i / 2 % 2 * 2, int16_t(q[i]));
  }
  static INLINE Weights split(U w) {
    return {reinterpret<I>(w & 0x00ff00ffu), reinterpret<I>((w >> 8) & 0x00ff00ffu)};
  }
  static INLINE I start(int32_t offset) { return I{} + offset; }
  static INLINE void add(I& sum, const Weights& w, const uint8_t* x) {
    I even = I{} + load<int32_t>(x), odd = I{} + load<int32_t>(x + 4);
    sum += multiply_words(w.even, even) + multiply_words(w.odd, odd);
  }
  static INLINE I total(I sum, int32_t) { return sum; }
};
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
// Two products of a number below 16 and one in [-127, 127] are at most 3810. The eight that each
// lane adds of 32 activations fit 16 bits.
template <>
struct ByteProducts<4> {
  static constexpr int X_BYTES = 4;
  using Weights = U;

  static void encode(I q, uint8_t* to) { store(to, convert<ByteVector>(q)); }
  static INLINE Weights split(U w) { return w; }
  static INLINE I start(int32_t) { return I{}; }
  static INLINE void add(I& sum, const Weights& w, const uint8_t* x) {
    auto four = _mm256_set1_epi32(load<int32_t>(x));
    EACH_PART {
      auto pairs = _mm256_maddubs_epi16((__m256i)w.part[i], four);
      sum.part[i] = (I::Part)_mm256_add_epi16((__m256i)sum.part[i], pairs);
      asm("" : "+x"(sum.part[i]));  // else gcc adds all products of a step first, and spills them
    }
  }
  static INLINE I total(I sum, int32_t offset) { return multiply_words(sum, I{} + 0x00010001) + offset; }
};
#endif

}  // namespace COTERIE_ISA
