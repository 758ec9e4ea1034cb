// What unpatchify and its backward do to memory: numbers of 1, 2, 4 or 8 bytes move between token
// rows and an image, and nothing is computed.
//
// Along a row of the image the pixels of a patch lie `channels` numbers apart in their token, the
// channels of a pixel a plane apart in the image: each row is the transpose of a matrix (pixels,
// channels). Squares of it go through vector registers of 16 or 8 bytes, which every x86-64 and
// arm64 has; single numbers do the edges. The permuted copy of eager PyTorch computes an address
// for each number and takes ten times as long as a plain copy.
#pragma once

#include <algorithm>
#include <cstdint>

#define FASTDIT_INLINE inline __attribute__((always_inline))

namespace fastdit {

constexpr int64_t kPixels = 1024;  // of a row at a time: their offsets take 8 KiB

// Token rows and an image; strides in numbers, both last axes dense. A signal is an image of one
// row.
struct Layout {
  int64_t samples, channels;
  int64_t grid_rows, grid_columns, patch_rows, patch_columns;
  int64_t token_batch = 0, token = 0;           // strides of the token rows
  int64_t image_batch = 0, plane = 0, row = 0;  // strides of the image

  int64_t tokens() const { return grid_rows * grid_columns; }
  int64_t token_width() const { return patch_rows * patch_columns * channels; }
  int64_t height() const { return grid_rows * patch_rows; }
  int64_t width() const { return grid_columns * patch_columns; }
  int64_t chunks() const { return (width() + kPixels - 1) / kPixels; }
};

// ---- squares of numbers --------------------------------------------------------------------------

// As many rows as a vector of `bytes` holds numbers.
template <class T, int bytes>
struct Square {
  static constexpr int size = bytes / int(sizeof(T));
  typedef T Row __attribute__((vector_size(bytes)));
  Row rows[size];

  // The first (`half` 0) or the last halves of two rows, number by number in turn.
  static FASTDIT_INLINE Row zip(Row a, Row b, int half) {
    const int first = half * size / 2;
    Row mixed;
#if defined(__clang__)
    for (int i = 0; i < size; ++i) mixed[i] = (i % 2 ? b : a)[first + i / 2];
#else  // GCC 12 does not see a shuffle in the loop: 4 times the instructions
    for (int i = 0; i < size; ++i) mixed[i] = T(i % 2 * size + first + i / 2);
    mixed = __builtin_shuffle(a, b, mixed);
#endif
    return mixed;
  }

  FASTDIT_INLINE void transpose() {
    for (int step = 1; step < size; step *= 2) {
      Row mixed[size];
      for (int i = 0; i < size; ++i) mixed[i] = zip(rows[i / 2], rows[i / 2 + size / 2], i % 2);
      for (int i = 0; i < size; ++i) rows[i] = mixed[i];
    }
  }
};

template <class Row, class T>
FASTDIT_INLINE void load(Row& to, const T* from) {
  __builtin_memcpy(&to, from, sizeof to);
}
template <class Row, class T>
FASTDIT_INLINE void store(T* to, const Row& from) {
  __builtin_memcpy(to, &from, sizeof from);
}

// ---- rows of an image ----------------------------------------------------------------------------

// Up to kPixels pixels of one row. `pixels` tells where each lies in the token rows.
template <class T, bool to_image>
struct Move {
  T* tokens;
  T* image;
  const int64_t* pixels;
  int64_t plane;

  template <int bytes>
  FASTDIT_INLINE void square(int64_t x, int64_t c) const {
    Square<T, bytes> s;
    constexpr int size = Square<T, bytes>::size;
    for (int i = 0; i < size; ++i) {
      if constexpr (to_image) {
        load(s.rows[i], tokens + pixels[x + i] + c);
      } else {
        load(s.rows[i], image + (c + i) * plane + x);
      }
    }
    s.transpose();
    for (int i = 0; i < size; ++i) {
      if constexpr (to_image) {
        store(image + (c + i) * plane + x, s.rows[i]);
      } else {
        store(tokens + pixels[x + i] + c, s.rows[i]);
      }
    }
  }

  FASTDIT_INLINE void number(int64_t x, int64_t c) const {
    T &token = tokens[pixels[x] + c], &pixel = image[c * plane + x];
    if constexpr (to_image) {
      pixel = token;
    } else {
      token = pixel;
    }
  }

  // Pixels [x0, x1) of channels [c0, c1), in squares of `bytes` and what is left in smaller ones.
  template <int bytes = 16>
  void area(int64_t x0, int64_t x1, int64_t c0, int64_t c1) const {
    constexpr int size = Square<T, bytes>::size;
    if constexpr (bytes < 8 || size < 2) {
      for (int64_t x = x0; x < x1; ++x)
        for (int64_t c = c0; c < c1; ++c) number(x, c);
    } else {
      const int64_t x_end = x1 - (x1 - x0) % size, c_end = c1 - (c1 - c0) % size;
      if constexpr (to_image) {
        // A cache line of each plane is written at once: 15 % less time. Reading planes so takes more.
        constexpr int64_t line = 64 / sizeof(T);
        for (int64_t first = x0; first < x_end; first += line)
          for (int64_t c = c0; c < c_end; c += size)
            for (int64_t x = first; x < std::min(first + line, x_end); x += size) square<bytes>(x, c);
      } else {
        for (int64_t x = x0; x < x_end; x += size)
          for (int64_t c = c0; c < c_end; c += size) square<bytes>(x, c);
      }
      if (c_end < c1) area<bytes / 2>(x0, x_end, c_end, c1);
      if (x_end < x1) area<bytes / 2>(x_end, x1, c0, c1);
    }
  }
};

// Items [begin, end) of samples × grid rows × chunks of a row.
template <class T, bool to_image>
void move_rows(const Layout& l, T* tokens, T* image, int64_t begin, int64_t end) {
  int64_t pixels[kPixels], filled = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t chunk = item % l.chunks(), grid_row = item / l.chunks() % l.grid_rows;
    const int64_t sample = item / l.chunks() / l.grid_rows, first = chunk * kPixels;
    const int64_t count = std::min(kPixels, l.width() - first);
    if (filled != chunk) {
      int64_t column = first / l.patch_columns, inside = first % l.patch_columns;
      for (int64_t x = 0; x < count; ++x) {
        pixels[x] = column * l.token + inside * l.channels;
        if (++inside == l.patch_columns) inside = 0, ++column;
      }
      filled = chunk;
    }
    for (int64_t i = 0; i < l.patch_rows; ++i) {
      const int64_t line = i * l.patch_columns * l.channels;
      const Move<T, to_image> move{
          tokens + sample * l.token_batch + grid_row * l.grid_columns * l.token + line,
          image + sample * l.image_batch + (grid_row * l.patch_rows + i) * l.row + first, pixels,
          l.plane};
      move.area(0, count, 0, l.channels);
    }
  }
}

// All of it on PyTorch's threads, numbers of `bytes` each.
void unpatchify_all(const Layout& l, void* tokens, void* image, int64_t bytes);

}  // namespace fastdit
