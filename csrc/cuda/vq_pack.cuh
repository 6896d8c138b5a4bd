// A codebook and rows made ready for the screen: centred by the mean of the codes (which changes no comparison and
// removes a common offset), scaled by a power of two, rounded to half and laid out as images (vq_image.cuh). What
// the rounding took away is measured, so that vq_settle.cuh can bound the error of every score.
#pragma once

#include <cmath>
#include <type_traits>

#include "element.cuh"
#include "memory.cuh"
#include "vq_image.cuh"

namespace fastgen::vq {

constexpr unsigned kAllLanes = 0xffffffffu;

// What the preparation finds out about the codebook of one head. Zero at first.
struct HeadFacts {
  unsigned longest;   // bits of a float: at least the length of any code in the image, before and after rounding
  unsigned residual;  // bits of a float: at least the length of what rounding took from any code
  int first_finite;   // number of codes from the first finite one to the last; 0 where none is
  int unusable;       // float64 keys could overflow or underflow: every row is compared with every code
  double scale;       // of codes, and for Euclidean distance of rows
};

struct Problem {
  std::int64_t rows;   // of a head in this launch
  std::int64_t codes;  // of a head
  ImageShape shape;
  bool cosine;

  FASTGEN_HD std::int64_t code_tiles() const { return (codes + kCodeTile - 1) / kCodeTile; }
  FASTGEN_HD std::int64_t padded_codes() const { return code_tiles() * kCodeTile; }
  // Of whole tiles for four warpgroups.
  FASTGEN_HD std::int64_t padded_rows() const {
    return (rows + 4 * kRowTile - 1) / (4 * kRowTile) * (4 * kRowTile);
  }
  FASTGEN_HD std::int64_t code_image_bytes() const { return code_tiles() * shape.tile_bytes(kCodeTile); }
  FASTGEN_HD std::int64_t row_image_bytes() const { return padded_rows() / kRowTile * shape.tile_bytes(kRowTile); }
};

// Lengths from this to its inverse have products and squares of products in the range of float64; all lengths of
// float32 vectors are among them.
constexpr double kSafeLength = 1e-60;

// Codes that take no part have this for their scale.
constexpr double kLeftOut = -1;

template <class T>
__device__ __forceinline__ T warp_sum(T value, int lanes = 32) {
  for (int bit = lanes / 2; bit > 0; bit /= 2) value += __shfl_xor_sync(kAllLanes, value, bit);
  return value;
}

template <class T>
__device__ __forceinline__ T warp_max(T value, int lanes = 32) {
  for (int bit = lanes / 2; bit > 0; bit /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, value, bit);
    value = other > value ? other : value;
  }
  return value;
}

__device__ __forceinline__ std::uint64_t mix_bits(std::uint64_t h) {
  h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9u;
  h = (h ^ (h >> 27)) * 0x94D049BB133111EBu;
  return h ^ (h >> 31);
}

// Equal for values that compare equal.
__device__ __forceinline__ std::uint64_t value_bits(float x) { return __float_as_uint(x + 0.0f); }
__device__ __forceinline__ std::uint64_t value_bits(double x) {
  return static_cast<std::uint64_t>(__double_as_longlong(x + 0.0));
}

template <class S>
struct IdentifyCodes {
  const S* codes;  // heads x K x D
  Problem problem;
  double* scales;         // heads x K: the factor that makes a code one of length one for cosine, else one
  int* table;             // heads x slots, zero at first: one more than the first of equal codes
  std::int64_t slots;     // a power of two
  std::int64_t* slot_of;  // heads x K
  HeadFacts* facts;
};

// One warp a code: finds the codes that can never be the answer, those not finite or equal to an earlier one.
// Leaving out the latter keeps collapsed codebooks as fast as others. blockIdx.y: the head.
template <class S>
__global__ void identify_codes_kernel(const IdentifyCodes<S> a) {
  const int lane = threadIdx.x % 32, size = a.problem.shape.size;
  const std::int64_t k = std::int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32, head = blockIdx.y;
  if (k >= a.problem.codes) return;
  const std::int64_t at = head * a.problem.codes + k;
  const S* head_codes = a.codes + head * a.problem.codes * size;
  const S* code = head_codes + k * size;
  int* table = a.table + head * a.slots;
  std::uint64_t hash = 0;
  double square = 0;
  bool finite = true;
  for (int j = lane; j < size; j += 32) {
    const auto e = widen(code[j]);
    finite = finite && e - e == 0;
    hash += value_bits(e) * (mix_bits(static_cast<std::uint64_t>(j) + 1) | 1u);
    square += static_cast<double>(e) * static_cast<double>(e);
  }
  finite = __all_sync(kAllLanes, finite);
  square = warp_sum(square);
  hash = mix_bits(warp_sum(static_cast<unsigned long long>(hash)));
  if (!finite) {
    if (lane == 0) a.scales[at] = kLeftOut;
    return;
  }
  std::int64_t slot = static_cast<std::int64_t>(hash >> 20) & (a.slots - 1);
  for (const int mine = static_cast<int>(k) + 1;; slot = (slot + 1) & (a.slots - 1)) {
    int found = 0;
    if (lane == 0) found = atomicCAS(table + slot, 0, mine);
    found = __shfl_sync(kAllLanes, found, 0);
    if (found == 0) break;
    const S* other = head_codes + std::int64_t{found - 1} * size;
    bool equal = true;
    for (int j = lane; j < size; j += 32) equal = equal && widen(code[j]) == widen(other[j]);
    if (!__all_sync(kAllLanes, equal)) continue;
    if (lane == 0) atomicMin(table + slot, mine);
    break;
  }
  if (lane != 0) return;
  a.slot_of[at] = slot;
  a.scales[at] = !a.problem.cosine ? 1 : square == 0 ? 0 : 1 / sqrt(square);
  atomicMax(&a.facts[head].first_finite, static_cast<int>(a.problem.codes - k));
  constexpr double kLeast = kSafeLength * kSafeLength;
  if (a.problem.cosine && square != 0 && !(square > kLeast && square < 1 / kLeast)) {
    atomicOr(&a.facts[head].unusable, 1);
  }
}

struct ColumnFacts {
  double sum, least, most, count;

  __device__ void add(const ColumnFacts& other) {
    sum += other.sum;
    count += other.count;
    least = other.least < least ? other.least : least;
    most = other.most > most ? other.most : most;
  }
};

constexpr int kColumnThreads = 256, kMostSegments = 64;

template <class S>
struct CentreCodes {
  const S* codes;
  Problem problem;
  const double* scales;
  int segments;
  ColumnFacts* partial;  // heads x segments x D
  acc_t<S>* centre;      // heads x D
  HeadFacts* facts;
};

// Columns of the scaled codes, over one segment of the codes. blockIdx: segment, group of columns, head.
template <class S>
__global__ void column_facts_kernel(const CentreCodes<S> a) {
  FASTGEN_SHARED(ColumnFacts, shared, [kColumnThreads]);
  const int size = a.problem.shape.size, columns = size <= 8 ? 8 : 32;
  const int j = blockIdx.y * columns + threadIdx.x % columns, lane = threadIdx.x / columns;
  const std::int64_t codes = a.problem.codes, head = blockIdx.z;
  const std::int64_t share = (codes + a.segments - 1) / a.segments, first = blockIdx.x * share;
  const std::int64_t last = first + share < codes ? first + share : codes;
  ColumnFacts mine{0, INFINITY, -INFINITY, 0};
  if (j < size) {
#pragma unroll 4
    for (std::int64_t k = first + lane; k < last; k += kColumnThreads / columns) {
      const double scale = a.scales[head * codes + k];
      if (scale == kLeftOut) continue;
      const double e = scale * static_cast<double>(widen(a.codes[(head * codes + k) * size + j]));
      mine.add({e, e, e, 1});
    }
  }
  shared[threadIdx.x] = mine;
  __syncthreads();
  if (lane != 0 || j >= size) return;
  for (int i = 1; i < kColumnThreads / columns; ++i) mine.add(shared[i * columns + threadIdx.x]);
  a.partial[(head * a.segments + blockIdx.x) * size + j] = mine;
}

// The mean of the codes, and the power of two that brings their largest centred element into [8, 16). blockIdx.x:
// the head.
template <class S>
__global__ void centre_codes_kernel(const CentreCodes<S> a) {
  using T = acc_t<S>;
  FASTGEN_SHARED(double, reaches, [kColumnThreads / 32]);
  const int size = a.problem.shape.size;
  const std::int64_t head = blockIdx.x;
  double reach = 0;
  for (int j = threadIdx.x; j < size; j += kColumnThreads) {
    ColumnFacts column{0, INFINITY, -INFINITY, 0};
#pragma unroll 8
    for (int s = 0; s < a.segments; ++s) column.add(a.partial[(head * a.segments + s) * size + j]);
    const T mean = column.count == 0 ? T(0) : static_cast<T>(column.sum / column.count);
    a.centre[head * size + j] = mean;
    if (column.count == 0) continue;
    const double below = static_cast<double>(mean) - column.least, above = column.most - static_cast<double>(mean);
    const double most = below > above ? below : above;
    // Sums that overflow give NaN: then nothing is known.
    if (!(most <= reach)) reach = most == most ? most : INFINITY;
  }
  reach = warp_max(reach);
  if (threadIdx.x % 32 == 0) reaches[threadIdx.x / 32] = reach;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kColumnThreads / 32; ++i) reach = reaches[i] > reach ? reaches[i] : reach;
  HeadFacts& facts = a.facts[head];
  facts.scale = 1;
  if (reach == 0) return;
  if (!(reach > kSafeLength && reach < 1 / kSafeLength)) {
    facts.unusable = 1;
    return;
  }
  const int exponent = 3 - ilogb(reach), most = 120;
  facts.scale = scalbn(1.0, std::is_same_v<T, double> ? exponent : exponent > most ? most : exponent);
}

// Elements [first, first + 8) of a row; zero from `size` on.
template <class S>
__device__ __forceinline__ void load_eight(const S* row, int first, int size, acc_t<S> (&to)[8]) {
  if (first + 8 <= size && reinterpret_cast<std::uintptr_t>(row + first) % 16 == 0) {
    return widen(read_vector<true, 8>(row + first, 0, 8), to);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = first + i < size ? widen(row[first + i]) : acc_t<S>(0);
}

// Lanes that share a row of an image: enough for its pieces, a power of two, at most a warp.
FASTGEN_HD inline int lanes_of_row(const ImageShape& s) {
  const int pieces = s.blocks * s.width / 16;
  int lanes = 1;
  while (lanes < pieces && lanes < 32) lanes *= 2;
  return lanes;
}

template <class S>
struct PackCodes {
  const S* codes;
  Problem problem;
  const double* scales;
  const int* table;
  std::int64_t slots;
  const std::int64_t* slot_of;
  const acc_t<S>* centre;
  HeadFacts* facts;
  unsigned char* image;  // heads x code image
  float* start;          // heads x padded codes, in columns: the score before any product
};

__device__ __forceinline__ void write_fold(unsigned char* tile, const ImageShape& s, int tile_rows,
                                           std::int64_t row, float first, float second, float third) {
  const float parts[3] = {first, second, third};
  for (int i = 0; i < 3; ++i) {
    const int j = s.size + i;
    auto* piece = reinterpret_cast<__half*>(tile + image_offset(s, tile_rows, row, j / 8));
    piece[j % 8] = __float2half_rn(parts[i]);
  }
}

// Lanes of a warp that share a row take a column of the code image: minus twice the centred and scaled code (minus
// once for cosine), in half. blockIdx.y: the head.
template <class S>
__global__ void pack_codes_kernel(const PackCodes<S> a) {
  const ImageShape s = a.problem.shape;
  const std::int64_t head = blockIdx.y, codes = a.problem.codes, padded = a.problem.padded_codes();
  const int lanes = lanes_of_row(s), lane = threadIdx.x % lanes, pieces = s.blocks * s.width / 16;
  const std::int64_t column = std::int64_t{blockIdx.x} * (blockDim.x / lanes) + threadIdx.x / lanes;
  const std::int64_t k = column < padded ? code_of_column(column, chunk_codes(s.width)) : codes;
  const std::int64_t at = head * codes + k;
  const double scale = k < codes ? a.scales[at] : kLeftOut, unit = a.facts[head].scale;
  const bool used = scale != kLeftOut && a.table[head * a.slots + a.slot_of[at]] == k + 1;
  const double factor = a.problem.cosine ? -unit : -2 * unit;
  unsigned char* image = a.image + head * a.problem.code_image_bytes();
  double square = 0, length = 0, residual = 0;
  for (int p = lane; p < pieces; p += lanes) {
    acc_t<S> e[8] = {};
    if (used) load_eight(a.codes + at * s.size, p * 8, s.size, e);
    double value[8] = {};
    float single[8], rounded[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int j = p * 8 + i;
      if (used && j < s.size) {
        const double mean = static_cast<double>(a.centre[head * s.size + j]);
        value[i] = factor * (scale * static_cast<double>(e[i]) - mean);
      }
      single[i] = static_cast<float>(value[i]);
    }
    const Vector<__half, 8> packed = narrow<__half>(single);
    widen(packed, rounded);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const double kept = static_cast<double>(rounded[i]), lost = value[i] - kept;
      square += value[i] * value[i];
      length += kept * kept;
      residual += lost * lost;
    }
    if (column < padded) {
      *reinterpret_cast<Vector<__half, 8>*>(image + image_offset(s, kCodeTile, column, p)) = packed;
    }
  }
  square = warp_sum(square, lanes);
  const float lost = static_cast<float>(sqrt(warp_sum(residual, lanes))) * 1.0001f;
  const float longest = static_cast<float>(sqrt(warp_sum(length, lanes))) * 1.0001f + lost;
  const unsigned most_lost = warp_max(__float_as_uint(lost)), most_long = warp_max(__float_as_uint(longest));
  if (threadIdx.x % 32 == 0) {
    atomicMax(&a.facts[head].residual, most_lost);
    atomicMax(&a.facts[head].longest, most_long);
  }
  __syncwarp();
  if (lane != 0 || column >= padded) return;
  const float start = !used ? INFINITY : a.problem.cosine ? 0.0f : static_cast<float>(square / 4);
  a.start[head * padded + column] = start;
  if (!s.folded) return;
  const float share = start / kFoldFactor, high = __half2float(__float2half_rn(share));
  const float rest = used ? share - high : 0.0f, middle = __half2float(__float2half_rn(rest));
  write_fold(image, s, kCodeTile, column, high, middle, rest - middle);
}

// What the rounding of a row left: bounds of the length of the row in its image and of what it lost. Some lengths
// are signs. Rows much longer than the codes are at a smaller scale: `unit`, a power of two, times that of their
// head, and so are their scores.
struct alignas(16) RowFacts {
  float length, residual, unit, unused;
};
constexpr int kLeastUnit = -20;
// Elements of the images of rows stay below 2 to this plus one.
constexpr int kMostExponent = 13;
// The row's own image is zero, and it is compared with every code.
constexpr float kBeyond = INFINITY;
// All keys of the row are equal (cosine, a zero row).
constexpr float kIndifferent = -1;

template <class S>
struct PackRows {
  const S* x;  // of the first row of this launch
  std::int64_t head_stride;
  Problem problem;
  const acc_t<S>* centre;
  const HeadFacts* facts;
  unsigned char* image;  // heads x row image
  RowFacts* row_facts;   // heads x rows
};

// The power of two that brings `most` into [8, 16); for float32 one whose products do not overflow.
template <class T>
__device__ T scale_of(T most) {
  const int exponent = most == T(0) ? 0 : 3 - ilogb(most), limit = 120;
  return static_cast<T>(scalbn(1.0, std::is_same_v<T, double> ? exponent : exponent > limit ? limit : exponent));
}

// Lanes of a warp that share a row round it to half. blockIdx.y: the head.
template <class S>
__global__ void pack_rows_kernel(const PackRows<S> a) {
  using T = acc_t<S>;
  const ImageShape s = a.problem.shape;
  const std::int64_t head = blockIdx.y;
  const int lanes = lanes_of_row(s), lane = threadIdx.x % lanes, pieces = s.blocks * s.width / 16;
  const std::int64_t row = std::int64_t{blockIdx.x} * (blockDim.x / lanes) + threadIdx.x / lanes;
  const bool exists = row < a.problem.rows;
  const S* x = a.x + head * a.head_stride + row * s.size;
  unsigned char* image = a.image + head * a.problem.row_image_bytes();

  T most = 0;
  int finite = 1;
  for (int p = lane; p < pieces && exists; p += lanes) {
    T value[8];
    load_eight(x, p * 8, s.size, value);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      finite = finite && value[i] - value[i] == 0;
      const int j = p * 8 + i;
      const T centred = a.problem.cosine || j >= s.size ? value[i] : value[i] - a.centre[head * s.size + j];
      const T magnitude = centred < 0 ? -centred : centred;
      most = magnitude > most ? magnitude : most;
    }
  }
  most = warp_max(most, lanes);
  finite = -warp_max(-finite, lanes);
  bool covered = exists && finite && !a.facts[head].unusable && most < INFINITY;
  T scale = static_cast<T>(a.facts[head].scale);
  float unit = 1;
  if (a.problem.cosine) {
    scale = covered ? scale_of(most) : T(1);
    if (std::is_same_v<T, double>) covered = covered && most > kSafeLength && most < 1 / kSafeLength;
  } else if (covered && most > T(0)) {
    const int over = ilogb(most) + ilogb(scale) - kMostExponent;
    covered = over <= -kLeastUnit;
    if (covered && over > 0) unit = scalbnf(1.0f, -over);
    scale *= static_cast<T>(unit);
  }

  float length = 0, residual = 0;
  for (int p = lane; p < pieces; p += lanes) {
    T value[8] = {};
    if (exists) load_eight(x, p * 8, s.size, value);
    float scaled[8] = {}, rounded[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int j = p * 8 + i;
      if (covered && j < s.size) {
        const T mean = a.problem.cosine ? T(0) : a.centre[head * s.size + j];
        scaled[i] = static_cast<float>((value[i] - mean) * scale);
      }
    }
    const Vector<__half, 8> packed = narrow<__half>(scaled);
    widen(packed, rounded);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float lost = scaled[i] - rounded[i];
      length = fmaf(rounded[i], rounded[i], length);
      residual = fmaf(lost, lost, residual);
    }
    if (row < a.problem.padded_rows()) {
      *reinterpret_cast<Vector<__half, 8>*>(image + image_offset(s, kRowTile, row, p)) = packed;
    }
  }
  length = warp_sum(length, lanes);
  residual = warp_sum(residual, lanes);
  __syncwarp();
  if (lane != 0 || row >= a.problem.padded_rows()) return;
  const float fold = kFoldFactor * unit;
  if (s.folded) write_fold(image, s, kRowTile, row, fold, fold, fold);
  if (!exists) return;
  // Rounding of the sums, of the difference and of the product above; and underflow.
  const float rounding = 1 + static_cast<float>(s.depth + 16) * 0x1p-23f;
  const float bound = sqrtf(length) * rounding;
  RowFacts facts{bound, sqrtf(residual) * rounding + bound * 0x1p-22f + 0x1p-60f, unit, 0};
  if (!covered) facts.length = kBeyond;
  if (a.problem.cosine && finite && most == T(0)) facts.length = kIndifferent;
  if (!finite) facts.length = NAN;
  a.row_facts[head * a.problem.rows + row] = facts;
}

}  // namespace fastgen::vq
