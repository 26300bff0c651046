// Compiled once per instruction set, under its flags and with COTERIE_ISA naming it.
#include "chain.hpp"
#include "experts.hpp"
#include "route.hpp"
#include "rows.hpp"

#define JOINED(a, b) a##b
#define NAMED(a, b) JOINED(a, b)

extern "C" int32_t NAMED(run_, COTERIE_ISA)(const Call& call) {
  using namespace COTERIE_ISA;
  switch (call.format) {
    case BF16: return run<Bf16>(call);
    case INT8: return run<Int8>(call);
    default: return run<Int4>(call);
  }
}

extern "C" int32_t NAMED(follow_, COTERIE_ISA)(const Chain& chain) {
  return COTERIE_ISA::follow(chain);
}

extern "C" int32_t NAMED(route_, COTERIE_ISA)(const Election& election) {
  return COTERIE_ISA::routing::run(election);
}

extern "C" int32_t NAMED(survey_, COTERIE_ISA)(const Surveying& surveying) {
  return COTERIE_ISA::survey(surveying);
}
