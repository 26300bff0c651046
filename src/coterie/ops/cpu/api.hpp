// What crosses the border: plain C, no torch, no Python. `library.py` writes it down a second time.
#pragma once
#include <stddef.h>
#include <stdint.h>

#define COTERIE_ABI 5
#define COTERIE_LAYOUT 1  // of panels; `panels.py` has it too, and says what the bytes are
#define COTERIE_API extern "C" __attribute__((visibility("default")))

enum Format : int32_t { BF16 = 0, INT8 = 1, INT4 = 2, FP32 = 3 };

// One layer's experts over the tokens routed to them.
struct ExpertsArgs {
  const void* x;           // [tokens, hidden], float or bf16
  const int64_t* ids;      // [tokens, k] experts, -1 = none
  const int64_t* slot_of;  // [experts], -1 = absent
  const float* weights;    // [tokens, k]
  float* out;              // [tokens, hidden], written whole
  const uint8_t* panels;   // slots, `stride` bytes apart
  size_t stride;
  int32_t tokens, k, experts, slots, hidden, width, threads, format, x_is_bf16;
};

// The bytes of some experts, read and nothing else: the limit that a kernel is held against.
struct ReadArgs {
  const uint8_t* panels;
  const int64_t* slots;  // [count]
  size_t stride, bytes;  // `bytes` of each
  int32_t count, threads;
};

// Experts from rows as checkpoints have them to panels as the kernels read them.
struct PackArgs {
  const void* gate_up;             // [experts, 2 width, hidden]: bf16, or whole numbers in int8
  const void* down;                // [experts, hidden, width]
  const uint16_t* gate_up_scales;  // [experts, 2 width, groups of hidden] in bf16; null for bf16
  const uint16_t* down_scales;     // [experts, hidden, groups of width]
  uint8_t* panels;                 // the first expert's; the next ones lie `stride` bytes apart
  size_t stride;
  int32_t experts, hidden, width, threads, format;
};

// A matrix from rows to panels: couples of 2 x 16 rows, one after the other.
struct PackMatrixArgs {
  const void* rows;  // [count, k], bf16 or float as the format says
  uint8_t* panels;
  int32_t count, k, threads, format;  // BF16 or FP32
};

// All tokens times one matrix.
struct MatmulArgs {
  const void* x;          // [tokens, k], float or bf16
  const uint8_t* panels;  // of [rows, k]
  const float* residual;    // [tokens, rows], added to it before it is rounded; or null
  void* out;              // [tokens, rows], float or bf16, written whole
  int32_t tokens, k, rows, format, x_is_bf16, out_is_bf16;
};

// Attention of a window: queries, keys and values of all its tokens, normed and turned here; keys and
// values are written by position first.
struct AttentionArgs {
  const uint16_t* qkv;                      // [rows, width, heads + 2 kv_heads, dim], bf16 as all here
  const uint16_t *query_norm, *key_norm;    // [dim]
  const float *cos, *sin;                   // [rows, width, half]
  const int64_t *positions, *cache_rows;        // [rows, width]; [rows]: which rows of the cache
  const int32_t* limits;                    // [rows, width]: keys before that position and `reach`
  uint16_t *keys, *values;                  // [.., kv_heads, length, dim], strides in numbers
  uint16_t* out;                            // [rows, width, heads, dim]
  size_t row_stride, head_stride;
  float epsilon, scale;
  int32_t rows, width, heads, kv_heads, dim, rotary_half, kv_length;
};

enum Vote : int32_t { MASKED = 0, WEIGHT = 1, COUNT = 2, FULL = 3, MARGIN = 4, MAX = 5 };

// One layer's selection, from probabilities to weights; T = sequences * tokens.
struct RouteArgs {
  const float* logits;      // [T, experts]
  const float* p;           // [T, experts], rows `stride` floats apart
  const float* bias;        // [experts], or null
  const float* vote_weight;       // [T], or null: everybody 1
  const uint8_t* resident;  // [experts], or null
  int64_t* ids;             // [T, k], -1 = none; the same as `own`: the unmodified model
  int64_t* vanilla_ids;             // [T, k]
  float* weights;           // [T, k]
  uint8_t* used;            // [experts]
  // Of a vote that is split (WEIGHT, MARGIN) the caller adds up the shares: without `sums` a call
  // writes `ballots` and `own` and no more, with them it goes on from there.
  float* ballots;     // [T, experts], or null
  const float* sums;  // [T], or null
  // Of coresets that rows had before (none: no expert), each stays while it holds 1 - `drift` of what a
  // fresh one holds of the plain votes, in which a token's say is `say`, and everybody's 1 in a row of
  // silent ones. Without `before` nothing is asked or written.
  const uint8_t* previous_coresets;  // [sequences, experts], or null
  const float* reuse_vote_weight;       // [T], or null: everybody 1
  uint8_t* coresets;      // [sequences, experts]
  uint8_t* reused;        // [sequences]
  double* vote_loss;           // [sequences]
  double mass, lam, eps, reuse_tolerance;
  float scale, epsilon;
  int32_t stride, sequences, tokens, experts, k, groups, kept_groups, renormalise, biased;
  int32_t vote, union_size, count, least, protect, most;
};

constexpr int MAX_GROUPS = 64;

// Rows of bf16, each over its root mean square, times a weight. With `more`, rows of x + more are.
struct RmsNormArgs {
  const uint16_t *x, *residual, *weight;  // [rows, width]; the same, or null; [width]
  uint16_t *sum, *out;                // [rows, width]: x + more, rounded, or null; its norm
  float epsilon;
  int32_t rows, width;
};

// silu of the first half of rows of bf16 times the second.
struct SiluMulArgs {
  const uint16_t* gate_up;  // [rows, 2 width]
  uint16_t* out;         // [rows, width]
  int32_t rows, width;
};

enum OpKind : int32_t { PRODUCT = 0, ATTENTION = 1, NORM = 2, GATE = 3 };

// A work and what it is.
struct Op {
  const void* args;
  int32_t kind;
};

constexpr int MAX_OPS = 8;

// Works one after the other: what one writes, the next ones may read.
struct OpList {
  const Op* ops;
  int32_t count, threads;
};

// What rows of logits say: the place of the greatest, the first of equals; the same without place
// `mask`; the log of the sum of e**logits. -1 is no place.
struct LogitsSummaryArgs {
  const float* logits;  // [rows, width]
  int64_t *best, *unmasked;
  float* logsumexp;
  int32_t rows, width, mask_id, threads;
};

enum Status : int32_t {
  STATUS_OK = 0,
  NO_SUCH_ISA = 1,
  NO_MEMORY = 2,
  NO_SUCH_EXPERT = 3,
  NO_SUCH_ROUTER = 4,
  NOT_FINITE = 5,
  TOO_MANY_OPS = 6
};

COTERIE_API int32_t coterie_abi_version();
COTERIE_API int32_t coterie_layout_version();
COTERIE_API const char* coterie_isa_name(int32_t index);     // from plainest to best; null past the last
COTERIE_API int32_t coterie_isa_supported(int32_t index);    // whether this machine has it
COTERIE_API int32_t coterie_group_size(int32_t format);      // columns that share a scale
COTERIE_API size_t coterie_expert_bytes(int32_t format, int32_t hidden, int32_t width);
COTERIE_API void coterie_pack(const PackArgs* args);
COTERIE_API uint64_t coterie_read_experts(const ReadArgs* args);  // of which something is made
COTERIE_API int32_t coterie_run_experts(int32_t isa, const ExpertsArgs* args);
COTERIE_API size_t coterie_matrix_bytes(int32_t format, int32_t rows, int32_t k);
COTERIE_API void coterie_pack_matrix(const PackMatrixArgs* args);
COTERIE_API int32_t coterie_run_ops(int32_t isa, const OpList* ops);
COTERIE_API int32_t coterie_route(int32_t isa, const RouteArgs* args);
COTERIE_API int32_t coterie_summarize_logits(int32_t isa, const LogitsSummaryArgs* args);
// zlib's CRC-32, going on from `sum`; NO_SUCH_ISA without AVX512 and products without carries.
COTERIE_API int32_t coterie_crc32(const uint8_t* bytes, size_t size, uint32_t* sum);
