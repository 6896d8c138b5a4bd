// Rows and codes in half precision, in the order in which tensor cores read them from shared memory.
#pragma once

#include <cstdint>

#include "../common/host_device.h"

namespace fastgen::vq {

// Rows of x that a warpgroup scores at once, and codes it scores them against.
constexpr int kRowTile = 64, kCodeTile = 128;

// An image is a sequence of tiles; a tile is a sequence of blocks of columns; a block holds `width` bytes of every
// row of its tile, swizzled so that reads of eight rows meet no bank twice.
struct ImageShape {
  int size;     // elements of a row
  int depth;    // elements of a row in the image: `size` on a multiple of 16; the rest is zero
  int width;    // bytes of a row in a block: 32, 64 or 128
  int blocks;   // blocks of a tile
  bool folded;  // whether the three elements after `size` add the start of the score

  FASTGEN_HD std::int64_t tile_bytes(int tile_rows) const { return std::int64_t{blocks} * tile_rows * width; }
};

// Above this size the sum of squares would not fit into a half.
constexpr int kMostFolded = 1024;
// What rows hold where codes hold the parts of a folded start.
constexpr float kFoldFactor = 16;

FASTGEN_HD inline ImageShape image_shape(int size) {
  const int depth = size == 0 ? 16 : (size + 15) / 16 * 16, width = depth <= 16 ? 32 : depth <= 32 ? 64 : 128;
  return {size, depth, width, (2 * depth + width - 1) / width, depth - size >= 3 && size <= kMostFolded};
}

// Neighbouring codes of one thread of the screen: a chunk, whose least score alone is kept. Larger chunks cost the
// screen less and the comparison of their codes more, which grows with their size.
FASTGEN_HD constexpr int chunk_codes(int width) { return width == 128 ? 4 : 8; }

// Offset of 16-byte piece `piece` of a row of a block.
FASTGEN_HD inline int swizzled(int row, int piece, int width) {
  const int offset = row * width + piece * 16;
  return offset ^ ((offset >> 7 & (width / 16 - 1)) << 4);
}

// Offset of 16-byte piece `piece` of a row in an image with tiles of `tile_rows`.
FASTGEN_HD inline std::int64_t image_offset(const ImageShape& s, int tile_rows, std::int64_t row, int piece) {
  const int pieces = s.width / 16, in_tile = static_cast<int>(row % tile_rows);
  return row / tile_rows * s.tile_bytes(tile_rows) + std::int64_t{piece / pieces} * tile_rows * s.width +
         swizzled(in_tile, piece % pieces, s.width);
}

// The code that column `column` of a code tile holds. A thread of the screen owns columns 2 t, 2 t + 1 of every
// eight, and its chunks are codes that follow each other.
FASTGEN_HD inline std::int64_t code_of_column(std::int64_t column, int chunk) {
  const int in_group = static_cast<int>(column % (4 * chunk)), owner = in_group % 8 / 2;
  return column / (4 * chunk) * (4 * chunk) + owner * chunk + in_group / 8 * 2 + in_group % 2;
}

}  // namespace fastgen::vq
