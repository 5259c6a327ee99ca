/* int4 weights in the layout of torch's _weight_int4pack_mm_for_cpu to bfloat16, transposed: out[column][row].

   packed: [blocks][columns][32] bytes; byte i holds row i of a block of 64 in its low nibble, row i + 32 in its high one.
   scale, zero: float [columns / size][rows]; a weight is nibble * scale + zero, rounded to nearest even.
   Blocks `first` to `last` are done, so that several threads can share the work. */

#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#define WIDE(bytes) _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))
#endif

static uint16_t rounded(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

void unpack_int4(const uint8_t *restrict packed, const float *restrict scale, const float *restrict zero,
                 uint16_t *restrict out, int64_t first, int64_t last, int64_t columns, int64_t size, int64_t rows) {
  for (int64_t b = first; b < last; b++)
    for (int64_t k = 0; k < columns; k++) {
      const uint8_t *p = packed + (b * columns + k) * 32;
      const float *s = scale + k / size * rows + b * 64, *z = zero + k / size * rows + b * 64;
      uint16_t *o = out + k * rows + b * 64;
#ifdef __AVX512BF16__
      for (int half = 0; half < 2; half++) {
        const __m128i mask = _mm_set1_epi8(15);
        __m128i left = _mm_loadu_si128((const __m128i *)p), right = _mm_loadu_si128((const __m128i *)(p + 16));
        if (half) left = _mm_srli_epi16(left, 4), right = _mm_srli_epi16(right, 4);
        __m512 low = _mm512_fmadd_ps(WIDE(_mm_and_si128(left, mask)), _mm512_loadu_ps(s + 32 * half),
                                     _mm512_loadu_ps(z + 32 * half));
        __m512 high = _mm512_fmadd_ps(WIDE(_mm_and_si128(right, mask)), _mm512_loadu_ps(s + 32 * half + 16),
                                      _mm512_loadu_ps(z + 32 * half + 16));
        _mm512_storeu_si512(o + 32 * half, (__m512i)_mm512_cvtne2ps_pbh(high, low));
      }
#else
      for (int r = 0; r < 32; r++) {
        o[r] = rounded((float)(p[r] & 15) * s[r] + z[r]);
        o[r + 32] = rounded((float)(p[r] >> 4) * s[r + 32] + z[r + 32]);
      }
#endif
    }
}
