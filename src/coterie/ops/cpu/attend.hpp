// Attention of a window over keys written by position. Included once per instruction set.
//
// Queries are the weights here: 2 x 16 of them side by side in panels, so that a key, as it lies in the
// cache, is a token that meets them, and neither scores nor shares are ever added across lanes.
#pragma once
#include "rows.hpp"

namespace COTERIE_ISA {

constexpr int ABREAST = 2 * LANES;  // queries in a couple of panels
constexpr int AT_ONCE = 1024;       // keys whose scores are kept
constexpr float NOTHING = -3e38f;   // the score of a key that is not seen

static inline int parts(int n, int of) { return (n + of - 1) / of; }

// Two neighbours along k, of each of 2 x 16 rows in w, times those of M tokens `apart` bytes apart.
template <int M>
static inline void meet(const uint8_t* w, const uint8_t* x, size_t apart, F (&sum)[2][M]) {
  U first = load<U>(w), second = load<U>(w + 64);
#ifdef __AVX512BF16__
  WRITTEN_OUT
  for (int m = 0; m < M; m++) {
    auto pair = (__m512bh)_mm512_set1_epi32(load<int32_t>(x + m * apart));
    sum[0][m] = (F)_mm512_dpbf16_ps((__m512)sum[0][m], (__m512bh)first, pair);
    sum[1][m] = (F)_mm512_dpbf16_ps((__m512)sum[1][m], (__m512bh)second, pair);
  }
#else
  F low[2] = {bits(first << 16), bits(second << 16)};
  F high[2] = {bits(first & 0xffff0000u), bits(second & 0xffff0000u)};
  WRITTEN_OUT
  for (int m = 0; m < M; m++) {
    float even = widen(load<uint16_t>(x + m * apart)), odd = widen(load<uint16_t>(x + m * apart + 2));
    WRITTEN_OUT
    for (int p = 0; p < 2; p++) sum[p][m] += low[p] * even;
    WRITTEN_OUT
    for (int p = 0; p < 2; p++) sum[p][m] += high[p] * odd;
  }
#endif
}

// A tile of keys against a couple of queries. Their width is known beforehand where it is usual, so
// that one register points at all keys of a tile.
template <int DIM>
struct Scored {
  const uint8_t *queries, *keys;
  F* scores;  // [keys][2]
  int dim;

  template <int M>
  void run(int first) const {
    F sum[2][M];
    WRITTEN_OUT
    for (int m = 0; m < M; m++) sum[0][m] = sum[1][m] = F{};
    const uint8_t *w = queries, *x = keys + size_t(first) * dim * 2;
    size_t apart = size_t(DIM ? DIM : dim) * 2;
    const uint8_t* soon = x + M * apart;  // the next tile's keys
    for (int s = 0; s < dim / 2; s++, w += STEP, x += 4, soon += 64) {
      prefetch(soon);
      meet<M>(w, x, apart, sum);
    }
    WRITTEN_OUT
    for (int m = 0; m < M; m++) {
      scores[2 * (first + m)] = sum[0][m];
      scores[2 * (first + m) + 1] = sum[1][m];
    }
  }
};

// A tile of the values' features, each weighted by what every key's share is.
struct Mixed {
  const uint8_t *shares, *values;  // both two keys a step
  F* out;                          // [dim][2], added to
  int steps, dim;

  template <int M>
  void run(int first) const {
    F sum[2][M];
    WRITTEN_OUT
    for (int m = 0; m < M; m++) {
      sum[0][m] = out[2 * (first + m)];
      sum[1][m] = out[2 * (first + m) + 1];
    }
    const uint8_t *w = shares, *x = values + size_t(first) * 4;
    for (int s = 0; s < steps; s++, w += STEP, x += size_t(dim) * 4) meet<M>(w, x, 4, sum);
    WRITTEN_OUT
    for (int m = 0; m < M; m++) {
      out[2 * (first + m)] = sum[0][m];
      out[2 * (first + m) + 1] = sum[1][m];
    }
  }
};

// Where a thread's things lie in the room, all its own: memory that two of them write costs more than
// to do its work twice.
struct Stand {
  F *scores, *out;                       // [keys][2], [dim][2]
  uint8_t *queries, *shares, *values;    // a couple of panels each of the first two; a head's values
  float* head;                           // a head's numbers
  uint16_t* turned;
  size_t bytes = 0;

  Stand(const Attending& a, uint8_t* room) {
    size_t dim = size_t(padded(a.dim, LANES));
    scores = place<F>(room, 2 * AT_ONCE);
    out = place<F>(room, 2 * dim);
    queries = place<uint8_t>(room, dim / 2 * STEP);
    shares = place<uint8_t>(room, AT_ONCE / 2 * STEP);
    values = place<uint8_t>(room, size_t(parts(a.reach, 2)) * a.dim * 4);
    head = place<float>(room, dim);
    turned = place<uint16_t>(room, dim);
  }

 private:
  template <class T>
  T* place(uint8_t* room, size_t count) {
    T* here = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(room) + bytes);
    bytes += (count * sizeof(T) + 63) / 64 * 64;
    return here;
  }
};

// A head's numbers, normed and turned by position; `room` holds as many floats.
static void turn(const Attending& a, int64_t token, const uint16_t* x, const uint16_t* norm,
                 float* room, uint16_t* to) {
  float scale = inverse_root(x, a.dim, a.epsilon);
  for (int i = 0; i < a.dim; i += LANES)
    put_some(room + i, normed(x + i, norm + i, scale, a.dim - i), a.dim - i);
  const float *cos = a.cos + token * a.half, *sin = a.sin + token * a.half;
  for (int i = 0; i < a.half; i += LANES) {
    int there = a.half - i;
    F first = some<F>(room + i, there), second = some<F>(room + a.half + i, there);
    F cosine = some<F>(cos + i, there), sine = some<F>(sin + i, there);
    put_some(room + i, first * cosine - second * sine, there);
    put_some(room + a.half + i, second * cosine + first * sine, there);
  }
  for (int i = 0; i < a.dim; i += LANES)
    put_some(to + i, narrow(some<F>(room + i, a.dim - i)), a.dim - i);
}

static const uint16_t* head_of(const Attending& a, int64_t token, int head) {
  return a.qkv + (token * (a.heads + 2 * a.kv_heads) + head) * a.dim;
}

// A token's keys and values into the cache.
static void keep(const Attending& a, const Stand& own, int64_t token) {
  size_t place = size_t(a.places[token / a.width]) * a.row_stride + size_t(a.positions[token]) * a.dim;
  for (int h = 0; h < a.kv_heads; h++, place += a.head_stride) {
    const uint16_t *key = head_of(a, token, a.heads + h), *value = key + a.kv_heads * a.dim;
    turn(a, token, key, a.key_norm, own.head, a.keys + place);
    memcpy(a.values + place, value, size_t(a.dim) * 2);
  }
}

// Two keys' values side by side, word by word.
static void pair_up(const Attending& a, const uint16_t* even, bool alone, uint8_t* to) {
  const uint16_t* odd = even + a.dim;
  int i = 0;
  for (; i + LANES <= a.dim; i += LANES) {
    U low = __builtin_convertvector(load<Half>(even + i), U), high = {};
    if (!alone) high = __builtin_convertvector(load<Half>(odd + i), U);
    store(to + 4 * i, low | high << 16);
  }
  for (; i < a.dim; i++) store(to + 4 * i, uint32_t(even[i]) | (alone ? 0 : uint32_t(odd[i]) << 16));
}

static inline U share(F score, F most, float scale, F& total) {
  F power = (score - most) * scale, e = exponential(power);
  e = power < F{} - 87.0f ? F{} : e;
  total += e;
#ifdef __AVX512BF16__
  return (U)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)e));
#else
  return __builtin_convertvector(narrow(e), U);
#endif
}

// The queries that share a head's keys, couple by couple.
struct Look {
  const Attending& a;
  const Stand& own;
  int64_t group;  // of queries: a row's key head
  int couple = 0;
  I limit[2];
  int least = 0, reach = 0;  // keys that all queries of the couple see, and any

  Look(const Attending& a, const Stand& own, int64_t group) : a(a), own(own), group(group) {
    const uint16_t* values = a.values + head();
    for (int key = 0; key < a.reach; key += 2)
      pair_up(a, values + size_t(key) * a.dim, key + 1 == a.reach,
              own.values + size_t(key / 2) * a.dim * 4);
  }
  size_t head() const {
    return size_t(a.places[group / a.kv_heads]) * a.row_stride + size_t(group % a.kv_heads) * a.head_stride;
  }
  int query(int lane) const { return couple * ABREAST + lane; }
  bool there(int lane) const { return query(lane) < a.heads / a.kv_heads * a.width; }
  int64_t token(int lane) const { return group / a.kv_heads * a.width + query(lane) % a.width; }
  int query_head(int lane) const {
    return int(group % a.kv_heads) * (a.heads / a.kv_heads) + query(lane) / a.width;
  }

  // The couple's queries into panels; what they see.
  void take() {
    least = a.reach, reach = 1;
    for (int lane = 0; lane < ABREAST; lane++) {
      bool here = there(lane);
      if (here)
        turn(a, token(lane), head_of(a, token(lane), query_head(lane)), a.query_norm, own.head, own.turned);
      for (int s = 0; s < a.dim / 2; s++)
        store(own.queries + s * STEP + lane * 4, here ? load<uint32_t>(own.turned + 2 * s) : 0u);
      int limits = here ? smaller(a.limits[token(lane)], a.reach) : 1;
      limit[lane / LANES][lane % LANES] = limits;
      if (here) least = smaller(least, limits), reach = limits > reach ? limits : reach;
    }
  }

  void run(int chosen) {
    couple = chosen;
    take();
    const uint16_t* keys = a.keys + head();
    F most[2] = {F{} + NOTHING, F{} + NOTHING}, total[2] = {};
    memset(static_cast<void*>(own.out), 0, size_t(a.dim) * 2 * sizeof(F));
    for (int start = 0; start < reach; start += AT_ONCE) {
      int count = smaller(AT_ONCE, reach - start);
      score(reinterpret_cast<const uint8_t*>(keys + size_t(start) * a.dim), count);
      weigh(start, count, most, total);
      const uint8_t* values = own.values + size_t(start / 2) * a.dim * 4;
      tiles<tile_of(2)>(a.dim, Mixed{own.shares, values, own.out, parts(count, 2), a.dim});
    }
    tell(total);
  }

  void score(const uint8_t* keys, int count) {
    if (a.dim == 128)
      tiles<tile_of(2)>(count, Scored<128>{own.queries, keys, own.scores, a.dim});
    else
      tiles<tile_of(2)>(count, Scored<0>{own.queries, keys, own.scores, a.dim});
  }

  // Scores become shares; what was mixed before shrinks where a greater score is found.
  void weigh(int start, int count, F (&most)[2], F (&total)[2]) {
    F *scores = own.scores, *out = own.out;
    for (int p = 0; p < 2; p++) {
      F best = most[p];
      for (int j = 0; j < count; j++) {
        F score = scores[2 * j + p];
        if (start + j >= least) score = limit[p] > start + j ? score : F{} + NOTHING;
        scores[2 * j + p] = score;
        best = score > best ? score : best;
      }
      if (start) {
        F shrunk = exponential((most[p] - best) * a.scale);
        total[p] *= shrunk;
        for (int i = 0; i < a.dim; i++) out[2 * i + p] *= shrunk;
      }
      most[p] = best;
      for (int j = 0; j < count; j += 2) {
        U word = share(scores[2 * j + p], best, a.scale, total[p]);
        if (j + 1 < count) word |= share(scores[2 * j + 2 + p], best, a.scale, total[p]) << 16;
        store(own.shares + j / 2 * STEP + p * 64, word);
      }
    }
  }

  void tell(const F (&total)[2]) const {
    F* out = own.out;
    F inverse[2] = {1.0f / total[0], 1.0f / total[1]};
    uint16_t* found = reinterpret_cast<uint16_t*>(out);  // no longer than what it is made of
    for (int i = 0; i < 2 * a.dim; i++) store(found + i * LANES, narrow(out[i] * inverse[i % 2]));
    for (int lane = 0; lane < ABREAST && there(lane); lane++) {
      uint16_t* to = a.out + (token(lane) * a.heads + query_head(lane)) * a.dim;
      for (int i = 0; i < a.dim; i++) to[i] = found[i * ABREAST + lane];
    }
  }
};

static size_t room_of(const Attending& a) { return Stand(a, nullptr).bytes; }

// This thread's part: of the keys and values first, then, when all are there, of the queries.
static void attend(const Attending& a, uint8_t* room, int* arrived) {
  Stand own(a, room);
  Part tokens(a.rows * a.width);
  for (int i = tokens.first; i < tokens.last; i++) keep(a, own, i);
  meet(arrived);
  int couples = parts(a.heads / a.kv_heads * a.width, ABREAST);
  Part part(a.rows * a.kv_heads * couples);
  for (int i = part.first; i < part.last;) {
    Look look(a, own, i / couples);
    do look.run(i % couples);
    while (++i < part.last && i % couples);
  }
}

}  // namespace COTERIE_ISA
