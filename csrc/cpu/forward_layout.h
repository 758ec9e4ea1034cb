// A DiT as numbers, and where its packed weights and its activations lie.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/forward.h"

namespace fastdit {

// In the order of `fastdit.native_weights`'s tuple.
struct Dit {
  int64_t channels, height, width, patch_rows, patch_columns;
  int64_t hidden, depth, heads, mlp, out_channels;

  static constexpr int64_t kNumbers = 10;
  int64_t grid_rows() const { return height / patch_rows; }
  int64_t grid_columns() const { return width / patch_columns; }
  int64_t tokens() const { return grid_rows() * grid_columns(); }
  int64_t patch_size() const { return channels * patch_rows * patch_columns; }
  int64_t pixels() const { return out_channels * patch_rows * patch_columns; }
  int64_t modulations() const { return (6 * depth + 2) * hidden; }
};

// A Linear in the packed memory: offsets in floats. Where it is in 8 bits its weight is words of
// `group` numbers, and each output channel has a scale and the sum of its integers.
struct Linear {
  int64_t weight, bias, rows, depth;
  int64_t group = 0, scale = 0, sums = 0;
};

inline int64_t words_of(int64_t depth, int64_t group) { return (depth + group - 1) / group; }

// The packed memory: a cache line that names the panel's width, then every matrix, each aligned.
struct PackedLayout {
  static constexpr int64_t kPerBlock = 4;  // qkv, proj, fc1, fc2
  Linear patch, last;
  int64_t positions;  // (tokens, padded(hidden)): the position plus the patch bias
  std::vector<Linear> blocks;
  int64_t floats = 16;

  // `group` 0 is all float; else the blocks' weights lie in 8 bits.
  PackedLayout(const Dit& d, int64_t group) {
    patch = linear(d.hidden, d.patch_size());
    positions = take(d.tokens() * padded(d.hidden));
    for (int64_t i = 0; i < d.depth; ++i) {
      blocks.push_back(linear(3 * d.hidden, d.hidden, group));
      blocks.push_back(linear(d.hidden, d.hidden, group));
      blocks.push_back(linear(d.mlp, d.hidden, group));
      blocks.push_back(linear(d.hidden, d.mlp, group));
    }
    last = linear(d.pixels(), d.hidden);
  }

 private:
  int64_t take(int64_t count) {
    const int64_t at = floats;
    floats += (count + 15) / 16 * 16;
    return at;
  }
  Linear linear(int64_t rows, int64_t depth, int64_t group = 0) {
    const int64_t weight = take(padded(rows) * (group ? words_of(depth, group) : depth));
    Linear l{weight, take(padded(rows)), rows, depth, group};
    if (group) l.scale = take(padded(rows)), l.sums = take(padded(rows));
    return l;
  }
};

// The activations: the residual stream, its normalisation (then attention's output), and what is
// wide: qkv, the MLP's hidden rows, the patches, the pixels. In 8 bits also what a product reads.
// Where a sample runs in parts, one may be in the MLP while another reads its keys, and in the next
// layer while a third still does: qkv lies apart, in two places by turns.
struct Workspace {
  int64_t modulations, stream, normed, wide, wide_stride, floats;
  int64_t words = 0, words_stride = 0, scales = 0, zeros = 0;
  int64_t qkv[2];

  Workspace(const Dit& d, int64_t batch, int64_t group, int64_t parts) {
    const int64_t rows = batch * d.tokens(), narrow = rows * row_stride(d.hidden);
    wide_stride = row_stride(std::max({3 * d.hidden, d.mlp, d.patch_size(), d.pixels()}));
    modulations = 0;
    stream = batch * (6 * d.depth + 2) * padded(d.hidden);
    normed = stream + narrow;
    wide = normed + narrow;
    floats = wide + rows * wide_stride + 16;
    for (int64_t& each : qkv) {
      each = parts > 1 ? floats : wide;
      if (parts > 1) floats += rows * wide_stride + 16;
    }
    if (!group) return;
    words_stride = row_stride(words_of(std::max(d.hidden, d.mlp), group));
    words = floats;
    scales = words + rows * words_stride;
    zeros = scales + rows;
    floats = zeros + rows + 16;
  }
};

}  // namespace fastdit
