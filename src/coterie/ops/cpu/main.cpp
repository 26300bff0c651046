// Which instruction sets there are, and the way to each.
#include "api.hpp"

extern "C" {
int32_t run_portable(const Call&);
int32_t multiply_portable(const Product&);
int32_t route_portable(const Election&);
int32_t run_avx2(const Call&);
int32_t multiply_avx2(const Product&);
int32_t route_avx2(const Election&);
int32_t run_avx512(const Call&);
int32_t multiply_avx512(const Product&);
int32_t route_avx512(const Election&);
int32_t run_avx512bf16(const Call&);
int32_t multiply_avx512bf16(const Product&);
int32_t route_avx512bf16(const Election&);
}

namespace {

struct Isa {
  const char* name;
  bool (*runs)();
  int32_t (*run)(const Call&);
  int32_t (*multiply)(const Product&);
  int32_t (*route)(const Election&);
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
    {"portable", [] { return true; }, run_portable, multiply_portable, route_portable},
#ifdef __x86_64__
    {"avx2", has_avx2, run_avx2, multiply_avx2, route_avx2},
    {"avx512", has_avx512, run_avx512, multiply_avx512, route_avx512},
    {"avx512bf16", has_avx512bf16, run_avx512bf16, multiply_avx512bf16, route_avx512bf16},
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

int32_t coterie_multiply(int32_t isa, const Product* product) {
  return coterie_isa_runs(isa) ? ISAS[isa].multiply(*product) : NO_SUCH_ISA;
}

int32_t coterie_route(int32_t isa, const Election* election) {
  return coterie_isa_runs(isa) ? ISAS[isa].route(*election) : NO_SUCH_ISA;
}
