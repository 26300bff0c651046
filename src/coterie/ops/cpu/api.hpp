// The C interface of the kernels: no torch, no Python. `library.py` mirrors these structs for
// ctypes, so the order of the fields is part of the interface.
#pragma once
#include <stddef.h>
#include <stdint.h>

#define COTERIE_ABI 10
#define COTERIE_LAYOUT 1  // version of the packed layout; described in `ops/packed_layout.py`
#define COTERIE_API extern "C" __attribute__((visibility("default")))

enum Format : int32_t { BF16 = 0, INT8 = 1, INT4 = 2, FP32 = 3 };

// Runs one layer's experts on the tokens routed to them.
struct ExpertsArgs {
  const void* x;           // [tokens, hidden], float or bf16
  const int64_t* ids;      // [tokens, k] expert of each choice, -1 = none
  const int64_t* slot_of;  // [experts] slot in `panels`, -1 = absent
  const float* weights;    // [tokens, k]
  float* out;              // [tokens, hidden], fully overwritten
  const uint8_t* panels;   // packed experts by slot, `stride` bytes apart
  size_t stride;
  int32_t tokens, k, experts, slots, hidden, width, threads, format, x_is_bf16;
  int32_t activation;  // of the gate: 0 silu, 1 gelu in its tanh form
};

// Reads the bytes of some experts and computes nothing: the memory bandwidth limit of the expert
// kernel.
struct ReadArgs {
  const uint8_t* panels;
  const int64_t* slots;  // [count]
  size_t stride, bytes;  // distance between experts; bytes to read of each
  int32_t count, threads;
};

// Packs experts from the row-major matrices of a checkpoint into the layout that the kernels read.
struct PackArgs {
  const void* gate_up;             // [experts, 2 width, hidden]: bf16, or integers stored as int8
  const void* down;                // [experts, hidden, width]
  const uint16_t* gate_up_scales;  // [experts, 2 width, hidden / group] in bf16; null for bf16 weights
  const uint16_t* down_scales;     // [experts, hidden, width / group]
  uint8_t* panels;                 // output; experts are `stride` bytes apart
  size_t stride;
  int32_t experts, hidden, width, threads, format;
};

// Packs one matrix into consecutive panel pairs of 2 x 16 rows.
struct PackMatrixArgs {
  const void* rows;        // [count, k]: bf16, float, or integers stored as int8, by `format`
  const uint16_t* scales;  // [count, k / group] in bf16; null for floats
  uint8_t* panels;
  int32_t count, k, threads, format;  // BF16, INT8 or FP32
};

// out = x times the transpose of one packed matrix.
struct MatmulArgs {
  const void* x;          // [tokens, k], float or bf16
  const uint8_t* panels;  // packed [rows, k]
  const float* residual;  // [tokens, rows], added before rounding; or null
  void* out;              // [tokens, rows], float or bf16, fully overwritten
  int32_t tokens, k, rows, format, x_is_bf16, out_is_bf16;
};

// Attention for a window of tokens. Queries and keys are RMS-normalised and rotated (RoPE); keys
// and values are written into the cache by position before any query reads them.
struct AttentionArgs {
  const uint16_t* qkv;                    // [rows, width, heads + 2 kv_heads, dim]; all tensors here are bf16
  const uint16_t *query_norm, *key_norm;  // [dim]
  const float *cos, *sin;                 // [rows, width, rotary_half]
  const int64_t *positions, *cache_rows;  // [rows, width]; [rows]: cache row of each batch row
  const int32_t* limits;                  // [rows, width]: a query sees keys before min(limit, kv_length)
  uint16_t *keys, *values;                // [cache rows, kv_heads, length, dim]; strides in elements
  uint16_t* out;                          // [rows, width, heads, dim]
  size_t row_stride, head_stride;
  float epsilon, scale;
  int32_t rows, width, heads, kv_heads, dim, rotary_half, kv_length;
  int32_t cache_size, capacity;  // rows of the cache; positions of each
};

enum Vote : int32_t { TOPK_PROB = 0, WEIGHT = 1, COUNT = 2, FULL = 3, MARGIN = 4, MAX = 5 };

// Routes the tokens of one layer, from probabilities to expert weights. T = sequences * tokens.
struct RouteArgs {
  const float* logits;       // [T, experts]
  const float* p;            // [T, experts] probabilities, rows `stride` floats apart
  const float* bias;         // [experts], or null
  const float* vote_weight;  // [T] weight of each token's vote; null = all 1
  const uint8_t* resident;   // [experts] experts in fast memory, or null
  // With a capacity, each block of `block` positions admits that many experts; its tokens choose
  // among these, and a coreset is elected among those of any block of the sequence.
  const int64_t* starts;  // [sequences] position of the first token, or null: all 0
  int64_t* ids;          // [T, k], -1 = none; the same pointer as `vanilla_ids` to run the unmodified model
  int64_t* vanilla_ids;  // [T, k] top-k of the unmodified model
  float* weights;        // [T, k]
  uint8_t* used;         // [experts] experts with at least one token
  // WEIGHT and MARGIN votes are normalised per token, and the caller computes the sums (torch's
  // order of addition decides the last bit). A first call without `sums` writes only `ballots` and
  // `vanilla_ids`; a second call with `sums` does the rest.
  float* ballots;     // [T, experts] unnormalised votes, or null
  const float* sums;  // [T] sum of each row of `ballots`, or null
  // A sequence reuses its previous coreset while that holds at least (1 - reuse_tolerance) of the
  // votes that the new coreset holds. These votes are top-k probabilities times
  // `reuse_vote_weight`; if all weights of a sequence are 0, they count as 1. An empty previous
  // coreset is never reused. With `previous_coresets` null the next five pointers are neither read
  // nor written.
  const uint8_t* previous_coresets;  // [sequences, experts], or null
  const float* reuse_vote_weight;    // [T], or null: all 1
  uint8_t* coresets;                 // [sequences, experts] output: the coresets in use
  uint8_t* reused;                   // [sequences] output: whether the previous coreset is reused
  double* vote_loss;                 // [sequences] output: share of votes lost by reuse
  double mass, resident_bonus, max_vote_loss, reuse_tolerance;
  float scale, epsilon;
  int32_t stride, sequences, tokens, experts, k, groups, kept_groups, renormalise, biased;
  int32_t vote, union_size, count, min_experts, protect, max_experts;
  int32_t capacity, block;  // 0: no capacity
};

constexpr int MAX_GROUPS = 64;  // groups of experts: one bit each in a 64-bit mask

// RMS norm of bf16 rows. With `residual`, the norm of x + residual.
struct RmsNormArgs {
  const uint16_t *x, *residual, *weight;  // [rows, width]; [rows, width] or null; [width]
  uint16_t *sum, *out;                    // [rows, width]: rounded x + residual (null without); its norm
  float epsilon;
  int32_t rows, width;
};

// silu(first half) * second half of bf16 rows.
struct SiluMulArgs {
  const uint16_t* gate_up;  // [rows, 2 width]
  uint16_t* out;            // [rows, width]
  int32_t rows, width;
};

enum OpKind : int32_t { MATMUL = 0, ATTENTION = 1, RMS_NORM = 2, SILU_MUL = 3 };

// One operation: its kind and the matching argument struct.
struct Op {
  const void* args;
  int32_t kind;
};

constexpr int MAX_OPS = 8;

// Operations that run in order; each may read what earlier ones wrote.
struct OpList {
  const Op* ops;
  int32_t count, threads;
};

// Per row of logits: argmax (lowest index on ties), argmax without `mask_id`, and logsumexp. An
// argmax is -1 if no logit is greater than minus infinity.
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
  UNSUPPORTED_ROUTER = 4,
  NOT_FINITE = 5,
  TOO_MANY_OPS = 6,
  NO_SUCH_POSITION = 7
};

COTERIE_API int32_t coterie_abi_version();
COTERIE_API int32_t coterie_layout_version();
COTERIE_API const char* coterie_isa_name(int32_t index);   // slowest first; null past the last
COTERIE_API int32_t coterie_isa_supported(int32_t index);  // whether this CPU supports it
COTERIE_API int32_t coterie_group_size(int32_t format);    // columns that share one scale
COTERIE_API size_t coterie_expert_bytes(int32_t format, int32_t hidden, int32_t width);
COTERIE_API void coterie_pack(const PackArgs* args);
COTERIE_API uint64_t coterie_read_experts(const ReadArgs* args);  // a checksum, to keep the reads
COTERIE_API int32_t coterie_run_experts(int32_t isa, const ExpertsArgs* args);
COTERIE_API size_t coterie_matrix_bytes(int32_t format, int32_t rows, int32_t k);
COTERIE_API void coterie_pack_matrix(const PackMatrixArgs* args);
COTERIE_API int32_t coterie_run_ops(int32_t isa, const OpList* ops);
COTERIE_API int32_t coterie_route(int32_t isa, const RouteArgs* args);
COTERIE_API int32_t coterie_summarize_logits(int32_t isa, const LogitsSummaryArgs* args);
// zlib's CRC-32, continued from `sum`. Returns NO_SUCH_ISA without AVX512 and carry-less
// multiplication.
COTERIE_API int32_t coterie_crc32(const uint8_t* bytes, size_t size, uint32_t* sum);
