// The instruction sets, and dispatch to the kernels of each.
#include "api.hpp"

#define DECLARE_ISA(isa)                         \
  int32_t run_experts_##isa(const ExpertsArgs&); \
  int32_t run_ops_##isa(const OpList&);          \
  int32_t route_##isa(const RouteArgs&);         \
  int32_t summarize_logits_##isa(const LogitsSummaryArgs&);
#define ISA_FUNCTIONS(isa) run_experts_##isa, run_ops_##isa, route_##isa, summarize_logits_##isa

extern "C" {
DECLARE_ISA(portable)
DECLARE_ISA(avx2)
DECLARE_ISA(avx512)
DECLARE_ISA(avx512bf16)
}

namespace {

struct Isa {
  const char* name;
  bool (*is_supported)();
  int32_t (*run_experts)(const ExpertsArgs&);
  int32_t (*run_ops)(const OpList&);
  int32_t (*route)(const RouteArgs&);
  int32_t (*summarize_logits)(const LogitsSummaryArgs&);
};

#ifdef __x86_64__
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
#endif

const Isa ISAS[] = {
    {"portable", [] { return true; }, ISA_FUNCTIONS(portable)},
#ifdef __x86_64__
    {"avx2", has_avx2, ISA_FUNCTIONS(avx2)},
    {"avx512", has_avx512, ISA_FUNCTIONS(avx512)},
    {"avx512bf16", has_avx512bf16, ISA_FUNCTIONS(avx512bf16)},
#endif
};
constexpr int32_t ISA_COUNT = sizeof ISAS / sizeof *ISAS;

bool is_valid(int32_t index) { return index >= 0 && index < ISA_COUNT; }

}  // namespace

int32_t coterie_abi_version() { return COTERIE_ABI; }

const char* coterie_isa_name(int32_t index) { return is_valid(index) ? ISAS[index].name : nullptr; }

int32_t coterie_isa_supported(int32_t index) { return is_valid(index) && ISAS[index].is_supported(); }

int32_t coterie_run_experts(int32_t isa, const ExpertsArgs* args) {
  return coterie_isa_supported(isa) ? ISAS[isa].run_experts(*args) : NO_SUCH_ISA;
}

int32_t coterie_run_ops(int32_t isa, const OpList* ops) {
  return coterie_isa_supported(isa) ? ISAS[isa].run_ops(*ops) : NO_SUCH_ISA;
}

int32_t coterie_route(int32_t isa, const RouteArgs* args) {
  return coterie_isa_supported(isa) ? ISAS[isa].route(*args) : NO_SUCH_ISA;
}

int32_t coterie_summarize_logits(int32_t isa, const LogitsSummaryArgs* args) {
  return coterie_isa_supported(isa) ? ISAS[isa].summarize_logits(*args) : NO_SUCH_ISA;
}
