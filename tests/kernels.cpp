// Every instruction set, format and many odd sizes, for the sanitizers to watch; all must agree.
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

// As many bytes as needed and no more, so that reading past them is seen.
std::vector<uint8_t> packed(int format, int experts, int hidden, int width, size_t stride) {
  size_t ups = size_t(experts) * 2 * width, downs = size_t(experts) * hidden;
  int size = coterie_group(format);
  auto groups = [size](int k) { return size_t((k + size - 1) / size); };
  std::vector<uint16_t> up, down, up_scales(ups * groups(hidden)), down_scales(downs * groups(width));
  std::vector<int8_t> up_whole, down_whole;
  for (size_t i = 0; i < ups * hidden; i++) up.push_back(half(noise() / std::sqrt(float(hidden))));
  for (size_t i = 0; i < downs * width; i++) down.push_back(half(noise() / std::sqrt(float(width))));
  for (auto* scales : {&up_scales, &down_scales})
    for (auto& scale : *scales) scale = half(0.01f * noise());
  int most = format == INT8 ? 127 : 7;
  for (size_t i = 0; i < up.size(); i++) up_whole.push_back(int8_t(between(-most - 1, most)));
  for (size_t i = 0; i < down.size(); i++) down_whole.push_back(int8_t(between(-most - 1, most)));
  std::vector<uint8_t> panels(experts * stride);
  bool plain = format == BF16;
  Packing packing{plain ? static_cast<void*>(up.data()) : up_whole.data(),
                  plain ? static_cast<void*>(down.data()) : down_whole.data(),
                  plain ? nullptr : up_scales.data(),
                  plain ? nullptr : down_scales.data(),
                  panels.data(), stride, experts, hidden, width, 2, format};
  coterie_pack(&packing);
  return panels;
}

bool agree(int format) {
  int experts = between(1, 6), hidden = between(1, 150), width = between(1, 90);
  int tokens = between(0, 40), k = between(1, 4), threads = between(1, 3);
  size_t stride = (coterie_expert_bytes(format, hidden, width) + 63) / 64 * 64;
  std::vector<uint8_t> panels = packed(format, experts, hidden, width, stride);
  std::vector<float> x, weights;
  std::vector<int64_t> ids, slot_of;
  for (int i = 0; i < tokens * hidden; i++) x.push_back(noise());
  for (int i = 0; i < tokens * k; i++) ids.push_back(between(-1, experts - 1));
  for (int i = 0; i < tokens * k; i++) weights.push_back(noise());
  for (int e = 0; e < experts; e++) slot_of.push_back(between(-1, experts - 1));
  std::vector<float> first;
  for (int isa = 0; coterie_isa(isa); isa++) {
    if (!coterie_isa_runs(isa)) continue;
    std::vector<float> out(size_t(tokens) * hidden, NAN);
    Call call{x.data(), ids.data(), slot_of.data(), weights.data(), out.data(), panels.data(), stride,
              tokens, k, experts, experts, hidden, width, threads, format, 0};
    if (coterie_run_experts(isa, &call) != DONE) return false;
    if (isa == 0) first = out;
    double error = 0, size = 1e-30;
    for (size_t i = 0; i < out.size(); i++) {
      error += std::pow(out[i] - first[i], 2);
      size += std::pow(first[i], 2);
    }
    if (!(error <= 1e-3 * size)) {
      std::printf("format %d, %s: %g\n", format, coterie_isa(isa), std::sqrt(error / size));
      return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  for (int i = 0; i < 300; i++)
    if (!agree(i % 3)) return 1;
  return 0;
}
