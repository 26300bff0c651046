// Elects a coreset from votes. Included once per instruction set. See `routing/coreset.py: elect`.
#pragma once
#include "admission.hpp"

namespace COTERIE_ISA::routing {

// Writes a token's unnormalised votes [experts]: nonzero only for its top-k experts.
static void write_split_votes(const RouteArgs& e, const SelectionScratch& scratch, size_t token,
                              int choices) {
  const int64_t* vanilla_ids = e.vanilla_ids + token * e.k;
  float* split_votes = e.ballots + token * e.experts;
  float last_score = score_of(scratch.best[choices - 1]);
  memset(split_votes, 0, size_t(e.experts) * sizeof(float));
  for (int j = 0; j < e.k; j++) {
    float above = score_of(scratch.best[j]) - last_score;
    float p = e.p[token * e.stride + vanilla_ids[j]];
    float weight = e.biased && e.bias ? p + e.bias[vanilla_ids[j]] : p;
    split_votes[vanilla_ids[j]] = e.vote == MARGIN ? (above > 0 ? above : 0) + MARGIN_FLOOR : weight;
  }
}

// Adds one token's votes, of the kinds that vote only for the token's top-k experts.
static void vote_topk(const RouteArgs& e, size_t token, float vote_weight, Code* votes) {
  const int64_t* vanilla_ids = e.vanilla_ids + token * e.k;
  const float* split_row = e.sums ? e.ballots + token * e.experts : e.p + token * e.stride;
  float sum = e.sums && e.sums[token] != 0 ? e.sums[token] : 1;
  for (int j = 0; j < e.k; j++)
    votes[vanilla_ids[j]] += units((e.vote == COUNT ? 1 : split_row[vanilla_ids[j]] / sum) * vote_weight);
}

// Adds one token's votes where it votes for all experts with their probabilities.
static void vote_full(const RouteArgs& e, size_t token, float vote_weight, Code* votes) {
  const float* p = e.p + token * e.stride;
  int i = 0;
  if (WIDTH > 2 && vote_weight <= 256) {
    for (; i + WIDTH <= e.experts; i += WIDTH) {
      Scores x = load<Scores>(p + i) * vote_weight * VOTE_UNIT;
      Doubles rounded = __builtin_convertvector(x, Doubles) + ROUNDING_MAGIC;
      Codes whole = load<Codes>(&rounded) - load<Code>(&ROUNDING_MAGIC);
      store(votes + i, load<Codes>(votes + i) + whole);
    }
  }
  for (; i < e.experts; i++) votes[i] += units(p[i] * vote_weight);
}

// Votes are the maximum score of each expert over all voters.
static void vote_max(const RouteArgs& e, const SelectionScratch& scratch, int row) {
  size_t begin = size_t(row) * e.tokens;
  best_scores(e, begin, begin + e.tokens, e.vote_weight, scratch.score);
  for (int i = 0; i < e.experts; i++) scratch.votes[i] = units(scratch.score[i]);
}

// Counts the votes of one sequence.
static void count_votes(const RouteArgs& e, const SelectionScratch& scratch, int row) {
  if (e.vote == MAX) return vote_max(e, scratch, row);
  memset(scratch.votes, 0, size_t(e.experts) * sizeof(Code));
  for (size_t t = size_t(row) * e.tokens; t < size_t(row + 1) * e.tokens; t++) {
    float vote_weight = e.vote_weight ? e.vote_weight[t] : 1;
    if (e.vote == FULL) {
      vote_full(e, t, vote_weight, scratch.votes);
    } else {
      vote_topk(e, t, vote_weight, scratch.votes);
    }
  }
}

// Marks the first `first_k` experts of every voter.
static void mark_first_choices(const RouteArgs& e, int row, int first_k, uint8_t* mask) {
  memset(mask, 0, size_t(e.experts));
  for (size_t t = size_t(row) * e.tokens; t < size_t(row + 1) * e.tokens; t++) {
    if (e.vote_weight && !(e.vote_weight[t] > 0)) continue;
    for (int j = 0; j < min_int(first_k, e.k); j++) mask[e.vanilla_ids[t * e.k + j]] = 1;
  }
}

// Sorts experts by key, largest first, lower index first on ties: a merge sort.
static void sort_down(const RouteArgs& e, const SelectionScratch& scratch, const Code* key) {
  int32_t *from = scratch.order, *to = scratch.swap;
  for (int i = 0; i < e.experts; i++) from[i] = i;
  for (int run = 1; run < e.experts; run *= 2) {
    for (int at = 0; at < e.experts; at += 2 * run) {
      int i = at, middle = min_int(at + run, e.experts), j = middle;
      int end = min_int(at + 2 * run, e.experts);
      for (int o = at; o < end; o++) {
        bool right = i == middle || (j < end && key[from[j]] > key[from[i]]);
        to[o] = right ? from[j++] : from[i++];
      }
    }
    int32_t* swapped = from;
    from = to, to = swapped;
  }
  // Stable partition by tier.
  int count = 0;
  for (int tier = PROTECTED; tier <= EXCLUDED; tier++)
    for (int i = 0; i < e.experts; i++)
      if (scratch.tier[from[i]] == tier) to[count++] = from[i];
  if (to != scratch.order) memcpy(scratch.order, to, size_t(e.experts) * sizeof *to);
}

// Size of the smallest prefix of the order that holds the share `mass` of all votes: as
// `routing/coreset.py: Mass`.
template <class Vote>
static int smallest_size(const RouteArgs& e, const SelectionScratch& scratch, const Vote* votes) {
  Vote all_votes = 0, prefix_votes = 0;
  for (int i = 0; i < e.experts; i++) all_votes += votes[scratch.order[i]];
  int count = 1;
  for (int i = 0; i < e.experts; i++) {
    prefix_votes += votes[scratch.order[i]];
    count += double(prefix_votes) < e.mass * double(all_votes);
  }
  return count > e.min_experts ? count : e.min_experts;
}

// Elects the coreset; `key` orders the experts, `votes` decide its size if `mass` is set.
template <class Vote>
static void select_coreset(const RouteArgs& e, const SelectionScratch& scratch, const Code* key,
                           const Vote* votes, uint8_t* coreset) {
  int protect = 0, eligible = 0, size = e.count;
  for (int i = 0; i < e.experts; i++) {
    protect += scratch.tier[i] == PROTECTED;
    eligible += scratch.tier[i] != EXCLUDED;
  }
  if (e.mass > 0) {
    sort_down(e, scratch, key);
    size = smallest_size(e, scratch, votes);
  }
  size = min_int(size > protect ? size : protect, eligible);
  if (e.max_experts > 0) size = min_int(size, e.max_experts);
  select_largest(e, scratch, key, size, protect > size ? PROTECTED : CANDIDATE, coreset);
}

// Writes the experts of one set that are not in the other, sorted by votes in ascending or
// descending order.
static int difference_by_votes(const RouteArgs& e, const SelectionScratch& scratch, const uint8_t* from_set,
                               const uint8_t* not_in, bool descending, int32_t* to) {
  int count = 0;
  for (int i = 0; i < e.experts; i++) {
    if (!from_set[i] || not_in[i]) continue;
    int at = count++;
    Code mine = scratch.votes[i];
    for (; at > 0; at--) {
      Code previous = scratch.votes[to[at - 1]];
      if (descending ? previous >= mine : previous <= mine) break;
      to[at] = to[at - 1];
    }
    to[at] = i;
  }
  return count;
}

// Elects with a bonus for resident experts, then swaps experts back until at most `max_vote_loss`
// of the votes is lost.
static void apply_resident_bonus(const RouteArgs& e, const SelectionScratch& scratch) {
  double* votes = reinterpret_cast<double*>(scratch.other);
  for (int i = 0; i < e.experts; i++) {
    double x = double(scratch.votes[i]) * (e.resident[i] ? 1 + e.resident_bonus : 1.0) + 0.0;
    Code bits = load<Code>(&x);
    store(votes + i, x);
    scratch.key[i] = bits ^ ((bits >> 63) & INT64_MAX);
  }
  select_coreset(e, scratch, scratch.key, votes, scratch.coreset);
  int restore_count = difference_by_votes(e, scratch, scratch.plain, scratch.coreset, true, scratch.restored);
  int evict_count = difference_by_votes(e, scratch, scratch.coreset, scratch.plain, false, scratch.evicted);
  Code coreset_votes = 0, plain_votes = 0;
  for (int i = 0; i < e.experts; i++) {
    coreset_votes += scratch.coreset[i] ? scratch.votes[i] : 0;
    plain_votes += scratch.plain[i] ? scratch.votes[i] : 0;
  }
  double floor = double(plain_votes) * (1 - e.max_vote_loss);
  for (int i = 0; (i < restore_count || i < evict_count) && double(coreset_votes) < floor; i++) {
    if (i < restore_count)
      coreset_votes += scratch.votes[scratch.restored[i]], scratch.coreset[scratch.restored[i]] = 1;
    if (i < evict_count)
      coreset_votes -= scratch.votes[scratch.evicted[i]], scratch.coreset[scratch.evicted[i]] = 0;
  }
}

// Elects the coreset of one sequence.
static void elect(const RouteArgs& e, const SelectionScratch& scratch, int row) {
  if (e.union_size > 0 && e.max_experts == 0)
    return mark_first_choices(e, row, e.union_size, scratch.coreset);
  mark_first_choices(e, row, e.union_size > 0 ? e.union_size : e.protect, scratch.coreset);
  set_tiers(e, scratch, row, scratch.coreset);
  count_votes(e, scratch, row);
  for (int i = 0; i < e.experts; i++)
    if (scratch.tier[i] == EXCLUDED) scratch.votes[i] = 0;
  bool has_bonus = e.resident_bonus > 0 && e.resident;
  select_coreset(e, scratch, scratch.votes, scratch.votes, has_bonus ? scratch.plain : scratch.coreset);
  if (has_bonus) apply_resident_bonus(e, scratch);
}

// The votes that decide whether a previous coreset is reused, independent of the rule; see
// `routing/reuse.py`.
static void count_reuse_votes(const RouteArgs& e, int row, Code* votes) {
  size_t begin = size_t(row) * e.tokens, end = begin + e.tokens;
  bool no_voter = true;
  for (size_t t = begin; t < end && e.reuse_vote_weight; t++) no_voter &= !(e.reuse_vote_weight[t] > 0);
  memset(votes, 0, size_t(e.experts) * sizeof(Code));
  for (size_t t = begin; t < end; t++)
    for (int j = 0; j < e.k; j++) {
      int64_t expert = e.vanilla_ids[t * e.k + j];
      votes[expert] += units(e.p[t * e.stride + expert] * (no_voter ? 1.0f : e.reuse_vote_weight[t]));
    }
}

// Replaces the new coreset by the previous one if that still holds enough votes; see
// `routing/reuse.py`.
static void reuse_coreset(const RouteArgs& e, const SelectionScratch& scratch, int row) {
  const uint8_t* previous = e.previous_coresets + size_t(row) * e.experts;
  uint8_t* coreset = e.coresets + size_t(row) * e.experts;
  Code previous_votes = 0, new_votes = 0;
  bool has_previous = false;
  count_reuse_votes(e, row, scratch.other);
  for (int i = 0; i < e.experts; i++) {
    has_previous |= previous[i] != 0;
    previous_votes += previous[i] ? scratch.other[i] : 0;
    new_votes += scratch.coreset[i] ? scratch.other[i] : 0;
  }
  bool reuses = has_previous && double(previous_votes) >= (1 - e.reuse_tolerance) * double(new_votes);
  double loss = reuses && new_votes > 0 ? 1 - double(previous_votes) / double(new_votes) : 0;
  e.reused[row] = reuses;
  e.vote_loss[row] = loss > 0 ? loss : 0;
  if (reuses) memcpy(scratch.coreset, previous, size_t(e.experts));
  memcpy(coreset, scratch.coreset, size_t(e.experts));
}

}  // namespace COTERIE_ISA::routing
