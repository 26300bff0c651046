// One matrix for all tokens: out = x times the weight's transpose. Included once per instruction set.
#pragma once
#include "experts.hpp"

namespace COTERIE_ISA {

static inline Half narrow(F x) {
  U wide = bits(x), rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
  U nan = (wide >> 16) | 64u;
  return __builtin_convertvector((wide & 0x7fffffffu) > 0x7f800000u ? nan : rounded, Half);
}

// A step is 128 bytes of weight: of 2 x 16 rows two k's in bf16, or one in fp32. The activations that
// it meets lie together, those of all tokens of a tile: `WORDS` times four bytes for each.
struct Narrow {
  static constexpr int PER_STEP = 2;
#ifdef __AVX512BF16__
  static constexpr int WORDS = 1;  // two bf16

  static void take(float even, float odd, uint8_t* to, size_t) {
    store(to, uint32_t(narrow(even)) | uint32_t(narrow(odd)) << 16);
  }
#else
  static constexpr int WORDS = 2;  // two floats, `apart` bytes from each other

  static void take(float even, float odd, uint8_t* to, size_t apart) {
    store(to, even);
    store(to + apart, odd);
  }
#endif

  template <int M>
  static inline void step(const uint8_t* w, const uint8_t* x, F (&sum)[2][M]) {
    U first = load<U>(w), second = load<U>(w + 64);
#ifdef __AVX512BF16__
    WRITTEN_OUT
    for (int m = 0; m < M; m++) {
      auto pair = (__m512bh)_mm512_set1_epi32(load<int32_t>(x + 4 * m));
      sum[0][m] = (F)_mm512_dpbf16_ps((__m512)sum[0][m], (__m512bh)first, pair);
      sum[1][m] = (F)_mm512_dpbf16_ps((__m512)sum[1][m], (__m512bh)second, pair);
    }
#else
    F low[2] = {bits(first << 16), bits(second << 16)};
    F high[2] = {bits(first & 0xffff0000u), bits(second & 0xffff0000u)};
    WRITTEN_OUT
    for (int m = 0; m < M; m++) {
      float even = load<float>(x + 4 * m), odd = load<float>(x + 4 * M + 4 * m);
      WRITTEN_OUT
      for (int p = 0; p < 2; p++) sum[p][m] += low[p] * even;
      WRITTEN_OUT
      for (int p = 0; p < 2; p++) sum[p][m] += high[p] * odd;
    }
#endif
  }
};

struct Wide {
  static constexpr int PER_STEP = 1, WORDS = 1;

  static void take(float one, float, uint8_t* to, size_t) { store(to, one); }

  template <int M>
  static inline void step(const uint8_t* w, const uint8_t* x, F (&sum)[2][M]) {
    F first = load<F>(w), second = load<F>(w + 64);
    WRITTEN_OUT
    for (int m = 0; m < M; m++) {
      float one = load<float>(x + 4 * m);
      sum[0][m] += first * one;
      sum[1][m] += second * one;
    }
  }
};

template <class Kind>
static inline size_t tile_at(int first, int steps) {
  return size_t(first) * steps * 4 * Kind::WORDS;
}

// Lays a tile of tokens out as its steps will meet it.
template <class Kind>
struct Taken {
  const Product& p;
  uint8_t* x;  // all tiles
  int steps;

  float number(int token, int i) const {
    if (i >= p.k) return 0;
    size_t at = size_t(token) * p.k + i;
    return p.x_is_bf16 ? widen(static_cast<const uint16_t*>(p.x)[at])
                       : static_cast<const float*>(p.x)[at];
  }

  // A word that is in memory as it is needed: four bytes of x.
  bool as_it_is(int s) const {
    bool fits = Kind::WORDS == 1 && bool(p.x_is_bf16) == (Kind::PER_STEP == 2);
    return fits && (s + 1) * Kind::PER_STEP <= p.k;
  }

  template <int M>
  void run(int first) const {
    constexpr size_t EACH = 4 * M * Kind::WORDS;
    uint8_t* to = x + tile_at<Kind>(first, steps);
    for (int s = 0; s < steps; s++, to += EACH) {
      int i = s * Kind::PER_STEP;
      size_t size = p.x_is_bf16 ? 2 : 4, at = (size_t(first) * p.k + i) * size;
      const uint8_t* from = static_cast<const uint8_t*>(p.x) + at;
      bool simple = as_it_is(s), widened = Kind::PER_STEP == 1 && p.x_is_bf16;
      for (int m = 0; m < M; m++, from += size_t(p.k) * size) {
        if (simple)
          store(to + 4 * m, load<uint32_t>(from));
        else if (widened)
          store(to + 4 * m, uint32_t(load<uint16_t>(from)) << 16);
        else
          Kind::take(number(first + m, i), number(first + m, i + 1), to + 4 * m, 4 * M);
      }
    }
  }
};

// A tile of tokens against a couple of panels. Arithmetic takes longer than reading once tokens are
// many: meanwhile the tile's share of the next couple comes nearer.
template <class Kind>
struct Multiplied {
  const Product& p;
  const uint8_t *w, *x, *next;
  int steps, column;

  template <int M>
  void run(int first) const {
    F sum[2][M];
    WRITTEN_OUT
    for (int m = 0; m < M; m++) sum[0][m] = sum[1][m] = F{};
    const uint8_t *panel = w, *words = x + tile_at<Kind>(first, steps);
    const uint8_t* soon = next + size_t(steps) * STEP * size_t(first) / size_t(p.tokens);
    size_t pace = size_t(M) * STEP * 256 / size_t(p.tokens), ahead = 0;  // in 256ths of a byte
    for (int s = 0; s < steps; s++, panel += STEP, words += 4 * M * Kind::WORDS, ahead += pace) {
      __builtin_prefetch(soon + (ahead >> 8), 0, 2);
      if (2 * M > p.tokens) __builtin_prefetch(soon + (ahead >> 8) + 64, 0, 2);
      Kind::template step<M>(panel, words, sum);
    }
    WRITTEN_OUT
    for (int m = 0; m < M; m++) {
      put(sum[0][m], first + m, column);
      put(sum[1][m], first + m, column + LANES);
    }
  }

  void put(F sum, int token, int at) const {
    int columns = smaller(LANES, p.rows - at);
    if (columns <= 0) return;
    size_t place = size_t(token) * p.rows + at;
    if (p.out_is_bf16) {
      Half half = narrow(sum);
      memcpy(static_cast<uint16_t*>(p.out) + place, &half, size_t(columns) * 2);
    } else {
      memcpy(static_cast<float*>(p.out) + place, &sum, size_t(columns) * 4);
    }
  }
};

template <class Kind>
static int32_t multiply(const Product& p) {
  constexpr int TILE = tile_of(2);
  static thread_local Room room;
  int steps = padded(p.k, Kind::PER_STEP) / Kind::PER_STEP;
  // Each thread has a copy of its own: lines that another one wrote come slower than they are made.
  size_t each = (tile_at<Kind>(p.tokens, steps) + 64 + 4095) / 4096 * 4096;
  uint8_t* memory = room.of(each * size_t(p.threads));
  if (!memory) return NO_MEMORY;
  size_t couple = size_t(steps) * STEP;
#pragma omp parallel num_threads(p.threads)
  {
    uint8_t* x = memory;
#ifdef _OPENMP
    x += each * size_t(omp_get_thread_num());
#endif
    Part part(padded(p.rows, COUPLE) / COUPLE);
    if (part.first < part.last) tiles<TILE>(p.tokens, Taken<Kind>{p, x, steps});
    for (int c = part.first; c < part.last; c++) {
      const uint8_t* w = p.panels + c * couple;
      const uint8_t* next = c + 1 < part.last ? w + couple : w;
      tiles<TILE>(p.tokens, Multiplied<Kind>{p, w, x, next, steps, c * COUPLE});
    }
  }
  return DONE;
}

static int32_t multiply(const Product& p) {
  return p.format == FP32 ? multiply<Wide>(p) : multiply<Narrow>(p);
}

}  // namespace COTERIE_ISA
