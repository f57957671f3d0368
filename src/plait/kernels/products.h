// Products of small fp32 matrices that lie as they are, in tiles of as many sums as the registers hold.
#pragma once
#include "vectors.h"

constexpr int ROWS = LANES == 16 ? 12 : 6;                    // of the largest tile
constexpr int NARROW = LANES == 4 ? 4 : 2;                    // vectors of outputs in it
constexpr int64_t STRIP = NARROW * LANES;                     // outputs: what widths must be multiples of

template <int R>
INLINE void small_tile(const float *x, int64_t row, int64_t column, const float *w, int64_t stride, int64_t k, float *out,
                       int64_t out_stride, bool more) {
    vec sum[R][NARROW];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < NARROW; c++) sum[r][c] = more ? load(out + r * out_stride + c * LANES) : vec{};
    for (int64_t i = 0; i < k; i++, x += column, w += stride) {
        vec b[NARROW];
        for (int c = 0; c < NARROW; c++) b[c] = load(w + c * LANES);
        for (int r = 0; r < R; r++) {
            const vec a = splat(x[r * row]);
            for (int c = 0; c < NARROW; c++) sum[r][c] += a * b[c];
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < NARROW; c++) store(out + r * out_stride + c * LANES, sum[r][c]);
}

template <int R>
static void small_strips(int64_t rows, const float *x, int64_t row, int64_t column, const float *w, int64_t stride, int64_t k,
                         float *out, int64_t out_stride, bool more) {
    if (rows == R)
        small_tile<R>(x, row, column, w, stride, k, out, out_stride, more);
    else if constexpr (R > 1)
        small_strips<R - 1>(rows, x, row, column, w, stride, k, out, out_stride, more);
}

// out (rows, n) = x (rows, k) times w (k, n), plus what `out` holds where there is `more`. Rows of x lie `row` items apart
// and its columns `column`, so that it may lie turned; n is a multiple of STRIP.
static void product(const float *x, int64_t row, int64_t column, int64_t rows, const float *w, int64_t stride, int64_t k,
                    int64_t n, float *out, int64_t out_stride, bool more) {
    for (int64_t c = 0; c < n; c += STRIP)
        for (int64_t r = 0, left = (rows + ROWS - 1) / ROWS, here; left > 0; left--, r += here) {
            here = (rows - r + left - 1) / left;
            small_strips<ROWS>(here, x + r * row, row, column, w + c, stride, k, out + r * out_stride + c, out_stride, more);
        }
}

// Lanes whose bit STEP is not set trade places with those of the vector STEP further on.
template <int STEP>
INLINE void trade(vec &a, vec &b) {
#if defined(__clang__)
    vec low = a, high = b;
    for (int i = 0; i < LANES; i++)
        if (i & STEP) low[i] = b[i - STEP], high[i - STEP] = a[i];
    a = low, b = high;
#else
    ivec low, high;
    for (int i = 0; i < LANES; i++) {
        low[i] = i & STEP ? LANES + i - STEP : i;
        high[i] = i & STEP ? LANES + i : i + STEP;
    }
    const vec first = __builtin_shuffle(a, b, low);
    b = __builtin_shuffle(a, b, high);
    a = first;
#endif
}
template <int STEP>
INLINE void trade_all(vec (&x)[LANES]) {
    for (int i = 0; i < LANES; i++)
        if (!(i & STEP)) trade<STEP>(x[i], x[i + STEP]);
    if constexpr (2 * STEP < LANES) trade_all<2 * STEP>(x);
}

// Rows (n, width) as columns (width, n); both are multiples of LANES.
static void columns_of(const float *from, int64_t n, int64_t width, float *to) {
    for (int64_t r = 0; r < n; r += LANES)
        for (int64_t i = 0; i < width; i += LANES) {
            vec x[LANES];
            for (int j = 0; j < LANES; j++) x[j] = load(from + (r + j) * width + i);
            trade_all<1>(x);
            for (int j = 0; j < LANES; j++) store(to + (i + j) * n + r, x[j]);
        }
}

// --- large products ----------------------------------------------------------------------------------------------------
//
// What stands on the right is packed first: panels of STRIP outputs by DEPTH inputs, each of which the first cache holds,
// and rows on the left are taken HEIGHT at a time, which the second holds.

constexpr int64_t DEPTH = 256, HEIGHT = 192;

// w (k, n), items `down` and `across` apart, as panels (n / STRIP, k, STRIP), zeros where n ends early.
static void pack_panels(const float *w, int64_t down, int64_t across, int64_t k, int64_t n, float *to) {
    for (int64_t c = 0; c < n; c += STRIP, to += k * STRIP) {
        const int64_t here = std::min(STRIP, n - c);
        if (down == 1 && here == STRIP) {  // turned
            int64_t i = 0;
            for (; i + LANES <= k; i += LANES)
                for (int64_t part = 0; part < STRIP; part += LANES) {
                    vec x[LANES];
                    for (int j = 0; j < LANES; j++) x[j] = load(w + (c + part + j) * across + i);
                    trade_all<1>(x);
                    for (int j = 0; j < LANES; j++) store(to + (i + j) * STRIP + part, x[j]);
                }
            for (; i < k; i++)
                for (int64_t j = 0; j < STRIP; j++) to[i * STRIP + j] = w[i + (c + j) * across];
        } else if (across == 1 && here == STRIP) {
            for (int64_t i = 0; i < k; i++)
                for (int64_t j = 0; j < STRIP; j += LANES) store(to + i * STRIP + j, load(w + i * down + c + j));
        } else {
            for (int64_t i = 0; i < k; i++)
                for (int64_t j = 0; j < STRIP; j++) to[i * STRIP + j] = j < here ? w[i * down + (c + j) * across] : 0.0f;
        }
    }
}

// Rows in strips of about equal height by a panel.
static void rows_by_panel(const float *x, int64_t row, int64_t column, int64_t rows, const float *w, int64_t k, float *out,
                          int64_t out_stride, bool more) {
    for (int64_t left = (rows + ROWS - 1) / ROWS; left > 0; left--) {
        const int64_t here = (rows + left - 1) / left;
        small_strips<ROWS>(here, x, row, column, w, STRIP, k, out, out_stride, more);
        rows -= here, x += here * row, out += here * out_stride;
    }
}

// out (m, n) = x (m, k) times w (k, n), for outputs `begin` to `end`, of which the first is a multiple of STRIP; items of x
// lie `row` and `column` apart, those of w `down` and `across`. `room` holds DEPTH * (padded outputs) + HEIGHT * STRIP.
static void large_product(const float *x, int64_t row, int64_t column, int64_t m, const float *w, int64_t down, int64_t across,
                          int64_t k, int64_t begin, int64_t end, float *out, int64_t out_stride, float *room) {
    const int64_t n = end - begin, panels = (n + STRIP - 1) / STRIP;
    float *edge = room + DEPTH * panels * STRIP;
    for (int64_t i = 0; i < k; i += DEPTH) {
        const int64_t deep = std::min(k - i, DEPTH);
        pack_panels(w + i * down + begin * across, down, across, deep, n, room);
        for (int64_t r = 0; r < m; r += HEIGHT) {
            const int64_t high = std::min(m - r, HEIGHT);
            for (int64_t p = 0; p < panels; p++) {
                const float *panel = room + p * deep * STRIP, *from = x + r * row + i * column;
                float *to = out + r * out_stride + begin + p * STRIP;
                const int64_t wide = std::min(STRIP, n - p * STRIP);
                if (wide == STRIP) {
                    rows_by_panel(from, row, column, high, panel, deep, to, out_stride, i > 0);
                    continue;
                }
                rows_by_panel(from, row, column, high, panel, deep, edge, STRIP, false);
                for (int64_t a = 0; a < high; a++)
                    for (int64_t b = 0; b < wide; b++) to[a * out_stride + b] = edge[a * STRIP + b] + (i ? to[a * out_stride + b] : 0.0f);
            }
        }
    }
}
