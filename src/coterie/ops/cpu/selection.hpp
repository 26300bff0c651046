// A token's top-k experts. Included once per instruction set. Comparisons use integers, as in
// `routing/`, so that every build and plain torch select the same experts.
#pragma once
#include <stdlib.h>
#include "api.hpp"
#include "simd.hpp"

namespace COTERIE_ISA::routing {

// Sort key of an expert, largest first: inside the kept groups, then the score's bits, then the
// lower index.
using Code = int64_t;
#if defined(__AVX512F__)
constexpr int WIDTH = 8;  // codes per register
#elif defined(__AVX2__)
constexpr int WIDTH = 4;
#else
constexpr int WIDTH = 2;
#endif
using Codes = Code __attribute__((vector_size(8 * WIDTH), may_alias));
using Scores = float __attribute__((vector_size(4 * WIDTH), may_alias));
using Bits = int32_t __attribute__((vector_size(4 * WIDTH), may_alias));
using Doubles = double __attribute__((vector_size(8 * WIDTH), may_alias));
constexpr int CODE_STRIDE = 16;  // arrays of codes are padded to a multiple of this
constexpr int PARTS = CODE_STRIDE / WIDTH;
constexpr Code LOWEST_CODE = INT64_MIN;  // below every code
constexpr Code OUTSIDE_PENALTY = Code(1) << 49;
constexpr float VOTE_UNIT = 1099511627776.0f;          // 2**40
constexpr float MARGIN_FLOOR = 0.0009765625f;          // 2**-10, added to every vote by margin
constexpr double ROUNDING_MAGIC = 6755399441055744.0;  // 1.5 * 2**52: adding it rounds to an integer

static inline int padded_codes(int n) { return (n + CODE_STRIDE - 1) / CODE_STRIDE * CODE_STRIDE; }

// Working memory of one call. Every array but the last three has one padded entry per expert.
struct SelectionScratch {
  Code *code, *candidates, *best, *key, *votes, *other;
  Code *tie_break, *coreset_tie_break;  // of all experts; of the coreset's
  Code* group;                          // of each coreset member
  int32_t *order, *swap, *restored, *evicted, *member;
  float *score, *bias;  // of each coreset member
  uint8_t *tier, *plain, *coreset;  // see `enum Tier`
  Code* dropped;  // [T] groups that the router dropped for this token, as bits
  Code* block;    // [T] index of the token's block, with a capacity
  Code* outside;  // [blocks, experts] OUTSIDE_PENALTY for experts that the block does not admit

  explicit SelectionScratch(const RouteArgs& e) : wide_(size_t(padded_codes(e.experts)) + CODE_STRIDE) {
    size_t all = wide_ * (9 * sizeof(Code) + 5 * sizeof(int32_t) + 2 * sizeof(float) + 3);
    size_t tokens = size_t(e.sequences) * e.tokens, blocks = 0;
    if (e.capacity) blocks = size_t(e.sequences) * ((size_t(e.tokens) + e.block - 1) / e.block + 1);
    all += (2 * tokens + blocks * wide_) * sizeof(Code);
    memory_ = aligned_alloc(64, (all + 63) / 64 * 64);
    at_ = static_cast<uint8_t*>(memory_);
    if (!memory_) return;
    carve(code), carve(candidates), carve(best), carve(key), carve(votes), carve(other), carve(tie_break),
        carve(coreset_tie_break);
    carve(group), carve(order), carve(swap), carve(restored), carve(evicted), carve(member), carve(score),
        carve(bias);
    carve(tier), carve(plain), carve(coreset), carve(dropped, tokens), carve(block, tokens),
        carve(outside, blocks * wide_);
    for (int i = 0; i < e.experts; i++) tie_break[i] = e.experts - 1 - i;
  }
  SelectionScratch(const SelectionScratch&) = delete;
  ~SelectionScratch() { free(memory_); }
  bool is_allocated() const { return memory_; }
  Code* outside_of(size_t token) const { return outside + size_t(block[token]) * wide_; }

 private:
  size_t wide_;
  void* memory_;
  uint8_t* at_;

  template <class T>
  void carve(T*& array) {
    carve(array, wide_);
  }
  template <class T>
  void carve(T*& array, size_t count) {
    array = reinterpret_cast<T*>(at_);
    at_ += count * sizeof(T);
  }
};

static inline Code code_of(float score, Code tie_break) {
  float x = score + 0.0f;  // -0 is 0
  int32_t bits = load<int32_t>(&x);
  return Code(bits ^ ((bits >> 31) & 0x7fffffff)) * 65536 + tie_break;
}

static inline int64_t expert_of(const RouteArgs& e, Code code) { return e.experts - 1 - (code & 0xffff); }

static inline float score_of(Code code) {
  int32_t bits = int32_t(code >> 16);
  bits ^= (bits >> 31) & 0x7fffffff;
  return load<float>(&bits);
}

// A vote in units of 2**-40, rounded half to even as torch does.
static inline int64_t units(float vote) {
  double x = vote * VOTE_UNIT;
  if (x > -1e15 && x < 1e15) {
    x += ROUNDING_MAGIC;
    return load<int64_t>(&x) - load<int64_t>(&ROUNDING_MAGIC);
  }
  return x > -9.2e18 && x < 9.2e18 ? int64_t(x) : INT64_MIN;  // already an integer, or out of range
}

// The codes of n experts, padded with LOWEST_CODE.
static void write_codes(const float* p, const float* bias, const Code* tie_break, int n, Code* to) {
  int i = 0;
  for (; WIDTH > 2 && i + WIDTH <= n; i += WIDTH) {
    Scores x = load<Scores>(p + i);
    if (bias) x += load<Scores>(bias + i);
    x += 0.0f;
    Bits bits = load<Bits>(&x);
    bits ^= (bits >> 31) & 0x7fffffff;
    store(to + i, __builtin_convertvector(bits, Codes) * 65536 + load<Codes>(tie_break + i));
  }
  for (; i < n; i++) to[i] = code_of(bias ? p[i] + bias[i] : p[i], tie_break[i]);
  for (; i < padded_codes(n); i++) to[i] = LOWEST_CODE;
}

static inline Codes larger(Codes a, Codes b) { return a > b ? a : b; }
static inline Codes lower(Codes a, Codes b) { return a > b ? b : a; }

// A lower bound that at least k codes reach, and usually few more: the k-th largest of sixteen
// lanes' maxima.
static Code bound_of(const Code* code, int n, int k) {
  if (k > CODE_STRIDE) return LOWEST_CODE + 1;
  Codes maxima[PARTS], above[PARTS] = {}, least = Codes{} + INT64_MAX;
  Code lane[CODE_STRIDE];
  UNROLL
  for (int p = 0; p < PARTS; p++) maxima[p] = load<Codes>(code + p * WIDTH);
  for (int i = CODE_STRIDE; i < n; i += CODE_STRIDE) {
    UNROLL
    for (int p = 0; p < PARTS; p++) maxima[p] = larger(maxima[p], load<Codes>(code + i + p * WIDTH));
  }
  UNROLL
  for (int p = 0; p < PARTS; p++) store(lane + p * WIDTH, maxima[p]);
  for (int i = 0; i < CODE_STRIDE; i++) {
    UNROLL
    for (int p = 0; p < PARTS; p++) above[p] -= lane[i] > maxima[p];
  }
  UNROLL
  for (int p = 0; p < PARTS; p++) least = lower(least, above[p] < k ? maxima[p] : Codes{} + INT64_MAX);
  store(lane, least);
  Code bound = lane[0];
  for (int i = 1; i < WIDTH; i++) bound = lane[i] < bound ? lane[i] : bound;
  return bound > LOWEST_CODE ? bound : LOWEST_CODE + 1;
}

// Writes the k largest of n codes (padded) to `best`, largest first. Returns how many there are.
static int choose(const Code* code, int n, int k, Code* spare, Code* best) {
  Code bound = bound_of(code, n, k);
  int count = 0, chosen_count;
  for (int i = 0; i < padded_codes(n); i += WIDTH) {
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
  chosen_count = min_int(k, count);
  for (int i = 0; i < count; i += WIDTH) {
    Codes mine = load<Codes>(spare + i), above = {};
    for (int j = 0; j < count; j++) above -= spare[j] > mine;
    Code rank[WIDTH];
    store(rank, above);
    for (int j = 0; j < min_int(WIDTH, count - i); j++)
      if (rank[j] < chosen_count) best[rank[j]] = spare[i + j];
  }
  return chosen_count;
}

// The two largest of n codes.
static void two_best(const Code* code, int n, Code* best, Code* second) {
  Code high = LOWEST_CODE, low = LOWEST_CODE;
  int i = 0;
  if (n % WIDTH == 0) {
    Codes highs = load<Codes>(code), lows = Codes{} + LOWEST_CODE;
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

// The groups that the router drops for a token: all but the `kept_groups` with the largest sum of
// two best scores.
static Code drop_groups(const RouteArgs& e, const Code* code) {
  int size = e.experts / e.groups;
  Code sums[MAX_GROUPS], dropped = 0;
  for (int g = 0; g < padded_codes(e.groups); g++) {
    Code best = LOWEST_CODE, second = LOWEST_CODE;
    if (g < e.groups) two_best(code + g * size, size, &best, &second);
    float sum = size > 1 ? score_of(best) + score_of(second) : score_of(best);
    sums[g] = g < e.groups ? code_of(sum, e.groups - g) : LOWEST_CODE;
  }
  for (int g = 0; g < e.groups; g += WIDTH) {
    Codes mine = load<Codes>(sums + g), above = {};
    for (int h = 0; h < e.groups; h++) above -= sums[h] > mine;
    Code rank[WIDTH];
    store(rank, above);
    for (int i = 0; i < min_int(WIDTH, e.groups - g); i++)
      dropped |= Code(rank[i] >= e.kept_groups) << (g + i);
  }
  return dropped;
}

// Ranks experts that the token's block does not admit after all others.
static void penalise_outside(const RouteArgs& e, const SelectionScratch& scratch, size_t token) {
  const Code* outside = scratch.outside_of(token);
  for (int i = 0; i < padded_codes(e.experts); i += WIDTH)
    store(scratch.code + i, load<Codes>(scratch.code + i) - load<Codes>(outside + i));
}

static inline bool in(Code groups, int g) { return (groups >> g) & 1; }

// A token's top-k experts in the unmodified model, as codes in `scratch.best`.
static void choose_vanilla(const RouteArgs& e, const SelectionScratch& scratch, size_t token, int k) {
  write_codes(e.p + token * e.stride, e.bias, scratch.tie_break, e.experts, scratch.code);
  if (e.capacity) penalise_outside(e, scratch, token);
  if (e.kept_groups == e.groups) {
    choose(scratch.code, e.experts, k, scratch.candidates, scratch.best);
    return;
  }
  int size = e.experts / e.groups, inside = size * e.kept_groups, count = 0;
  Code dropped = scratch.dropped[token] = drop_groups(e, scratch.code);
  if (inside < k) {
    for (int i = 0; i < e.experts; i++) scratch.code[i] -= in(dropped, i / size) ? OUTSIDE_PENALTY : 0;
    choose(scratch.code, e.experts, k, scratch.candidates, scratch.best);
    return;
  }
  for (int g = 0; g < e.groups; g++) {
    if (in(dropped, g)) continue;
    // May write up to one register past the group; the next group overwrites that.
    for (int i = 0; i < size; i += WIDTH)
      store(scratch.key + count + i, load<Codes>(scratch.code + g * size + i));
    count += size;
  }
  for (; count < padded_codes(inside); count++) scratch.key[count] = LOWEST_CODE;
  choose(scratch.key, inside, k, scratch.candidates, scratch.best);
}

}  // namespace COTERIE_ISA::routing
