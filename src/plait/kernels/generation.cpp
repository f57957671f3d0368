// Linear layers whose weights are packed once, and one more position of a decoder-only transformer for each row of a
// batch as one call: what `Decoder._step` does in PyTorch, without its calls. `kernels/linear.py` and
// `kernels/generation.py` call this; the structs below are mirrored there.
//
// Weights lie in panels of 32 outputs; a panel goes along K, the inputs, in one of the formats below, zeros where K or N
// end early. A sum over K runs in one order whatever the number of rows, so a row's result does not depend on its
// company, but for bf16 products of AMX.
#include "vectors.h"

constexpr int64_t PANEL = 32;    // outputs of a panel; sizes are filled up to it
constexpr int64_t GROUP = 32;    // inputs that share a scale, where weights are integers
constexpr int64_t DEPTH = 256;   // inputs of a block: with 32 outputs in fp32, what the first cache holds
constexpr int64_t HEIGHT = 192;  // rows that are multiplied while they lie in the second cache
constexpr int64_t AHEAD = 4096;  // bytes
constexpr int64_t MANY = 5;      // rows from which on AMX is faster than AVX512-BF16
constexpr int VECTORS = PANEL / LANES;  // of a panel's row

enum Format {
    FP32,  // (K, 32)
    BF16,  // (K / 2, 32, 2)
    FP16,  // (K, 32)
    INT8,  // a group: 32 scales in bf16, then (8, 32, 4) of -127 to 127
    INT4,  // a group: 32 scales and 32 offsets in bf16, then (4, 32, 4) of two numbers 0 to 15, of inputs 4 apart
    INT5,  // a group: 32 scales in fp16, the fifth bits (32, 4) of 8 inputs 4 apart, the other four as in INT4; less 16
};
constexpr int64_t BYTES[] = {4, 2, 2, 0, 0, 0};                                     // a weight
constexpr int64_t GROUP_BYTES[] = {0, 0, 0, 64 + 1024, 128 + 512, 64 + 128 + 512};  // a group of a panel
constexpr int64_t NUMBERS[] = {0, 0, 0, 64, 128, 192};                              // where its numbers begin
constexpr int FIFTHS = 64;                                                          // and the fifth bits of INT5
constexpr int MIDDLE = 16;                                                          // what is 0 there

struct Norm {
    const float *weight, *bias;  // no bias: RMS
};
struct Linear {
    const void *weight;  // packed
    const float *bias;   // or null
    int64_t in, out, format;
};
struct Layer {
    Norm attention_norm, feed_norm;
    Linear qkv, attention_out, feed_in, feed_out;
    const float *q_norm, *k_norm;  // or null
};
struct Model {
    int64_t layers, width, heads, kv_heads, head_width, hidden, max_length;
    int64_t activation;  // 0 SwiGLU, 1 GELU, 2 GELU by tanh
    int64_t half;        // cache and hidden states in bf16; activations too, where there are units for its products
    float eps;
    const float *cos_sin;      // (max_length, head_width): cosines, then sines of half the places; or null
    const float *positions;  // (max_length, width), or null
    const Layer *layer;
    Norm final_norm;
};

static int products = 0;  // of bf16: 0 plain vectors, 1 AVX512-BF16, 2 AMX

static inline int64_t padded(int64_t n) { return (n + PANEL - 1) / PANEL * PANEL; }
static inline int64_t whole_rows(int64_t n) { return n < 16 ? n : (n + 15) / 16 * 16; }
static inline bool is_integer(int64_t format) { return format >= INT8; }
static inline int64_t panel_bytes(int64_t format, int64_t in) {
    return is_integer(format) ? padded(in) / GROUP * GROUP_BYTES[format] : padded(in) * PANEL * BYTES[format];
}

// Weights are read once, faster than the processor foresees: ask for what is 4 KiB ahead.
INLINE void fetch(const void *w) { __builtin_prefetch((const char *)w + AHEAD); }

// --- products in fp32 --------------------------------------------------------------------------------------------------
//
// A tile is R rows by C vectors of outputs, as many sums as the registers hold. Where there is `more`, it goes on with
// what `out` has from the inputs before.

constexpr int ROWS = LANES == 16 ? 12 : 6;     // of the largest tile
constexpr int NARROW = LANES == 16 ? 2 : LANES == 8 ? 2 : 4;  // vectors of a tile of many rows

template <int R, int C, bool FIRST = true>  // FIRST: nobody has read this part of the weight yet
INLINE void tile(const float *x, int64_t stride, const float *w, int64_t k, float *out, int64_t out_stride, bool more) {
    vec sum[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sum[r][c] = more ? load(out + r * out_stride + c * LANES) : vec{};
    for (int64_t i = 0; i < k; i++, w += PANEL) {
        if (FIRST) fetch(w), fetch(w + 16);
        vec b[C];
        for (int c = 0; c < C; c++) b[c] = load(w + c * LANES);
        for (int r = 0; r < R; r++) {
            const vec a = splat(x[r * stride + i]);
            for (int c = 0; c < C; c++) sum[r][c] += a * b[c];
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(out + r * out_stride + c * LANES, sum[r][c]);
}

// Pairs of bf16 are widened where they are used.
template <int R, int C>
INLINE void tile(const float *x, int64_t stride, const bf16 *w, int64_t k, float *out, int64_t out_stride, bool more) {
    vec sum[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sum[r][c] = more ? load(out + r * out_stride + c * LANES) : vec{};
    for (int64_t i = 0; i < k; i += 2, w += 2 * PANEL) {
        fetch(w), fetch(w + 32);
        for (int c = 0; c < C; c++) {
            const uvec pairs = *(const uvec *)(w + 2 * c * LANES);
            const vec even = bits_of<vec>((uvec)(pairs << 16)), odd = bits_of<vec>((uvec)(pairs & 0xffff0000u));
            for (int r = 0; r < R; r++) {
                sum[r][c] += splat(x[r * stride + i]) * even;
                sum[r][c] += splat(x[r * stride + i + 1]) * odd;
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(out + r * out_stride + c * LANES, sum[r][c]);
}

template <int R, int C>
INLINE void tile(const float *x, int64_t stride, const half *w, int64_t k, float *out, int64_t out_stride, bool more) {
    vec sum[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sum[r][c] = more ? load(out + r * out_stride + c * LANES) : vec{};
    for (int64_t i = 0; i < k; i++, w += PANEL) {
        fetch(w);
        for (int c = 0; c < C; c++) {
            const vec b = load(w + c * LANES);
            for (int r = 0; r < R; r++) sum[r][c] += splat(x[r * stride + i]) * b;
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(out + r * out_stride + c * LANES, sum[r][c]);
}

// The whole panel at once for one or two rows: nothing is read twice.
template <class W>
static void few(const float *x, int64_t rows, int64_t stride, const W *w, int64_t k, float *out, int64_t out_stride, bool more) {
    if (rows == 2)
        tile<2, VECTORS>(x, stride, w, k, out, out_stride, more);
    else
        tile<1, VECTORS>(x, stride, w, k, out, out_stride, more);
}

template <int R, bool FIRST>
static void strip(const float *x, int64_t stride, const float *w, int64_t k, float *out, int64_t out_stride, bool more) {
    tile<R, NARROW, FIRST>(x, stride, w, k, out, out_stride, more);
    for (int c = NARROW; c < VECTORS; c += NARROW)
        tile<R, NARROW, false>(x, stride, w + c * LANES, k, out + c * LANES, out_stride, more);
}

template <int R, bool FIRST>
static void strips(int64_t rows, const float *x, int64_t stride, const float *w, int64_t k, float *out, int64_t out_stride, bool more) {
    if (rows == R)
        strip<R, FIRST>(x, stride, w, k, out, out_stride, more);
    else if constexpr (R > 1)
        strips<R - 1, FIRST>(rows, x, stride, w, k, out, out_stride, more);
}

// Rows in strips of about equal height.
static void block(const float *x, int64_t rows, int64_t stride, const float *w, int64_t k, float *out, int64_t out_stride, bool more) {
    bool first = true;
    for (int64_t left = (rows + ROWS - 1) / ROWS; left > 0; left--, first = false) {
        const int64_t here = (rows + left - 1) / left;
        (first ? strips<ROWS, true> : strips<ROWS, false>)(here, x, stride, w, k, out, out_stride, more);
        rows -= here, x += here * stride, out += here * out_stride;
    }
}


static void widen(const bf16 *w, int64_t k, float *to) {
    for (int64_t i = 0; i < k; i += 2, w += 2 * PANEL, to += 2 * PANEL)
        for (int c = 0; c < PANEL; c += LANES) {
            const uvec pairs = *(const uvec *)(w + 2 * c);
            store(to + c, bits_of<vec>((uvec)(pairs << 16)));
            store(to + PANEL + c, bits_of<vec>((uvec)(pairs & 0xffff0000u)));
        }
}
static void widen(const half *w, int64_t k, float *to) {
    for (int64_t i = 0; i < k * PANEL; i += LANES) store(to + i, load(w + i));
}

// out (rows, 32) = x (rows, in) times a panel.
template <class W>
static void panel(const float *x, int64_t rows, int64_t stride, const W *w, int64_t in, float *out, int64_t out_stride) {
    alignas(64) float wide[sizeof(W) == 4 ? 1 : DEPTH * PANEL];
    for (int64_t k = 0; k < in; k += DEPTH, w += DEPTH * PANEL) {
        const int64_t deep = std::min(in - k, DEPTH);
        if (rows <= 2) {
            few(x + k, rows, stride, w, deep, out, out_stride, k > 0);
        } else if constexpr (sizeof(W) == 4) {
            block(x + k, rows, stride, w, deep, out, out_stride, k > 0);
        } else {
            widen(w, deep, wide);
            block(x + k, rows, stride, wide, deep, out, out_stride, k > 0);
        }
    }
}

// --- products of integers ----------------------------------------------------------------------------------------------
//
// Inputs become 8 bits too, with a scale for each group of a row. A sum of a group is exact; those of groups are added in
// fp32, in order.

struct Quantised {  // rows of inputs, one after the other
    char *at;
    int64_t in;  // filled up
    int64_t groups() const { return in / GROUP; }
    int64_t stride() const { return (in + groups() * 8 + 63) / 64 * 64; }
    int8_t *numbers(int64_t row) const { return (int8_t *)at + row * stride(); }
    float *scales(int64_t row) const { return (float *)(at + row * stride() + in); }
    int32_t *sums(int64_t row) const { return (int32_t *)(scales(row) + groups()); }  // of a group's numbers

    template <class T>
    void fill(int64_t row, const T *x) const {
        int8_t *q = numbers(row);
        for (int64_t g = 0; g < groups(); g++, x += GROUP, q += GROUP) {
            vec greatest = {};
            for (int64_t i = 0; i < GROUP; i += LANES) {
                const vec v = load(x + i);
                greatest = larger(greatest, v < 0.0f ? -v : v);
            }
            const float scale = most(greatest) / 127.0f, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
            int32_t sum = 0;
            for (int64_t i = 0; i < GROUP; i += LANES) {
                const vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
                const ivec n = __builtin_convertvector(load(x + i) * inverse + shift - shift, ivec);
                for (int j = 0; j < LANES; j++) q[i + j] = (int8_t)n[j], sum += n[j];
            }
            scales(row)[g] = scale;
            sums(row)[g] = sum;
        }
    }
};

// The sums of a group's products, int32, of R rows from `row` on and C vectors of outputs; `w` has their numbers, `fifths`
// the fifth bits where there are any.
template <int R, int C, Format F>
INLINE void group_sums(const int8_t *const *x, const uint8_t *w, const uint8_t *fifths, ivec (&sum)[R][C]) {
    constexpr bool PAIRS = F != INT8;  // two numbers a byte
    constexpr int STEPS = PAIRS ? 4 : 8;
#if defined(WIDE)
    __m512i acc[R][C], fifth[C];
    const __m512i low = _mm512_set1_epi8(15), middle = _mm512_set1_epi8(MIDDLE);
    for (int c = 0; c < C; c++) fifth[c] = F == INT5 ? _mm512_loadu_si512(fifths + 64 * c) : __m512i{};
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) acc[r][c] = _mm512_setzero_si512();
    auto add = [&](int quad, const __m512i (&b)[C]) {
        for (int r = 0; r < R; r++) {
            const __m512i a = _mm512_set1_epi32(*(const int32_t *)(x[r] + 4 * quad));
#if defined(__AVX512VNNI__)
            for (int c = 0; c < C; c++) acc[r][c] = _mm512_dpbusd_epi32(acc[r][c], b[c], a);
#else
            const __m512i ones = _mm512_set1_epi16(1), size = _mm512_abs_epi8(a);
            const __mmask64 negative = _mm512_movepi8_mask(a);
            for (int c = 0; c < C; c++) {
                const __m512i pairs = PAIRS ? _mm512_maddubs_epi16(b[c], a)
                                            : _mm512_maddubs_epi16(size, _mm512_mask_sub_epi8(b[c], negative, __m512i{}, b[c]));
                acc[r][c] = _mm512_add_epi32(acc[r][c], _mm512_madd_epi16(pairs, ones));
            }
#endif
        }
    };
#pragma GCC unroll 8
    for (int j = 0; j < STEPS; j++, w += 128) {
        __m512i b[C], high[C];
        for (int c = 0; c < C; c++) {
            b[c] = _mm512_loadu_si512(w + 64 * c);
            if (PAIRS) {
                high[c] = _mm512_and_si512(_mm512_srli_epi16(b[c], 4), low);
                b[c] = _mm512_and_si512(b[c], low);
            }
            if (F == INT5) {
                const __m512i bit = j < 3 ? _mm512_slli_epi16(fifth[c], 4 - 2 * j) : _mm512_srli_epi16(fifth[c], 2 * j - 4);
                const __m512i next = j < 2 ? _mm512_slli_epi16(fifth[c], 3 - 2 * j) : _mm512_srli_epi16(fifth[c], 2 * j - 3);
                b[c] = _mm512_ternarylogic_epi32(b[c], bit, middle, 0xf8);  // b | bit & middle
                high[c] = _mm512_ternarylogic_epi32(high[c], next, middle, 0xf8);
            }
        }
        add(PAIRS ? 2 * j : j, b);
        if (PAIRS) add(2 * j + 1, high);
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sum[r][c] = (ivec)acc[r][c];
#elif defined(X86)
    const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15), middle = _mm256_set1_epi8(MIDDLE);
    __m256i acc[R][C], fifth[C];
    for (int c = 0; c < C; c++) fifth[c] = F == INT5 ? _mm256_loadu_si256((const __m256i *)(fifths + 32 * c)) : __m256i{};
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) acc[r][c] = _mm256_setzero_si256(), sum[r][c] = ivec{};
#pragma GCC unroll 8
    for (int j = 0; j < STEPS; j++, w += 128) {
        __m256i b[C], high[C];
        for (int c = 0; c < C; c++) {
            b[c] = _mm256_loadu_si256((const __m256i *)(w + 32 * c));
            if (PAIRS) {
                high[c] = _mm256_and_si256(_mm256_srli_epi16(b[c], 4), low);
                b[c] = _mm256_and_si256(b[c], low);
            }
            if (F == INT5) {
                const __m256i bit = j < 3 ? _mm256_slli_epi16(fifth[c], 4 - 2 * j) : _mm256_srli_epi16(fifth[c], 2 * j - 4);
                const __m256i next = j < 2 ? _mm256_slli_epi16(fifth[c], 3 - 2 * j) : _mm256_srli_epi16(fifth[c], 2 * j - 3);
                b[c] = _mm256_or_si256(b[c], _mm256_and_si256(bit, middle));
                high[c] = _mm256_or_si256(high[c], _mm256_and_si256(next, middle));
            }
        }
        for (int r = 0; r < R; r++) {
            if (PAIRS) {  // at most 15 * 127 * 2 * 8 = 30480: 16 bits hold a group's sum, and half of it where there are 5 bits
                const __m256i a = _mm256_set1_epi32(*(const int32_t *)(x[r] + 8 * j));
                const __m256i next = _mm256_set1_epi32(*(const int32_t *)(x[r] + 8 * j + 4));
                for (int c = 0; c < C; c++) {
                    acc[r][c] = _mm256_add_epi16(acc[r][c], _mm256_maddubs_epi16(b[c], a));
                    acc[r][c] = _mm256_add_epi16(acc[r][c], _mm256_maddubs_epi16(high[c], next));
                    if (F == INT5 && j == 1) {
                        sum[r][c] = (ivec)_mm256_madd_epi16(acc[r][c], ones);
                        acc[r][c] = _mm256_setzero_si256();
                    }
                }
            } else {  // at most 127 * 127 * 2: 16 bits hold a pair's
                const __m256i a = _mm256_set1_epi32(*(const int32_t *)(x[r] + 4 * j)), size = _mm256_abs_epi8(a);
                for (int c = 0; c < C; c++) {
                    const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(b[c], a));
                    acc[r][c] = _mm256_add_epi32(acc[r][c], _mm256_madd_epi16(pairs, ones));
                }
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sum[r][c] += (ivec)(PAIRS ? _mm256_madd_epi16(acc[r][c], ones) : acc[r][c]);
#else
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sum[r][c] = ivec{};
    for (int j = 0; j < STEPS; j++, w += 128)
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++)
                for (int i = 0; i < LANES; i++)
                    for (int q = 0; q < 4; q++) {
                        const int at = 4 * (c * LANES + i) + q;
                        if (PAIRS) {
                            const int fifth = F == INT5 ? fifths[at] >> 2 * j : 0;
                            const int first = (w[at] & 15) | (fifth & 1) << 4, second = w[at] >> 4 | (fifth & 2) << 3;
                            sum[r][c][i] += first * x[r][8 * j + q] + second * x[r][8 * j + 4 + q];
                        } else {
                            sum[r][c][i] += (int8_t)w[at] * x[r][4 * j + q];
                        }
                    }
#endif
}

// Whether weights of 8 bits are kept above zero, as the processor's instruction for them wants one side.
#if defined(WIDE) && defined(__AVX512VNNI__)
constexpr int SHIFTED = 128;
#else
constexpr int SHIFTED = 0;
#endif

template <int R, int C, Format F>
static void integer_tile(const Quantised &x, int64_t row, const uint8_t *w, int64_t c, float *out, int64_t out_stride) {
    constexpr int ZERO = F == INT5 ? MIDDLE : F == INT8 ? SHIFTED : 0;  // the number that stands for 0
    vec sum[R][C] = {};
    const int8_t *numbers[R];
    for (int r = 0; r < R; r++) numbers[r] = x.numbers(row + r);
    for (int64_t g = 0; g < x.groups(); g++, w += GROUP_BYTES[F]) {
        for (int64_t i = 0; i < GROUP_BYTES[F]; i += 64) fetch(w + i);
        ivec sums[R][C];
        group_sums<R, C, F>(numbers, w + NUMBERS[F] + 4 * c * LANES, w + FIFTHS + 4 * c * LANES, sums);
        vec scale[C], offset[C];
        for (int j = 0; j < C; j++) {
            scale[j] = F == INT5 ? load((const half *)w + (c + j) * LANES) : load((const bf16 *)w + (c + j) * LANES);
            if (F == INT4) offset[j] = load((const bf16 *)w + 32 + (c + j) * LANES);
        }
        for (int r = 0; r < R; r++) {
            const float own = x.scales(row + r)[g];
            const int32_t all = x.sums(row + r)[g];
            for (int j = 0; j < C; j++) {
                if (ZERO) sums[r][j] -= ZERO * all;
                sum[r][j] += __builtin_convertvector(sums[r][j], vec) * (own * scale[j]);
                if (F == INT4) sum[r][j] += offset[j] * (own * all);
            }
            numbers[r] += GROUP;
        }
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < C; j++) store(out + r * out_stride + (c + j) * LANES, sum[r][j]);
}

template <Format F>
static void integer_panel(const Quantised &x, int64_t row, int64_t rows, const uint8_t *w, float *out, int64_t out_stride) {
    for (; rows >= 4; rows -= 4, row += 4, out += 4 * out_stride)
        for (int c = 0; c < VECTORS; c += 2) integer_tile<4, 2, F>(x, row, w, c, out, out_stride);
    for (; rows >= 2; rows -= 2, row += 2, out += 2 * out_stride)
        for (int c = 0; c < VECTORS; c += 2) integer_tile<2, 2, F>(x, row, w, c, out, out_stride);
    if (rows) {
        constexpr int C = VECTORS > 4 ? 4 : VECTORS;
        for (int c = 0; c < VECTORS; c += C) integer_tile<1, C, F>(x, row, w, c, out, out_stride);
    }
}

// --- products of bf16, where there are units for them --------------------------------------------------------------------

#if defined(BF16_UNITS)
template <int R>
static void panel_rows(const bf16 *x, int64_t stride, const bf16 *w, int64_t in, float *out, int64_t out_stride) {
    __m512 sum[R][2];
    for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < in; k += 2, w += 2 * PANEL) {
        fetch(w), fetch(w + 32);
        __m512bh a = (__m512bh)_mm512_loadu_si512(w), b = (__m512bh)_mm512_loadu_si512(w + 32);
        for (int r = 0; r < R; r++) {
            int32_t both;
            std::memcpy(&both, x + r * stride + k, 4);
            __m512bh pair = (__m512bh)_mm512_set1_epi32(both);
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], a, pair);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], b, pair);
        }
    }
    for (int r = 0; r < R; r++) {
        _mm512_storeu_ps(out + r * out_stride, sum[r][0]);
        _mm512_storeu_ps(out + r * out_stride + 16, sum[r][1]);
    }
}

template <int R>
static void panel_strips(int64_t rows, const bf16 *x, int64_t stride, const bf16 *w, int64_t in, float *out, int64_t out_stride) {
    if (rows == R)
        panel_rows<R>(x, stride, w, in, out, out_stride);
    else if constexpr (R > 1)
        panel_strips<R - 1>(rows, x, stride, w, in, out, out_stride);
}

static void panel(const bf16 *x, int64_t rows, int64_t stride, const bf16 *w, int64_t in, float *out, int64_t out_stride) {
    for (int64_t left = (rows + ROWS - 1) / ROWS; left > 0; left--) {
        const int64_t here = (rows + left - 1) / left;
        panel_strips<ROWS>(here, x, stride, w, in, out, out_stride);
        rows -= here, x += here * stride, out += here * out_stride;
    }
}
#endif

#ifdef AMX
struct Tiles {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};
static void lay_tiles(int64_t rows) {  // 0 to 3 sums, 4 and 5 inputs, 6 and 7 weights
    Tiles tiles;
    for (int i = 0; i < 8; i++) tiles.bytes[i] = 64, tiles.rows[i] = i < 6 ? std::min(rows, (int64_t)16) : 16;
    asm volatile("" ::: "memory");  // GCC does not know what tile instructions read
    _tile_loadconfig(&tiles);
}
static void panel_tiles(const bf16 *x, int64_t rows, int64_t stride, const bf16 *w, int64_t in, float *out,
                        int64_t out_stride) {
    for (int64_t r = 0; r < rows; r += 32, x += 32 * stride, out += 32 * out_stride) {
        const bool two = rows - r > 16;
        asm volatile("" ::: "memory");
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        const bf16 *panel = w;
        for (int64_t k = 0; k < in; k += 32, panel += 32 * PANEL) {
            for (int i = 0; i < 32; i++) fetch(panel + 32 * i);
            _tile_loadd(6, panel, 4 * PANEL);
            _tile_loadd(7, panel + 32, 4 * PANEL);
            _tile_loadd(4, x + k, 2 * stride);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (two) {
                _tile_loadd(5, x + 16 * stride + k, 2 * stride);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, out, 4 * out_stride);
        _tile_stored(1, out + 16, 4 * out_stride);
        if (two) {
            _tile_stored(2, out + 16 * out_stride, 4 * out_stride);
            _tile_stored(3, out + 16 * out_stride + 16, 4 * out_stride);
        }
    }
}
#endif

struct Tiled {  // a thread's tiles while it multiplies bf16 for so many rows
    const bool on;
    explicit Tiled(int64_t rows) : on(products == 2 && rows >= MANY) {
#ifdef AMX
        if (on) lay_tiles(rows);
#endif
    }
    ~Tiled() {
#ifdef AMX
        if (on) _tile_release();
#endif
    }
};

// --- a team of threads, each with a share of what is to be done -----------------------------------------------------

struct ThreadTeam {
    int64_t index, size;
    void share(int64_t n, int64_t &begin, int64_t &end) const { begin = n * index / size, end = n * (index + 1) / size; }
    void meet() const {
#ifdef _OPENMP
#pragma omp barrier
#endif
    }
};

template <class Work>
static void together(int64_t threads, Work work) {
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    work(ThreadTeam{omp_get_thread_num(), omp_get_num_threads()});
#else
    work(ThreadTeam{0, 1});
#endif
}

// out (rows, N) = x (rows, K) times the weight; `after(row, first output)` ends each panel while it is in the cache. Rows of
// x are filled up with zeros; `numbers` has room for them as integers.
template <class T, class After>
static void multiply(const ThreadTeam &team, const Linear &linear, const T *x, int64_t rows, float *out, char *numbers, After after) {
    const int64_t in = padded(linear.in), stride = padded(linear.out), size = panel_bytes(linear.format, in);
    int64_t begin, end;
    const Quantised integers{numbers, in};
    if (is_integer(linear.format)) {
        team.share(rows, begin, end);
        for (int64_t r = begin; r < end; r++) integers.fill(r, x + r * in);
        team.meet();
    }
    team.share(stride / PANEL, begin, end);
    for (int64_t first = 0; first < rows; first += HEIGHT) {
        const int64_t here = std::min(rows - first, HEIGHT);
        for (int64_t p = begin; p < end; p++) {
            const char *w = (const char *)linear.weight + p * size;
            float *to = out + first * stride + p * PANEL;
            const T *from = x + first * in;
            if (linear.format == INT8) {
                integer_panel<INT8>(integers, first, here, (const uint8_t *)w, to, stride);
            } else if (linear.format == INT4) {
                integer_panel<INT4>(integers, first, here, (const uint8_t *)w, to, stride);
            } else if (linear.format == INT5) {
                integer_panel<INT5>(integers, first, here, (const uint8_t *)w, to, stride);
            } else if constexpr (sizeof(T) == 2) {
#ifdef AMX
                if (products == 2 && rows >= MANY)
                    panel_tiles(from, here, in, (const bf16 *)w, in, to, stride);
                else
#endif
#if defined(BF16_UNITS)
                    panel(from, here, in, (const bf16 *)w, in, to, stride);
#endif
            } else if (linear.format == FP32) {
                panel(from, here, in, (const float *)w, in, to, stride);
            } else if (linear.format == BF16) {
                panel(from, here, in, (const bf16 *)w, in, to, stride);
            } else {
                panel(from, here, in, (const half *)w, in, to, stride);
            }
            for (int64_t r = 0; r < here; r++) {
                float *row = to + r * stride;
                if (linear.bias)
                    for (int64_t i = 0; i < PANEL; i += LANES) store(row + i, load(row + i) + load(linear.bias + p * PANEL + i));
                after(first + r, p * PANEL);
            }
        }
    }
    team.meet();
}

// --- the step --------------------------------------------------------------------------------------------------------

template <class T>
static void normalise(const float *x, const Norm &norm, float eps, int64_t width, T *out) {
    vec sums = {}, squares = {};
    float mean = 0, square = 0;
    int64_t i = 0;
    if (norm.bias) {
        for (; i + LANES <= width; i += LANES) sums += load(x + i);
        mean = total(sums);
        for (; i < width; i++) mean += x[i];
        mean /= width;
    }
    for (i = 0; i + LANES <= width; i += LANES) squares += (load(x + i) - mean) * (load(x + i) - mean);
    square = total(squares);
    for (; i < width; i++) square += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / std::sqrt(square / width + eps);
    for (i = 0; i + LANES <= width; i += LANES) {
        vec y = (load(x + i) - mean) * scale * load(norm.weight + i);
        store(out + i, norm.bias ? y + load(norm.bias + i) : y);
    }
    for (; i < width; i++) put(out + i, (x[i] - mean) * scale * norm.weight[i] + (norm.bias ? norm.bias[i] : 0.0f));
}

// The norm of a head, its rotation, and a factor; in place.
static void rotate_head(float *x, const float *norm, const float *cos_sin, const Model &m, float factor) {
    const int64_t width = m.head_width, middle = width / 2;
    if (norm) normalise(x, Norm{norm, nullptr}, m.eps, width, x);
    int64_t i = 0;
    if (!cos_sin) {
        for (; i < width; i++) x[i] *= factor;
        return;
    }
    for (; i + LANES <= middle; i += LANES) {
        const vec a = load(x + i), b = load(x + i + middle), cosine = load(cos_sin + i), sine = load(cos_sin + i + middle);
        store(x + i, (a * cosine - b * sine) * factor);
        store(x + i + middle, (b * cosine + a * sine) * factor);
    }
    for (; i < middle; i++) {
        const float a = x[i], b = x[i + middle], cosine = cos_sin[i], sine = cos_sin[i + middle];
        x[i] = (a * cosine - b * sine) * factor;
        x[i + middle] = (b * cosine + a * sine) * factor;
    }
}

// The weighted sum of N vectors of values from `i` on.
template <int N, class C, class T>
INLINE void mix(const float *scores, int64_t held, const C *values, int64_t width, const C *next, float share, T *out) {
    vec sum[N] = {};
    for (int64_t t = 0; t < held; t++) {
        if (N * LANES >= 64 / (int)sizeof(C)) __builtin_prefetch(next + t * width);  // keys of the next head
        for (int j = 0; j < N; j++) sum[j] += scores[t] * load(values + t * width + j * LANES);
    }
    for (int j = 0; j < N; j++) store(out + j * LANES, sum[j] * share);
}

// Attention of one row's heads of one key-value head; `qkv` is rotated in place, key and value go into the cache.
template <class T, class C>
static void attend(const Model &m, const Layer &layer, float *qkv, int64_t kv, C *keys, C *values, int64_t capacity,
                   int64_t at, float *scores, T *mixed) {
    const int64_t width = m.head_width, group = m.heads / m.kv_heads, held = at + 1;
    const float *cos_sin = m.cos_sin ? m.cos_sin + std::min(at, m.max_length - 1) * width : nullptr;
    float *k = qkv + (m.heads + kv) * width, *v = k + m.kv_heads * width;
    rotate_head(k, layer.k_norm, cos_sin, m, 1.0f);
    for (int64_t i = 0; i < width; i++) put(keys + at * width + i, k[i]), put(values + at * width + i, v[i]);
    for (int64_t h = kv * group; h < (kv + 1) * group; h++) {
        float *q = qkv + h * width;
        rotate_head(q, layer.q_norm, cos_sin, m, 1.0f / std::sqrt((float)width));
        for (int64_t t = 0; t < held; t += 4) {
            const C *key[4];  // beyond the end, the last again
            for (int j = 0; j < 4; j++) {
                key[j] = keys + std::min(t + j, at) * width;
                for (int64_t i = 0; i < width; i += 64 / sizeof(C)) __builtin_prefetch(key[j] - keys + values + i);
            }
            vec sum[4] = {};
            int64_t i = 0;
            for (; i + LANES <= width; i += LANES)
                for (int j = 0; j < 4; j++) sum[j] += load(q + i) * load(key[j] + i);
            f4 score = totals(sum[0], sum[1], sum[2], sum[3]);
            for (; i < width; i++)
                for (int j = 0; j < 4; j++) score[j] += q[i] * one(key[j] + i);
            *(f4 *)(scores + t) = score;
        }
        for (int64_t t = held; t % LANES; t++) scores[t] = -INFINITY;
        vec greatest = load(scores);
        for (int64_t t = LANES; t < held; t += LANES) greatest = larger(greatest, load(scores + t));
        const float top = most(greatest);
        vec sums = {};
        for (int64_t t = 0; t < held; t += LANES) {
            vec e = exponential(load(scores + t) - top);
            if (t + LANES > held)
                for (int64_t i = held - t; i < LANES; i++) e[i] = 0;
            store(scores + t, e);
            sums += e;
        }
        const float share = 1.0f / total(sums);
        T *out = mixed + h * width;
        int64_t i = 0;
        for (; i + 64 <= width; i += 64)
            mix<64 / LANES>(scores, held, values + i, width, keys + capacity * width + i, share, out + i);
        for (; i + LANES <= width; i += LANES) mix<1>(scores, held, values + i, width, keys + i, share, out + i);
        for (; i < width; i++) {
            float sum = 0;
            for (int64_t t = 0; t < held; t++) sum += scores[t] * one(values + t * width + i);
            put(out + i, sum * share);
        }
    }
}

// Whether activations are bf16 as well.
static inline bool in_units(const Model &m) { return m.half && products && m.layers && m.layer[0].qkv.format == BF16; }

struct ScratchLayout {  // of the scratch memory, in bytes; inputs of products keep zeros where they are filled up
    int64_t normed, mixed, inner, qkv, gates, sums, scores, numbers, size;
    ScratchLayout(const Model &m, int64_t rows, int64_t capacity, int64_t threads) {
        const int64_t item = in_units(m) ? 2 : 4, many = whole_rows(rows);
        int64_t at = 0;
        auto take = [&](int64_t bytes) {
            int64_t here = at;
            at += (bytes + 63) / 64 * 64;
            return here;
        };
        normed = take(many * padded(m.width) * item);
        mixed = take(many * padded(m.heads * m.head_width) * item);
        inner = take(many * padded(m.hidden) * item);
        qkv = take(many * padded((m.heads + 2 * m.kv_heads) * m.head_width) * 4);
        gates = take(many * padded(m.hidden * (m.activation ? 1 : 2)) * 4);
        sums = take(many * padded(m.width) * 4);
        scores = take(threads * (capacity + 16) * 4);
        const int64_t widest = std::max({m.width, m.heads * m.head_width, m.hidden});
        numbers = take(rows * Quantised{nullptr, padded(widest)}.stride());
        size = at;
    }
};

// T is of activations, C of the cache and of the hidden states.
template <class T, class C>
static void step(const Model &m, const ThreadTeam &team, float *x, C *hidden, C *keys, C *values, const int64_t *lengths,
                 int64_t rows, int64_t cache_rows, int64_t capacity, char *scratch) {
    const ScratchLayout layout(m, rows, capacity, team.size);
    T *normed = (T *)(scratch + layout.normed), *mixed = (T *)(scratch + layout.mixed), *inner = (T *)(scratch + layout.inner);
    float *qkv = (float *)(scratch + layout.qkv), *gates = (float *)(scratch + layout.gates);
    float *sums = (float *)(scratch + layout.sums), *scores = (float *)(scratch + layout.scores) + team.index * (capacity + 16);
    char *numbers = scratch + layout.numbers;
    const int64_t wide = padded(m.width), mix = padded(m.heads * m.head_width), deep = padded(m.hidden);
    const int64_t qkv_stride = padded((m.heads + 2 * m.kv_heads) * m.head_width);
    int64_t begin, end;
    const Tiled tiled(sizeof(T) == 2 ? rows : 0);
    auto norm_all = [&](const Norm &norm, auto *out, int64_t stride) {
        team.share(rows, begin, end);
        for (int64_t r = begin; r < end; r++) normalise(x + r * m.width, norm, m.eps, m.width, out + r * stride);
        team.meet();
    };
    auto nothing = [](int64_t, int64_t) {};
    auto add = [&](int64_t r, int64_t n) {  // to the residual stream
        const float *from = sums + r * wide + n;
        float *to = x + r * m.width + n;
        for (int64_t i = 0; i < std::min(PANEL, m.width - n); i++) to[i] += from[i];
    };
    if (m.positions) {
        team.share(rows, begin, end);
        for (int64_t r = begin; r < end; r++) {
            const float *from = m.positions + std::min(lengths[r], m.max_length - 1) * m.width;
            for (int64_t i = 0; i < m.width; i++) x[r * m.width + i] += from[i];
        }
        team.meet();
    }
    for (int64_t l = 0; l < m.layers; l++) {
        const Layer &layer = m.layer[l];
        norm_all(layer.attention_norm, normed, wide);
        multiply(team, layer.qkv, normed, rows, qkv, numbers, nothing);
        team.share(rows * m.kv_heads, begin, end);
        for (int64_t item = begin; item < end; item++) {
            const int64_t r = item / m.kv_heads, kv = item % m.kv_heads;
            const int64_t at = ((l * cache_rows + r) * m.kv_heads + kv) * capacity * m.head_width;
            attend(m, layer, qkv + r * qkv_stride, kv, keys + at, values + at, capacity, lengths[r], scores, mixed + r * mix);
        }
        team.meet();
        multiply(team, layer.attention_out, mixed, rows, sums, numbers, add);
        norm_all(layer.feed_norm, normed, wide);
        multiply(team, layer.feed_in, normed, rows, gates, numbers, nothing);
        team.share(rows * deep / LANES, begin, end);
        const int64_t gates_stride = padded(layer.feed_in.out);
        for (int64_t item = begin; item < end; item++) {
            const int64_t r = item / (deep / LANES), i = item % (deep / LANES) * LANES;
            const float *gate = gates + r * gates_stride + i;
            T *to = inner + r * deep + i;
            if (i + LANES > m.hidden) {
                for (int64_t j = i; j < m.hidden; j++) {
                    const vec a = splat(gates[r * gates_stride + j]);
                    put(inner + r * deep + j, m.activation ? gelu(a, m.activation == 2)[0]
                                                           : (a * sigmoid(a))[0] * gates[r * gates_stride + m.hidden + j]);
                }
            } else if (m.activation) {
                store(to, gelu(load(gate), m.activation == 2));
            } else {
                store(to, load(gate) * sigmoid(load(gate)) * load(gate + m.hidden));
            }
        }
        team.meet();
        multiply(team, layer.feed_out, inner, rows, sums, numbers, add);
    }
    norm_all(m.final_norm, hidden, m.width);
}

// --- packing of integers -----------------------------------------------------------------------------------------------

// The numbers of a group of one output; `group` begins the panel's group.
static void put_numbers(const uint8_t *numbers, int64_t format, char *group, int64_t column) {
    uint32_t quads[GROUP / 4], fifths = 0;
    std::memcpy(quads, numbers, GROUP);
    char *to = group + NUMBERS[format] + column * 4;
    if (format == INT8) {
        for (int q = 0; q < 8; q++) std::memcpy(to + q * PANEL * 4, quads + q, 4);
        return;
    }
    for (int j = 0; j < 4; j++) {
        const uint32_t both = (quads[2 * j] & 0x0f0f0f0f) | (quads[2 * j + 1] & 0x0f0f0f0f) << 4;
        std::memcpy(to + j * PANEL * 4, &both, 4);
    }
    if (format != INT5) return;
    for (int q = 0; q < 8; q++) fifths |= (quads[q] >> 4 & 0x01010101) << q;
    std::memcpy(group + FIFTHS + column * 4, &fifths, 4);
}

// 32 weights of one output, rounded.
static void put_group(const float *w, int64_t format, char *group, int64_t column) {
    vec least = {}, greatest = {};
    for (int64_t i = 0; i < GROUP; i += LANES) greatest = larger(greatest, load(w + i)), least = larger(least, -load(w + i));
    const float low = -most(least), high = most(greatest);
    float unit, start = 0, lowest = 0, highest = 15;
    if (format == INT5) {
        half *scale = (half *)group + column;
        put(scale, (high > -low ? high : low) / -16.0f);
        unit = one(scale), lowest = -16;
    } else {
        bf16 *scale = (bf16 *)group + column;
        put(scale, format == INT8 ? std::max(high, -low) / 127.0f : (high - low) / 15.0f);
        unit = one(scale);
        if (format == INT8) {
            lowest = -127, highest = 127;
        } else {
            put(scale + PANEL, low);
            start = one(scale + PANEL);
        }
    }
    const int zero = format == INT5 ? MIDDLE : format == INT8 ? SHIFTED : 0;
    uint8_t numbers[GROUP];
    for (int64_t i = 0; i < GROUP; i += LANES) {
        const vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
        vec q = unit != 0.0f ? (load(w + i) - start) / unit + shift - shift : vec{};
        q = q < lowest ? splat(lowest) : q;
        q = q > highest ? splat(highest) : q;
        const ivec n = __builtin_convertvector(q, ivec) + zero;
        for (int j = 0; j < LANES; j++) numbers[i + j] = (uint8_t)n[j];
    }
    put_numbers(numbers, format, group, column);
}

// Blocks of weights in a GGUF file, as llama.cpp keeps them.
enum Blocks { Q4_0, Q5_0, Q8_0, Q4_K, Q6_K };

INLINE float scale_at(const uint8_t *p) {
    half scale;
    std::memcpy(&scale, p, 2);
    return one(&scale);
}

// Q5_0: a scale, the fifth bit of each of 32 weights, four bits of each; less 16.
static void fives(const uint8_t *block, uint8_t *numbers) {
    uint32_t fifths;
    std::memcpy(&fifths, block + 2, 4);
    for (int i = 0; i < 16; i++) {
        numbers[i] = (block[6 + i] & 15) | (fifths >> i & 1) << 4;
        numbers[16 + i] = block[6 + i] >> 4 | (fifths >> (16 + i) & 1) << 4;
    }
}

// Weights 32 `g` to 32 `g` + 31 of a row of blocks.
static void widen_group(int64_t kind, const uint8_t *row, int64_t g, float *w) {
    if (kind == Q4_0) {
        const uint8_t *block = row + g * 18;
        const float scale = scale_at(block);
        for (int i = 0; i < 16; i++) {
            w[i] = scale * ((block[2 + i] & 15) - 8);
            w[16 + i] = scale * ((block[2 + i] >> 4) - 8);
        }
    } else if (kind == Q5_0) {
        const uint8_t *block = row + g * 22;
        const float scale = scale_at(block);
        uint8_t numbers[GROUP];
        fives(block, numbers);
        for (int i = 0; i < 32; i++) w[i] = scale * (numbers[i] - 16);
    } else if (kind == Q8_0) {
        const uint8_t *block = row + g * 34;
        const float scale = scale_at(block);
        for (int i = 0; i < 32; i++) w[i] = scale * (int8_t)block[2 + i];
    } else if (kind == Q4_K) {  // 8 groups: two scales, a scale and an offset of 6 bits of each, four bits of each weight
        const uint8_t *block = row + g / 8 * 144, *six = block + 4;
        const int j = g % 8;
        const int scale = j < 4 ? six[j] & 63 : (six[j + 4] & 15) | (six[j - 4] >> 6) << 4;
        const int least = j < 4 ? six[j + 4] & 63 : six[j + 4] >> 4 | (six[j] >> 6) << 4;
        const float unit = scale_at(block) * scale, offset = scale_at(block + 2) * least;
        for (int i = 0; i < 32; i++) w[i] = unit * (block[16 + j / 2 * 32 + i] >> j % 2 * 4 & 15) - offset;
    } else {  // Q6_K, 8 groups: four bits and two bits of each weight, a scale of 8 bits for each 16, a scale of all; less 32
        const uint8_t *block = row + g / 8 * 210, *fours = block + g % 8 / 4 * 64, *twos = block + 128 + g % 8 / 4 * 32;
        const int8_t *scales = (const int8_t *)block + 192 + g % 8 * 2;
        const int j = g % 4;
        const float all = scale_at(block + 208);
        for (int i = 0; i < 32; i++) {
            const int number = (fours[j % 2 * 32 + i] >> j / 2 * 4 & 15) | (twos[i] >> 2 * j & 3) << 4;
            w[i] = all * scales[i / 16] * (number - 32);
        }
    }
}

extern "C" {

// What bf16 products use here: 0 plain vectors, 1 AVX512-BF16, 2 AMX. To be called first.
int plait_products() {
#if defined(BF16_UNITS)
    products = 1;
#endif
#ifdef AMX
    if (!syscall(SYS_arch_prctl, 0x1023, 18)) products = 2;  // ARCH_REQ_XCOMP_PERM for the tiles' data
#endif
    return products;
}

// Bytes of a packed weight.
int64_t plait_packed_size(int64_t out, int64_t in, int64_t format) { return padded(out) / PANEL * panel_bytes(format, in); }

// Rows `first` to `first + out` of a weight, (out, in) in fp32, laid out in panels; `to`, where the first panel of all begins,
// is zero.
void plait_pack(const float *weight, int64_t first, int64_t out, int64_t in, int64_t format, char *to) {
    const int64_t size = panel_bytes(format, in);
    for (int64_t n = first; n < first + out; n++, weight += in) {
        char *panel = to + n / PANEL * size;
        const int64_t column = n % PANEL;
        if (is_integer(format)) {
            for (int64_t k = 0; k < in; k += GROUP, panel += GROUP_BYTES[format]) {
                float w[GROUP] = {};
                std::memcpy(w, weight + k, 4 * std::min(GROUP, in - k));
                put_group(w, format, panel, column);
            }
            continue;
        }
        for (int64_t k = 0; k < in; k++) {
            if (format == BF16)
                put((bf16 *)panel + (k / 2 * PANEL + column) * 2 + k % 2, weight[k]);
            else if (format == FP16)
                put((half *)panel + k * PANEL + column, weight[k]);
            else
                ((float *)panel)[k * PANEL + column] = weight[k];
        }
    }
}

// The same of rows (out, row_bytes) of blocks of a GGUF file, in a format of integers; `in` is a multiple of the block's. False
// where a scale is not finite.
bool plait_pack_blocks(int64_t kind, const uint8_t *blocks, int64_t row_bytes, int64_t first, int64_t out, int64_t in,
                       int64_t format, char *to) {
    const int64_t size = panel_bytes(format, in);
    bool finite = true;
    for (int64_t n = first; n < first + out; n++, blocks += row_bytes) {
        char *panel = to + n / PANEL * size;
        for (int64_t g = 0; g < in / GROUP; g++, panel += GROUP_BYTES[format]) {
            if (kind == Q5_0 && format == INT5) {  // the same numbers
                const uint8_t *block = blocks + g * 22;
                uint8_t numbers[GROUP];
                fives(block, numbers);
                std::memcpy((half *)panel + n % PANEL, block, 2);
                put_numbers(numbers, INT5, panel, n % PANEL);
                finite &= std::isfinite(scale_at(block));
                continue;
            }
            float w[GROUP], sum = 0;
            widen_group(kind, blocks, g, w);
            for (float one : w) sum += one;
            finite &= std::isfinite(sum);
            put_group(w, format, panel, n % PANEL);
        }
    }
    return finite;
}

// Rows `ids` (n,) of a packed weight, as outputs (n, in) in fp32.
void plait_rows(const Linear *linear, const int64_t *ids, int64_t n, float *to) {
    const int64_t size = panel_bytes(linear->format, linear->in);
    for (int64_t r = 0; r < n; r++, to += linear->in) {
        const char *panel = (const char *)linear->weight + ids[r] / PANEL * size;
        const int64_t column = ids[r] % PANEL;
        for (int64_t k = 0; k < linear->in; k++) switch (linear->format) {
                case FP32: to[k] = ((const float *)panel)[k * PANEL + column]; break;
                case BF16: to[k] = one((const bf16 *)panel + (k / 2 * PANEL + column) * 2 + k % 2); break;
                case FP16: to[k] = one((const half *)panel + k * PANEL + column); break;
                case INT8: {
                    const char *group = panel + k / GROUP * GROUP_BYTES[INT8];
                    const uint8_t q = ((const uint8_t *)group)[64 + (k % GROUP / 4 * PANEL + column) * 4 + k % 4];
                    to[k] = one((const bf16 *)group + column) * (SHIFTED ? (int)q - SHIFTED : (int8_t)q);
                    break;
                }
                case INT5: {
                    const char *group = panel + k / GROUP * GROUP_BYTES[INT5];
                    const int64_t place = column * 4 + k % 4;
                    const uint8_t q = ((const uint8_t *)group)[NUMBERS[INT5] + k % GROUP / 8 * PANEL * 4 + place];
                    const int fifth = ((const uint8_t *)group)[FIFTHS + place] >> k % GROUP / 4 & 1;
                    to[k] = one((const half *)group + column) * ((k / 4 % 2 ? q >> 4 : q & 15) + 16 * fifth - MIDDLE);
                    break;
                }
                default: {
                    const char *group = panel + k / GROUP * GROUP_BYTES[INT4];
                    const uint8_t q = ((const uint8_t *)group)[128 + (k % GROUP / 8 * PANEL + column) * 4 + k % 4];
                    const int number = k / 4 % 2 ? q >> 4 : q & 15;
                    to[k] = one((const bf16 *)group + PANEL + column) + one((const bf16 *)group + column) * number;
                }
            }
    }
}

int64_t plait_scratch(const Model *model, int64_t rows, int64_t capacity, int64_t threads) {
    return ScratchLayout(*model, rows, capacity, threads).size;
}

// Bytes that `plait_linear` needs beside.
int64_t plait_linear_scratch(int64_t in, int64_t rows) {
    return whole_rows(rows) * padded(in) * 4 + rows * Quantised{nullptr, padded(in)}.stride();
}

// out (rows, padded outputs) in fp32 = x (rows, inputs) in fp32 or, where `halved`, bf16, times the weight; room for
// `whole_rows(rows)` rows in `out`. `scratch` is zero at first.
void plait_linear(const Linear *linear, int64_t halved, const void *x, int64_t rows, float *out, char *scratch, int64_t threads) {
    const int64_t in = linear->in, wide = padded(in);
    const bool units = halved && products && linear->format == BF16;
    char *numbers = scratch + whole_rows(rows) * wide * 4;
    const bool direct = in == wide && (units ? rows == whole_rows(rows) : !halved);
    auto nothing = [](int64_t, int64_t) {};
    together(threads, [&](const ThreadTeam &team) {
        int64_t begin, end;
        team.share(direct ? 0 : rows, begin, end);
        for (int64_t r = begin; r < end; r++) {
            if (units || !halved) {
                const int64_t item = units ? 2 : 4;
                std::memcpy(scratch + r * wide * item, (const char *)x + r * in * item, in * item);
            } else {
                for (int64_t i = 0; i < in; i++) ((float *)scratch)[r * wide + i] = one((const bf16 *)x + r * in + i);
            }
        }
        team.meet();
        const void *from = direct ? x : scratch;
        const Tiled tiled(units ? rows : 0);
        if (units)
            multiply(team, *linear, (const bf16 *)from, rows, out, numbers, nothing);
        else
            multiply(team, *linear, (const float *)from, rows, out, numbers, nothing);
    });
}

// x (rows, width) embeds one more position a row, and is overwritten; `hidden` (rows, width) gets the states after the
// final norm. Keys and values (layers, cache_rows, kv_heads, capacity, head_width) hold `lengths` (rows,) positions
// and get one more. `scratch` is zero at first, and belongs to calls of the same number of rows, capacity and threads.
void plait_step(const Model *model, float *x, void *hidden, void *keys, void *values, const int64_t *lengths, int64_t rows,
                int64_t cache_rows, int64_t capacity, char *scratch, int64_t threads) {
    together(threads, [&](const ThreadTeam &team) {
        auto run = [&](auto activation, auto cached) {
            typedef decltype(cached) C;
            step<decltype(activation), C>(*model, team, x, (C *)hidden, (C *)keys, (C *)values, lengths, rows, cache_rows, capacity, scratch);
        };
        if (in_units(*model))
            run(bf16{}, bf16{});
        else if (model->half)
            run(float{}, bf16{});
        else
            run(float{}, float{});
    });
}
}
