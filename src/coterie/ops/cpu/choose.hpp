// A token's best experts. Included once per instruction set. Whole numbers decide, as in `routing/`:
// every build and plain torch choose the same.
#pragma once
#include <stdlib.h>
#include "api.hpp"
#include "simd.hpp"

namespace COTERIE_ISA::routing {

// What sorts an expert, largest first: inside the kept groups, its score's bits, the lower index.
using Code = int64_t;
#if defined(__AVX512F__)
constexpr int WIDTH = 8;  // codes at a time: what a register holds
#elif defined(__AVX2__)
constexpr int WIDTH = 4;
#else
constexpr int WIDTH = 2;
#endif
using Codes = Code __attribute__((vector_size(8 * WIDTH), may_alias));
using Scores = float __attribute__((vector_size(4 * WIDTH), may_alias));
using Bits = int32_t __attribute__((vector_size(4 * WIDTH), may_alias));
using Wide = double __attribute__((vector_size(8 * WIDTH), may_alias));
constexpr int STRIDE = 16;  // what arrays of codes are filled up to
constexpr int PARTS = STRIDE / WIDTH;
constexpr Code NOBODY = INT64_MIN;  // below every code
constexpr Code OUTSIDE = Code(1) << 49;
constexpr float UNIT = 1099511627776.0f;      // 2**40
constexpr float FLOOR = 0.0009765625f;        // 2**-10, which votes by margin are above
constexpr double MAGIC = 6755399441055744.0;  // 1.5 * 2**52: what is added to it is rounded

static inline int filled_up(int n) { return (n + STRIDE - 1) / STRIDE * STRIDE; }

// Working memory of one call; every array but the last is one of all experts, filled up.
struct Hall {
  Code *code, *some, *best, *key, *votes, *other;
  Code *place, *seat;  // what tells experts of one score apart: of all of them, of the coreset's
  Code* group;         // the coreset's
  int32_t *order, *swap, *back, *out, *member;
  float *score, *bias;  // the coreset's
  uint8_t *first, *plain, *coreset;
  Code* dropped;  // [T]: the groups that the model does not look into, as bits

  explicit Hall(const Election& e) : wide_(size_t(filled_up(e.experts)) + STRIDE) {
    size_t all = wide_ * (9 * sizeof(Code) + 5 * sizeof(int32_t) + 2 * sizeof(float) + 3);
    all += size_t(e.sequences) * e.tokens * sizeof(Code);
    memory_ = aligned_alloc(64, (all + 63) / 64 * 64);
    at_ = static_cast<uint8_t*>(memory_);
    if (!memory_) return;
    lay(code), lay(some), lay(best), lay(key), lay(votes), lay(other), lay(place), lay(seat);
    lay(group), lay(order), lay(swap), lay(back), lay(out), lay(member), lay(score), lay(bias);
    lay(first), lay(plain), lay(coreset), lay(dropped);
    for (int i = 0; i < e.experts; i++) place[i] = e.experts - 1 - i;
  }
  Hall(const Hall&) = delete;
  ~Hall() { free(memory_); }
  bool there() const { return memory_; }

 private:
  size_t wide_;
  void* memory_;
  uint8_t* at_;

  template <class T>
  void lay(T*& array) {
    array = reinterpret_cast<T*>(at_);
    at_ += wide_ * sizeof(T);
  }
};

static inline Code code_of(float score, Code place) {
  float x = score + 0.0f;  // -0 is 0
  int32_t bits = load<int32_t>(&x);
  return Code(bits ^ ((bits >> 31) & 0x7fffffff)) * 65536 + place;
}

static inline int64_t expert_of(const Election& e, Code code) {
  return e.experts - 1 - (code & 0xffff);
}

static inline float score_of(Code code) {
  int32_t bits = int32_t(code >> 16);
  bits ^= (bits >> 31) & 0x7fffffff;
  return load<float>(&bits);
}

// A vote in whole units, rounded to even as torch does it.
static inline int64_t units(float vote) {
  double x = vote * UNIT;
  if (x > -1e15 && x < 1e15) {
    x += MAGIC;
    return load<int64_t>(&x) - load<int64_t>(&MAGIC);
  }
  return x > -9.2e18 && x < 9.2e18 ? int64_t(x) : INT64_MIN;  // whole already, or too much
}

// The codes of n experts by their scores, filled up with nobody.
static void write_codes(const float* p, const float* bias, const Code* place, int n, Code* to) {
  int i = 0;
  for (; WIDTH > 2 && i + WIDTH <= n; i += WIDTH) {
    Scores x = load<Scores>(p + i);
    if (bias) x += load<Scores>(bias + i);
    x += 0.0f;
    Bits bits = load<Bits>(&x);
    bits ^= (bits >> 31) & 0x7fffffff;
    store(to + i, __builtin_convertvector(bits, Codes) * 65536 + load<Codes>(place + i));
  }
  for (; i < n; i++) to[i] = code_of(bias ? p[i] + bias[i] : p[i], place[i]);
  for (; i < filled_up(n); i++) to[i] = NOBODY;
}

static inline Codes larger(Codes a, Codes b) { return a > b ? a : b; }
static inline Codes lower(Codes a, Codes b) { return a > b ? b : a; }

// A bound that at least k codes reach and, as a rule, few more: the k-th of sixteen lanes' largest.
static Code bound_of(const Code* code, int n, int k) {
  if (k > STRIDE) return NOBODY + 1;
  Codes most[PARTS], above[PARTS] = {}, least = Codes{} + INT64_MAX;
  Code lane[STRIDE];
  WRITTEN_OUT
  for (int p = 0; p < PARTS; p++) most[p] = load<Codes>(code + p * WIDTH);
  for (int i = STRIDE; i < n; i += STRIDE) {
    WRITTEN_OUT
    for (int p = 0; p < PARTS; p++) most[p] = larger(most[p], load<Codes>(code + i + p * WIDTH));
  }
  WRITTEN_OUT
  for (int p = 0; p < PARTS; p++) store(lane + p * WIDTH, most[p]);
  for (int i = 0; i < STRIDE; i++) {
    WRITTEN_OUT
    for (int p = 0; p < PARTS; p++) above[p] -= lane[i] > most[p];
  }
  WRITTEN_OUT
  for (int p = 0; p < PARTS; p++)
    least = lower(least, above[p] < k ? most[p] : Codes{} + INT64_MAX);
  store(lane, least);
  Code bound = lane[0];
  for (int i = 1; i < WIDTH; i++) bound = lane[i] < bound ? lane[i] : bound;
  return bound > NOBODY ? bound : NOBODY + 1;
}

// The k largest of n codes (filled up), best first, into `found`; how many there are.
static int choose(const Code* code, int n, int k, Code* spare, Code* found) {
  Code bound = bound_of(code, n, k);
  int count = 0, taken;
  for (int i = 0; i < filled_up(n); i += WIDTH) {
#ifdef __AVX512F__
    __m512i eight = load<__m512i>(code + i);
    __mmask8 enough = _mm512_cmpge_epi64_mask(eight, _mm512_set1_epi64(bound));
    store(spare + count, _mm512_maskz_compress_epi64(enough, eight));
    count += __builtin_popcount(enough);
#else
    for (int j = i; j < i + WIDTH; j++) {
      spare[count] = code[j];
      count += code[j] >= bound;
    }
#endif
  }
  taken = smaller(k, count);
  for (int i = 0; i < count; i += WIDTH) {
    Codes mine = load<Codes>(spare + i), above = {};
    for (int j = 0; j < count; j++) above -= spare[j] > mine;
    Code rank[WIDTH];
    store(rank, above);
    for (int j = 0; j < smaller(WIDTH, count - i); j++)
      if (rank[j] < taken) found[rank[j]] = spare[i + j];
  }
  return taken;
}

// The two best codes of a run.
static void two_best(const Code* code, int n, Code* best, Code* second) {
  Code high = NOBODY, low = NOBODY;
  int i = 0;
  if (n % WIDTH == 0) {
    Codes highs = load<Codes>(code), lows = Codes{} + NOBODY;
    for (i = WIDTH; i < n; i += WIDTH) {
      Codes next = load<Codes>(code + i);
      lows = larger(lows, lower(highs, next));
      highs = larger(highs, next);
    }
#ifdef __AVX512F__
    auto fold = [&highs, &lows](__m512i h, __m512i l) {
      lows = larger(larger(lows, Codes(l)), lower(highs, Codes(h)));
      highs = larger(highs, Codes(h));
    };
    fold(_mm512_shuffle_i64x2(__m512i(highs), __m512i(highs), 0x4e),
         _mm512_shuffle_i64x2(__m512i(lows), __m512i(lows), 0x4e));
    fold(_mm512_permutex_epi64(__m512i(highs), 0x4e), _mm512_permutex_epi64(__m512i(lows), 0x4e));
    fold(_mm512_permutex_epi64(__m512i(highs), 0xb1), _mm512_permutex_epi64(__m512i(lows), 0xb1));
    high = highs[0], low = lows[0];
#else
    for (int j = 0; j < WIDTH; j++) {
      Code loser = highs[j] > high ? high : highs[j];
      high = highs[j] > high ? highs[j] : high;
      low = loser > low ? loser : low;
      low = lows[j] > low ? lows[j] : low;
    }
#endif
  }
  for (; i < n; i++) {
    Code loser = code[i] > high ? high : code[i];
    high = code[i] > high ? code[i] : high;
    low = loser > low ? loser : low;
  }
  *best = high, *second = low;
}

// The groups that the model drops for a token: all but those whose two best add up to most.
static Code drop_groups(const Election& e, const Code* code) {
  int size = e.experts / e.groups;
  Code sums[MOST_GROUPS], dropped = 0;
  for (int g = 0; g < filled_up(e.groups); g++) {
    Code best = NOBODY, second = NOBODY;
    if (g < e.groups) two_best(code + g * size, size, &best, &second);
    float sum = size > 1 ? score_of(best) + score_of(second) : score_of(best);
    sums[g] = g < e.groups ? code_of(sum, e.groups - g) : NOBODY;
  }
  for (int g = 0; g < e.groups; g += WIDTH) {
    Codes mine = load<Codes>(sums + g), above = {};
    for (int h = 0; h < e.groups; h++) above -= sums[h] > mine;
    Code rank[WIDTH];
    store(rank, above);
    for (int i = 0; i < smaller(WIDTH, e.groups - g); i++)
      dropped |= Code(rank[i] >= e.kept) << (g + i);
  }
  return dropped;
}

static inline bool in(Code groups, int g) { return (groups >> g) & 1; }

// A token's best experts in the unmodified model, as codes into `hall.best`.
static void choose_own(const Election& e, const Hall& hall, size_t token, int k) {
  write_codes(e.p + token * e.stride, e.bias, hall.place, e.experts, hall.code);
  if (e.kept == e.groups) {
    choose(hall.code, e.experts, k, hall.some, hall.best);
    return;
  }
  int size = e.experts / e.groups, inside = size * e.kept, count = 0;
  Code dropped = hall.dropped[token] = drop_groups(e, hall.code);
  if (inside < k) {
    for (int i = 0; i < e.experts; i++) hall.code[i] -= in(dropped, i / size) ? OUTSIDE : 0;
    choose(hall.code, e.experts, k, hall.some, hall.best);
    return;
  }
  for (int g = 0; g < e.groups; g++) {
    if (in(dropped, g)) continue;
    // Up to a register more than there is: what comes next is written over it.
    for (int i = 0; i < size; i += WIDTH)
      store(hall.key + count + i, load<Codes>(hall.code + g * size + i));
    count += size;
  }
  for (; count < filled_up(inside); count++) hall.key[count] = NOBODY;
  choose(hall.key, inside, k, hall.some, hall.best);
}

}  // namespace COTERIE_ISA::routing
