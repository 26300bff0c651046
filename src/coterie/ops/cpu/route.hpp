// One layer's selection, from probabilities to weights. Included once per instruction set.
#pragma once
#include "elect.hpp"

namespace COTERIE_ISA::routing {

// Experts of dropped groups come behind all others.
static void push_outside(Code dropped, const Code* group, int n, Code* code) {
  int i = 0;
  for (; i + WIDTH <= n; i += WIDTH) {
    Codes out = ((Codes{} + dropped) >> load<Codes>(group + i)) & 1;
    store(code + i, load<Codes>(code + i) - out * OUTSIDE);
  }
  for (; i < n; i++) code[i] -= in(dropped, int(group[i])) ? OUTSIDE : 0;
}

// Each token's best of the coreset: inside the groups that the model keeps, then of the rest.
static void choose_inside(const Election& e, const Hall& hall, int row) {
  int count = 0, size = e.experts / e.groups;
  for (int i = 0; i < e.experts; i++) {
    if (!hall.coreset[i]) continue;
    hall.group[count] = i / size;
    hall.bias[count] = e.bias ? e.bias[i] : 0;
    hall.seat[count] = hall.place[i];
    hall.member[count++] = i;
  }
  const float* bias = e.bias ? hall.bias : nullptr;
  for (size_t t = size_t(row) * e.tokens; t < size_t(row + 1) * e.tokens; t++) {
    const float* p = e.p + t * e.stride;
    for (int i = 0; i < count; i++) hall.score[i] = p[hall.member[i]];
    write_codes(hall.score, bias, hall.seat, count, hall.code);
    if (e.kept < e.groups) push_outside(hall.dropped[t], hall.group, count, hall.code);
    int taken = choose(hall.code, count, e.k, hall.some, hall.best);
    for (int j = 0; j < e.k; j++)
      e.ids[t * e.k + j] = j < taken ? expert_of(e, hall.best[j]) : -1;
  }
}

// The family's weights of what a token uses.
static void weigh(const Election& e, size_t token) {
  const int64_t* ids = e.ids + token * e.k;
  const float* p = e.p + token * e.stride;
  float* to = e.weights + token * e.k;
  float sum = 0;
  for (int j = 0; j < e.k; j++) {
    to[j] = ids[j] < 0 ? 0.0f : e.biased && e.bias ? p[ids[j]] + e.bias[ids[j]] : p[ids[j]];
    sum += to[j];
    if (ids[j] >= 0) e.used[ids[j]] = 1;
  }
  for (int j = 0; j < e.k; j++) {
    if (e.renormalise) to[j] /= sum + e.epsilon;
    to[j] *= e.scale;
  }
}

static bool finite(const float* x, size_t n) {
  U bad = {};
  size_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    U power = load<U>(x + i) & 0x7f800000u;
    bad |= reinterpret_cast<U>(power == 0x7f800000u);
  }
  uint32_t any = 0;
  for (int lane = 0; lane < LANES; lane++) any |= bad[lane];
  for (; i < n; i++) any |= (load<uint32_t>(x + i) & 0x7f800000u) == 0x7f800000u;
  return !any;
}

static int32_t run(const Election& e) {
  if (e.k > e.experts || e.experts > 65535 || e.groups > MOST_GROUPS || e.experts % e.groups)
    return NO_SUCH_ROUTER;
  size_t tokens = size_t(e.sequences) * e.tokens;
  if (!finite(e.logits, tokens * e.experts)) return NOT_FINITE;
  Hall hall(e);
  if (!hall.there()) return NO_MEMORY;
  bool splits = e.ballots && !e.sums;
  int more = splits && e.vote == MARGIN ? smaller(e.k + 1, e.experts) : e.k;
  for (size_t t = 0; t < tokens; t++) {
    choose_own(e, hall, t, more);
    for (int j = 0; j < e.k; j++) e.own[t * e.k + j] = expert_of(e, hall.best[j]);
    if (splits) write_ballot(e, hall, t, more);
  }
  if (splits) return DONE;
  for (int row = 0; row < e.sequences && e.own != e.ids; row++) {
    elect(e, hall, row);
    if (e.before) settle(e, hall, row);
    choose_inside(e, hall, row);
  }
  memset(e.used, 0, size_t(e.experts));
  for (size_t t = 0; t < tokens; t++) weigh(e, t);
  return DONE;
}

}  // namespace COTERIE_ISA::routing
