// zlib's CRC-32, many bytes at a time, with carry-less multiplication.
//
// The bytes are the coefficients of a polynomial over GF(2); the checksum is its remainder modulo
// POLYNOMIAL. A block that lies D bits before another can be added to it after multiplication by
// x^D mod POLYNOMIAL. The sum so far is folded onto the next block this way, until 16 bytes remain
// that have the checksum of all bytes.
#include "api.hpp"

#ifdef __x86_64__
#include <immintrin.h>

namespace {

constexpr uint32_t POLYNOMIAL = 0xEDB88320;  // lowest power in the highest bit, as everywhere here
// An array of accumulators stays in registers only if the loops over it are unrolled.
#define UNROLL _Pragma("GCC unroll 4")

constexpr int PIECE = 16;  // bytes folded by one multiplication

constexpr uint32_t times_x(uint32_t p) { return p & 1 ? p >> 1 ^ POLYNOMIAL : p >> 1; }

// x^power mod POLYNOMIAL. Shifted, because the product of two bit-reflected numbers is one bit low.
constexpr int64_t factor(int power) {
  uint32_t p = 0x80000000;
  for (int i = 0; i < power; i++) p = times_x(p);
  return int64_t(uint64_t(p) << 1);
}

struct Table {
  uint32_t of[256];
  constexpr Table() : of{} {
    for (uint32_t byte = 0; byte < 256; byte++) {
      of[byte] = byte;
      for (int i = 0; i < 8; i++) of[byte] = times_x(of[byte]);
    }
  }
};
constexpr Table TABLE;

uint32_t crc_by_byte(const uint8_t* bytes, size_t size, uint32_t sum) {
  for (size_t i = 0; i < size; i++) sum = TABLE.of[(sum ^ bytes[i]) & 255] ^ sum >> 8;
  return sum;
}

// The factors of both halves of a piece; the lower half precedes the upper by 64 bits.
#define FACTORS(bits) factor((bits) - 32), factor((bits) + 32)

#define PCLMUL_TARGET __attribute__((target("pclmul,sse4.1")))
#define AVX512_TARGET __attribute__((target("avx512f,avx512dq,vpclmulqdq,pclmul")))

PCLMUL_TARGET inline __m128i fold(__m128i sum, __m128i onto, __m128i by) {
  return _mm_xor_si128(
      onto, _mm_xor_si128(_mm_clmulepi64_si128(sum, by, 0x00), _mm_clmulepi64_si128(sum, by, 0x11)));
}

PCLMUL_TARGET inline __m128i load_piece(const uint8_t* from) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}

// The checksum of a folded sum followed by the last bytes.
PCLMUL_TARGET uint32_t reduce(__m128i sum, const uint8_t* bytes, size_t size) {
  const __m128i next = _mm_set_epi64x(FACTORS(128));
  for (; size >= PIECE; bytes += PIECE, size -= PIECE) sum = fold(sum, load_piece(bytes), next);
  uint8_t rest[PIECE];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(rest), sum);
  return crc_by_byte(bytes, size, crc_by_byte(rest, PIECE, 0));
}

AVX512_TARGET inline __m512i fold(__m512i sum, __m512i onto, __m512i by) {
  return _mm512_ternarylogic_epi64(onto, _mm512_clmulepi64_epi128(sum, by, 0x00),
                                   _mm512_clmulepi64_epi128(sum, by, 0x11), 0x96);
}

// The checksum of at least 256 bytes.
AVX512_TARGET uint32_t fold_all(const uint8_t* bytes, size_t size, uint32_t initial) {
  const __m512i fold_2048 = _mm512_broadcast_i64x2(_mm_set_epi64x(FACTORS(2048)));
  const __m512i next = _mm512_broadcast_i64x2(_mm_set_epi64x(FACTORS(512)));
  const __m128i last = _mm_set_epi64x(FACTORS(128));
  __m512i sums[4];
  for (int i = 0; i < 4; i++) sums[i] = _mm512_loadu_si512(bytes + 64 * i);
  sums[0] = _mm512_xor_si512(sums[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(int(initial))));
  for (bytes += 256, size -= 256; size >= 256; bytes += 256, size -= 256) {
    UNROLL
    for (int i = 0; i < 4; i++) sums[i] = fold(sums[i], _mm512_loadu_si512(bytes + 64 * i), fold_2048);
  }
  __m512i sum = sums[0];
  for (int i = 1; i < 4; i++) sum = fold(sum, sums[i], next);
  for (; size >= 64; bytes += 64, size -= 64) sum = fold(sum, _mm512_loadu_si512(bytes), next);
  __m128i one = _mm512_castsi512_si128(sum);
  one = fold(one, _mm512_extracti64x2_epi64(sum, 1), last);
  one = fold(one, _mm512_extracti64x2_epi64(sum, 2), last);
  one = fold(one, _mm512_extracti64x2_epi64(sum, 3), last);
  return reduce(one, bytes, size);
}

}  // namespace

int32_t coterie_crc32(const uint8_t* bytes, size_t size, uint32_t* sum) {
  bool supported = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("avx512f") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("vpclmulqdq");
  if (!supported) return NO_SUCH_ISA;
  *sum = ~(size < 256 ? crc_by_byte(bytes, size, ~*sum) : fold_all(bytes, size, ~*sum));
  return STATUS_OK;
}

#else

int32_t coterie_crc32(const uint8_t*, size_t, uint32_t*) { return NO_SUCH_ISA; }

#endif
