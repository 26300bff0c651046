// Packs row-major weights into the layout that the kernels read. The layout is the same for all
// instruction sets.
#define COTERIE_ISA layout
#include "api.hpp"
#include "formats.hpp"

using namespace layout;

namespace {

// Reads the rows of a matrix [rows, k] four packed bytes at a time; columns past the end are zero.
struct Bf16Rows {
  using Format = Bf16;
  static constexpr bool SCALED = false;
  static constexpr int STEPS = 32;
  const uint16_t* row;
  int k;

  static size_t step_at(int step) { return size_t(step) * STEP; }
  static int steps(int k) { return padded(k, 2) / 2; }
  static size_t pair_bytes(int k) { return Format::panel_bytes(k); }
  static uint32_t zero_word() { return 0; }
  Bf16Rows at(int64_t n) const { return {row + n * k, k}; }
  uint32_t word(int step) const {
    uint32_t low = row[2 * step], high = 2 * step + 1 < k ? row[2 * step + 1] : 0;
    return low | high << 16;
  }
};

struct Fp32Rows {
  using Format = Fp32;
  static constexpr bool SCALED = false;
  static constexpr int STEPS = 32;
  const float* row;
  int k;

  static size_t step_at(int step) { return size_t(step) * STEP; }
  static int steps(int k) { return k; }
  static size_t pair_bytes(int k) { return Format::panel_bytes(k); }
  static uint32_t zero_word() { return 0; }
  Fp32Rows at(int64_t n) const { return {row + n * k, k}; }
  uint32_t word(int step) const { return load<uint32_t>(row + step); }
};

template <class IntFormat, int BITS>
struct IntRows {
  using Format = IntFormat;
  static constexpr bool SCALED = true;
  static constexpr int STEPS = IntFormat::STEPS;
  const int8_t* row;
  int k;

  static size_t step_at(int step) {
    return size_t(step / STEPS) * IntFormat::PANEL_GROUP + IntFormat::SCALES + size_t(step % STEPS) * STEP;
  }
  static int steps(int k) { return padded(k, IntFormat::GROUP) / IntFormat::GROUP * STEPS; }
  static size_t pair_bytes(int k) { return Format::panel_bytes(k); }
  static uint32_t zero_word() { return IntFormat::ZERO * 0x01010101u * (BITS == 4 ? 17 : 1); }
  IntRows at(int64_t n) const { return {row + n * k, k}; }
  uint32_t word(int step) const {
    uint32_t combined = zero_word();
    for (int part = 0; part < 8 / BITS; part++)
      for (int j = 0; j < 4; j++) {
        int i = step * IntFormat::PER_STEP + part * 4 + j;
        uint32_t stored = uint8_t(i < k ? row[i] : 0) & ((1u << BITS) - 1);
        // XOR with the zero point flips the sign bit, which adds the zero point.
        combined ^= stored << (8 * j + 4 * part);
      }
    return combined;
  }
};

// Packs sixteen rows from `first`, of which those before `last` exist, into one panel of a pair.
template <class Rows>
void pack_panel(const Rows& rows, int first, int last, uint8_t* panel) {
  int steps = Rows::steps(rows.k);
  // Each block of steps stays in L1 while its sixteen rows are written.
  for (int block = 0; block < steps; block += Rows::STEPS)
    for (int lane = 0; lane < LANES; lane++) {
      bool valid = first + lane < last;
      Rows row = rows.at(valid ? first + lane : 0);
      for (int s = block; s < min_int(block + Rows::STEPS, steps); s++)
        store(panel + Rows::step_at(s) + 4 * lane, valid ? row.word(s) : Rows::zero_word());
    }
}

template <class IntFormat>
void pack_scales(const uint16_t* scales, int groups, int first, int last, uint8_t* panel) {
  for (int g = 0; g < groups; g++)
    for (int lane = 0; lane < LANES; lane++) {
      int row = first + lane;
      uint16_t scale = row < last ? scales[int64_t(row) * groups + g] : 0;
      store(panel + g * IntFormat::PANEL_GROUP + 2 * lane, scale);
    }
}

// Packs one panel pair. Pairs are numbered through all experts; in an expert gate-up pairs precede
// down pairs.
template <class Rows>
void pack_pair(const PackArgs& p, int64_t pair) {
  using Format = typename Rows::Format;
  int gate_up_pairs = padded(p.width, LANES) / LANES, down_pairs = padded(p.hidden, 2 * LANES) / (2 * LANES);
  int64_t expert = pair / (gate_up_pairs + down_pairs);
  int at = int(pair % (gate_up_pairs + down_pairs));
  bool up = at < gate_up_pairs;
  int row = up ? at * LANES : (at - gate_up_pairs) * 2 * LANES, k = up ? p.hidden : p.width;
  size_t offset =
      up ? at * Format::panel_bytes(k)
         : gate_up_pairs * Format::panel_bytes(p.hidden) + (at - gate_up_pairs) * Format::panel_bytes(k);
  uint8_t* to = p.panels + size_t(expert) * p.stride + offset;
  int height = up ? 2 * p.width : p.hidden, second = row + (up ? p.width : LANES);
  int first_end = up ? p.width : p.hidden;
  Rows rows{static_cast<decltype(Rows::row)>(up ? p.gate_up : p.down) + expert * height * k, k};
  pack_panel(rows, row, first_end, to);
  pack_panel(rows, second, height, to + 64);
  if constexpr (Rows::SCALED) {
    int groups = padded(k, Format::GROUP) / Format::GROUP;
    const uint16_t* scales = (up ? p.gate_up_scales : p.down_scales) + expert * height * groups;
    pack_scales<Format>(scales, groups, row, first_end, to);
    pack_scales<Format>(scales, groups, second, height, to + 2 * LANES);
  }
}

template <class Rows>
void pack_all(const PackArgs& p) {
  int64_t pairs_per_expert = padded(p.width, LANES) / LANES + padded(p.hidden, 2 * LANES) / (2 * LANES);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t pair = 0; pair < p.experts * pairs_per_expert; pair++) pack_pair<Rows>(p, pair);
}

template <class Rows>
void pack_matrix(const PackMatrixArgs& p) {
  int pairs = padded(p.count, 2 * LANES) / (2 * LANES);
  Rows rows{static_cast<decltype(Rows::row)>(p.rows), p.k};
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int c = 0; c < 2 * pairs; c++) {
    uint8_t* pair = p.panels + size_t(c / 2) * Rows::pair_bytes(p.k);
    pack_panel(rows, LANES * c, p.count, pair + c % 2 * 64);
    if constexpr (Rows::SCALED) {
      using Format = typename Rows::Format;
      int groups = padded(p.k, Format::GROUP) / Format::GROUP;
      pack_scales<Format>(p.scales, groups, LANES * c, p.count, pair + c % 2 * 2 * LANES);
    }
  }
}

template <class Format>
size_t bytes(int hidden, int width) {
  return padded(width, LANES) / LANES * Format::panel_bytes(hidden) +
         padded(hidden, 2 * LANES) / (2 * LANES) * Format::panel_bytes(width);
}

}  // namespace

int32_t coterie_layout_version() { return COTERIE_LAYOUT; }

int32_t coterie_group_size(int32_t format) {
  return format == BF16 ? Bf16::GROUP : format == INT8 ? Int8::GROUP : Int4::GROUP;
}

size_t coterie_expert_bytes(int32_t format, int32_t hidden, int32_t width) {
  if (format == BF16) return bytes<Bf16>(hidden, width);
  if (format == FP32) return bytes<Fp32>(hidden, width);
  return format == INT8 ? bytes<Int8>(hidden, width) : bytes<Int4>(hidden, width);
}

void coterie_pack(const PackArgs* p) {
  if (p->format == BF16) return pack_all<Bf16Rows>(*p);
  if (p->format == FP32) return pack_all<Fp32Rows>(*p);
  if (p->format == INT8) return pack_all<IntRows<Int8, 8>>(*p);
  pack_all<IntRows<Int4, 4>>(*p);
}

size_t coterie_matrix_bytes(int32_t format, int32_t rows, int32_t k) {
  size_t pairs = size_t(padded(rows, 2 * LANES) / (2 * LANES));
  if (format == FP32) return pairs * Fp32Rows::pair_bytes(k);
  return pairs * (format == INT8 ? Int8::panel_bytes(k) : Bf16::panel_bytes(k));
}

void coterie_pack_matrix(const PackMatrixArgs* p) {
  if (p->format == FP32) return pack_matrix<Fp32Rows>(*p);
  if (p->format == INT8) return pack_matrix<IntRows<Int8, 8>>(*p);
  pack_matrix<Bf16Rows>(*p);
}

uint64_t coterie_read_experts(const ReadArgs* r) {
  constexpr int PREFETCH_BYTES = 2048;
  uint64_t checksum = 0;
  int64_t run_count = int64_t(r->count) * r->threads;
  size_t share = r->bytes / size_t(r->threads) / 256 * 256;
#pragma omp parallel for num_threads(r->threads) schedule(static) reduction(^ : checksum)
  for (int64_t run = 0; run < run_count; run++) {
    // Each thread reads its share of every expert, as the kernels do.
    const uint8_t* from = r->panels + size_t(r->slots[run % r->count]) * r->stride;
    from += size_t(run / r->count) * share;
    U accumulator[4] = {};
    for (size_t at = 0; at < share; at += 256) {
      UNROLL
      for (int i = 0; i < 4; i++) {
        prefetch(from + at + PREFETCH_BYTES + 64 * i);
        accumulator[i] ^= load<U>(from + at + 64 * i);
      }
    }
    U combined = accumulator[0] ^ accumulator[1] ^ accumulator[2] ^ accumulator[3];
    for (int i = 0; i < LANES; i++) checksum ^= combined[i];
  }
  return checksum;
}
