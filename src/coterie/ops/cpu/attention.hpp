// Attention of a window over cached keys. Included once per instruction set.
//
// Queries take the part of weights in a matrix product: 2 x 16 of them are packed into a pair of
// panels, and each cached key takes the part of a token. Neither scores nor softmax weights are
// ever summed across lanes.
#pragma once
#include "elementwise.hpp"

namespace COTERIE_ISA {

constexpr int QUERY_LANES = 2 * LANES;  // queries in a pair of panels
constexpr int KEYS_PER_PASS = 1024;     // keys per softmax pass
constexpr float MASKED_SCORE = -3e38f;  // score of a key past the query's limit

static inline int ceil_div(int n, int size) { return (n + size - 1) / size; }

// Multiplies two adjacent k of N panels in w with those of M tokens, `stride` bytes apart, and adds
// to sum.
template <int N, int M>
static INLINE void multiply_step(const uint8_t* w, const uint8_t* x, size_t stride, F (&sum)[N][M]) {
#ifdef __AVX512BF16__
  add_bf16_products(w, [=](int m) { return load<int32_t>(x + m * stride); }, sum);
#else
  auto number = [=](int m, int odd) INLINE_LAMBDA {
    return half_of(U{} + load<uint32_t>(x + m * stride), odd);
  };
  add_bf16_products(w, number, sum);
#endif
}

// Scores of a tile of keys against a pair of query panels. DIM is the head size if known at compile
// time (then one register addresses all keys of a tile), else 0.
template <int DIM>
struct ScoreTile {
  const uint8_t *queries, *keys;
  F* scores;  // [keys][2]
  int dim;

  template <int M>
  void run(int first) const {
    constexpr int N = panels_of(M);
    size_t stride = size_t(DIM ? DIM : dim) * 2;
    for (int panel = 0; panel < 2; panel += N) {
      F sum[N][M];
      UNROLL
      for (int i = 0; i < N * M; i++) sum[i / M][i % M] = F{};
      const uint8_t *w = queries + 64 * panel, *x = keys + size_t(first) * dim * 2;
      const uint8_t* prefetch_at = x + M * stride;  // the next tile's keys
      for (int s = 0; s < dim / 2; s++, w += STEP, x += 4, prefetch_at += 64) {
        prefetch(prefetch_at);
        multiply_step(w, x, stride, sum);
      }
      UNROLL
      for (int i = 0; i < N * M; i++) scores[2 * (first + i % M) + panel + i / M] = sum[i / M][i % M];
    }
  }
};

// Adds, for a tile of the values' features, each key's softmax weight times its value.
struct ValueTile {
  const uint8_t *shares, *values;  // both hold two keys per step
  F* out;                          // [dim][2], accumulated into
  int steps, dim;

  template <int M>
  void run(int first) const {
    constexpr int N = panels_of(M);
    for (int panel = 0; panel < 2; panel += N) {
      F sum[N][M];
      UNROLL
      for (int i = 0; i < N * M; i++) sum[i / M][i % M] = out[2 * (first + i % M) + panel + i / M];
      const uint8_t *w = shares + 64 * panel, *x = values + size_t(first) * 4;
      for (int s = 0; s < steps; s++, w += STEP, x += size_t(dim) * 4) multiply_step(w, x, 4, sum);
      UNROLL
      for (int i = 0; i < N * M; i++) out[2 * (first + i % M) + panel + i / M] = sum[i / M][i % M];
    }
  }
};

// One thread's scratch memory. Nothing is shared: sharing written cache lines costs more than
// repeating work.
struct SoftmaxState {
  F *scores, *out;                     // [keys][2], [dim][2]
  uint8_t *queries, *shares, *values;  // a panel pair; a panel pair; all values of a head, interleaved
  float* head;                         // one head of one token in fp32
  uint16_t* rotated;
  size_t bytes = 0;

  SoftmaxState(const AttentionArgs& a, uint8_t* scratch) {
    size_t dim = size_t(padded(a.dim, LANES));
    scores = carve<F>(scratch, 2 * KEYS_PER_PASS);
    out = carve<F>(scratch, 2 * dim);
    queries = carve<uint8_t>(scratch, dim / 2 * STEP);
    shares = carve<uint8_t>(scratch, KEYS_PER_PASS / 2 * STEP);
    values = carve<uint8_t>(scratch, size_t(ceil_div(a.kv_length, 2)) * a.dim * 4);
    head = carve<float>(scratch, dim);
    rotated = carve<uint16_t>(scratch, dim);
  }

 private:
  template <class T>
  T* carve(uint8_t* scratch, size_t count) {
    T* array = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(scratch) + bytes);
    bytes += (count * sizeof(T) + 63) / 64 * 64;
    return array;
  }
};

// RMS norm and RoPE of one head of one token; `scratch` holds `dim` floats.
static void norm_and_rope(const AttentionArgs& a, int64_t token, const uint16_t* x, const uint16_t* weight,
                          float* scratch, uint16_t* to) {
  float scale = inverse_rms(x, a.dim, a.epsilon);
  for (int i = 0; i < a.dim; i += LANES)
    store_some(scratch + i, rms_normed(x + i, weight + i, scale, a.dim - i), a.dim - i);
  const float *cos = a.cos + token * a.rotary_half, *sin = a.sin + token * a.rotary_half;
  for (int i = 0; i < a.rotary_half; i += LANES) {
    int valid = a.rotary_half - i;
    F first = load_some<F>(scratch + i, valid), second = load_some<F>(scratch + a.rotary_half + i, valid);
    F cosine = load_some<F>(cos + i, valid), sine = load_some<F>(sin + i, valid);
    store_some(scratch + i, first * cosine - second * sine, valid);
    store_some(scratch + a.rotary_half + i, second * cosine + first * sine, valid);
  }
  for (int i = 0; i < a.dim; i += LANES)
    store_some(to + i, narrow(load_some<F>(scratch + i, a.dim - i)), a.dim - i);
}

static const uint16_t* head_of(const AttentionArgs& a, int64_t token, int head) {
  return a.qkv + (token * (a.heads + 2 * a.kv_heads) + head) * a.dim;
}

// Writes a token's keys and values into the cache.
static void store_kv(const AttentionArgs& a, const SoftmaxState& state, int64_t token) {
  size_t offset = size_t(a.cache_rows[token / a.width]) * a.row_stride + size_t(a.positions[token]) * a.dim;
  for (int h = 0; h < a.kv_heads; h++, offset += a.head_stride) {
    const uint16_t *key = head_of(a, token, a.heads + h), *value = key + a.kv_heads * a.dim;
    norm_and_rope(a, token, key, a.key_norm, state.head, a.keys + offset);
    memcpy(a.values + offset, value, size_t(a.dim) * 2);
  }
}

// Interleaves the values of two keys, element by element. The last key of an odd count has no
// partner.
static void interleave_values(const AttentionArgs& a, const uint16_t* even, bool last_key, uint8_t* to) {
  const uint16_t* odd = even + a.dim;
  int i = 0;
  for (; i + LANES <= a.dim; i += LANES) {
    U low = convert<U>(load<HalfVector>(even + i)), high = {};
    if (!last_key) high = convert<U>(load<HalfVector>(odd + i));
    store(to + 4 * i, low | high << 16);
  }
  for (; i < a.dim; i++) store(to + 4 * i, uint32_t(even[i]) | (last_key ? 0 : uint32_t(odd[i]) << 16));
}

// e**((score - peak) * scale) as bf16 bits, and adds it to total.
static INLINE U softmax_share(F score, F peak, float scale, F& total) {
  F power = (score - peak) * scale, e = exponential(power);
  e = select(power < F{} - 87.0f, F{}, e);
  total += e;
#ifdef __AVX512BF16__
  return (U)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)e));
#else
  return convert<U>(narrow(e));
#endif
}

// The queries of one batch row that share a KV head, processed in pairs of panels.
struct QueryGroup {
  const AttentionArgs& a;
  const SoftmaxState& state;
  int64_t group;  // row * kv_heads + kv_head
  int pair = 0;
  I limit[2];
  int min_limit = 0, max_limit = 0;  // keys seen by all queries of the pair; keys seen by any

  QueryGroup(const AttentionArgs& a, const SoftmaxState& state, int64_t group)
      : a(a), state(state), group(group) {
    const uint16_t* values = a.values + head_offset();
    for (int key = 0; key < a.kv_length; key += 2)
      interleave_values(a, values + size_t(key) * a.dim, key + 1 == a.kv_length,
                        state.values + size_t(key / 2) * a.dim * 4);
  }
  size_t head_offset() const {
    return size_t(a.cache_rows[group / a.kv_heads]) * a.row_stride +
           size_t(group % a.kv_heads) * a.head_stride;
  }
  int query(int lane) const { return pair * QUERY_LANES + lane; }
  bool valid(int lane) const { return query(lane) < a.heads / a.kv_heads * a.width; }
  int64_t token(int lane) const { return group / a.kv_heads * a.width + query(lane) % a.width; }
  int query_head(int lane) const {
    return int(group % a.kv_heads) * (a.heads / a.kv_heads) + query(lane) / a.width;
  }

  // Packs the pair's queries into panels and reads their limits.
  void load_queries() {
    min_limit = a.kv_length, max_limit = 1;
    for (int lane = 0; lane < QUERY_LANES; lane++) {
      bool in_range = valid(lane);
      if (in_range)
        norm_and_rope(a, token(lane), head_of(a, token(lane), query_head(lane)), a.query_norm, state.head,
                      state.rotated);
      for (int s = 0; s < a.dim / 2; s++)
        store(state.queries + s * STEP + lane * 4, in_range ? load<uint32_t>(state.rotated + 2 * s) : 0u);
      int lane_limit = in_range ? min_int(a.limits[token(lane)], a.kv_length) : 1;
      limit[lane / LANES][lane % LANES] = lane_limit;
      if (in_range)
        min_limit = min_int(min_limit, lane_limit),
        max_limit = lane_limit > max_limit ? lane_limit : max_limit;
    }
  }

  void run(int index) {
    pair = index;
    load_queries();
    const uint16_t* keys = a.keys + head_offset();
    F peak[2] = {F{} + MASKED_SCORE, F{} + MASKED_SCORE}, total[2] = {};
    memset(static_cast<void*>(state.out), 0, size_t(a.dim) * 2 * sizeof(F));
    for (int start = 0; start < max_limit; start += KEYS_PER_PASS) {
      int count = min_int(KEYS_PER_PASS, max_limit - start);
      score(reinterpret_cast<const uint8_t*>(keys + size_t(start) * a.dim), count);
      softmax(start, count, peak, total);
      const uint8_t* values = state.values + size_t(start / 2) * a.dim * 4;
      tiles<tile_of(2)>(a.dim, ValueTile{state.shares, values, state.out, ceil_div(count, 2), a.dim});
    }
    write_output(total);
  }

  void score(const uint8_t* keys, int count) {
    if (a.dim == 128)
      tiles<tile_of(2)>(count, ScoreTile<128>{state.queries, keys, state.scores, a.dim});
    else
      tiles<tile_of(2)>(count, ScoreTile<0>{state.queries, keys, state.scores, a.dim});
  }

  // Turns scores into softmax weights (online softmax): earlier sums are rescaled if the maximum
  // grows.
  void softmax(int start, int count, F (&peak)[2], F (&total)[2]) {
    F *scores = state.scores, *out = state.out;
    for (int p = 0; p < 2; p++) {
      F new_peak = peak[p];
      for (int j = 0; j < count; j++) {
        F score = scores[2 * j + p];
        if (start + j >= min_limit) score = select(limit[p] > start + j, score, F{} + MASKED_SCORE);
        scores[2 * j + p] = score;
        new_peak = select(score > new_peak, score, new_peak);
      }
      if (start) {
        F rescale = exponential((peak[p] - new_peak) * a.scale);
        total[p] *= rescale;
        for (int i = 0; i < a.dim; i++) out[2 * i + p] *= rescale;
      }
      peak[p] = new_peak;
      for (int j = 0; j < count; j += 2) {
        U word = softmax_share(scores[2 * j + p], new_peak, a.scale, total[p]);
        if (j + 1 < count) word |= softmax_share(scores[2 * j + 2 + p], new_peak, a.scale, total[p]) << 16;
        store(state.shares + j / 2 * STEP + p * 64, word);
      }
    }
  }

  void write_output(const F (&total)[2]) const {
    F* out = state.out;
    F inverse[2] = {1.0f / total[0], 1.0f / total[1]};
    uint16_t* output = reinterpret_cast<uint16_t*>(out);  // in place: half the size of its fp32 source
    for (int i = 0; i < 2 * a.dim; i++) store(output + i * LANES, narrow(out[i] * inverse[i % 2]));
    for (int lane = 0; lane < QUERY_LANES && valid(lane); lane++) {
      uint16_t* to = a.out + (token(lane) * a.heads + query_head(lane)) * a.dim;
      for (int i = 0; i < a.dim; i++) to[i] = output[i * QUERY_LANES + lane];
    }
  }
};

// Whether every token has a place in the cache, and a key that it sees.
static bool is_inside_cache(const AttentionArgs& a) {
  bool inside = true;
  for (int i = 0; i < a.rows; i++) inside &= a.cache_rows[i] >= 0 && a.cache_rows[i] < a.cache_size;
  for (int i = 0; i < a.rows * a.width; i++)
    inside &= a.positions[i] >= 0 && a.positions[i] < a.capacity && a.limits[i] > 0;
  return inside;
}

static size_t scratch_bytes(const AttentionArgs& a) { return SoftmaxState(a, nullptr).bytes; }

// This thread's share of the keys and values; then, once all threads have stored theirs, of the
// queries.
static void fused_attention(const AttentionArgs& a, uint8_t* scratch, int* arrivals) {
  SoftmaxState state(a, scratch);
  ThreadRange tokens(a.rows * a.width);
  for (int i = tokens.first; i < tokens.last; i++) store_kv(a, state, i);
  barrier(arrivals);
  int pairs = ceil_div(a.heads / a.kv_heads * a.width, QUERY_LANES);
  ThreadRange part(a.rows * a.kv_heads * pairs);
  for (int i = part.first; i < part.last;) {
    QueryGroup group(a, state, i / pairs);
    do group.run(i % pairs);
    while (++i < part.last && i % pairs);
  }
}

}  // namespace COTERIE_ISA
