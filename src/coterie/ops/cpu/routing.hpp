// Routes the tokens of one layer, from probabilities to expert weights. Included once per
// instruction set.
#pragma once
#include "election.hpp"

namespace COTERIE_ISA::routing {

// Ranks experts of dropped groups after all others.
static void penalise_dropped_groups(Code dropped, const Code* group, int n, Code* code) {
  int i = 0;
  for (; i + WIDTH <= n; i += WIDTH) {
    Codes is_outside = ((Codes{} + dropped) >> load<Codes>(group + i)) & 1;
    store(code + i, load<Codes>(code + i) - is_outside * OUTSIDE_PENALTY);
  }
  for (; i < n; i++) code[i] -= in(dropped, int(group[i])) ? OUTSIDE_PENALTY : 0;
}

// Each token's top k of the coreset: first from the token's kept groups, or the experts that its
// block admits, then from the rest.
static void choose_inside(const RouteArgs& e, const SelectionScratch& scratch, int row) {
  int count = 0, size = e.experts / e.groups;
  for (int i = 0; i < e.experts; i++) {
    if (!scratch.coreset[i]) continue;
    scratch.group[count] = i / size;
    scratch.bias[count] = e.bias ? e.bias[i] : 0;
    scratch.coreset_tie_break[count] = scratch.tie_break[i];
    scratch.member[count++] = i;
  }
  const float* bias = e.bias ? scratch.bias : nullptr;
  for (size_t t = size_t(row) * e.tokens; t < size_t(row + 1) * e.tokens; t++) {
    const float* p = e.p + t * e.stride;
    for (int i = 0; i < count; i++) scratch.score[i] = p[scratch.member[i]];
    write_codes(scratch.score, bias, scratch.coreset_tie_break, count, scratch.code);
    if (e.kept_groups < e.groups)
      penalise_dropped_groups(scratch.dropped[t], scratch.group, count, scratch.code);
    const Code* outside = e.capacity ? scratch.outside_of(t) : nullptr;
    for (int i = 0; outside && i < count; i++) scratch.code[i] -= outside[scratch.member[i]];
    int chosen_count = choose(scratch.code, count, e.k, scratch.candidates, scratch.best);
    for (int j = 0; j < e.k; j++) e.ids[t * e.k + j] = j < chosen_count ? expert_of(e, scratch.best[j]) : -1;
  }
}

// The softmax of the logits of a token's experts, for probabilities that are all 0 in fp32.
static void weigh_by_logits(const RouteArgs& e, size_t token) {
  const int64_t* ids = e.ids + token * e.k;
  const float* logits = e.logits + token * e.experts;
  float* to = e.weights + token * e.k;
  float peak = -INFINITY, sum = 0;
  for (int j = 0; j < e.k; j++) peak = ids[j] >= 0 && logits[ids[j]] > peak ? logits[ids[j]] : peak;
  for (int j = 0; j < e.k; j++) sum += to[j] = ids[j] < 0 ? 0.0f : expf(logits[ids[j]] - peak);
  for (int j = 0; j < e.k && sum > 0; j++) to[j] /= sum;
}

// A token's expert weights, by the rules of the model family; marks the experts as used.
static void write_weights(const RouteArgs& e, size_t token) {
  const int64_t* ids = e.ids + token * e.k;
  const float* p = e.p + token * e.stride;
  float* to = e.weights + token * e.k;
  float sum = 0;
  for (int j = 0; j < e.k; j++) {
    to[j] = ids[j] < 0 ? 0.0f : e.biased && e.bias ? p[ids[j]] + e.bias[ids[j]] : p[ids[j]];
    sum += to[j];
    if (ids[j] >= 0) e.used[ids[j]] = 1;
  }
  sum += e.epsilon;
  if (e.renormalise && sum == 0) {
    weigh_by_logits(e, token);
    sum = 1;
  }
  for (int j = 0; j < e.k; j++) {
    if (e.renormalise) to[j] /= sum;
    to[j] *= e.scale;
  }
}

static bool all_finite(const float* x, size_t n) {
  U bad = {};
  size_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    U power = load<U>(x + i) & 0x7f800000u;
    bad |= reinterpret<U>(power == 0x7f800000u);
  }
  uint32_t any = 0;
  for (int lane = 0; lane < LANES; lane++) any |= bad[lane];
  for (; i < n; i++) any |= (load<uint32_t>(x + i) & 0x7f800000u) == 0x7f800000u;
  return !any;
}

static int32_t run_route(const RouteArgs& e) {
  if (e.k > e.experts || e.experts > 65535 || e.groups > MAX_GROUPS || e.experts % e.groups)
    return UNSUPPORTED_ROUTER;
  if (e.capacity && (e.capacity < e.k || e.capacity > e.experts || e.block < 1 || e.kept_groups < e.groups))
    return UNSUPPORTED_ROUTER;
  size_t tokens = size_t(e.sequences) * e.tokens;
  if (!all_finite(e.logits, tokens * e.experts)) return NOT_FINITE;
  SelectionScratch scratch(e);
  if (!scratch.is_allocated()) return NO_MEMORY;
  bool splits = e.ballots && !e.sums;
  // Margins are measured from the best score outside the top k.
  int choices = splits && e.vote == MARGIN ? min_int(e.k + 1, e.experts) : e.k;
  if (e.capacity) admit(e, scratch);
  for (size_t t = 0; t < tokens; t++) {
    choose_vanilla(e, scratch, t, choices);
    for (int j = 0; j < e.k; j++) e.vanilla_ids[t * e.k + j] = expert_of(e, scratch.best[j]);
    if (splits) write_split_votes(e, scratch, t, choices);
  }
  if (splits) return STATUS_OK;
  for (int row = 0; row < e.sequences && e.vanilla_ids != e.ids; row++) {
    elect(e, scratch, row);
    if (e.previous_coresets) reuse_coreset(e, scratch, row);
    choose_inside(e, scratch, row);
  }
  memset(e.used, 0, size_t(e.experts));
  for (size_t t = 0; t < tokens; t++) write_weights(e, t);
  return STATUS_OK;
}

}  // namespace COTERIE_ISA::routing
