// One more position of a decoder-only transformer for each row of a batch, as one call: what `Decoder._step` does in
// PyTorch, without its calls. `generation/native.py` calls it; the structs below are mirrored there.
//
// Weights lie in panels of 32 outputs, (N / 32, K, 32) in fp32 and (N / 32, K / 2, 32, 2) in bf16, zeros where K or N
// end early. A sum over K runs in one order whatever the number of rows, so a row's result in fp32 does not depend on its
// company. Vectors are the compiler's own (16 floats, split where the processor's are shorter); bf16 products use
// AVX512-BF16 or AMX where the compiler has them for this processor.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define AMX 1
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

typedef float f16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef float f8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float f4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t i16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t u16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t h16 __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint16_t bf16;

constexpr int64_t PANEL = 32;  // outputs of a panel; sizes are filled up to it
constexpr int64_t AHEAD = 4096;  // bytes
constexpr int64_t MANY = 5;    // rows from which on AMX is faster than AVX512-BF16

struct Norm {
    const float *weight, *bias;  // no bias: RMS
};
struct Linear {
    const void *weight;  // packed
    const float *bias;   // or null
    int64_t in, out;
};
struct Layer {
    Norm attention_norm, feed_norm;
    Linear qkv, attention_out, feed_in, feed_out;
    const float *q_norm, *k_norm;  // or null
};
struct Model {
    int64_t layers, width, heads, kv_heads, head_width, hidden, max_length;
    int64_t activation;  // 0 SwiGLU, 1 GELU, 2 GELU by tanh
    int64_t half;        // weights, activations and cache in bf16
    float eps;
    const float *turns;      // (max_length, head_width): cosines, then sines of half the places; or null
    const float *positions;  // (max_length, width), or null
    const Layer *layer;
    Norm final_norm;
};

static int products = 0;  // 0 plain vectors, 1 AVX512-BF16, 2 AMX

static inline int64_t padded(int64_t n) { return (n + PANEL - 1) / PANEL * PANEL; }
static inline int64_t whole_rows(int64_t n) { return n < 16 ? n : (n + 15) / 16 * 16; }

// --- vectors -----------------------------------------------------------------------------------------------------

static inline f16 load(const float *p) { return *(const f16 *)p; }
static inline f16 load(const bf16 *p) {
#if defined(__AVX512F__)  // the compiler would do it in halves
    return (f16)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
#endif
    u16 wide = __builtin_convertvector(*(const h16 *)p, u16) << 16;
    f16 x;
    std::memcpy(&x, &wide, sizeof x);
    return x;
}
static inline void store(float *p, f16 x) { *(f16 *)p = x; }
static inline void store(bf16 *p, f16 x) {
    u16 bits;
    std::memcpy(&bits, &x, sizeof x);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to the nearest, ties to even
    *(h16 *)p = __builtin_convertvector(bits, h16);
}
static inline float one(const float *p) { return *p; }
static inline float one(const bf16 *p) {
    uint32_t bits = (uint32_t)*p << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
static inline void put(float *p, float x) { *p = x; }
static inline void put(bf16 *p, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof x);
    *p = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
static inline f16 all(float x) { return f16{} + x; }
static inline f4 quarter(f16 x) {  // the sum of its four quarters
    f8 a, b;
    std::memcpy(&a, &x, 32);
    std::memcpy(&b, (char *)&x + 32, 32);
    a += b;
    f4 c, d;
    std::memcpy(&c, &a, 16);
    std::memcpy(&d, (char *)&a + 16, 16);
    return c + d;
}
static inline float total(f16 x) {
    const f4 c = quarter(x);
    return (c[0] + c[1]) + (c[2] + c[3]);
}
static inline f4 totals(f16 x, f16 y, f16 z, f16 w) {  // of each, as `total` adds
    const f4 a = quarter(x), b = quarter(y), c = quarter(z), d = quarter(w);
    const f4 ab = f4{a[0], b[0], a[2], b[2]} + f4{a[1], b[1], a[3], b[3]};
    const f4 cd = f4{c[0], d[0], c[2], d[2]} + f4{c[1], d[1], c[3], d[3]};
    return f4{ab[0], ab[1], cd[0], cd[1]} + f4{ab[2], ab[3], cd[2], cd[3]};
}
static inline f16 exponential(f16 x) {  // relative error 2e-7 (Cephes)
    x = x < -87.0f ? all(-87.0f) : x;
    x = x > 88.0f ? all(88.0f) : x;
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    f16 n = x * 1.44269504f + shift - shift;
    f16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    f16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    i16 power = (__builtin_convertvector(n, i16) + 127) << 23;
    f16 scale;
    std::memcpy(&scale, &power, sizeof scale);
    return p * scale;
}
static inline f16 sigmoid(f16 x) { return 1.0f / (1.0f + exponential(-x)); }
static inline f16 gelu(f16 x, bool by_tanh) {
    if (by_tanh) return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
    // x * Phi(x), erfc by Abramowitz and Stegun 7.1.26, error 1.5e-7
    f16 z = x * 0.70710678f, a = z < 0.0f ? -z : z, t = 1.0f / (1.0f + 0.3275911f * a);
    f16 p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    f16 tail = 0.5f * p * exponential(-a * a);
    return x * (x < 0.0f ? tail : 1.0f - tail);
}

// --- products ----------------------------------------------------------------------------------------------------

// Weights are read once, faster than the processor foresees: ask for what is 4 KiB ahead, two lines a call.
static inline void fetch(const void *w) {
    __builtin_prefetch((const char *)w + AHEAD);
    __builtin_prefetch((const char *)w + AHEAD + 64);
}

template <int R>
static void panel_rows(const float *x, int64_t stride, const float *w, int64_t in, float *out, int64_t out_stride) {
    f16 sum[R][2] = {};
    for (int64_t k = 0; k < in; k++, w += PANEL) {
        fetch(w);
        f16 a = load(w), b = load(w + 16);
        for (int r = 0; r < R; r++) {
            sum[r][0] += x[r * stride + k] * a;
            sum[r][1] += x[r * stride + k] * b;
        }
    }
    for (int r = 0; r < R; r++) store(out + r * out_stride, sum[r][0]), store(out + r * out_stride + 16, sum[r][1]);
}

template <int R>
static void panel_rows(const bf16 *x, int64_t stride, const bf16 *w, int64_t in, float *out, int64_t out_stride) {
#if defined(__AVX512BF16__)
    __m512 sum[R][2];
    for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < in; k += 2, w += 2 * PANEL) {
        fetch(w);
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
#else
    f16 sum[R][2] = {};
    for (int64_t k = 0; k < in; k += 2, w += 2 * PANEL)
        for (int half = 0; half < 2; half++) {
            u16 pairs = *(const u16 *)(w + 32 * half), low = pairs << 16, high = pairs & 0xffff0000u;
            f16 even, odd;
            std::memcpy(&even, &low, sizeof even);
            std::memcpy(&odd, &high, sizeof odd);
            for (int r = 0; r < R; r++)
                sum[r][half] += one(x + r * stride + k) * even + one(x + r * stride + k + 1) * odd;
        }
    for (int r = 0; r < R; r++) store(out + r * out_stride, sum[r][0]), store(out + r * out_stride + 16, sum[r][1]);
#endif
}

template <class T>
static void panel(const T *x, int64_t rows, int64_t stride, const T *w, int64_t in, float *out, int64_t out_stride) {
    for (int64_t r = 0; r < rows; r += 8, x += 8 * stride, out += 8 * out_stride) switch (std::min(rows - r, (int64_t)8)) {
            case 8: panel_rows<8>(x, stride, w, in, out, out_stride); break;
            case 7: panel_rows<7>(x, stride, w, in, out, out_stride); break;
            case 6: panel_rows<6>(x, stride, w, in, out, out_stride); break;
            case 5: panel_rows<5>(x, stride, w, in, out, out_stride); break;
            case 4: panel_rows<4>(x, stride, w, in, out, out_stride); break;
            case 3: panel_rows<3>(x, stride, w, in, out, out_stride); break;
            case 2: panel_rows<2>(x, stride, w, in, out, out_stride); break;
            default: panel_rows<1>(x, stride, w, in, out, out_stride);
        }
}

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
            for (int i = 0; i < 16; i++) fetch(panel + 64 * i);
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

struct Team {
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
    work(Team{omp_get_thread_num(), omp_get_num_threads()});
#else
    work(Team{0, 1});
#endif
}

// out (rows, N) = x (rows, K) times the weight; `after(row, first output)` ends each panel while it is in the cache.
template <class T, class After>
static void multiply(const Team &team, const Linear &linear, const T *x, int64_t rows, float *out, After after) {
    const int64_t in = padded(linear.in), stride = padded(linear.out);
    int64_t begin, end;
    team.share(stride / PANEL, begin, end);
    for (int64_t p = begin; p < end; p++) {
        const T *w = (const T *)linear.weight + p * PANEL * in;
        float *to = out + p * PANEL;
#ifdef AMX
        if (sizeof(T) == 2 && products == 2 && rows >= MANY)
            panel_tiles((const bf16 *)x, rows, in, (const bf16 *)w, in, to, stride);
        else
#endif
            panel(x, rows, in, w, in, to, stride);
        for (int64_t r = 0; r < rows; r++) {
            float *row = to + r * stride;
            if (linear.bias)
                for (int64_t i = 0; i < PANEL; i += 16) store(row + i, load(row + i) + load(linear.bias + p * PANEL + i));
            after(r, p * PANEL);
        }
    }
    team.meet();
}

// --- the step ----------------------------------------------------------------------------------------------------

template <class T>
static void normalise(const float *x, const Norm &norm, float eps, int64_t width, T *out) {
    f16 sums = {}, squares = {};
    float mean = 0, square = 0;
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) sums += load(x + i);
    if (norm.bias) {
        mean = total(sums);
        for (; i < width; i++) mean += x[i];
        mean /= width;
    }
    for (i = 0; i + 16 <= width; i += 16) squares += (load(x + i) - mean) * (load(x + i) - mean);
    square = total(squares);
    for (; i < width; i++) square += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / std::sqrt(square / width + eps);
    for (i = 0; i + 16 <= width; i += 16) {
        f16 y = (load(x + i) - mean) * scale * load(norm.weight + i);
        store(out + i, norm.bias ? y + load(norm.bias + i) : y);
    }
    for (; i < width; i++) put(out + i, (x[i] - mean) * scale * norm.weight[i] + (norm.bias ? norm.bias[i] : 0.0f));
}

// The norm of a head, its rotation, and a factor; in place.
static void turn(float *x, const float *norm, const float *turns, const Model &m, float factor) {
    const int64_t width = m.head_width, half = width / 2;
    if (norm) normalise(x, Norm{norm, nullptr}, m.eps, width, x);
    if (turns)
        for (int64_t i = 0; i < half; i++) {
            const float a = x[i], b = x[i + half], cosine = turns[i], sine = turns[i + half];
            x[i] = (a * cosine - b * sine) * factor;
            x[i + half] = (b * cosine + a * sine) * factor;
        }
    else
        for (int64_t i = 0; i < width; i++) x[i] *= factor;
}

// Attention of one row's heads of one key-value head; `qkv` is turned in place, key and value go into the cache.
template <class T>
static void attend(const Model &m, const Layer &layer, float *qkv, int64_t kv, T *keys, T *values, int64_t capacity,
                   int64_t at, float *scores, T *mixed) {
    const int64_t width = m.head_width, group = m.heads / m.kv_heads, held = at + 1;
    const float *turns = m.turns ? m.turns + std::min(at, m.max_length - 1) * width : nullptr;
    float *k = qkv + (m.heads + kv) * width, *v = k + m.kv_heads * width;
    turn(k, layer.k_norm, turns, m, 1.0f);
    for (int64_t i = 0; i < width; i++) put(keys + at * width + i, k[i]), put(values + at * width + i, v[i]);
    for (int64_t h = kv * group; h < (kv + 1) * group; h++) {
        float *q = qkv + h * width;
        turn(q, layer.q_norm, turns, m, 1.0f / std::sqrt((float)width));
        for (int64_t t = 0; t < held; t += 4) {
            const T *key[4];  // beyond the end, the last again
            for (int j = 0; j < 4; j++) {
                key[j] = keys + std::min(t + j, at) * width;
                for (int64_t i = 0; i < width; i += 64 / sizeof(T)) __builtin_prefetch(key[j] - keys + values + i);
            }
            f16 sum[4] = {};
            int64_t i = 0;
            for (; i + 16 <= width; i += 16)
                for (int j = 0; j < 4; j++) sum[j] += load(q + i) * load(key[j] + i);
            f4 score = totals(sum[0], sum[1], sum[2], sum[3]);
            for (; i < width; i++)
                for (int j = 0; j < 4; j++) score[j] += q[i] * one(key[j] + i);
            *(f4 *)(scores + t) = score;
        }
        for (int64_t t = held; t % 16; t++) scores[t] = -INFINITY;
        f16 greatest = load(scores);
        for (int64_t t = 16; t < held; t += 16) greatest = load(scores + t) > greatest ? load(scores + t) : greatest;
        float most = greatest[0];
        for (int i = 1; i < 16; i++) most = std::max(most, greatest[i]);
        f16 sums = {};
        for (int64_t t = 0; t < held; t += 16) {
            f16 e = exponential(load(scores + t) - most);
            if (t + 16 > held)
                for (int64_t i = held - t; i < 16; i++) e[i] = 0;
            store(scores + t, e);
            sums += e;
        }
        const float share = 1.0f / total(sums);
        T *out = mixed + h * width;
        int64_t i = 0;
        for (; i + 64 <= width; i += 64) {
            f16 sum[4] = {};
            for (int64_t t = 0; t < held; t++) {
                for (int64_t j = 0; j < 64; j += 64 / sizeof(T))  // of the next head
                    __builtin_prefetch(keys + (capacity + t) * width + i + j);
                for (int j = 0; j < 4; j++) sum[j] += scores[t] * load(values + t * width + i + 16 * j);
            }
            for (int j = 0; j < 4; j++) store(out + i + 16 * j, sum[j] * share);
        }
        for (; i + 16 <= width; i += 16) {
            f16 sum = {};
            for (int64_t t = 0; t < held; t++) sum += scores[t] * load(values + t * width + i);
            store(out + i, sum * share);
        }
        for (; i < width; i++) {
            float sum = 0;
            for (int64_t t = 0; t < held; t++) sum += scores[t] * one(values + t * width + i);
            put(out + i, sum * share);
        }
    }
}

struct Room {  // of the scratch memory, in bytes; inputs of products keep zeros where they are filled up
    int64_t normed, mixed, inner, qkv, gates, sums, scores, size;
    Room(const Model &m, int64_t rows, int64_t capacity, int64_t threads) {
        const int64_t item = m.half ? 2 : 4, many = whole_rows(rows);
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
        size = at;
    }
};

template <class T>
static void step(const Model &m, const Team &team, float *x, T *hidden, T *keys, T *values, const int64_t *lengths,
                 int64_t rows, int64_t cache_rows, int64_t capacity, char *scratch) {
    const Room room(m, rows, capacity, team.size);
    T *normed = (T *)(scratch + room.normed), *mixed = (T *)(scratch + room.mixed), *inner = (T *)(scratch + room.inner);
    float *qkv = (float *)(scratch + room.qkv), *gates = (float *)(scratch + room.gates);
    float *sums = (float *)(scratch + room.sums), *scores = (float *)(scratch + room.scores) + team.index * (capacity + 16);
    const int64_t wide = padded(m.width), mix = padded(m.heads * m.head_width), deep = padded(m.hidden);
    const int64_t qkv_stride = padded((m.heads + 2 * m.kv_heads) * m.head_width);
    int64_t begin, end;
    const Tiled tiled(sizeof(T) == 2 ? rows : 0);
    auto norm_all = [&](const Norm &norm, T *out, int64_t stride) {
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
        multiply(team, layer.qkv, normed, rows, qkv, nothing);
        team.share(rows * m.kv_heads, begin, end);
        for (int64_t item = begin; item < end; item++) {
            const int64_t r = item / m.kv_heads, kv = item % m.kv_heads;
            const int64_t at = ((l * cache_rows + r) * m.kv_heads + kv) * capacity * m.head_width;
            attend(m, layer, qkv + r * qkv_stride, kv, keys + at, values + at, capacity, lengths[r], scores, mixed + r * mix);
        }
        team.meet();
        multiply(team, layer.attention_out, mixed, rows, sums, add);
        norm_all(layer.feed_norm, normed, wide);
        multiply(team, layer.feed_in, normed, rows, gates, nothing);
        team.share(rows * deep / 16, begin, end);
        const int64_t gates_stride = padded(layer.feed_in.out);
        for (int64_t item = begin; item < end; item++) {
            const int64_t r = item / (deep / 16), i = item % (deep / 16) * 16;
            const float *gate = gates + r * gates_stride + i;
            T *to = inner + r * deep + i;
            if (i + 16 > m.hidden) {
                for (int64_t j = i; j < m.hidden; j++) {
                    const f16 a = all(gates[r * gates_stride + j]);
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
        multiply(team, layer.feed_out, inner, rows, sums, add);
    }
    norm_all(m.final_norm, hidden, m.width);
}

extern "C" {

// What bf16 products use here: 0 plain vectors, 1 AVX512-BF16, 2 AMX. To be called first.
int plait_products() {
#if defined(__AVX512BF16__)
    products = 1;
#endif
#ifdef AMX
    if (!syscall(SYS_arch_prctl, 0x1023, 18)) products = 2;  // ARCH_REQ_XCOMP_PERM for the tiles' data
#endif
    return products;
}

// Weight (out, in) in fp32, laid out in panels; `to` holds padded(out) * padded(in) items and is zero.
void plait_pack(const float *weight, int64_t out, int64_t in, int64_t half, void *to) {
    const int64_t deep = padded(in);
    for (int64_t n = 0; n < out; n++)
        for (int64_t k = 0; k < in; k++) {
            const int64_t panel = n / PANEL * PANEL * deep, column = n % PANEL;
            if (half)
                put((bf16 *)to + panel + (k / 2 * PANEL + column) * 2 + k % 2, weight[n * in + k]);
            else
                ((float *)to)[panel + k * PANEL + column] = weight[n * in + k];
        }
}

int64_t plait_scratch(const Model *model, int64_t rows, int64_t capacity, int64_t threads) {
    return Room(*model, rows, capacity, threads).size;
}

// out (rows, padded outputs) in fp32 = x (rows, inputs) times the weight; room for `whole_rows(rows)` rows in `out`, and
// in `scratch` for the inputs filled up, zero at first.
void plait_linear(const Linear *linear, int64_t half, const void *x, int64_t rows, float *out, char *scratch, int64_t threads) {
    const int64_t item = half ? 2 : 4, wide = padded(linear->in) * item;
    for (int64_t r = 0; r < rows; r++) std::memcpy(scratch + r * wide, (const char *)x + r * linear->in * item, linear->in * item);
    auto nothing = [](int64_t, int64_t) {};
    together(threads, [&](const Team &team) {
        const Tiled tiled(half ? rows : 0);
        if (half)
            multiply(team, *linear, (const bf16 *)scratch, rows, out, nothing);
        else
            multiply(team, *linear, (const float *)scratch, rows, out, nothing);
    });
}

// x (rows, width) embeds one more position a row, and is overwritten; `hidden` (rows, width) gets the states after the
// final norm. Keys and values (layers, cache_rows, kv_heads, capacity, head_width) hold `lengths` (rows,) positions
// and get one more. `scratch` is zero at first, and belongs to calls of the same number of rows, capacity and threads.
void plait_step(const Model *model, float *x, void *hidden, void *keys, void *values, const int64_t *lengths, int64_t rows,
                int64_t cache_rows, int64_t capacity, char *scratch, int64_t threads) {
    together(threads, [&](const Team &team) {
        if (model->half)
            step<bf16>(*model, team, x, (bf16 *)hidden, (bf16 *)keys, (bf16 *)values, lengths, rows, cache_rows, capacity,
                       scratch);
        else
            step<float>(*model, team, x, (float *)hidden, (float *)keys, (float *)values, lengths, rows, cache_rows,
                        capacity, scratch);
    });
}
}
