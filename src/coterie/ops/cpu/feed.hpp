// In which order a thread meets panels, and what it asks of memory meanwhile.
#pragma once
#include "desk.hpp"

namespace COTERIE_ISA {

// One thread's way, run after run: some panels of each expert of a team in turn, then the panels beside
// them; gate and up of all teams first, then down. A run is long enough to be read at full speed, and
// short enough that experts of many tokens and of few take turns.
template <class Format>
struct Way {
  static constexpr int TOGETHER = 512;      // pairs of a team, whose activations stay in a cache
  static constexpr size_t RUN = 512 << 10;  // bytes
  const Call& c;
  const Desk<Format>& d;
  struct Leg {
    int first, last, most;   // couples of this thread, and of a run
    size_t couple, skipped;  // bytes
  } legs[2];
  int leg = 0, team = 0, end = 0, couple = 0, i = 0;

  Way(const Call& c, const Desk<Format>& d) : c(c), d(d) {
    int ups = padded(c.width, LANES) / LANES, downs = padded(c.hidden, COUPLE) / COUPLE;
    legs[0] = planned(ups, Format::panel_bytes(c.hidden), 0);
    legs[1] = planned(downs, Format::panel_bytes(c.width), ups * legs[0].couple);
    start();
  }

  bool over() const { return leg == 2; }
  int couples() const { return smaller(legs[leg].most, legs[leg].last - couple); }
  size_t size() const { return couples() * legs[leg].couple; }
  const uint8_t* run() const {
    const Leg& at = legs[leg];
    return c.panels + size_t(d.order[i]) * c.stride + at.skipped + couple * at.couple;
  }

  void next() {
    if (++i < end) return;
    couple += legs[leg].most;
    if (couple < legs[leg].last) {
      i = team;
    } else if (end < d.used) {
      gather();
    } else {
      leg++;
      start();
    }
  }

 private:
  static Leg planned(int couples, size_t bytes, size_t skipped) {
    Part part(couples);
    return {part.first, part.last, RUN > bytes ? int(RUN / bytes) : 1, bytes, skipped};
  }
  void start() {
    i = 0;
    while (leg < 2 && (legs[leg].first == legs[leg].last || !d.used)) leg++;
    if (leg < 2) gather();
  }
  void gather() {
    couple = legs[leg].first;
    team = end = i;
    int pairs = d.count(end++);
    while (end < d.used && (pairs += d.count(end)) <= TOGETHER) end++;
  }
};

// Bytes asked of memory are spread evenly over the arithmetic: while an expert of many tokens is
// computed, more than its own, so that those of few need not wait.
template <class Format>
struct Feed {
  static constexpr int64_t LEAST = 4 << 10, MOST = 384 << 10;  // bytes ahead of what is computed
  Way<Format> way;  // as far as it was asked for, but for `left` bytes of this run
  int64_t left, lead = 0;
  float share[Format::TILE + 1];  // of a couple's bytes, for one pass of so many tokens over it

  explicit Feed(const Way<Format>& here) : way(here), left(here.over() ? 0 : here.size()) {
    float all = 0;
    for (int i = 0; i < way.d.used; i++) {
      int count = way.d.count(i), passes = (count + Format::TILE - 1) / Format::TILE;
      all += passes * cost(float(count) / passes);
    }
    for (int m = 0; m <= Format::TILE; m++) share[m] = way.d.used * cost(m) / all;
  }

  // What a pass of so many tokens over so many bytes asks for; the first one uses them up.
  Ahead ask(int64_t bytes, int steps, int tokens, bool first) {
    if (way.over()) return {way.c.panels, way.c.panels + 1, way.c.panels, 0};
    if (first) lead -= bytes;
    int64_t wanted = int64_t(bytes * share[tokens]);
    if (wanted < LEAST - lead) wanted = LEAST - lead;
    if (wanted > MOST - lead) wanted = MOST - lead;
    if (wanted > Ahead::MOST * steps) wanted = Ahead::MOST * steps;
    if (wanted < 0) wanted = 0;
    const uint8_t* end = way.run() + way.size();
    Ahead ahead{end - left, end, end, size_t((wanted + steps - 1) / steps)};
    if (wanted >= left) {
      wanted -= left;
      lead += left;
      way.next();
      left = way.over() ? 0 : way.size();
      if (wanted > left) wanted = left;
      if (left) ahead.next = way.run();
    }
    left -= wanted;
    lead += wanted;
    return ahead;
  }

 private:
  // Steps of few tokens wait for their sums.
  static float cost(float tokens) { return (tokens < 6 ? 6 : tokens) + 1; }
};

}  // namespace COTERIE_ISA
