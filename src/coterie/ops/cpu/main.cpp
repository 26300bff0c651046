// Which instruction sets there are, and the way to each.
#include "api.hpp"

#define DECLARED(isa)                   \
  int32_t run_##isa(const Call&);       \
  int32_t follow_##isa(const Chain&);   \
  int32_t route_##isa(const Election&); \
  int32_t survey_##isa(const Surveying&);
#define NAMED(isa) \
  run_##isa, follow_##isa, route_##isa, survey_##isa

extern "C" {
DECLARED(portable)
DECLARED(avx2)
DECLARED(avx512)
DECLARED(avx512bf16)
}

namespace {

struct Isa {
  const char* name;
  bool (*runs)();
  int32_t (*run)(const Call&);
  int32_t (*follow)(const Chain&);
  int32_t (*route)(const Election&);
  int32_t (*survey)(const Surveying&);
};

#ifdef __x86_64__
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

const Isa ISAS[] = {
    {"portable", [] { return true; }, NAMED(portable)},
#ifdef __x86_64__
    {"avx2", has_avx2, NAMED(avx2)},
    {"avx512", has_avx512, NAMED(avx512)},
    {"avx512bf16", has_avx512bf16, NAMED(avx512bf16)},
#endif
};
constexpr int32_t COUNT = sizeof ISAS / sizeof *ISAS;

bool known(int32_t index) { return index >= 0 && index < COUNT; }

}  // namespace

int32_t coterie_abi() { return COTERIE_ABI; }

const char* coterie_isa(int32_t index) { return known(index) ? ISAS[index].name : nullptr; }

int32_t coterie_isa_runs(int32_t index) { return known(index) && ISAS[index].runs(); }

int32_t coterie_run_experts(int32_t isa, const Call* call) {
  return coterie_isa_runs(isa) ? ISAS[isa].run(*call) : NO_SUCH_ISA;
}

int32_t coterie_follow(int32_t isa, const Chain* chain) {
  return coterie_isa_runs(isa) ? ISAS[isa].follow(*chain) : NO_SUCH_ISA;
}

int32_t coterie_route(int32_t isa, const Election* election) {
  return coterie_isa_runs(isa) ? ISAS[isa].route(*election) : NO_SUCH_ISA;
}

int32_t coterie_survey(int32_t isa, const Surveying* surveying) {
  return coterie_isa_runs(isa) ? ISAS[isa].survey(*surveying) : NO_SUCH_ISA;
}
