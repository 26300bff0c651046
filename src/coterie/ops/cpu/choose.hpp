// A token's best experts. Included once per instruction set. Whole numbers decide, as in `routing/`:
// every build and plain torch choose the same.
#pragma once
#include <stdlib.h>
#include "api.hpp"
#include "simd.hpp"

namespace COTERIE_ISA::routing {

// What sorts an expert, largest first: inside the kept groups, its score's bits, the lower index.
using Code = int64_t;
using Codes = Code __attribute__((vector_size(64), may_alias));
using Scores = float __attribute__((vector_size(32), may_alias));
using Bits = int32_t __attribute__((vector_size(32), may_alias));
using Wide = double __attribute__((vector_size(64), may_alias));
constexpr int WIDTH = 8;            // codes at a time
constexpr int STRIDE = 2 * WIDTH;   // what arrays of codes are filled up to
constexpr Code NOBODY = INT64_MIN;  // below every code
constexpr Code OUTSIDE = Code(1) << 49;
constexpr float UNIT = 1099511627776.0f;      // 2**40
constexpr float FLOOR = 0.0009765625f;        // 2**-10, which votes by margin are above
constexpr double MAGIC = 6755399441055744.0;  // 1.5 * 2**52: what is added to it is rounded

static inline int filled_up(int n) { return (n + STRIDE - 1) / STRIDE * STRIDE; }

// Working memory of one call; every array but the last is one of all experts, filled up.
struct Hall {
  Code *code, *some, *best, *key, *votes, *other;
  int32_t *order, *swap, *back, *out, *member;
  uint8_t *first, *plain, *coreset;
  uint8_t* kept;  // [T, groups]

  explicit Hall(const Election& e) : wide_(size_t(filled_up(e.experts)) + STRIDE) {
    size_t each = 6 * sizeof(Code) + 5 * sizeof(int32_t) + 3;
    memory_ = malloc(wide_ * each + size_t(e.sequences) * e.tokens * e.groups);
    at_ = static_cast<uint8_t*>(memory_);
    if (!memory_) return;
    place(code), place(some), place(best), place(key), place(votes), place(other);
    place(order), place(swap), place(back), place(out), place(member);
    place(first), place(plain), place(coreset), place(kept);
  }
  Hall(const Hall&) = delete;
  ~Hall() { free(memory_); }
  bool there() const { return memory_; }

 private:
  size_t wide_;
  void* memory_;
  uint8_t* at_;

  template <class T>
  void place(T*& array) {
    array = reinterpret_cast<T*>(at_);
    at_ += wide_ * sizeof(T);
  }
};

static inline Code code_of(float score, int place) {
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

// The codes of a token's experts, filled up with nobody.
static void write_codes(const float* p, const float* bias, int n, Code* to) {
  int i = 0;
  for (; i + WIDTH <= n; i += WIDTH) {
    Scores x = load<Scores>(p + i);
    if (bias) x += load<Scores>(bias + i);
    x += 0.0f;
    Bits bits = load<Bits>(&x);
    bits ^= (bits >> 31) & 0x7fffffff;
    Codes places = n - 1 - i - Codes{0, 1, 2, 3, 4, 5, 6, 7};
    store(to + i, __builtin_convertvector(bits, Codes) * 65536 + places);
  }
  for (; i < n; i++) to[i] = code_of(bias ? p[i] + bias[i] : p[i], n - 1 - i);
  for (; i < filled_up(n); i++) to[i] = NOBODY;
}

static inline Codes larger(Codes a, Codes b) { return a > b ? a : b; }

// A bound that at least k codes reach and, as a rule, few more: the k-th of sixteen lanes' largest.
static Code bound_of(const Code* code, int n, int k) {
  if (k > STRIDE) return NOBODY + 1;
  Codes a = load<Codes>(code), b = load<Codes>(code + WIDTH), above_a = {}, above_b = {};
  for (int i = STRIDE; i < n; i += STRIDE) {
    a = larger(a, load<Codes>(code + i));
    b = larger(b, load<Codes>(code + i + WIDTH));
  }
  Code lane[STRIDE];
  store(lane, a);
  store(lane + WIDTH, b);
  for (Code each : lane) above_a -= each > a, above_b -= each > b;
  a = above_a < k ? a : Codes{} + INT64_MAX;
  b = above_b < k ? b : Codes{} + INT64_MAX;
  a = larger(-1 - a, -1 - b);
  Code least = NOBODY;
  for (int i = 0; i < WIDTH; i++) least = a[i] > least ? a[i] : least;
  return -1 - least > NOBODY ? -1 - least : NOBODY + 1;
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
    for (int j = 0; j < smaller(WIDTH, count - i); j++)
      if (above[j] < taken) found[above[j]] = mine[j];
  }
  return taken;
}

// Which groups the model keeps for a token: those whose two best add up to most.
static void keep_groups(const Election& e, const Code* code, uint8_t* kept) {
  int size = e.experts / e.groups;
  float sums[MOST_GROUPS];
  for (int g = 0; g < e.groups; g++) {
    const Code* here = code + g * size;
    Code best = here[0], second = NOBODY;
    int i = 1;
    if (size % WIDTH == 0) {
      Codes high = load<Codes>(here), low = Codes{} + NOBODY;
      for (i = WIDTH; i < size; i += WIDTH) {
        Codes next = load<Codes>(here + i);
        low = larger(low, next > high ? high : next);
        high = larger(high, next);
      }
      best = NOBODY;
      for (int j = 0; j < WIDTH; j++) {
        Code loser = high[j] > best ? best : high[j];
        best = high[j] > best ? high[j] : best;
        second = loser > second ? loser : second;
        second = low[j] > second ? low[j] : second;
      }
    }
    for (; i < size; i++) {
      Code loser = here[i] > best ? best : here[i];
      best = here[i] > best ? here[i] : best;
      second = loser > second ? loser : second;
    }
    sums[g] = size > 1 ? score_of(best) + score_of(second) : score_of(best);
  }
  for (int g = 0; g < e.groups; g++) {
    int before = 0;
    for (int h = 0; h < e.groups; h++) before += sums[h] > sums[g] || (sums[h] == sums[g] && h < g);
    kept[g] = before < e.kept;
  }
}

// A token's best experts in the unmodified model, as codes into `hall.best`.
static void choose_own(const Election& e, const Hall& hall, size_t token, int k) {
  write_codes(e.p + token * e.stride, e.bias, e.experts, hall.code);
  if (e.kept == e.groups) {
    choose(hall.code, e.experts, k, hall.some, hall.best);
    return;
  }
  uint8_t* kept = hall.kept + token * e.groups;
  int size = e.experts / e.groups, inside = size * e.kept, count = 0;
  keep_groups(e, hall.code, kept);
  if (inside < k) {
    for (int i = 0; i < e.experts; i++) hall.code[i] -= kept[i / size] ? 0 : OUTSIDE;
    choose(hall.code, e.experts, k, hall.some, hall.best);
    return;
  }
  for (int g = 0; g < e.groups; g++) {
    if (!kept[g]) continue;
    memcpy(hall.key + count, hall.code + g * size, size_t(size) * sizeof(Code));
    count += size;
  }
  for (; count < filled_up(inside); count++) hall.key[count] = NOBODY;
  choose(hall.key, inside, k, hall.some, hall.best);
}

}  // namespace COTERIE_ISA::routing
