// Loads, stores and elementwise functions of vectors. Included once per instruction set. Templates
// of the standard library are not used: the linker would keep one copy for all instruction sets.
#pragma once
#include "vector.hpp"

namespace COTERIE_ISA {

static inline int min_int(int a, int b) { return a < b ? a : b; }

static INLINE F bits(U v) { return reinterpret<F>(v); }
static INLINE U bits(F v) { return reinterpret<U>(v); }
static INLINE F widen(HalfVector v) { return bits(convert<U>(v) << 16); }

// One of each pair of bf16 numbers.
static INLINE F half_of(U pairs, int odd) {
  if (odd) return bits(pairs & 0xffff0000u);
  return bits(pairs << 16);
}

// Loads `count` elements, at most a vector, and reads nothing past them.
template <class V, class T>
static inline V load_some(const T* from, int count) {
  V v = {};
  if (count >= LANES) return load<V>(from);
  memcpy(static_cast<void*>(&v), from, size_t(count) * sizeof(T));
  return v;
}

template <class V, class T>
static inline void store_some(T* to, V v, int count) {
  memcpy(to, &v, count >= LANES ? sizeof v : size_t(count) * sizeof(T));
}

static inline float widen(uint16_t x) {
  uint32_t wide = uint32_t(x) << 16;
  return load<float>(&wide);
}

// fp32 to bf16: rounds to nearest, ties to even; NaN stays NaN.
static inline uint16_t narrow(float x) {
  uint32_t wide = load<uint32_t>(&x);
  if ((wide & 0x7fffffff) > 0x7f800000) return uint16_t((wide >> 16) | 64);
  return uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

static INLINE HalfVector narrow(F x) {
  U wide = bits(x), rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
  U nan = (wide >> 16) | 64u;
  return convert<HalfVector>(select((wide & 0x7fffffffu) > 0x7f800000u, nan, rounded));
}

// Rounds to the nearest integer, for |x| < 2**22: floats of the size of NEAREST are integers.
constexpr float NEAREST = 12582912.0f;  // 1.5 * 2**23
static inline F nearest(F x) { return (x + NEAREST) - NEAREST; }

// e**x to two units in the last place, clamped to e**88; NaN stays NaN.
static INLINE F exponential(F x) {
  F low = F{} - 87.0f, high = F{} + 88.0f;
  x = select(x < low, low, x);
  x = select(x > high, high, x);
  F n = nearest(x * 1.44269504f);
  F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts (Cody and Waite)
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;      // Cephes, expf
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  U power = (bits(n + NEAREST) - (0x4b400000u - 127u)) << 23;
  return p * bits(power);
}

static inline F silu_times(F gate, F up) { return gate * up / (exponential(-gate) + 1.0f); }

// gelu(gate) * up in the tanh form: 0.5 (1 + tanh z) is the sigmoid of 2 z.
static inline F gelu_times(F gate, F up) {
  F twice = 1.5957691216f * (gate + 0.044715f * gate * gate * gate);  // 2 sqrt(2 / pi)
  return gate * up / (exponential(-twice) + 1.0f);
}

// The largest of sixteen magnitudes, compared as bits: NaN is greater than infinity, so it is not
// lost.
static inline float max_of_bits(U v) {
  using U8 = uint32_t __attribute__((vector_size(32), may_alias));
  using U4 = uint32_t __attribute__((vector_size(16), may_alias));
  U8 halves[2] = {load<U8>(&v), load<U8>(reinterpret_cast<char*>(&v) + 32)};
  U8 max8 = halves[0] > halves[1] ? halves[0] : halves[1];
  U4 quarters[2] = {load<U4>(&max8), load<U4>(reinterpret_cast<char*>(&max8) + 16)};
  U4 max4 = quarters[0] > quarters[1] ? quarters[0] : quarters[1];
  uint32_t max_bits = 0;
  for (int i = 0; i < 4; i++) max_bits = max4[i] > max_bits ? max4[i] : max_bits;
  return load<float>(&max_bits);
}

static inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

static inline void pause() {
#ifdef __x86_64__
  __builtin_ia32_pause();
#endif
}

}  // namespace COTERIE_ISA
