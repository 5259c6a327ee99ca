/* int4 weights for one token and for many, in the layout of torch's _weight_int4pack_mm_for_cpu with AVX512.

   packed: [blocks][columns][32] bytes; byte i holds row i of a block of 64 in its low nibble, row i + 32 in its high one.
   grid: [groups][rows], two bfloat16 numbers to a word, scale and zero, groups of a power of two of columns. A weight is
   (nibble - 8) * scale + zero, for many tokens rounded to nearest even to bfloat16.
   Threads are OpenMP's, as torch's are; where torch's is GCC's own library they are the same ones. */

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  const uint8_t *packed;
  float *scale, *shift; /* [groups][rows]: a weight is nibble * scale + shift */
  int64_t columns, rows;
  int bits; /* a group of columns has 2^bits */
} Weight;

static inline void affine(__m512i grid, __m512 *scale, __m512 *shift) {
  __m512 zero = _mm512_castsi512_ps(_mm512_and_si512(grid, _mm512_set1_epi32((int)0xffff0000)));
  *scale = _mm512_castsi512_ps(_mm512_slli_epi32(grid, 16));
  *shift = _mm512_fnmadd_ps(_mm512_set1_ps(8), *scale, zero);
}

/* Like malloc, in whole lines of the cache; there is nothing to be done for a layer for whose like there is no room. */
static void *room(int64_t bytes) {
  void *found = aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (!found) abort();
  return found;
}

static Weight open_weight(const uint8_t *packed, const uint32_t *grid, int64_t columns, int64_t group, int64_t rows) {
  int64_t count = columns / group * rows; /* rows are a multiple of 16 */
  float *scale = room(2 * count * sizeof(float)), *shift = scale + count;
  for (int64_t i = 0; i < count; i += 16) {
    __m512 s, z;
    affine(_mm512_loadu_si512(grid + i), &s, &z);
    _mm512_storeu_ps(scale + i, s);
    _mm512_storeu_ps(shift + i, z);
  }
  return (Weight){packed, scale, shift, columns, rows, __builtin_ctzll(group)};
}

static inline __m512 floats(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)); }

/* Weights of column k: of rows 16 · part + 0 … 15 of the block that begins with `row`, and of those 32 further. */
static inline void weights(const Weight *w, int64_t row, int64_t k, int part, __m512 *low, __m512 *high) {
  const __m128i mask = _mm_set1_epi8(15);
  __m128i bytes = _mm_loadu_si128((const __m128i *)(w->packed + (row / 64 * w->columns + k) * 32) + part);
  const float *scale = w->scale + (k >> w->bits) * w->rows + row + 16 * part;
  const float *shift = w->shift + (k >> w->bits) * w->rows + row + 16 * part;
  *low = _mm512_fmadd_ps(floats(_mm_and_si128(bytes, mask)), _mm512_loadu_ps(scale), _mm512_loadu_ps(shift));
  *high = _mm512_fmadd_ps(floats(_mm_and_si128(_mm_srli_epi16(bytes, 4), mask)), _mm512_loadu_ps(scale + 32),
                          _mm512_loadu_ps(shift + 32));
}

static inline __m256i rounded(__m512 value) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(value);
#else
  __m512i bits = _mm512_castps_si512(value);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
#endif
}

/* out: bfloat16 [columns][rows], the weight transposed. */
void unpack_int4(const uint8_t *packed, const uint32_t *grid, uint16_t *out, int64_t columns, int64_t group,
                 int64_t rows, int threads) {
  const Weight w = open_weight(packed, grid, columns, group, rows);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row += 64)
    for (int64_t k = 0; k < columns; k++)
      for (int part = 0; part < 2; part++) {
        __m512 low, high;
        weights(&w, row, k, part, &low, &high);
        _mm256_storeu_si256((__m256i *)(out + k * rows + row + 16 * part), rounded(low));
        _mm256_storeu_si256((__m256i *)(out + k * rows + row + 16 * part + 32), rounded(high));
      }
  free(w.scale);
}

#ifdef __AVX512BF16__
/* Codes 0 … 15 of 32 bytes as bfloat16 numbers 128 + code: the code is the last of the mantissa's bits. */
static inline __m512bh raised(__m256i codes) {
  return (__m512bh)_mm512_or_si512(_mm512_cvtepu8_epi16(codes), _mm512_set1_epi16(0x4300));
}

/* x: bfloat16 [columns]. y = weight · x, bfloat16 [rows]. Two columns at a time; what 128 adds is taken off by group. */
void dot_int4(const uint16_t *x, const uint8_t *packed, const uint32_t *grid, uint16_t *y, int64_t columns,
              int64_t group, int64_t rows, int threads) {
  const uint32_t *pairs = (const uint32_t *)x;
  const __m256i mask = _mm256_set1_epi8(15);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row += 64) {
    const __m256i *from = (const __m256i *)(packed + row / 2 * columns);
    __m512 total[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t g = 0; g < columns / group; g++) {
      __m512 part[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
      __m512 sum = _mm512_setzero_ps();
      const __m512bh one = (__m512bh)_mm512_set1_epi16(0x3F80);
      for (int64_t k = g * group / 2; k < (g + 1) * group / 2; k++) {
        __m256i even = _mm256_loadu_si256(from + 2 * k), odd = _mm256_loadu_si256(from + 2 * k + 1);
        __m512bh value = (__m512bh)_mm512_set1_epi32((int)pairs[k]);
        _mm_prefetch((const char *)(from + 2 * k) + 4096, _MM_HINT_T0);
        __m256i left = _mm256_and_si256(even, mask), right = _mm256_and_si256(odd, mask);
        part[0] = _mm512_dpbf16_ps(part[0], raised(_mm256_unpacklo_epi8(left, right)), value);
        part[1] = _mm512_dpbf16_ps(part[1], raised(_mm256_unpackhi_epi8(left, right)), value);
        left = _mm256_and_si256(_mm256_srli_epi16(even, 4), mask);
        right = _mm256_and_si256(_mm256_srli_epi16(odd, 4), mask);
        part[2] = _mm512_dpbf16_ps(part[2], raised(_mm256_unpacklo_epi8(left, right)), value);
        part[3] = _mm512_dpbf16_ps(part[3], raised(_mm256_unpackhi_epi8(left, right)), value);
        sum = _mm512_dpbf16_ps(sum, one, value);
      }
      for (int i = 0; i < 4; i++) {
        /* eight rows, and the eight that are sixteen further */
        const __m256i *words = (const __m256i *)(grid + g * rows + row + i / 2 * 32 + i % 2 * 8);
        __m512 scale, shift;
        affine(_mm512_inserti32x8(_mm512_castsi256_si512(_mm256_loadu_si256(words)), _mm256_loadu_si256(words + 2), 1),
               &scale, &shift);
        shift = _mm512_fnmadd_ps(_mm512_set1_ps(128), scale, shift);
        total[i] = _mm512_fmadd_ps(scale, part[i], _mm512_fmadd_ps(shift, sum, total[i]));
      }
    }
    for (int i = 0; i < 4; i++) {
      __m256i half = rounded(total[i]);
      uint16_t *to = y + row + i / 2 * 32 + i % 2 * 8;
      _mm_storeu_si128((__m128i *)to, _mm256_castsi256_si128(half));
      _mm_storeu_si128((__m128i *)(to + 16), _mm256_extracti128_si256(half, 1));
    }
  }
}
#endif

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Compilers do not see that tiles are loaded from memory, and stored to it. */
#define PUBLISH() __asm__ volatile("" ::: "memory")
#define DEPTH 1024              /* columns in a panel, which then fits the cache beside the activations */
#define TILE 512                /* bfloat16 numbers in a tile, 16 × 32 */
#define PANEL (DEPTH / 2 * 64)  /* pairs of neighbouring columns of 64 rows: four rows of tiles */

/* Columns k and k + 1 of 64 rows, side by side as the matrix unit wants them, to pair `at` of a panel. */
static inline void unpack_pair(const Weight *w, int64_t row, int64_t k, uint32_t *panel, int64_t at) {
  /* 0, 16, 1, 17, … 15, 31: one of each half in turns */
  const __m512i turns = _mm512_add_epi32(_mm512_set1_epi32(0x100000), _mm512_mullo_epi32(
      _mm512_set1_epi32(0x10001), _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)));
  for (int part = 0; part < 2; part++) {
    __m512 low[2], high[2];
    for (int i = 0; i < 2; i++) weights(w, row, k + i, part, low + i, high + i);
    __m512i left = (__m512i)_mm512_cvtne2ps_pbh(low[1], low[0]), right = (__m512i)_mm512_cvtne2ps_pbh(high[1], high[0]);
    _mm512_store_si512(panel + part * (PANEL / 4) + at * 16, _mm512_permutexvar_epi16(turns, left));
    _mm512_store_si512(panel + (part + 2) * (PANEL / 4) + at * 16, _mm512_permutexvar_epi16(turns, right));
  }
}

static int64_t pairs(const Weight *w, int64_t from) {
  return ((w->columns - from < DEPTH ? w->columns - from : DEPTH)) / 2;
}

/* Rows `first` to `last` of y, given the tiles of x. While the matrix unit works on a panel the next one is unpacked. */
static void multiply(const Weight *w, const uint16_t *tiles, uint16_t *y, int64_t tokens, int64_t first, int64_t last) {
  int64_t steps = w->columns / 32, high = (tokens + 31) / 32 * 2;
  uint32_t *panel = room(2 * PANEL * sizeof(uint32_t)), *next = panel + PANEL, *both = panel;
  float *sums = room(high * 16 * 64 * sizeof(float));
  struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } config = {.palette = 1};
  for (int tile = 0; tile < 8; tile++) config.bytes[tile] = 64, config.rows[tile] = 16;
  PUBLISH();
  _tile_loadconfig(&config);
  for (int64_t k = 0; k < pairs(w, 0); k++) unpack_pair(w, first, 2 * k, panel, k);
  for (int64_t row = first; row < last; row += 64) {
    for (int64_t from = 0; from < w->columns; from += DEPTH) {
      int64_t after = from + DEPTH < w->columns ? from + DEPTH : 0, of = after ? row : row + 64, unpacked = 0;
      int64_t wanted = of < last ? pairs(w, after) : 0;
      for (int n = 0; n < 4; n += 2)
        for (int64_t m = 0; m < high; m += 2) {
          float *at = sums + m * 16 * 64 + n * 16;
          if (from) {
            _tile_loadd(0, at, 256); _tile_loadd(1, at + 16, 256);
            _tile_loadd(2, at + 16 * 64, 256); _tile_loadd(3, at + 16 * 64 + 16, 256);
          } else {
            _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
          }
          PUBLISH();
          const uint32_t *b = panel + n * (PANEL / 4);
          const uint16_t *a = tiles + (m * steps + from / 32) * TILE;
          for (int64_t step = 0; step < pairs(w, from) / 16; step++) {
            _tile_loadd(4, a + step * TILE, 64);
            _tile_loadd(6, b + step * 256, 64);
            _tile_loadd(7, b + PANEL / 4 + step * 256, 64);
            _tile_loadd(5, a + (steps + step) * TILE, 64);
            _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
            if (unpacked < wanted) unpack_pair(w, of, after + 2 * unpacked, next, unpacked), unpacked++;
          }
          _tile_stored(0, at, 256); _tile_stored(1, at + 16, 256);
          _tile_stored(2, at + 16 * 64, 256); _tile_stored(3, at + 16 * 64 + 16, 256);
        }
      for (; unpacked < wanted; unpacked++) unpack_pair(w, of, after + 2 * unpacked, next, unpacked);
      uint32_t *done = panel;
      panel = next, next = done;
    }
    PUBLISH();
    for (int64_t m = 0; m < tokens; m++)
      for (int n = 0; n < 64; n += 16)
        _mm256_storeu_si256((__m256i *)(y + m * w->rows + row + n), rounded(_mm512_load_ps(sums + m * 64 + n)));
  }
  _tile_release();
  free(both), free(sums);
}

/* x: bfloat16 [tokens][columns], columns a multiple of 32. y = x · weightᵀ, bfloat16 [tokens][rows]. */
void linear_int4(const uint16_t *x, const uint8_t *packed, const uint32_t *grid, uint16_t *y, int64_t tokens,
                 int64_t columns, int64_t group, int64_t rows, int threads) {
  const Weight w = open_weight(packed, grid, columns, group, rows);
  int64_t steps = columns / 32, high = (tokens + 31) / 32 * 2;
  uint16_t *tiles = room(high * steps * TILE * sizeof(uint16_t));
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < high * 16; t++)
      for (int64_t k = 0; k < steps; k++) {
        __m512i piece = t < tokens ? _mm512_loadu_si512(x + t * columns + 32 * k) : _mm512_setzero_si512();
        _mm512_store_si512(tiles + ((t / 16 * steps + k) * 16 + t % 16) * 32, piece);
      }
    int64_t blocks = rows / 64, thread = omp_get_thread_num(), all = omp_get_num_threads();
    int64_t first = blocks * thread / all * 64, last = blocks * (thread + 1) / all * 64;
    if (first < last) multiply(&w, tiles, y, tokens, first, last);
  }
  free(tiles), free(w.scale);
}

/* Whether the system lets this process use the matrix unit. */
int has_matrix_unit(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
#endif
