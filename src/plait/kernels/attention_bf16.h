// Attention of training in bf16, for processors with units for its products: AVX512-BF16, or AMX where it is there.
// `training.cpp` includes this; vectors here are of 16 floats, and `m` says which of them are there.
#pragma once

namespace units {

typedef ::Attention<bf16> Attention;
static bool tiles = false;  // whether products use AMX

static inline __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : (__mmask16)((1u << n) - 1); }
static inline __m512 load(const float *p, __mmask16 m = 0xffff) { return _mm512_maskz_loadu_ps(m, p); }
static inline __m512 load(const bf16 *p, __mmask16 m = 0xffff) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16));
}
static inline void store(float *p, __m512 x, __mmask16 m = 0xffff) { _mm512_mask_storeu_ps(p, m, x); }
static inline void store(bf16 *p, __m512 x, __mmask16 m = 0xffff) {
    _mm256_mask_storeu_epi16(p, m, (__m256i)_mm512_cvtneps_pbh(x));
}
static inline __m512 all(float x) { return _mm512_set1_ps(x); }
static inline float total(__m512 x) { return _mm512_reduce_add_ps(x); }
static inline __m512 power(__m512 x) {  // 2^x, relative error 1e-7: a polynomial fitted on half a unit to each side
    const __m512 n = _mm512_roundscale_ps(x, 0), r = x - n;
    const __m512 p = ((((r * 0.00132765f + 0.00967554f) * r + 0.05550713f) * r + 0.24022120f) * r + 0.69314697f) * r + 1.0f;
    return _mm512_scalef_ps(p, n);
}
// Columns of 16 rows of 16 four-byte items; rows `stride` items apart.
static inline void transpose(const void *from, int64_t stride, __m512i to[16]) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512((const int32_t *)from + i * stride);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        to[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
        to[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
        to[i + 4] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88);
        to[i + 12] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd);
    }
}

// --- products of bf16 in blocks of 32 by 32 ----------------------------------------------------------------------------

constexpr int64_t BLOCK = 32, PANEL = 32 * BLOCK;  // items of 32 rows in a panel
static inline int64_t padded(int64_t n) { return (n + BLOCK - 1) / BLOCK * BLOCK; }

struct Tiled {  // a thread's tiles while it multiplies
    Tiled() {
#ifdef AMX
        if (!tiles) return;
        struct {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } shape;
        for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
        asm volatile("" ::: "memory");  // GCC does not know what tile instructions read
        _tile_loadconfig(&shape);
#endif
    }
    ~Tiled() {
#ifdef AMX
        if (tiles) _tile_release();
#endif
    }
};

// c (32, 32) = a (32, k) times b, a panel of pairs of rows: (k / 2, 32, 2). Rows of a lie `stride` apart, and `step` items
// lead from 32 of its columns to the next.
static void product(const bf16 *a, int64_t stride, int64_t step, const bf16 *b, int64_t k, float *c) {
#ifdef AMX
    if (tiles) {
        asm volatile("" ::: "memory");
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t i = 0; i < k; i += 32, a += step, b += PANEL) {
            _tile_loadd(4, a, 2 * stride);
            _tile_loadd(6, b, 128);
            _tile_loadd(7, b + 32, 128);
            _tile_loadd(5, a + 16 * stride, 2 * stride);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, c, 128);
        _tile_stored(1, c + 16, 128);
        _tile_stored(2, c + 16 * 32, 128);
        _tile_stored(3, c + 16 * 32 + 16, 128);
        return;
    }
#endif
    for (int64_t r = 0; r < 32; r += 8) {
        __m512 sum[8][2];
        for (int j = 0; j < 8; j++) sum[j][0] = sum[j][1] = _mm512_setzero_ps();
        for (int64_t i = 0; i < k; i += 2) {
            const __m512bh left = (__m512bh)_mm512_loadu_si512(b + 32 * i), right = (__m512bh)_mm512_loadu_si512(b + 32 * i + 32);
            for (int j = 0; j < 8; j++) {
                int32_t both;
                std::memcpy(&both, a + i / 32 * step + (r + j) * stride + i % 32, 4);
                const __m512bh pair = (__m512bh)_mm512_set1_epi32(both);
                sum[j][0] = _mm512_dpbf16_ps(sum[j][0], left, pair);
                sum[j][1] = _mm512_dpbf16_ps(sum[j][1], right, pair);
            }
        }
        for (int j = 0; j < 8; j++) store(c + (r + j) * 32, sum[j][0]), store(c + (r + j) * 32 + 16, sum[j][1]);
    }
}

// Two rows of 16 as one of pairs.
static inline __m512i paired(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// Rows (n, width) as panels of pairs of rows, (width / 32, n / 2, 32, 2); n and width are multiples of 32.
static void pair_rows(const bf16 *from, int64_t n, int64_t width, bf16 *to) {
    for (int64_t r = 0; r < n; r += 2)
        for (int64_t i = 0; i < width; i += 16) {
            const __m256i even = _mm256_loadu_si256((const __m256i *)(from + r * width + i));
            const __m256i odd = _mm256_loadu_si256((const __m256i *)(from + (r + 1) * width + i));
            _mm512_storeu_si512(to + i / 32 * 32 * n + r * 32 + i % 32 * 2, paired(even, odd));
        }
}

// Rows (n, width) as panels of pairs of columns, (n / 32, width / 2, 32, 2), or as plain columns, (width, n).
template <bool PLAIN>
static void columns_of(const bf16 *from, int64_t n, int64_t width, bf16 *to) {
    for (int64_t r = 0; r < n; r += 16)
        for (int64_t i = 0; i < width; i += 32) {
            __m512i columns[16];
            transpose(from + r * width + i, width / 2, columns);
            for (int j = 0; j < 16; j++)
                if (PLAIN) {
                    bf16 *even = to + (i + 2 * j) * n + r;
                    _mm256_storeu_si256((__m256i *)even, _mm512_cvtepi32_epi16(columns[j]));
                    _mm256_storeu_si256((__m256i *)(even + n), _mm512_cvtepi32_epi16(_mm512_srli_epi32(columns[j], 16)));
                } else {
                    _mm512_storeu_si512(to + r / 32 * 32 * width + (i / 2 + j) * 64 + r % 32 * 2, columns[j]);
                }
        }
}

// --- attention: causal, over what each row holds itself -------------------------------------------------------------------

// Rows of a head lie far apart: ask for them ahead.
constexpr int64_t AHEAD = 12;
static inline void fetch(const bf16 *row, int64_t width) {
    for (int64_t i = 0; i < width; i += 32) __builtin_prefetch(row + i);
}

// 1 / rms of a head's values.
static inline float scale_of(const bf16 *from, int64_t width, float eps) {
    __m512 squares = {};
    for (int64_t i = 0; i < width; i += 16) squares += load(from + i) * load(from + i);
    return 1.0f / std::sqrt(total(squares) / width + eps);
}

// A head of queries or keys as rows (padded length, width), normed and rotated; zeros beyond.
static void turned_rows(const Attention &x, int64_t b, int64_t head, const float *norm, bf16 *to) {
    const int64_t width = x.width, half = width / 2;
    for (int64_t l = 0; l < x.length; l++, to += width) {
        const bf16 *from = x.qkv + x.at(b, l, head);
        fetch(from + AHEAD * x.all_heads() * width, width);
        const float scale = norm ? scale_of(from, width, x.eps) : 1.0f;
        for (int64_t i = 0, j = half; i < half; i += 16, j += 16) {
            const __mmask16 m = first(half - i);
            __m512 a = load(from + i, m), c = load(from + j, m);
            if (norm) a = a * scale * load(norm + i, m), c = c * scale * load(norm + j, m);
            if (x.cosines) {
                const int64_t at = b * x.stride + l * width;
                const __m512 cosine = load(x.cosines + at + i, m), sine = load(x.sines + at + j, m);
                const __m512 before = a;
                a = a * cosine - c * sine;
                c = c * cosine + before * sine;
            }
            store(to + i, a, m);
            store(to + j, c, m);
        }
    }
    std::memset(to, 0, (padded(x.length) - x.length) * width * 2);
}

// What dropout multiplies the chances of 16 queries with, for one key: a function of the place and the seed alone.
static inline __m512 kept(const Attention &x, int64_t head, int64_t t, int64_t l) {
    if (!x.dropped) return all(1.0f);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i bits = _mm512_add_epi32(lane, _mm512_set1_epi32((int32_t)((head * x.length + t) * x.length + l)));
    bits = _mm512_xor_si512(bits, _mm512_set1_epi32((int32_t)x.seed));
    bits = _mm512_mullo_epi32(_mm512_xor_si512(bits, _mm512_srli_epi32(bits, 16)), _mm512_set1_epi32((int32_t)0x85ebca6b));
    bits = _mm512_mullo_epi32(_mm512_xor_si512(bits, _mm512_srli_epi32(bits, 13)), _mm512_set1_epi32((int32_t)0xc2b2ae35));
    bits = _mm512_xor_si512(bits, _mm512_srli_epi32(bits, 16));  // murmur3's finaliser
    const __mmask16 stays = _mm512_cmpge_epu32_mask(bits, _mm512_set1_epi32((int32_t)(uint32_t)x.dropped));
    return _mm512_maskz_mov_ps(stays, all((float)(1.0 / (1.0 - x.dropped / 4294967296.0))));
}

// The slopes to what `turned_rows` read, from those to what it gave, (length, width) in fp32, which it overwrites;
// `to_norm` (width,) is added to.
static void turned_back(const Attention &x, int64_t b, int64_t head, const float *norm, float *slopes, bf16 *to_qkv, float *to_norm) {
    const int64_t width = x.width, half = width / 2;
    for (int64_t l = 0; l < x.length; l++, slopes += width) {
        const bf16 *from = x.qkv + x.at(b, l, head);
        bf16 *to = to_qkv + x.at(b, l, head);
        fetch(from + AHEAD * x.all_heads() * width, width);
        if (x.cosines)  // the rotation back
            for (int64_t i = 0, j = half; i < half; i += 16, j += 16) {
                const __mmask16 m = first(half - i);
                const int64_t at = b * x.stride + l * width;
                const __m512 cosine = load(x.cosines + at + i, m), sine = load(x.sines + at + j, m);
                const __m512 a = load(slopes + i, m), c = load(slopes + j, m);
                store(slopes + i, a * cosine + c * sine, m);
                store(slopes + j, c * cosine - a * sine, m);
            }
        if (!norm) {
            for (int64_t i = 0; i < width; i += 16) store(to + i, load(slopes + i));
            continue;
        }
        const float scale = scale_of(from, width, x.eps);
        __m512 along = {};
        for (int64_t i = 0; i < width; i += 16) along += load(from + i) * load(slopes + i) * load(norm + i);
        const float mean = total(along) * scale * scale / width;
        for (int64_t i = 0; i < width; i += 16) {
            const __m512 v = load(from + i), s = load(slopes + i);
            store(to_norm + i, load(to_norm + i) + s * v * scale);
            store(to + i, (s * load(norm + i) - v * mean) * scale);
        }
    }
}

// (length, width) of a tensor whose rows lie `stride` apart, as rows (padded length, width).
static void plain_rows(const bf16 *from, int64_t stride, int64_t length, int64_t width, bf16 *to) {
    for (int64_t l = 0; l < length; l++, from += stride) {
        fetch(from + AHEAD * stride, width);
        std::memcpy(to + l * width, from, width * 2);
    }
    std::memset(to + length * width, 0, (padded(length) - length) * width * 2);
}

static int64_t scratch_size(int64_t length, int64_t width) {
    const int64_t n = padded(length);
    return n * (width * (8 * 2 + 3 * 4) + n * 2 + 32 * (4 + 2 + 2) + 2 * 4) + 2 * BLOCK * BLOCK * 4 + 32 * 64;
}

static inline void store_pairs(bf16 *to, __m512 even, __m512 odd) {
    _mm512_storeu_si512(to, paired((__m256i)_mm512_cvtneps_pbh(even), (__m256i)_mm512_cvtneps_pbh(odd)));
}

// Scores lie turned, (keys, queries), so that a softmax runs down a lane and only small matrices have to be transposed.
static void attend(const Attention &x, int64_t b, int64_t kv, Scratch room) {
    const int64_t length = x.length, n = padded(length), width = x.width, group = x.heads / x.kv_heads;
    bf16 *rows = room.take<bf16>(n * width), *keys = room.take<bf16>(n * width), *queries = room.take<bf16>(n * width);
    bf16 *turned_values = room.take<bf16>(n * width), *pairs = room.take<bf16>(n * 32);
    float *scores = room.take<float>(n * 32), *out = room.take<float>(BLOCK * BLOCK);
    const float scale = 1.0f / std::sqrt((float)width), unit = scale * LOG2E;
    plain_rows(x.qkv + x.at(b, 0, x.heads + x.kv_heads + kv), x.all_heads() * width, length, width, rows);
    columns_of<true>(rows, n, width, turned_values);
    turned_rows(x, b, x.heads + kv, x.k_norm, keys);
    for (int64_t h = kv * group; h < (kv + 1) * group; h++) {
        turned_rows(x, b, h, x.q_norm, rows);
        columns_of<false>(rows, n, width, queries);
        for (int64_t l = 0; l < length; l += 32) {
            const int64_t held = l + 32, here = std::min(length - l, (int64_t)32);
            for (int64_t t = 0; t < held; t += 32) product(keys + t * width, width, 32, queries + l * width, width, scores + t * 32);
            float logs[32], shares[32];
            for (int64_t i = 0; i < 32; i += 16) {
                // What is not seen, in the last block: lane q of row r where q < r.
                auto seen = [&](int64_t t) { return t - l <= i ? (__mmask16)0xffff : (__mmask16)~first(t - l - i); };
                __m512 most = all(-INFINITY), sums = {};
                for (int64_t t = 0; t < l; t++) most = _mm512_max_ps(most, load(scores + t * 32 + i));
                for (int64_t t = l; t < held; t++) most = _mm512_mask_max_ps(most, seen(t), most, load(scores + t * 32 + i));
                most = most * unit;
                for (int64_t t = 0; t < held; t += 2) {
                    __m512 even = power(load(scores + t * 32 + i) * unit - most);
                    __m512 odd = power(load(scores + (t + 1) * 32 + i) * unit - most);
                    if (t >= l) even = _mm512_maskz_mov_ps(seen(t), even), odd = _mm512_maskz_mov_ps(seen(t + 1), odd);
                    sums += even + odd;
                    const int64_t head = b * x.heads + h;
                    store_pairs(pairs + t * 32 + 2 * i, even * kept(x, head, t, l + i), odd * kept(x, head, t + 1, l + i));
                }
                store(shares + i, 1.0f / sums);
                store(logs + i, most);
                for (int64_t j = i; j < i + 16; j++) logs[j] -= std::log2(shares[j]);
            }
            std::memcpy(x.logs + (b * x.heads + h) * length + l, logs, here * 4);
            for (int64_t i = 0; i < width; i += 32) {
                product(turned_values + i * n, n, 32, pairs, held, out);
                for (int64_t r = 0; r < 32; r += 16)
                    for (int64_t j = 0; j < here; j += 16) {
                        __m512i columns[16];
                        transpose(out + r * 32 + j, 32, columns);
                        for (int64_t k = 0; k < std::min(here - j, (int64_t)16); k++)
                            store(x.mixed + ((b * length + l + j + k) * x.heads + h) * width + i + r,
                                  _mm512_castsi512_ps(columns[k]) * shares[j + k]);
                    }
            }
        }
    }
}

// As in FlashAttention (Dao et al., 2022): chances are computed again from the logs.
static void attend_back(const Attention &x, int64_t b, int64_t kv, const bf16 *slope, bf16 *to_qkv, float *to_norms, Scratch room) {
    const int64_t length = x.length, n = padded(length), width = x.width, group = x.heads / x.kv_heads;
    bf16 *keys = room.take<bf16>(n * width), *values = room.take<bf16>(n * width), *turned_keys = room.take<bf16>(n * width);
    bf16 *rows = room.take<bf16>(n * width), *query_columns = room.take<bf16>(n * width), *query_pairs = room.take<bf16>(n * width);
    bf16 *slope_columns = room.take<bf16>(n * width), *slope_pairs = room.take<bf16>(n * width);
    bf16 *chances = room.take<bf16>(n * 32), *slopes = room.take<bf16>(n * 32), *pairs = room.take<bf16>(n * n);
    float *to_query = room.take<float>(n * width), *to_key = room.take<float>(n * width), *to_value = room.take<float>(n * width);
    float *means = room.take<float>(n), *logs = room.take<float>(n);
    float *c = room.take<float>(BLOCK * BLOCK), *d = room.take<float>(BLOCK * BLOCK);
    const float scale = 1.0f / std::sqrt((float)width), unit = scale * LOG2E;
    turned_rows(x, b, x.heads + kv, x.k_norm, keys);
    columns_of<true>(keys, n, width, turned_keys);
    plain_rows(x.qkv + x.at(b, 0, x.heads + x.kv_heads + kv), x.all_heads() * width, length, width, values);
    std::memset(to_key, 0, n * width * 4);
    std::memset(to_value, 0, n * width * 4);
    for (int64_t h = kv * group; h < (kv + 1) * group; h++) {
        turned_rows(x, b, h, x.q_norm, rows);
        columns_of<false>(rows, n, width, query_columns);
        pair_rows(rows, n, width, query_pairs);
        plain_rows(slope + (b * length * x.heads + h) * width, x.heads * width, length, width, rows);
        columns_of<false>(rows, n, width, slope_columns);
        pair_rows(rows, n, width, slope_pairs);
        for (int64_t l = 0; l < n; l++) {
            __m512 sum = {};
            const bf16 *mixed = x.mixed + ((b * length + l) * x.heads + h) * width;
            for (int64_t i = 0; l < length && i < width; i += 16) sum += load(mixed + i) * load(rows + l * width + i);
            means[l] = total(sum);
            logs[l] = l < length ? x.logs[(b * x.heads + h) * length + l] : 0.0f;
        }
        for (int64_t t = 0; t < n; t += 32) {
            for (int64_t l = t; l < n; l += 32) {
                product(keys + t * width, width, 32, query_columns + l * width, width, c);
                product(values + t * width, width, 32, slope_columns + l * width, width, d);
                for (int64_t i = 0; i < 32; i += 16) {
                    const __m512 mean = load(means + l + i), log = load(logs + l + i);
                    for (int64_t r = 0; r < 32; r += 2) {
                        __m512 p[2], s[2];
                        for (int64_t j = 0; j < 2; j++) {
                            const int64_t at = (r + j) * 32 + i, to = l * 32 + at;
                            p[j] = power(load(c + at) * unit - log);
                            if (l == t && r + j > i) p[j] = _mm512_maskz_mov_ps((__mmask16)~first(r + j - i), p[j]);
                            const __m512 keep = kept(x, b * x.heads + h, t + r + j, l + i);
                            s[j] = p[j] * (load(d + at) * keep - mean) * scale;
                            store(chances + to, p[j] * keep);
                            store(slopes + to, s[j]);
                        }
                        store_pairs(pairs + l * n + (t + r) * 32 + 2 * i, s[0], s[1]);
                    }
                }
            }
            for (int64_t i = 0; i < width; i += 32) {
                product(chances + t * 32, 32, PANEL, slope_pairs + i * n + t * 32, n - t, c);
                product(slopes + t * 32, 32, PANEL, query_pairs + i * n + t * 32, n - t, d);
                for (int64_t r = 0; r < 32; r++)
                    for (int64_t j = 0; j < 32; j += 16) {
                        float *value = to_value + (t + r) * width + i + j, *key = to_key + (t + r) * width + i + j;
                        store(value, load(value) + load(c + r * 32 + j));
                        store(key, load(key) + load(d + r * 32 + j));
                    }
            }
        }
        for (int64_t l = 0; l < n; l += 32)
            for (int64_t i = 0; i < width; i += 32) {
                product(turned_keys + i * n, n, 32, pairs + l * n, l + 32, c);
                for (int64_t r = 0; r < 32; r += 16)
                    for (int64_t j = 0; j < 32; j += 16) {
                        __m512i columns[16];
                        transpose(c + r * 32 + j, 32, columns);
                        for (int k = 0; k < 16; k++) _mm512_storeu_si512(to_query + (l + j + k) * width + i + r, columns[k]);
                    }
            }
        turned_back(x, b, h, x.q_norm, to_query, to_qkv, to_norms);
    }
    turned_back(x, b, x.heads + kv, x.k_norm, to_key, to_qkv, to_norms + width);
    for (int64_t l = 0; l < length; l++)
        for (int64_t i = 0; i < width; i += 16)
            store(to_qkv + x.at(b, l, x.heads + x.kv_heads + kv) + i, load(to_value + l * width + i));
}

}  // namespace units
