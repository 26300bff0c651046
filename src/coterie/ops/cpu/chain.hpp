// Several works, one after the other, in one parallel region: to wake threads takes as long as a small
// work. Included once per instruction set.
#pragma once
#include "attend.hpp"

namespace COTERIE_ISA {

static size_t room_of(const Link& link) {
  switch (link.kind) {
    case PRODUCT: return room_of(*static_cast<const Product*>(link.work));
    case ATTENTION: return room_of(*static_cast<const Attending*>(link.work));
    default: return 0;
  }
}

static void follow(const Link& link, uint8_t* room, int* arrived) {
  switch (link.kind) {
    case PRODUCT: return multiply(*static_cast<const Product*>(link.work), room);
    case ATTENTION: return attend(*static_cast<const Attending*>(link.work), room, arrived);
    case NORM: return norm(*static_cast<const Norming*>(link.work));
    case GATE: return gate(*static_cast<const Gating*>(link.work));
  }
}

static int32_t follow(const Chain& c) {
  static thread_local Room room;
  if (c.count > MOST_LINKS) return TOO_LONG;
  size_t each = 0;
  for (int i = 0; i < c.count; i++) {
    size_t wanted = room_of(c.links[i]);
    each = wanted > each ? wanted : each;
  }
  each = (each + 4096) / 4096 * 4096;  // threads begin in pages of their own
  uint8_t* memory = room.of(each * size_t(c.threads));
  if (!memory) return NO_MEMORY;
  int arrived[2 * MOST_LINKS] = {};
#pragma omp parallel num_threads(c.threads)
  {
    uint8_t* own = memory;
#ifdef _OPENMP
    own += each * size_t(omp_get_thread_num());
#endif
    for (int i = 0; i < c.count; i++) {
      if (i) meet(arrived + 2 * i);
      follow(c.links[i], own, arrived + 2 * i + 1);
    }
  }
  return DONE;
}

}  // namespace COTERIE_ISA
