// A call of diffusion_step with random contents in buffers of exactly its size, and its results
// evaluated in double from the formula, for one kernel or another to be held against.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <vector>

#include "diffusion_step.h"

namespace fastdit {

enum class Noise { kNone, kGiven, kSeed, kSeeds };

struct Options {
  int64_t batch = 2, channels = 4, height = 4, width = 6;
  int patch_h = 0, patch_w = 0;
  bool wide_output = true, learned = true, previous = true, step_per_sample = true;
  int64_t guided = 3;
  Noise noise = Noise::kGiven;
  float clip = 0.7f;
  Storage x = Storage::kFloat, output = Storage::kFloat;
  int shift = 0;  // elements by which every tensor misses its alignment

  void print() const {
    std::printf("batch %ld channels %ld size %ldx%ld patch %dx%d wide %d learned %d previous %d "
                "guided %ld noise %d clip %g storage %d %d shift %d",
                batch, channels, height, width, patch_h, patch_w, wide_output, learned, previous,
                guided, int(noise), clip, int(x), int(output), shift);
  }
};

class Random {
 public:
  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state_ >> 33);
  }
  float uniform(float low, float high) {
    return low + (high - low) * float(bits() % 65536) / 65536.0f;
  }

 private:
  uint64_t state_ = 1;
};

inline int size_of(Storage storage) { return storage == Storage::kFloat ? 4 : 2; }

inline double read(const void* tensor, Storage storage, int64_t at) {
  if (storage == Storage::kFloat) return static_cast<const float*>(tensor)[at];
  if (storage == Storage::kHalf) return to_float(static_cast<const half*>(tensor)[at]);
  return to_float(static_cast<const bfloat16*>(tensor)[at]);
}

inline void write(void* tensor, Storage storage, int64_t at, float value) {
  if (storage == Storage::kFloat) static_cast<float*>(tensor)[at] = value;
  if (storage == Storage::kHalf) from_float(value, static_cast<half*>(tensor)[at]);
  if (storage == Storage::kBFloat16) from_float(value, static_cast<bfloat16*>(tensor)[at]);
}

class Problem {
 public:
  explicit Problem(const Options& options) : o(options) {
    call.batch = o.batch;
    call.channels = o.channels;
    call.plane = o.height * o.width;
    call.output_channels = o.wide_output ? 2 * o.channels : o.channels;
    call.guided = o.guided;
    call.learned = o.learned;
    call.clip = o.clip;
    call.width = int32_t(o.width);
    call.patch_h = o.patch_h;
    call.patch_w = o.patch_w;
    call.x_storage = o.x;
    call.output_storage = o.output;
    call.rows = 5;
    const int64_t size = o.batch * call.sample_size();
    call.x = tensor(size, o.x);
    call.output = tensor((o.guided ? 2 : 1) * o.batch * call.output_size(), o.output);
    call.noise = o.noise == Noise::kGiven ? tensor(size, o.x) : nullptr;
    call.previous = o.previous ? tensor(size, o.x) : nullptr;
    call.next = tensor(size, o.x);
    call.x0 = tensor(size, o.x);
    table.resize(5);
    for (StepRow& row : table) {
      row = {random.uniform(-1, 1), random.uniform(-1, 1), random.uniform(-1, 1),
             random.uniform(-1, 1), random.uniform(-1, 1), random.uniform(0, 1),
             random.uniform(-3, -2), random.uniform(-2, 0), random.uniform(1, 4)};
    }
    call.table = table.data();
    for (int64_t b = 0; b < o.batch; ++b) {
      steps.push_back(random.bits() % 5);
      seeds.push_back(random.bits() * 0x100000001 - 7);
    }
    call.step = steps.data();
    call.step_per_sample = o.step_per_sample;
    call.seed = o.noise == Noise::kSeed || o.noise == Noise::kSeeds ? seeds.data() : nullptr;
    call.seed_per_sample = o.noise == Noise::kSeeds;
  }

  // Compares what a kernel stored; prints the first difference.
  bool matches() const {
    for (int64_t b = 0; b < o.batch; ++b) {
      for (int64_t e = 0; e < call.sample_size(); ++e) {
        double next, x0;
        expected(b, e, next, x0);
        const int64_t at = b * call.sample_size() + e;
        if (near(read(call.next, o.x, at), next) && near(read(call.x0, o.x, at), x0)) continue;
        o.print();
        std::printf("\n  sample %ld element %ld: %.9g and %.9g, expected %.9g and %.9g\n", b, e,
                    read(call.next, o.x, at), read(call.x0, o.x, at), next, x0);
        return false;
      }
    }
    return true;
  }

  void expected(int64_t b, int64_t e, double& next, double& x0) const {
    const StepRow& row = table[size_t(call.step_of(b))];
    const double x = read(call.x, o.x, b * call.sample_size() + e);
    x0 = double(row.a) * x + double(row.b) * model(b, e, row);
    if (x0 > o.clip) x0 = o.clip;
    if (x0 < -o.clip) x0 = -o.clip;
    next = double(row.cx) * x + double(row.c0) * x0;
    if (o.previous) next += double(row.cp) * read(call.previous, o.x, b * call.sample_size() + e);
    if (o.noise == Noise::kNone) return;
    double sigma = row.sigma;
    if (o.learned) {
      const double f = (model(b, call.sample_size() + e, row) + 1) / 2;
      sigma *= std::exp(0.5 * (f * row.max_log + (1 - f) * row.min_log));
    }
    next += sigma * noise(b, e);
  }

  Options o;
  StepCall call = {};

 private:
  void* tensor(int64_t count, Storage storage) {
    const size_t bytes = size_t(count + o.shift) * size_of(storage);
    buffers.emplace_back(static_cast<char*>(std::malloc(bytes)), std::free);
    for (int64_t i = 0; i < count + o.shift; ++i) {
      write(buffers.back().get(), storage, i, random.uniform(-2, 2));
    }
    return buffers.back().get() + o.shift * size_of(storage);
  }

  bool near(double got, double want) const {
    const double unit = o.x == Storage::kFloat ? 1e-6 : o.x == Storage::kHalf ? 0x1p-11 : 0x1p-8;
    return std::abs(got - want) <= unit * std::abs(want) + 2e-6;
  }

  // Element e of sample b's output in the image's order, its channels guided.
  double model(int64_t b, int64_t e, const StepRow& row) const {
    const double cond = read(call.output, o.output, output_place(b, e));
    if (e / call.plane >= o.guided) return cond;
    const double null = read(call.output, o.output, output_place(o.batch + b, e));
    return null + row.guidance * (cond - null);
  }

  int64_t output_place(int64_t b, int64_t e) const {
    if (o.patch_w == 0) return b * call.output_size() + e;
    const int64_t c = e / call.plane, y = e % call.plane / o.width, x = e % o.width;
    const int64_t token = y / o.patch_h * (o.width / o.patch_w) + x / o.patch_w;
    const int64_t inside = y % o.patch_h * o.patch_w + x % o.patch_w;
    const int64_t row = token * o.patch_h * o.patch_w + inside;
    return b * call.output_size() + row * call.output_channels + c;
  }

  double noise(int64_t b, int64_t e) const {
    if (o.noise == Noise::kGiven) return read(call.noise, o.x, b * call.sample_size() + e);
    const NoiseKey key = {uint64_t(seeds[o.noise == Noise::kSeeds ? b : 0]),
                          o.noise == Noise::kSeeds ? 0u : uint32_t(b), uint32_t(call.step_of(b))};
    const Words w = philox4x32_10({uint32_t(e / 4), uint32_t(e / 4 >> 32), key.sample, key.step},
                                  uint32_t(key.seed), uint32_t(key.seed >> 32));
    const double u = float((double(e % 4 < 2 ? w.w0 : w.w2) + 0.5) * 0x1p-32);
    const double angle = double(e % 4 < 2 ? w.w1 : w.w3) * 0x1p-31 * 3.141592653589793;
    return std::sqrt(-2 * std::log(u)) * (e % 2 == 0 ? std::cos(angle) : std::sin(angle));
  }

  Random random;
  std::vector<StepRow> table;
  std::vector<int64_t> steps, seeds;
  std::vector<std::unique_ptr<char, void (*)(void*)>> buffers;
};

// Every layout and source of noise on shapes with and without tails.
template <class Run>
int count_failures(Run run) {
  int failures = 0, number = 0;
  for (const Noise noise : {Noise::kNone, Noise::kGiven, Noise::kSeed, Noise::kSeeds}) {
    for (const auto& [height, width] : std::initializer_list<std::pair<int, int>>{
             {4, 6}, {1, 1}, {2, 3}, {3, 5}, {16, 36}, {1, 2050}}) {
      for (const int64_t channels : {1, 3, 4, 6}) {
        for (const int patch : {0, 1, 2, 3}) {
          ++number;
          Options o;
          o.height = height, o.width = width, o.channels = channels, o.noise = noise;
          o.batch = 1 + number % 3;
          o.guided = number % (2 * channels) + 1;
          if (number % 4 == 0) o.guided = 0;
          if (number % 4 == 1) o.guided = 2 * channels;
          o.learned = number % 3 != 0;
          o.wide_output = o.learned || number % 2;
          if (!o.wide_output && o.guided > channels) o.guided = channels;
          o.previous = number % 5 < 3;
          o.step_per_sample = number % 7 < 4;
          if (number % 11 == 0) o.clip = INFINITY;
          o.shift = number % 4 == 3 ? 1 : 0;
          if (patch) {
            o.patch_w = width % patch ? 1 : patch, o.patch_h = height % patch ? 1 : patch;
          }
          if (number % 5 == 1) o.x = o.output = Storage::kBFloat16;
          if (number % 5 == 2) o.x = o.output = Storage::kHalf;
          if (number % 5 == 3) o.output = Storage::kBFloat16;
          if (number % 5 == 4) o.output = Storage::kHalf;
          Problem problem(o);
          run(problem.call);
          failures += !problem.matches();
        }
      }
    }
  }
  return failures;
}

}  // namespace fastdit
