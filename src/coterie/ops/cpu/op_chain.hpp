// Runs several operations in one parallel region, because waking threads takes as long as a small
// operation. Included once per instruction set.
#pragma once
#include "attention.hpp"

namespace COTERIE_ISA {

static size_t scratch_bytes(const Op& op) {
  switch (op.kind) {
    case MATMUL: return scratch_bytes(*static_cast<const MatmulArgs*>(op.args));
    case ATTENTION: return scratch_bytes(*static_cast<const AttentionArgs*>(op.args));
    default: return 0;
  }
}

static void run_op(const Op& op, uint8_t* scratch, int* arrivals) {
  switch (op.kind) {
    case MATMUL: return multiply(*static_cast<const MatmulArgs*>(op.args), scratch);
    case ATTENTION: return fused_attention(*static_cast<const AttentionArgs*>(op.args), scratch, arrivals);
    case RMS_NORM: return rms_norm(*static_cast<const RmsNormArgs*>(op.args));
    case SILU_MUL: return silu_and_mul(*static_cast<const SiluMulArgs*>(op.args));
  }
}

static int32_t run_ops(const OpList& list) {
  static thread_local ScratchBuffer scratch;
  if (list.count > MAX_OPS) return TOO_MANY_OPS;
  size_t each = 0;
  for (int i = 0; i < list.count; i++) {
    const Op& op = list.ops[i];
    if (op.kind == ATTENTION && !is_inside_cache(*static_cast<const AttentionArgs*>(op.args)))
      return NO_SUCH_POSITION;
    size_t needed = scratch_bytes(op);
    each = needed > each ? needed : each;
  }
  each = (each + 4096) / 4096 * 4096;  // each thread's scratch starts on its own page
  uint8_t* memory = scratch.get(each * size_t(list.threads));
  if (!memory) return NO_MEMORY;
  int arrivals[2 * MAX_OPS] = {};
#pragma omp parallel num_threads(list.threads)
  {
    uint8_t* thread_memory = memory;
#ifdef _OPENMP
    thread_memory += each * size_t(omp_get_thread_num());
#endif
    for (int i = 0; i < list.count; i++) {
      if (i) barrier(arrivals + 2 * i);
      run_op(list.ops[i], thread_memory, arrivals + 2 * i + 1);
    }
  }
  return STATUS_OK;
}

}  // namespace COTERIE_ISA
