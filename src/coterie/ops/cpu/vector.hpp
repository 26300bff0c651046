// Vectors of sixteen lanes, in the vector extensions that gcc and clang share. Included once per
// instruction set.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false positive in gcc 12's headers
#endif
#include <immintrin.h>
#endif

// Accumulators stay in registers only if every loop over them is unrolled.
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

// gcc 12 reorders the integer sums of unrolled steps, and then spills them. One instruction a sum
// leaves it nothing to reorder.
#ifdef __AVX512VNNI__
#define UNROLL_STEPS UNROLL
#else
#define UNROLL_STEPS
#endif

#define INLINE_LAMBDA __attribute__((always_inline))
#define INLINE inline INLINE_LAMBDA
#define NOINLINE __attribute__((noinline))  // a loop in a function of its own has more registers

namespace COTERIE_ISA {

constexpr int LANES = 16;

#ifdef __AVX512F__

constexpr int PARTS = 1;  // registers of sixteen lanes
using F = float __attribute__((vector_size(64), may_alias));
using I = int32_t __attribute__((vector_size(64), may_alias));
using U = uint32_t __attribute__((vector_size(64), may_alias));
using HalfVector = uint16_t __attribute__((vector_size(32), may_alias));
using ByteVector = int8_t __attribute__((vector_size(16), may_alias));

template <class Mask, class V>
static INLINE V select(Mask mask, V a, V b) { return mask ? a : b; }

template <class To, class From>
static INLINE To convert(From v) { return __builtin_convertvector(v, To); }

template <class To, class From>
static INLINE To reinterpret(From v) { return reinterpret_cast<To>(v); }

#else

#ifdef __AVX2__
constexpr int PARTS = 2;
#else
constexpr int PARTS = 4;
#endif
#define EACH_PART UNROLL for (int i = 0; i < PARTS; i++)

// An array of registers: gcc keeps a vector that is wider than a register in memory.
template <class T>
struct Vector {
  typedef T Part __attribute__((vector_size(LANES / PARTS * sizeof(T)), may_alias));
  Part part[PARTS];

  Vector() = default;
  INLINE Vector(T x) {
    EACH_PART part[i] = x - Part{};
  }
  // Copies register by register: gcc leaves arrays in memory that are copied as a whole.
  INLINE Vector(const Vector& v) { *this = v; }
  INLINE Vector& operator=(const Vector& v) {
    EACH_PART part[i] = v.part[i];
    return *this;
  }
  INLINE T operator[](int lane) const { return reinterpret_cast<const T*>(part)[lane]; }
  INLINE T& operator[](int lane) { return reinterpret_cast<T*>(part)[lane]; }
  INLINE Vector operator-() const {
    Vector v;
    EACH_PART v.part[i] = -part[i];
    return v;
  }

#define OPERATOR(op)                                            \
  INLINE friend Vector operator op(Vector a, const Vector& b) { \
    EACH_PART a.part[i] = a.part[i] op b.part[i];               \
    return a;                                                   \
  }                                                             \
  INLINE Vector& operator op##=(const Vector& b) {              \
    EACH_PART part[i] = part[i] op b.part[i];                   \
    return *this;                                               \
  }
#define COMPARISON(op)                                                          \
  INLINE friend Vector<int32_t> operator op(const Vector& a, const Vector& b) { \
    Vector<int32_t> mask;                                                       \
    EACH_PART mask.part[i] = a.part[i] op b.part[i];                            \
    return mask;                                                                \
  }
  OPERATOR(+)
  OPERATOR(-)
  OPERATOR(*)
  OPERATOR(/)
  OPERATOR(&)
  OPERATOR(|)
  OPERATOR(^)
  OPERATOR(<<)
  OPERATOR(>>)
  COMPARISON(<)
  COMPARISON(>)
  COMPARISON(==)
  COMPARISON(!=)
#undef OPERATOR
#undef COMPARISON
};

using F = Vector<float>;
using I = Vector<int32_t>;
using U = Vector<uint32_t>;
using HalfVector = Vector<uint16_t>;
using ByteVector = Vector<int8_t>;

template <class V>
static INLINE V select(I mask, V a, V b) {
  EACH_PART a.part[i] = mask.part[i] ? a.part[i] : b.part[i];
  return a;
}

template <class To, class From>
static INLINE To convert(From v) {
  To to;
  EACH_PART to.part[i] = __builtin_convertvector(v.part[i], typename To::Part);
  return to;
}

template <class To, class From>
static INLINE To reinterpret(From v) {
  To to;
  EACH_PART to.part[i] = reinterpret_cast<typename To::Part>(v.part[i]);
  return to;
}

template <class T>
static INLINE void read(const void* p, Vector<T>& v) {
  EACH_PART memcpy(&v.part[i], static_cast<const char*>(p) + i * sizeof v.part[i], sizeof v.part[i]);
}

template <class T>
static INLINE void write(void* p, const Vector<T>& v) {
  EACH_PART memcpy(static_cast<char*>(p) + i * sizeof v.part[i], &v.part[i], sizeof v.part[i]);
}

#endif

template <class V>
static INLINE void read(const void* p, V& v) {
  memcpy(&v, p, sizeof v);
}

template <class V>
static INLINE void write(void* p, const V& v) {
  memcpy(p, &v, sizeof v);
}

template <class V>
static INLINE V load(const void* p) {
  V v;
  read(p, v);
  return v;
}

template <class V>
static INLINE void store(void* p, V v) {
  write(p, v);
}

}  // namespace COTERIE_ISA
