// Exact answers from what the screen kept. A bound of the error of every score says which chunks of codes can hold
// the nearest one. Almost always that is one chunk: its codes are compared in float32 (float64 for float64
// inputs), and in float64 as the answer is defined where that cannot tell. Rows for which more is possible, "open"
// rows, are screened again for every code within the bound.
#pragma once

#include "vq_screen.cuh"

namespace fastgen::vq {

template <class S>
struct Search {
  using T = acc_t<S>;
  Problem problem;
  const S* x;              // heads x head_rows x D
  const S* codes;          // heads x K x D
  std::int64_t head_rows;  // of a head in all launches
  std::int64_t first;      // row of a head that this launch begins at
  const HeadFacts* facts;
  const RowFacts* row_facts;
  const Minimum* minima;
  int parts;
  const unsigned char *row_image, *code_image;
  const float* start;
  int* open_count;    // heads, zero at first
  int* open_rows;     // heads x rows
  float* open_limit;  // heads x rows

  std::int64_t* indices;  // heads x head_rows
  T* distance;            // may be null
  S* quantized;           // may be null
  double* errors;         // squared distance of a row, with `quantized`

  FASTGEN_HD const S* row(std::int64_t head, std::int64_t r) const {
    return x + (head * head_rows + first + r) * problem.shape.size;
  }
  FASTGEN_HD const S* code(std::int64_t head, std::int64_t k) const {
    return codes + (head * problem.codes + k) * problem.shape.size;
  }
};

// The float64 key that defines the answer: terms in order, no fma.
template <class S>
__device__ __forceinline__ double exact_key(const S* x, const S* e, int size, bool cosine) {
  double sum = 0, square = 0;
#pragma unroll 2
  for (int j = 0; j < size; ++j) {
    const double a = static_cast<double>(widen(x[j])), b = static_cast<double>(widen(e[j]));
    if (cosine) {
      sum = __dadd_rn(sum, __dmul_rn(a, b));
      square = __dadd_rn(square, __dmul_rn(b, b));
    } else {
      const double difference = __dsub_rn(a, b);
      sum = __dadd_rn(sum, __dmul_rn(difference, difference));
    }
  }
  if (!cosine) return sum;
  return square == 0 ? 0 : -__dmul_rn(sum, fabs(sum)) / square;
}

struct Nearest {
  double key = INFINITY;
  std::int64_t index = 0x7fffffffffffffff;

  // Keys that are not finite take no part.
  __device__ void offer(double candidate, std::int64_t k) {
    if (!(candidate > -INFINITY && candidate < INFINITY)) return;
    if (candidate < key || (candidate == key && k < index)) {
      key = candidate;
      index = k;
    }
  }

  __device__ void join_warp() {
    for (int bit = 16; bit > 0; bit /= 2) {
      const double other_key = __shfl_xor_sync(kAllLanes, key, bit);
      const long long other = __shfl_xor_sync(kAllLanes, static_cast<long long>(index), bit);
      offer(other_key, other);
    }
    if (!(key < INFINITY)) index = 0;
  }
};

// How far apart the scores of two codes must be for their order to be certain.
//
// With h = x + a, g = e + b the row and the code in the image, <x, e> is within |a| |e| + |h| |b| of <h, g>.
// Adding up rounds at most depth + depth / 8 times at 2^-23 of the largest magnitude met, the start included; the
// three halves of a folded start lose at most 2^-20. The last term covers the float64 keys that the order is
// defined by.
__device__ inline float certain_gap(const Problem& p, const HeadFacts& facts, const RowFacts& row) {
  const float e = __uint_as_float(facts.longest), lost = __uint_as_float(facts.residual);
  const float x = row.length + row.residual, start = p.cosine ? 0 : row.unit * e * e / 4;
  const float sum = (1.25f * static_cast<float>(p.shape.depth) + 32) * 0x1p-23f * (start + x * e);
  const float whole =
      p.cosine ? x * static_cast<float>(facts.scale) : (x + row.unit * e) * (x + row.unit * e) / row.unit;
  const float key = static_cast<float>(p.shape.depth + 16) * 0x1p-51f * whole;
  return 2.02f * (row.residual * e + row.length * lost + sum + key + (p.shape.folded ? row.unit * 0x1p-19f : 0));
}

// Sums of kValues values a lane over the warp. Afterwards value[0] is that of position lane / (32 / kValues).
template <int kValues, class T>
__device__ __forceinline__ void fold_warp(T (&value)[kValues], int lane) {
  int bit = 16;
#pragma unroll
  for (int n = kValues / 2; n > 0; n /= 2, bit /= 2) {
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const T sent = upper ? value[i] : value[i + n], kept = upper ? value[i + n] : value[i];
      value[i] = kept + __shfl_xor_sync(kAllLanes, sent, bit);
    }
  }
  for (; bit > 0; bit /= 2) value[0] += __shfl_xor_sync(kAllLanes, value[0], bit);
}

// The lanes whose code of a chunk can be the nearest by arithmetic in T. Lane l has code l / (32 / kChunk), which
// is left out from `count` on.
template <int kChunk, class S>
__device__ __forceinline__ unsigned possible_in_chunk(const S* x, const S* chunk, int count, int size, bool cosine,
                                                      int lane) {
  using T = acc_t<S>;
  constexpr T kEpsilon = std::is_same_v<T, double> ? T(0x1p-52) : T(0x1p-23);
  T value[kChunk] = {}, squares[kChunk] = {}, length = 0;
#pragma unroll 2
  for (int j = lane; j < size; j += 32) {
    const T a = widen(x[j]);
    length += a * a;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const T b = i < count ? widen(chunk[std::int64_t{i} * size + j]) : T(0), difference = a - b;
      value[i] += cosine ? a * b : difference * difference;
      if (cosine) squares[i] += b * b;
    }
  }
  fold_warp(value, lane);
  T mine = value[0], margin = 0;
  const T rounding = static_cast<T>(size + 16) * kEpsilon;
  if (cosine) {
    fold_warp(squares, lane);
    length = warp_sum(length);
    // Too small or too large for these sums: NaN, which nothing rules out.
    constexpr T kLeast = std::is_same_v<T, double> ? T(0x1p-800) : T(0x1p-90);
    const bool usable = squares[0] > kLeast && squares[0] < 1 / kLeast && length > kLeast && length < 1 / kLeast;
    mine = usable ? -mine / sqrt(squares[0]) : T(NAN);
    margin = rounding * sqrt(length);
  }
  T least = lane / (32 / kChunk) < count ? mine : T(INFINITY);
  for (int bit = 16; bit > 0; bit /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, least, bit);
    // A NaN loses.
    least = other < least || least != least ? other : least;
  }
  if (!cosine) {
    constexpr T kTiny = std::is_same_v<T, double> ? T(0x1p-1000) : T(0x1p-120);
    margin = rounding * least + static_cast<T>(size) * kTiny;
  }
  const bool ruled_out = lane / (32 / kChunk) >= count || mine > least + 2 * margin;
  return __ballot_sync(kAllLanes, !ruled_out);
}

// Writes the results of a row, of which the whole warp knows the answer.
template <class S>
__device__ __forceinline__ void write_row(const Search<S>& a, bool cosine, std::int64_t head, std::int64_t r,
                                          std::int64_t index, int lane) {
  using T = acc_t<S>;
  const std::int64_t at = head * a.head_rows + a.first + r;
  const int size = a.problem.shape.size;
  if (lane == 0) a.indices[at] = index;
  if (a.distance == nullptr && a.quantized == nullptr) return;
  const S* x = a.row(head, r);
  const S* e = a.code(head, index);
  double sum = 0, square_x = 0, square_e = 0;
#pragma unroll 2
  for (int j = lane; j < size; j += 32) {
    const T p = widen(x[j]), q = widen(e[j]);
    if (a.quantized != nullptr) {
      // p - p is zero, or NaN where p is not finite.
      narrow(q + (p - p), a.quantized + at * size + j);
      const T difference = p - q;
      sum += static_cast<double>(difference) * static_cast<double>(difference);
    } else if (cosine) {
      sum += static_cast<double>(p) * static_cast<double>(q);
      square_x += static_cast<double>(p) * static_cast<double>(p);
      square_e += static_cast<double>(q) * static_cast<double>(q);
    } else {
      const double difference = static_cast<double>(p) - static_cast<double>(q);
      sum += difference * difference;
    }
  }
  sum = warp_sum(sum);
  if (a.quantized != nullptr) {
    if (lane == 0) a.errors[at] = sum;
    return;
  }
  if (cosine) {
    square_x = warp_sum(square_x);
    square_e = warp_sum(square_e);
    // Written so that NaN stays.
    const double similarity = square_x == 0 || square_e == 0 ? 0 : sum / sqrt(square_x) / sqrt(square_e);
    sum = similarity > 1 ? 0 : 2 - 2 * similarity;
    if (sum > 4) sum = 4;
  }
  if (lane == 0) a.distance[at] = static_cast<T>(sum);
}

constexpr int kSettleThreads = 256;

// The nearest of the codes of one chunk; the whole warp gets it.
template <int kChunk, bool kCosine, class S>
__device__ __forceinline__ std::int64_t nearest_in_chunk(const Search<S>& a, std::int64_t head, const S* x,
                                                         int chunk, int lane) {
  constexpr int kLanes = 32 / kChunk;
  const int size = a.problem.shape.size;
  const std::int64_t first = std::int64_t{chunk} * kChunk, k = first + lane / kLanes;
  const int count = a.problem.codes - first < kChunk ? static_cast<int>(a.problem.codes - first) : kChunk;
  const unsigned possible = possible_in_chunk<kChunk>(x, a.code(head, first), count, size, kCosine, lane);
  const int lowest = (__ffs(possible) - 1) / kLanes;
  if (possible == ((1u << kLanes) - 1) << lowest * kLanes) return first + lowest;
  Nearest nearest;
  if ((possible >> lane & 1) != 0 && lane % kLanes == 0) {
    nearest.offer(exact_key(x, a.code(head, k), size, kCosine), k);
  }
  nearest.join_warp();
  return nearest.index;
}

// The nearest of the codes of several chunks, those of the lanes in `candidates`: at most 32 codes.
template <int kChunk, bool kCosine, class S>
__device__ __forceinline__ std::int64_t nearest_in_chunks(const Search<S>& a, std::int64_t head, const S* x,
                                                          int chunk, unsigned candidates, int lane) {
  // The codes of the c-th of them are those of lanes [c, c + 1) * kChunk.
  for (int c = 0; c < lane / kChunk; ++c) candidates &= candidates - 1;
  const int source = candidates == 0 ? 0 : __ffs(candidates) - 1;
  const std::int64_t k = std::int64_t{__shfl_sync(kAllLanes, chunk, source)} * kChunk + lane % kChunk;
  Nearest nearest;
  if (candidates != 0 && k < a.problem.codes) {
    nearest.offer(exact_key(x, a.code(head, k), a.problem.shape.size, kCosine), k);
  }
  nearest.join_warp();
  return nearest.index;
}

// One warp a row. blockIdx.y: the head.
template <int kChunk, bool kCosine, class S>
__global__ void __launch_bounds__(kSettleThreads, kCosine || sizeof(S) == 8 ? 2 : 4)
    settle_kernel(const Search<S> a) {
  const int lane = threadIdx.x % 32;
  const std::int64_t r = std::int64_t{blockIdx.x} * (kSettleThreads / 32) + threadIdx.x / 32, head = blockIdx.y;
  if (r >= a.problem.rows) return;
  const std::int64_t at = head * a.problem.rows + r;
  const HeadFacts facts = a.facts[head];
  const RowFacts row = a.row_facts[at];
  std::int64_t index = 0;
  if (row.length == kIndifferent && facts.first_finite != 0) {
    index = a.problem.codes - facts.first_finite;
  } else if (row.length >= 0 && facts.first_finite != 0) {
    Best mine;
#pragma unroll 1
    for (int p = lane; p < a.parts; p += 32) {
      const Minimum m = a.minima[at * a.parts + p];
      mine.second = fminf(mine.second, m.second);
      mine.offer(m.best, m.chunk);
    }
    const float best = -warp_max(-mine.best);
    // Infinite where nothing is known. The gap has room for the rounding of the sum.
    const bool known = row.length != kBeyond && best < INFINITY;
    const float limit = known ? best + certain_gap(a.problem, facts, row) : INFINITY;
    const unsigned candidates = __ballot_sync(kAllLanes, mine.best <= limit);
    if (__any_sync(kAllLanes, mine.second <= limit) || __popc(candidates) * kChunk > 32) {
      if (lane != 0) return;
      const std::int64_t to = head * a.problem.rows + atomicAdd(a.open_count + head, 1);
      a.open_rows[to] = static_cast<int>(r);
      a.open_limit[to] = limit;
      return;
    }
    const S* x = a.row(head, r);
    const int chunk = __shfl_sync(kAllLanes, mine.chunk, __ffs(candidates) - 1);
    index = __popc(candidates) == 1 ? nearest_in_chunk<kChunk, kCosine>(a, head, x, chunk, lane)
                                    : nearest_in_chunks<kChunk, kCosine>(a, head, x, mine.chunk, candidates, lane);
  }
  write_row(a, kCosine, head, r, index, lane);
}

constexpr int kOpenRows = 16, kOpenThreads = 512, kOpenWarps = kOpenThreads / 32;
// Columns of the code image that a warp scores at once, and how many of their scores it can keep for later.
constexpr int kOpenGroups = 4, kOpenColumns = 8 * kOpenGroups, kOpenList = 640;
static_assert(kCodeTile % kOpenColumns == 0 && kOpenList > kOpenRows * kOpenColumns);

// 32 bits of an image row: elements 2 w, 2 w + 1.
__device__ __forceinline__ std::uint32_t image_word(const unsigned char* image, const ImageShape& s, int tile_rows,
                                                    std::int64_t row, int w) {
  return *reinterpret_cast<const std::uint32_t*>(image + image_offset(s, tile_rows, row, w / 4) + w % 4 * 4);
}

// Comparing these as unsigned compares the numbers; -0 is 0.
__device__ __forceinline__ unsigned long long ordered_bits(double x) {
  const auto bits = static_cast<unsigned long long>(__double_as_longlong(x + 0.0));
  return (bits >> 63) != 0 ? ~bits : bits | 1ull << 63;
}

// The least key met for each open row of a block, and the lowest code with it.
struct Leaders {
  static constexpr unsigned long long kNone = ~0ull;
  static constexpr int kNoCode = 0x7fffffff;
  unsigned long long key[kOpenRows];
  int code[kOpenRows];

  // By all lanes of a warp, none of them for another warp's leaders; `row` is ignored where the key is kNone.
  __device__ __forceinline__ void offer(int row, unsigned long long candidate, int k) {
    const bool real = candidate != kNone;
    const unsigned long long before = real ? key[row] : 0;
    __syncwarp();
    if (real) atomicMin(&key[row], candidate);
    __syncwarp();
    const unsigned long long now = real ? key[row] : 0;
    if (now != before) atomicExch(&code[row], kNoCode);
    __syncwarp();
    if (real && now == candidate) atomicMin(&code[row], k);
    __syncwarp();
  }
};

// kOpenRows open rows at a time against all codes: those within the limit of a row are compared in float64. Warps
// take columns in turn and do not wait for each other. blockIdx.y: the head.
template <class S>
__global__ void __launch_bounds__(kOpenThreads) open_rows_kernel(const Search<S> a) {
  FASTGEN_SHARED(Leaders, leaders, [kOpenWarps]);
  FASTGEN_SHARED(int, lists, [kOpenWarps][kOpenList]);
  FASTGEN_SHARED(int, found, [kOpenWarps]);
  const ImageShape s = a.problem.shape;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int chunk = chunk_codes(s.width);
  const std::int64_t head = blockIdx.y, count = a.open_count[head], columns = a.problem.padded_codes();
  const int* rows = a.open_rows + head * a.problem.rows;
  const float* limits = a.open_limit + head * a.problem.rows;
  const unsigned char* row_image = a.row_image + head * a.problem.row_image_bytes();
  const unsigned char* code_image = a.code_image + head * a.problem.code_image_bytes();
  const float* start = a.start + head * columns;

  for (std::int64_t first = std::int64_t{blockIdx.x} * kOpenRows; first < count;
       first += std::int64_t{gridDim.x} * kOpenRows) {
    if (lane < kOpenRows) {
      leaders[warp].key[lane] = Leaders::kNone;
      leaders[warp].code[lane] = Leaders::kNoCode;
    }
    if (lane == 0) found[warp] = 0;
    __syncwarp();
    // Of rows g and g + 8; there is always a first one.
    int row[2];
    float limit[2], unit[2];
    for (int i = 0; i < 2; ++i) {
      const std::int64_t at = first + g + 8 * i;
      row[i] = rows[at < count ? at : first];
      unit[i] = a.row_facts[head * a.problem.rows + row[i]].unit;
      limit[i] = at < count ? limits[at] : -INFINITY;
    }
    // Entries of the list: column * kOpenRows + row.
    const auto compare_list = [&] {
      const int candidates = found[warp];
      for (int i = lane; i - lane < candidates; i += 32) {
        unsigned long long key = Leaders::kNone;
        int local = 0, k = 0;
        if (i < candidates) {
          local = lists[warp][i] % kOpenRows;
          k = static_cast<int>(code_of_column(lists[warp][i] / kOpenRows, chunk));
          const double exact =
              exact_key(a.row(head, rows[first + local]), a.code(head, k), s.size, a.problem.cosine);
          if (exact > -INFINITY && exact < INFINITY) key = ordered_bits(exact);
        }
        leaders[warp].offer(local, key, k);
      }
      if (lane == 0) found[warp] = 0;
      __syncwarp();
    };
    for (std::int64_t column = warp * kOpenColumns; column < columns; column += kOpenWarps * kOpenColumns) {
      float score[kOpenGroups][4] = {};
#pragma unroll 4
      for (int w = 0; w < s.depth / 2; w += 8) {
        std::uint32_t x[4];
        for (int i = 0; i < 4; ++i) x[i] = image_word(row_image, s, kRowTile, row[i % 2], w + t + i / 2 * 4);
        for (int n = 0; n < kOpenGroups; ++n) {
          std::uint32_t e[2];
          for (int i = 0; i < 2; ++i)
            e[i] = image_word(code_image, s, kCodeTile, column + n * 8 + g, w + t + i * 4);
          mma_m16n8k16_f16(score[n], x, e, score[n]);
        }
      }
      for (int n = 0; n < kOpenGroups; ++n) {
        for (int i = 0; i < 4; ++i) {
          const std::int64_t at = column + n * 8 + 2 * t + i % 2;
          const float total = s.folded ? score[n][i] : fmaf(start[at], unit[i / 2], score[n][i]);
          if (!(total <= limit[i / 2] || limit[i / 2] == INFINITY)) continue;
          if (code_of_column(at, chunk) >= a.problem.codes) continue;
          lists[warp][atomicAdd(&found[warp], 1)] = static_cast<int>(at) * kOpenRows + g + i / 2 * 8;
        }
      }
      __syncwarp();
      if (found[warp] > kOpenList - kOpenRows * kOpenColumns) compare_list();
    }
    compare_list();
    __syncthreads();
    if (warp == 0) {
      for (int other = 1; other < kOpenWarps; ++other) {
        const int local = lane % kOpenRows;
        leaders[0].offer(local, lane < kOpenRows ? leaders[other].key[local] : Leaders::kNone,
                         leaders[other].code[local]);
      }
    }
    __syncthreads();
    for (int local = warp; local < kOpenRows && first + local < count; local += kOpenWarps) {
      const bool known = leaders[0].key[local] != Leaders::kNone;
      write_row(a, a.problem.cosine, head, rows[first + local], known ? leaders[0].code[local] : 0, lane);
    }
    __syncthreads();
  }
}

}  // namespace fastgen::vq
