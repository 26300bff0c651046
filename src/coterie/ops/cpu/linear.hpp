// Matrix product: out = x times the transpose of the weight. Included once per instruction set.
#pragma once
#include "experts.hpp"

namespace COTERIE_ISA {

// A step is 128 bytes of weights: 2 x 16 rows times two k in bf16, or one k in fp32. The
// activations of a step are contiguous for all tokens of a tile: `WORDS` times four bytes per
// token.
struct Bf16Matrix {
  static constexpr int PER_STEP = 2;
#ifdef __AVX512BF16__
  static constexpr int WORDS = 1;  // two bf16

  static void encode(float even, float odd, uint8_t* to, size_t) {
    store(to, uint32_t(narrow(even)) | uint32_t(narrow(odd)) << 16);
  }
#else
  static constexpr int WORDS = 2;  // two floats, `stride` bytes apart

  static void encode(float even, float odd, uint8_t* to, size_t stride) {
    store(to, even);
    store(to + stride, odd);
  }
#endif

  template <int N, int M>
  static INLINE void step(const uint8_t* w, const uint8_t* x, F (&sum)[N][M]) {
#ifdef __AVX512BF16__
    add_bf16_products(w, [=](int m) { return load<int32_t>(x + 4 * m); }, sum);
#else
    add_bf16_products(w, [=](int m, int odd) { return load<float>(x + 4 * M * odd + 4 * m); }, sum);
#endif
  }
};

struct Fp32Matrix {
  static constexpr int PER_STEP = 1, WORDS = 1;

  static void encode(float one, float, uint8_t* to, size_t) { store(to, one); }

  template <int N, int M>
  static INLINE void step(const uint8_t* w, const uint8_t* x, F (&sum)[N][M]) {
    add_fp32_products(w, [=](int m) { return load<float>(x + 4 * m); }, sum);
  }
};

#ifdef __AVX512F__
// Transposes a 16 x 16 matrix of 32-bit words.
static inline void transpose16(__m512i (&row)[LANES]) {
  __m512i two[LANES];
  UNROLL
  for (int i = 0; i < LANES; i += 2) {
    two[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    two[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
  UNROLL
  for (int i = 0; i < LANES; i += 4) {
    row[i] = _mm512_unpacklo_epi64(two[i], two[i + 2]);
    row[i + 1] = _mm512_unpackhi_epi64(two[i], two[i + 2]);
    row[i + 2] = _mm512_unpacklo_epi64(two[i + 1], two[i + 3]);
    row[i + 3] = _mm512_unpackhi_epi64(two[i + 1], two[i + 3]);
  }
  UNROLL
  for (int i = 0; i < 4; i++) {  // even quarters of four rows, then odd quarters
    two[i] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0x88);
    two[i + 4] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0xdd);
    two[i + 8] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0x88);
    two[i + 12] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0xdd);
  }
  UNROLL
  for (int i = 0; i < 8; i++) {
    row[i] = _mm512_shuffle_i32x4(two[i], two[i + 8], 0x88);
    row[i + 8] = _mm512_shuffle_i32x4(two[i], two[i + 8], 0xdd);
  }
}
#endif

template <class MatrixFormat>
static inline size_t tile_offset(int first, int steps) {
  return size_t(first) * steps * 4 * MatrixFormat::WORDS;
}

// Reorders a tile of tokens into the order in which the steps read it.
template <class MatrixFormat>
struct RowTile {
  const MatmulArgs& p;
  uint8_t* x;  // output: all tiles
  int steps;
  const uint8_t* first_pair;  // prefetched to L2 meanwhile

  float element(int token, int i) const {
    if (i >= p.k) return 0;
    size_t at = size_t(token) * p.k + i;
    return p.x_is_bf16 ? widen(static_cast<const uint16_t*>(p.x)[at]) : static_cast<const float*>(p.x)[at];
  }

  template <int M>
  void run(int first) const {
    constexpr size_t STEP_BYTES = 4 * M * MatrixFormat::WORDS;
    uint8_t* to = x + tile_offset<MatrixFormat>(first, steps);
    int s = 0;
#ifdef __AVX512F__
    if (MatrixFormat::WORDS == 1 && (MatrixFormat::PER_STEP == 1 || p.x_is_bf16))
      for (; s + LANES <= p.k / MatrixFormat::PER_STEP; s += LANES, to += LANES * STEP_BYTES) {
        size_t share = size_t(LANES) * STEP * M / p.tokens;
        const uint8_t* prefetch_at = first_pair + size_t(steps) * STEP * first / p.tokens;
        prefetch_at += share * (s / LANES);
        for (size_t at = 0; at < share; at += 64) __builtin_prefetch(prefetch_at + at, 0, 2);
        transpose_steps<M>(first, s, to);
      }
#endif
    for (; s < steps; s++, to += STEP_BYTES) {
      int i = s * MatrixFormat::PER_STEP;
      for (int m = 0; m < M; m++)
        MatrixFormat::encode(element(first + m, i), element(first + m, i + 1), to + 4 * m, 4 * M);
    }
  }

#ifdef __AVX512F__
  // Reorders sixteen steps of a tile. Each step writes sixteen words; the next step or tile
  // overwrites those past the M tokens.
  template <int M>
  void transpose_steps(int first, int s, uint8_t* to) const {
    static_assert(M <= LANES, "a tile is no wider than a register");
    __m512i row[LANES] = {};
    size_t at = size_t(first) * p.k + size_t(s) * MatrixFormat::PER_STEP;
    UNROLL
    for (int m = 0; m < M; m++, at += size_t(p.k)) {
      if (!p.x_is_bf16 || MatrixFormat::PER_STEP == 2)
        row[m] = load<__m512i>(static_cast<const uint8_t*>(p.x) + at * (p.x_is_bf16 ? 2 : 4));
      else
        row[m] = (__m512i)widen(load<HalfVector>(static_cast<const uint16_t*>(p.x) + at));
    }
    transpose16(row);
    UNROLL
    for (int i = 0; i < LANES; i++) store(to + 4 * M * i, row[i]);
  }
#endif
};

// Rounds and stores sixteen columns of a token.
static inline void write(const MatmulArgs& p, F sum, int token, int at) {
  int columns = min_int(LANES, p.rows - at);
  if (columns <= 0) return;
  size_t offset = size_t(token) * p.rows + at;
  if (p.residual) sum += load_some<F>(p.residual + offset, columns);
  if (p.out_is_bf16) {
    HalfVector half = narrow(sum);
    memcpy(static_cast<uint16_t*>(p.out) + offset, &half, size_t(columns) * 2);
  } else {
    memcpy(static_cast<float*>(p.out) + offset, &sum, size_t(columns) * 4);
  }
}

// Multiplies a tile of tokens with a panel pair. With many tokens arithmetic takes longer than
// reading, so each tile prefetches its share of the next panel pair to L2, and the weights needed
// soon from L2 to L1.
template <class MatrixFormat>
struct MatmulTile {
  static constexpr size_t PREFETCH_BYTES = 16 << 10;  // distance to the weights in use
  const MatmulArgs& p;
  const uint8_t *w, *x, *next;
  int steps, column;

  template <int M>
  void run(int first) const {
    constexpr int N = panels_of(M);
    const uint8_t* prefetch_at = next + size_t(steps) * STEP * size_t(first) / size_t(p.tokens);
    size_t prefetch_step = size_t(M) * STEP * 128 * N / size_t(p.tokens),
           prefetch_offset = 0;  // in 256ths of a byte
    for (int first_panel = 0; first_panel < 2; first_panel += N) {
      F sum[N][M];
      UNROLL
      for (int i = 0; i < N * M; i++) sum[i / M][i % M] = F{};
      const uint8_t *panel = w + 64 * first_panel, *words = x + tile_offset<MatrixFormat>(first, steps);
      for (int s = 0; s < steps;
           s++, panel += STEP, words += 4 * M * MatrixFormat::WORDS, prefetch_offset += prefetch_step) {
        __builtin_prefetch(prefetch_at + (prefetch_offset >> 8), 0, 2);
        if (N * M > p.tokens) __builtin_prefetch(prefetch_at + (prefetch_offset >> 8) + 64, 0, 2);
        UNROLL
        for (int i = 0; i < N; i++) prefetch(panel + PREFETCH_BYTES + 64 * i);
        MatrixFormat::step(panel, words, sum);
      }
      UNROLL
      for (int i = 0; i < N * M; i++)
        write(p, sum[i / M][i % M], first + i % M, column + (first_panel + i / M) * LANES);
    }
  }

};

// Multiplies a tile of encoded tokens with a panel pair of integers, and prefetches its share of the
// next pair.
struct IntMatmulTile {
  const MatmulArgs& p;
  const uint8_t *w, *x, *next;
  int column;

  template <int M>
  void run(int first) const {
    size_t row_bytes = Int8::row_bytes<Int8::OF_X>(p.k), pair_bytes = Int8::panel_bytes(p.k);
    const uint8_t* rows[M];
    for (int m = 0; m < M; m++) rows[m] = x + size_t(first + m) * row_bytes;
    size_t steps = size_t(Int8::steps(p.k)) * (2 / panels_of(M, Int8::WEIGHTS));
    size_t share = pair_bytes * M / size_t(p.tokens);
    const uint8_t *from = next + pair_bytes * size_t(first) / size_t(p.tokens), *end = from + share;
    F sum[2][M];
    Int8::dot<Int8::OF_X>(w, rows, p.k, {from, end, end, (share + steps - 1) / steps}, sum);
    for (int i = 0; i < 2 * M; i++) write(p, sum[i / M][i % M], first + i % M, column + i / M * LANES);
  }
};

// Scratch bytes of one thread. Each thread reorders the tokens itself: that is faster than reading
// cache lines that another thread wrote.
static size_t scratch_bytes(const MatmulArgs& p) {
  if (p.format == INT8) return size_t(p.tokens) * Int8::row_bytes<Int8::OF_X>(p.k);
  bool is_fp32 = p.format == FP32;
  int steps = is_fp32 ? p.k : padded(p.k, Bf16Matrix::PER_STEP) / Bf16Matrix::PER_STEP;
  return (is_fp32 ? tile_offset<Fp32Matrix>(p.tokens, steps) : tile_offset<Bf16Matrix>(p.tokens, steps)) + 64;
}

template <class MatrixFormat>
static void multiply(const MatmulArgs& p, uint8_t* x) {
  constexpr int TILE = tile_of(2);
  int steps = padded(p.k, MatrixFormat::PER_STEP) / MatrixFormat::PER_STEP;
  size_t pair_bytes = size_t(steps) * STEP;
  ThreadRange part(padded(p.rows, PAIR_COLUMNS) / PAIR_COLUMNS);
  const uint8_t* first = p.panels + part.first * pair_bytes;
  if (part.first < part.last) tiles<TILE>(p.tokens, RowTile<MatrixFormat>{p, x, steps, first});
  for (int c = part.first; c < part.last; c++) {
    const uint8_t* w = p.panels + c * pair_bytes;
    const uint8_t* next = c + 1 < part.last ? w + pair_bytes : w;
    tiles<TILE>(p.tokens, MatmulTile<MatrixFormat>{p, w, x, next, steps, c * PAIR_COLUMNS});
  }
}

// The same for integers, whose activations are integers too.
static void multiply_integers(const MatmulArgs& p, uint8_t* x) {
  size_t pair_bytes = Int8::panel_bytes(p.k);
  ThreadRange part(padded(p.rows, PAIR_COLUMNS) / PAIR_COLUMNS);
  if (part.first == part.last) return;
  ActivationRows source{p.x, p.k, p.x_is_bf16};
  for (int t = 0; t < p.tokens; t++)
    source.encode<Int8, Int8::OF_X>(t, x + size_t(t) * Int8::row_bytes<Int8::OF_X>(p.k));
  for (int c = part.first; c < part.last; c++) {
    const uint8_t* w = p.panels + c * pair_bytes;
    const uint8_t* next = c + 1 < part.last ? w + pair_bytes : w;
    tiles<Int8::TILE>(p.tokens, IntMatmulTile{p, w, x, next, c * PAIR_COLUMNS});
  }
}

// Computes this thread's share of the output columns.
static void multiply(const MatmulArgs& p, uint8_t* scratch) {
  if (p.format == INT8) return multiply_integers(p, scratch);
  p.format == FP32 ? multiply<Fp32Matrix>(p, scratch) : multiply<Bf16Matrix>(p, scratch);
}

}  // namespace COTERIE_ISA
