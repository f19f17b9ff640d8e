// The learned step of lqkd/quantization/kernels.py, for float32 on a CPU: the same numbers bit for bit.
//
// A tensor is (rows, columns) in the order of memory, and each row has a step of its own. The sums of the step's
// gradient run over blocks of a fixed size, in float32 within a block (64 sums side by side) and in float64 over the
// blocks, so that they depend neither on the number of threads nor on the machine's vectors.

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t BLOCK = 8192, LANES = 64, PARALLEL_FROM = 32768;

struct Grid {
    float step, low, high;
};

float positive_step(float scale) {
    const float magnitude = std::fabs(scale);
    return magnitude < FLT_MIN ? FLT_MIN : magnitude;
}

inline float rounded(float ratio, const Grid& grid) {
    ratio = ratio < grid.low ? grid.low : ratio;  // false for NaN, which stays
    ratio = ratio > grid.high ? grid.high : ratio;
    return std::rint(ratio);
}

void forward_block(const float* __restrict x, float* __restrict x_hat, int64_t n, const Grid grid) {
    for (int64_t i = 0; i < n; ++i)
        x_hat[i] = (rounded(x[i] / grid.step, grid) + 0.0f) * grid.step;  // -0 + 0 is 0
}

inline float slope_at(float ratio, bool inside, const Grid& grid) {
    return rounded(ratio, grid) - (inside ? ratio : 0.0f);
}

// Sets the gradient of x and returns what its product with the incoming one adds to the sum.
inline float backward_element(float gradient, float x, float& gradient_x, const Grid& grid) {
    const float ratio = x / grid.step;
    const bool inside = (ratio > grid.low) & (ratio < grid.high);
    gradient_x = inside ? gradient : 0.0f;
    return gradient * slope_at(ratio, inside, grid);
}

void slope_block(const float* __restrict x, float* __restrict slope, int64_t n, const Grid grid) {
    for (int64_t i = 0; i < n; ++i) {
        const float ratio = x[i] / grid.step;
        slope[i] = slope_at(ratio, (ratio > grid.low) & (ratio < grid.high), grid);
    }
}

double backward_block(
    const float* __restrict gradient, const float* __restrict x, float* __restrict gradient_x, int64_t n, const Grid grid
) {
    float lanes[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int64_t lane = 0; lane < LANES; ++lane)
            lanes[lane] += backward_element(gradient[i + lane], x[i + lane], gradient_x[i + lane], grid);
    for (; i < n; ++i) lanes[i % LANES] += backward_element(gradient[i], x[i], gradient_x[i], grid);
    double total = 0.0;
    for (const float lane : lanes) total += lane;
    return total;
}

// Calls run(row, block, first element, elements) for every block of every row.
template <typename Run>
void for_blocks(int64_t rows, int64_t columns, int threads, const Run& run) {
    const int64_t blocks = (columns + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows * columns >= PARALLEL_FROM)
    for (int64_t i = 0; i < rows * blocks; ++i) {
        const int64_t row = i / blocks, first = i % blocks * BLOCK;
        run(row, i, row * columns + first, columns - first < BLOCK ? columns - first : BLOCK);
    }
}

}  // namespace

extern "C" void learned_step(
    const float* x, float* x_hat, const float* scale, int64_t rows, int64_t columns, float low, float high, int threads
) {
    for_blocks(rows, columns, threads, [&](int64_t row, int64_t, int64_t first, int64_t n) {
        forward_block(x + first, x_hat + first, n, {positive_step(scale[row]), low, high});
    });
}

extern "C" void learned_step_slope(
    const float* x, float* slope, const float* scale, int64_t rows, int64_t columns, float low, float high, int threads
) {
    for_blocks(rows, columns, threads, [&](int64_t row, int64_t, int64_t first, int64_t n) {
        slope_block(x + first, slope + first, n, {positive_step(scale[row]), low, high});
    });
}

extern "C" void learned_step_backward(
    const float* gradient, const float* x, float* gradient_x, const float* scale, float* gradient_scale, int64_t rows,
    int64_t columns, float factor, float low, float high, int threads
) {
    const int64_t blocks = (columns + BLOCK - 1) / BLOCK;
    std::vector<double> sums(rows * blocks);
    for_blocks(rows, columns, threads, [&](int64_t row, int64_t block, int64_t first, int64_t n) {
        const Grid grid{positive_step(scale[row]), low, high};
        sums[block] = backward_block(gradient + first, x + first, gradient_x + first, n, grid);
    });
    for (int64_t row = 0; row < rows; ++row) {
        double total = 0.0;
        for (int64_t block = 0; block < blocks; ++block) total += sums[row * blocks + block];
        const float sign = scale[row] > 0.0f ? 1.0f : scale[row] < 0.0f ? -1.0f : 0.0f;
        const float towards = std::fabs(scale[row]) == positive_step(scale[row]) ? sign : 0.0f;
        gradient_scale[row] = static_cast<float>(total) * factor * towards;
    }
}
