// One layer's selection, from probabilities to weights. Included once per instruction set.
#pragma once
#include "elect.hpp"

namespace COTERIE_ISA::routing {

// Each token's best of the coreset: inside the groups that the model keeps, then of the rest.
static void choose_inside(const Election& e, const Hall& hall, int row) {
  int count = 0, size = e.experts / e.groups;
  for (int i = 0; i < e.experts; i++) {
    if (!hall.coreset[i]) continue;
    hall.back[count] = i / size;
    hall.member[count++] = i;
  }
  for (int i = count; i < filled_up(count); i++) hall.code[i] = NOBODY;
  for (size_t t = size_t(row) * e.tokens; t < size_t(row + 1) * e.tokens; t++) {
    const float* p = e.p + t * e.stride;
    const uint8_t* kept = hall.kept + t * e.groups;
    for (int i = 0; i < count; i++) {
      int id = hall.member[i];
      Code code = code_of(e.bias ? p[id] + e.bias[id] : p[id], e.experts - 1 - id);
      hall.code[i] = e.kept == e.groups || kept[hall.back[i]] ? code : code - OUTSIDE;
    }
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
    choose_inside(e, hall, row);
  }
  memset(e.used, 0, size_t(e.experts));
  for (size_t t = 0; t < tokens; t++) weigh(e, t);
  return DONE;
}

}  // namespace COTERIE_ISA::routing
