// Compiled once per instruction set, with its compiler flags and COTERIE_ISA as its name.
#include "op_chain.hpp"
#include "experts.hpp"
#include "routing.hpp"
#include "elementwise.hpp"

#define CONCAT_TOKENS(a, b) a##b
#define CONCAT(a, b) CONCAT_TOKENS(a, b)

extern "C" int32_t CONCAT(run_experts_, COTERIE_ISA)(const ExpertsArgs& args) {
  using namespace COTERIE_ISA;
  switch (args.format) {
    case BF16: return run<Bf16>(args);
    case FP32: return run<Fp32>(args);
    case INT8: return run<Int8>(args);
    default: return run<Int4>(args);
  }
}

extern "C" int32_t CONCAT(run_ops_, COTERIE_ISA)(const OpList& ops) { return COTERIE_ISA::run_ops(ops); }

extern "C" int32_t CONCAT(route_, COTERIE_ISA)(const RouteArgs& args) {
  return COTERIE_ISA::routing::run_route(args);
}

extern "C" int32_t CONCAT(summarize_logits_, COTERIE_ISA)(const LogitsSummaryArgs& args) {
  return COTERIE_ISA::summarize_logits(args);
}
