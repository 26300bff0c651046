// A coreset from votes. Included once per instruction set. See `routing/coreset.py: elect`.
#pragma once
#include <math.h>
#include "choose.hpp"

namespace COTERIE_ISA::routing {

// What a token gives each of its own experts before its vote is split: [experts], nothing else.
static void write_ballot(const Election& e, const Hall& hall, size_t token, int chosen) {
  const int64_t* own = e.own + token * e.k;
  float* ballot = e.ballots + token * e.experts;
  float last = score_of(hall.best[chosen - 1]);
  memset(ballot, 0, size_t(e.experts) * sizeof(float));
  for (int j = 0; j < e.k; j++) {
    float above = score_of(hall.best[j]) - last;
    float p = e.p[token * e.stride + own[j]];
    float weight = e.biased && e.bias ? p + e.bias[own[j]] : p;
    ballot[own[j]] = e.vote == MARGIN ? (above > 0 ? above : 0) + FLOOR : weight;
  }
}

// One token's votes, of those that it casts for its own experts alone.
static void vote_for_own(const Election& e, size_t token, float voice, Code* votes) {
  const int64_t* own = e.own + token * e.k;
  const float* given = e.sums ? e.ballots + token * e.experts : e.p + token * e.stride;
  float sum = e.sums && e.sums[token] != 0 ? e.sums[token] : 1;
  for (int j = 0; j < e.k; j++)
    votes[own[j]] += units((e.vote == COUNT ? 1 : given[own[j]] / sum) * voice);
}

static void vote_for_all(const Election& e, size_t token, float voice, Code* votes) {
  const float* p = e.p + token * e.stride;
  int i = 0;
  if (WIDTH > 2 && voice <= 256) {
    for (; i + WIDTH <= e.experts; i += WIDTH) {
      Scores x = load<Scores>(p + i) * voice * UNIT;
      Wide rounded = __builtin_convertvector(x, Wide) + MAGIC;
      Codes whole = load<Codes>(&rounded) - load<Code>(&MAGIC);
      store(votes + i, load<Codes>(votes + i) + whole);
    }
  }
  for (; i < e.experts; i++) votes[i] += units(p[i] * voice);
}

// The best score that any voter gives each expert.
static void vote_by_best(const Election& e, const Hall& hall, int row) {
  float* best = hall.score;
  for (int i = 0; i < e.experts; i++) best[i] = -INFINITY;
  for (size_t t = size_t(row) * e.tokens; t < size_t(row + 1) * e.tokens; t++) {
    const float* p = e.p + t * e.stride;
    if (e.voice && !(e.voice[t] > 0)) continue;
    int i = 0;
    for (; WIDTH > 2 && i + WIDTH <= e.experts; i += WIDTH) {
      Scores mine = load<Scores>(p + i), old = load<Scores>(best + i);
      if (e.bias) mine += load<Scores>(e.bias + i);
      store(best + i, mine > old ? mine : old);
    }
    for (; i < e.experts; i++) {
      float mine = e.bias ? p[i] + e.bias[i] : p[i];
      best[i] = mine > best[i] ? mine : best[i];
    }
  }
  for (int i = 0; i < e.experts; i++) hall.votes[i] = units(best[i]);
}

// The votes of one sequence.
static void count_votes(const Election& e, const Hall& hall, int row) {
  if (e.vote == MAX) return vote_by_best(e, hall, row);
  memset(hall.votes, 0, size_t(e.experts) * sizeof(Code));
  for (size_t t = size_t(row) * e.tokens; t < size_t(row + 1) * e.tokens; t++) {
    float voice = e.voice ? e.voice[t] : 1;
    if (e.vote == FULL) {
      vote_for_all(e, t, voice, hall.votes);
    } else {
      vote_for_own(e, t, voice, hall.votes);
    }
  }
}

// Every voter's first so many own experts.
static void mark_first(const Election& e, int row, int many, uint8_t* mask) {
  memset(mask, 0, size_t(e.experts));
  for (size_t t = size_t(row) * e.tokens; t < size_t(row + 1) * e.tokens; t++) {
    if (e.voice && !(e.voice[t] > 0)) continue;
    for (int j = 0; j < smaller(many, e.k); j++) mask[e.own[t * e.k + j]] = 1;
  }
}

// Experts by their key, largest first and the lower index first of equals: a merge sort.
static void sort_down(const Election& e, const Hall& hall, const Code* key) {
  int32_t *from = hall.order, *to = hall.swap;
  for (int i = 0; i < e.experts; i++) from[i] = i;
  for (int run = 1; run < e.experts; run *= 2) {
    for (int at = 0; at < e.experts; at += 2 * run) {
      int i = at, middle = smaller(at + run, e.experts), j = middle;
      int end = smaller(at + 2 * run, e.experts);
      for (int o = at; o < end; o++) {
        bool right = i == middle || (j < end && key[from[j]] > key[from[i]]);
        to[o] = right ? from[j++] : from[i++];
      }
    }
    int32_t* done = from;
    from = to, to = done;
  }
  // The protected before the others.
  int count = 0;
  for (int wanted = 1; wanted >= 0; wanted--)
    for (int i = 0; i < e.experts; i++)
      if (hall.first[from[i]] == wanted) to[count++] = from[i];
  if (to != hall.order) memcpy(hall.order, to, size_t(e.experts) * sizeof *to);
}

// The fewest of the order that hold the share of all votes: as `routing/coreset.py: Mass`.
template <class Vote>
static int fewest(const Election& e, const Hall& hall, const Vote* votes) {
  Vote all = 0, held = 0;
  for (int i = 0; i < e.experts; i++) all += votes[hall.order[i]];
  int count = 1;
  for (int i = 0; i < e.experts; i++) {
    held += votes[hall.order[i]];
    count += double(held) < e.mass * double(all);
  }
  return count > e.least ? count : e.least;
}

// The `size` experts with the largest keys, the protected before the others: bisection for the least
// of them, then the lower index. Where the protected alone are too many, it is among them.
static void take_most(const Election& e, const Hall& hall, const Code* key, int size, bool crowded,
                      uint8_t* coreset) {
  Code low = INT64_MAX, high = NOBODY;
  int count = 0;  // how many reach `low`
  for (int i = 0; i < e.experts; i++) {
    if (crowded && !hall.first[i]) continue;
    low = key[i] < low ? key[i] : low;
    high = key[i] > high ? key[i] : high;
    count++;
  }
  for (int i = 0; i < filled_up(e.experts); i++) {
    bool there = i < e.experts && (!crowded || hall.first[i]);
    hall.some[i] = !there ? NOBODY : hall.first[i] && !crowded ? high + 1 : key[i];
  }
  high++;
  while (low < high && count != size) {
    Code middle = low + Code((uint64_t(high) - uint64_t(low) + 1) / 2);
    Codes reach = {};
    for (int i = 0; i < filled_up(e.experts); i += WIDTH)
      reach -= load<Codes>(hall.some + i) >= middle;
    Code lanes[WIDTH], reached = 0;
    store(lanes, reach);
    for (Code each : lanes) reached += each;
    if (reached >= size) {
      low = middle;
      count = int(reached);
    } else {
      high = middle - 1;
    }
  }
  for (int i = e.experts - 1; i >= 0; i--) {
    coreset[i] = hall.some[i] >= low;
    if (hall.some[i] == low && count > size) coreset[i] = 0, count--;
  }
}

// The coreset by these votes, which `key` sorts.
template <class Vote>
static void take(const Election& e, const Hall& hall, const Code* key, const Vote* votes, uint8_t* coreset) {
  int protect = 0, size = e.count;
  for (int i = 0; i < e.experts; i++) protect += hall.first[i];
  if (e.mass > 0) {
    sort_down(e, hall, key);
    size = fewest(e, hall, votes);
  }
  size = smaller(size > protect ? size : protect, e.experts);
  if (e.most > 0) size = smaller(size, e.most);
  take_most(e, hall, key, size, protect > size, coreset);
}

// Those of one set that are not in the other, by votes: most first, or fewest first.
static int missing(const Election& e, const Hall& hall, const uint8_t* of, const uint8_t* in,
                   bool most, int32_t* to) {
  int count = 0;
  for (int i = 0; i < e.experts; i++) {
    if (!of[i] || in[i]) continue;
    int at = count++;
    Code mine = hall.votes[i];
    for (; at > 0; at--) {
      Code before = hall.votes[to[at - 1]];
      if (most ? before >= mine : before <= mine) break;
      to[at] = to[at - 1];
    }
    to[at] = i;
  }
  return count;
}

// Favour the experts in fast memory, then bring back the votes that this may not cost.
static void favour_residents(const Election& e, const Hall& hall) {
  double* votes = reinterpret_cast<double*>(hall.other);
  for (int i = 0; i < e.experts; i++) {
    double x = double(hall.votes[i]) * (e.resident[i] ? 1 + e.lam : 1.0) + 0.0;
    Code bits = load<Code>(&x);
    store(votes + i, x);
    hall.key[i] = bits ^ ((bits >> 63) & INT64_MAX);
  }
  take(e, hall, hall.key, votes, hall.coreset);
  int come = missing(e, hall, hall.plain, hall.coreset, true, hall.back);
  int go = missing(e, hall, hall.coreset, hall.plain, false, hall.out);
  Code held = 0, all = 0;
  for (int i = 0; i < e.experts; i++) {
    held += hall.coreset[i] ? hall.votes[i] : 0;
    all += hall.plain[i] ? hall.votes[i] : 0;
  }
  double floor = double(all) * (1 - e.eps);
  for (int i = 0; (i < come || i < go) && double(held) < floor; i++) {
    if (i < come) held += hall.votes[hall.back[i]], hall.coreset[hall.back[i]] = 1;
    if (i < go) held -= hall.votes[hall.out[i]], hall.coreset[hall.out[i]] = 0;
  }
}

static void elect(const Election& e, const Hall& hall, int row) {
  if (e.first > 0 && e.most == 0) return mark_first(e, row, e.first, hall.coreset);
  mark_first(e, row, e.first > 0 ? e.first : e.protect, hall.first);
  count_votes(e, hall, row);
  bool favours = e.lam > 0 && e.resident;
  take(e, hall, hall.votes, hall.votes, favours ? hall.plain : hall.coreset);
  if (favours) favour_residents(e, hall);
}

// The votes by which a coreset stays or goes, whatever elected it: see `routing/select.py: own_votes`.
static void count_own_votes(const Election& e, int row, Code* votes) {
  size_t begin = size_t(row) * e.tokens, end = begin + e.tokens;
  bool silent = true;
  for (size_t t = begin; t < end && e.say; t++) silent &= !(e.say[t] > 0);
  memset(votes, 0, size_t(e.experts) * sizeof(Code));
  for (size_t t = begin; t < end; t++)
    for (int j = 0; j < e.k; j++) {
      int64_t expert = e.own[t * e.k + j];
      votes[expert] += units(e.p[t * e.stride + expert] * (silent ? 1.0f : e.say[t]));
    }
}

// The coreset of before in the place of the fresh one, if it still holds enough: as
// `routing/persistent.py: settle`.
static void settle(const Election& e, const Hall& hall, int row) {
  const uint8_t* before = e.before + size_t(row) * e.experts;
  uint8_t* coreset = e.coresets + size_t(row) * e.experts;
  Code held = 0, best = 0;
  bool there = false;
  count_own_votes(e, row, hall.other);
  for (int i = 0; i < e.experts; i++) {
    there |= before[i] != 0;
    held += before[i] ? hall.other[i] : 0;
    best += hall.coreset[i] ? hall.other[i] : 0;
  }
  bool stays = there && double(held) >= (1 - e.drift) * double(best);
  double lost = stays && best > 0 ? 1 - double(held) / double(best) : 0;
  e.stayed[row] = stays;
  e.lost[row] = lost > 0 ? lost : 0;
  if (stays) memcpy(hall.coreset, before, size_t(e.experts));
  memcpy(coreset, hall.coreset, size_t(e.experts));
}

}  // namespace COTERIE_ISA::routing
