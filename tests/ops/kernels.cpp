// Runs every instruction set and format on many odd sizes, under the sanitizers; all must agree.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>
#include "api.hpp"

namespace {

std::mt19937 draw(1);

int between(int low, int high) { return low + int(draw() % unsigned(high - low + 1)); }
float noise() { return std::normal_distribution<float>()(draw); }

uint16_t half(float x) {
  uint32_t wide;
  __builtin_memcpy(&wide, &x, 4);
  return uint16_t(wide >> 16);
}

// Buffers have exactly the needed size, so that the sanitizers see reads past the end.
std::vector<uint8_t> pack_random(int format, int experts, int hidden, int width, size_t stride) {
  size_t ups = size_t(experts) * 2 * width, downs = size_t(experts) * hidden;
  int size = coterie_group_size(format);
  auto groups = [size](int k) { return size_t((k + size - 1) / size); };
  std::vector<uint16_t> up, down, up_scales(ups * groups(hidden)), down_scales(downs * groups(width));
  std::vector<int8_t> up_whole, down_whole;
  for (size_t i = 0; i < ups * hidden; i++) up.push_back(half(noise() / std::sqrt(float(hidden))));
  for (size_t i = 0; i < downs * width; i++) down.push_back(half(noise() / std::sqrt(float(width))));
  for (auto* scales : {&up_scales, &down_scales})
    for (auto& scale : *scales) scale = half(0.01f * noise());
  int largest = format == INT8 ? 127 : 7;
  for (size_t i = 0; i < up.size(); i++) up_whole.push_back(int8_t(between(-largest - 1, largest)));
  for (size_t i = 0; i < down.size(); i++) down_whole.push_back(int8_t(between(-largest - 1, largest)));
  std::vector<uint8_t> panels(experts * stride);
  bool plain = format == BF16;
  PackArgs packing{plain ? static_cast<void*>(up.data()) : up_whole.data(),
                   plain ? static_cast<void*>(down.data()) : down_whole.data(),
                   plain ? nullptr : up_scales.data(),
                   plain ? nullptr : down_scales.data(),
                   panels.data(),
                   stride,
                   experts,
                   hidden,
                   width,
                   2,
                   format};
  coterie_pack(&packing);
  return panels;
}

bool experts_agree(int format) {
  int experts = between(1, 6), hidden = between(1, 150), width = between(1, 90);
  int tokens = between(0, 40), k = between(1, 4), threads = between(1, 3), activation = between(0, 1);
  size_t stride = (coterie_expert_bytes(format, hidden, width) + 63) / 64 * 64;
  std::vector<uint8_t> panels = pack_random(format, experts, hidden, width, stride);
  std::vector<float> x, weights;
  std::vector<int64_t> ids, slot_of;
  for (int i = 0; i < tokens * hidden; i++) x.push_back(noise());
  for (int i = 0; i < tokens * k; i++) ids.push_back(between(-1, experts - 1));
  for (int i = 0; i < tokens * k; i++) weights.push_back(noise());
  for (int e = 0; e < experts; e++) slot_of.push_back(between(-1, experts - 1));
  std::vector<float> first;
  for (int isa = 0; coterie_isa_name(isa); isa++) {
    if (!coterie_isa_supported(isa)) continue;
    std::vector<float> out(size_t(tokens) * hidden, NAN);
    ExpertsArgs call{x.data(), ids.data(), slot_of.data(), weights.data(), out.data(), panels.data(), stride,
                     tokens,   k,          experts,        experts,        hidden,     width,         threads,
                     format,   0,          activation};
    if (coterie_run_experts(isa, &call) != STATUS_OK) return false;
    if (isa == 0) first = out;
    double error = 0, size = 1e-30;
    for (size_t i = 0; i < out.size(); i++) {
      error += std::pow(out[i] - first[i], 2);
      size += std::pow(first[i], 2);
    }
    if (!(error <= 1e-3 * size)) {
      std::printf("format %d, %s: %g\n", format, coterie_isa_name(isa), std::sqrt(error / size));
      return false;
    }
  }
  return true;
}

// The outputs of routing, which are identical under every instruction set.
struct RouteOutput {
  std::vector<int64_t> ids, vanilla_ids;
  std::vector<float> weights;
  std::vector<uint8_t> used;
  bool operator==(const RouteOutput& other) const {
    return ids == other.ids && vanilla_ids == other.vanilla_ids && used == other.used &&
           weights == other.weights;
  }
};

bool routes_agree() {
  int groups = 1 << between(0, 3), experts = groups * between(1, 40),
      k = between(1, experts < 20 ? experts : 20);
  int rows = between(1, 3), tokens = between(1, 40), all = rows * tokens;
  std::vector<float> logits, p, bias, vote_weight;
  std::vector<uint8_t> resident;
  for (int i = 0; i < all * experts; i++) logits.push_back(float(between(-4, 4)));
  for (float z : logits) p.push_back(1 / (1 + std::exp(-z)));
  for (int e = 0; e < experts; e++) bias.push_back(float(between(-2, 2)) / 4);
  for (int e = 0; e < experts; e++) resident.push_back(uint8_t(between(0, 1)));
  for (int i = 0; i < all; i++) vote_weight.push_back(i % tokens ? float(between(0, 2)) / 2 : 1);
  RouteArgs e{};
  e.logits = logits.data(), e.p = p.data(), e.stride = experts, e.sequences = rows, e.tokens = tokens;
  e.bias = between(0, 1) ? bias.data() : nullptr,
  e.vote_weight = between(0, 1) ? vote_weight.data() : nullptr;
  e.resident = between(0, 1) ? resident.data() : nullptr, e.resident_bonus = between(0, 2),
  e.max_vote_loss = 0.1;
  e.experts = experts, e.k = k, e.groups = groups, e.kept_groups = between(1, groups), e.scale = 1;
  e.vote = between(TOPK_PROB, MAX), e.protect = between(0, 1), e.renormalise = between(0, 1);
  e.union_size = between(0, 3) ? 0 : between(1, k), e.count = between(1, experts), e.min_experts = 1;
  e.mass = between(0, 1) ? 0.8 : 0;
  std::vector<int64_t> starts;
  for (int row = 0; row < rows; row++) starts.push_back(between(0, 100));
  if (between(0, 1)) {  // blocks admit experts
    e.kept_groups = groups, e.capacity = between(k, experts), e.block = between(1, 50);
    e.starts = between(0, 1) ? starts.data() : nullptr;
  }
  bool vanilla = !between(0, 4), splits = e.vote == WEIGHT || e.vote == MARGIN;
  RouteOutput first;
  for (int isa = 0; coterie_isa_name(isa); isa++) {
    if (!coterie_isa_supported(isa)) continue;
    size_t pairs = size_t(all) * k;
    RouteOutput c{std::vector<int64_t>(pairs), std::vector<int64_t>(pairs), std::vector<float>(pairs),
                  std::vector<uint8_t>(experts)};
    std::vector<float> ballots(logits.size()), sums(all);
    e.vanilla_ids = c.vanilla_ids.data(), e.ids = vanilla ? e.vanilla_ids : c.ids.data();
    e.weights = c.weights.data(), e.used = c.used.data(), e.ballots = nullptr, e.sums = nullptr;
    if (splits && !vanilla) {
      e.ballots = ballots.data();
      if (coterie_route(isa, &e) != STATUS_OK) return false;
      for (int t = 0; t < all; t++)
        for (int i = 0; i < experts; i++) sums[t] += ballots[size_t(t) * experts + i];
      e.sums = sums.data();
    }
    if (coterie_route(isa, &e) != STATUS_OK) return false;
    if (isa == 0) first = c;
    if (!(c == first)) {
      std::printf("routing, %s\n", coterie_isa_name(isa));
      return false;
    }
  }
  logits[between(0, all * experts - 1)] = INFINITY;
  return coterie_route(0, &e) == NOT_FINITE;
}

// Whether the results of all instruction sets equal those of the first, to rounding.
template <class Make>
bool same_on_all_isas(const char* what, Make make) {
  std::vector<float> first;
  for (int isa = 0; coterie_isa_name(isa); isa++) {
    if (!coterie_isa_supported(isa)) continue;
    std::vector<float> result = make(isa);
    if (isa == 0) first = result;
    double error = 0, size = 1e-30;
    for (size_t i = 0; i < result.size(); i++) {
      error += std::pow(result[i] - first[i], 2);
      size += std::pow(first[i], 2);
    }
    if (!(error <= 1e-3 * size)) {
      std::printf("%s, %s: %g\n", what, coterie_isa_name(isa), std::sqrt(error / size));
      return false;
    }
  }
  return true;
}

std::vector<uint16_t> halves(size_t count) {
  std::vector<uint16_t> result(count);
  for (auto& x : result) x = half(noise());
  return result;
}

std::vector<float> to_floats(const std::vector<uint16_t>& halves) {
  std::vector<float> result;
  for (uint32_t x : halves) {
    x <<= 16;
    float wide;
    __builtin_memcpy(&wide, &x, 4);
    result.push_back(wide);
  }
  return result;
}

// Runs the operations in one call; returns whether that succeeded.
template <class... OpTypes>
bool run_ops(int isa, int threads, const OpTypes&... ops) {
  const Op op_array[] = {ops...};
  OpList call{op_array, int32_t(sizeof...(ops)), threads};
  return coterie_run_ops(isa, &call) == STATUS_OK;
}

bool products_agree() {
  int tokens = between(0, 40), k = between(1, 90), rows = between(1, 100), threads = between(1, 3);
  bool wide = between(0, 1), x_is_bf16 = between(0, 1);
  std::vector<uint16_t> weight = halves(size_t(rows) * k), x = halves(size_t(tokens) * k);
  std::vector<float> wide_weight = to_floats(weight), wide_x = to_floats(x);
  std::vector<float> residual = to_floats(halves(size_t(tokens) * rows));
  int format = wide ? FP32 : BF16;
  std::vector<uint8_t> panels(coterie_matrix_bytes(format, rows, k));
  const void* from = wide ? static_cast<void*>(wide_weight.data()) : weight.data();
  PackMatrixArgs packing{from, panels.data(), rows, k, threads, format};
  coterie_pack_matrix(&packing);
  const void* x_data = x_is_bf16 ? static_cast<void*>(x.data()) : wide_x.data();
  return same_on_all_isas("product", [&](int isa) {
    std::vector<float> out(size_t(tokens) * rows, NAN);
    std::vector<uint16_t> narrow(out.size());
    for (int out_is_bf16 : {1, 0}) {
      void* to = out_is_bf16 ? static_cast<void*>(narrow.data()) : out.data();
      const float* added = out_is_bf16 ? nullptr : residual.data();
      MatmulArgs product{x_data, panels.data(), added, to, tokens, k, rows, format, x_is_bf16, out_is_bf16};
      if (!run_ops(isa, threads, Op{&product, MATMUL})) out.assign(out.size(), NAN);
    }
    return out;
  });
}

bool attention_agrees() {
  int rows = between(1, 2), width = between(1, 35), kv_heads = between(1, 3), dim = 2 * between(1, 40);
  int heads = kv_heads * between(1, 3), rotary_half = between(1, dim / 2), length = width + between(0, 60);
  int threads = between(1, 3);
  size_t tokens = size_t(rows) * width, row_size = size_t(kv_heads) * length * dim;
  std::vector<uint16_t> qkv = halves(tokens * (heads + 2 * kv_heads) * dim), norm = halves(dim);
  std::vector<uint16_t> keys = halves(rows * row_size), values = halves(rows * row_size);
  std::vector<float> cos(tokens * rotary_half), sin(cos.size());
  for (size_t i = 0; i < cos.size(); i++) cos[i] = std::cos(float(i)), sin[i] = std::sin(float(i));
  std::vector<int64_t> positions, cache_rows;
  std::vector<int32_t> limits;
  for (int row = 0; row < rows; row++) {
    int start = between(0, length - width);
    cache_rows.push_back(rows - 1 - row);
    for (int i = 0; i < width; i++) {
      positions.push_back(start + i);
      limits.push_back(between(1, length + 9));  // also past the last key
    }
  }
  return same_on_all_isas("attention", [&](int isa) {
    std::vector<uint16_t> out(tokens * heads * dim);
    AttentionArgs call{qkv.data(),
                       norm.data(),
                       norm.data(),
                       cos.data(),
                       sin.data(),
                       positions.data(),
                       cache_rows.data(),
                       limits.data(),
                       keys.data(),
                       values.data(),
                       out.data(),
                       row_size,
                       size_t(length) * dim,
                       1e-6f,
                       0.2f,
                       rows,
                       width,
                       heads,
                       kv_heads,
                       dim,
                       rotary_half,
                       length,
                       rows,
                       length};
    if (!run_ops(isa, threads, Op{&call, ATTENTION})) return std::vector<float>{NAN};
    return to_floats(out);
  });
}

bool rows_agree() {
  int rows = between(0, 9), width = between(1, 100), threads = between(1, 3);
  std::vector<uint16_t> x = halves(size_t(rows) * width), weight = halves(width);
  std::vector<float> logits = to_floats(x);
  return same_on_all_isas("rows", [&](int isa) {
    std::vector<uint16_t> sum(x.size()), both(2 * x.size()), out(x.size());
    std::vector<int64_t> best(rows), unmasked(rows);
    std::vector<float> total(rows);
    RmsNormArgs norm_args{x.data(), nullptr, weight.data(), nullptr, both.data(), 1e-6f, rows, width};
    RmsNormArgs second{x.data(), both.data(), weight.data(), sum.data(), both.data() + x.size(),
                       1e-6f,    rows,        width};
    SiluMulArgs silu_args{both.data(), out.data(), rows, width};
    LogitsSummaryArgs summary_args{logits.data(), best.data(), unmasked.data(),       total.data(),
                                   rows,          width,       between(0, width - 1), threads};
    Op ops[] = {{&norm_args, RMS_NORM}, {&second, RMS_NORM}, {&silu_args, SILU_MUL}};
    if (!run_ops(isa, threads, ops[0], ops[1], ops[2]) || coterie_summarize_logits(isa, &summary_args))
      return std::vector<float>{NAN};
    std::vector<float> result = to_floats(out);
    result.insert(result.end(), total.begin(), total.end());
    result.insert(result.end(), best.begin(), best.end());
    return result;
  });
}

bool sums_agree() {
  std::vector<uint8_t> bytes(size_t(between(0, 3000)));  // exactly the summed size
  for (auto& byte : bytes) byte = uint8_t(draw());
  uint32_t before = draw(), true_sum = ~before, sum = before;
  for (uint8_t byte : bytes)
    for (int bit = 0; bit < 8; bit++) {
      bool odd = (true_sum ^ byte >> bit) & 1;
      true_sum = odd ? true_sum >> 1 ^ 0xEDB88320 : true_sum >> 1;
    }
  bool same = coterie_crc32(bytes.data(), bytes.size(), &sum) != STATUS_OK || sum == ~true_sum;
  if (!same) std::printf("the checksum of %zu bytes differs\n", bytes.size());
  return same;
}

}  // namespace

// The argument is the number of rounds (default 300).
int main(int count, char** arguments) {
  int rounds = count > 1 ? std::atoi(arguments[1]) : 300;
  for (int i = 0; i < rounds; i++)
    if (!products_agree() || !attention_agrees() || !rows_agree() || !sums_agree()) return 1;
  for (int i = 0; i < 3 * rounds; i++)
    if (!routes_agree()) return 1;
  for (int i = 0; i < rounds; i++)
    if (!experts_agree(i % 3)) return 1;
  return 0;
}
