// Exact nearest-code search on the CPU.
//
// Codes and rows are centred by the mean of the codes (which changes no comparison and removes a common offset)
// and scored in the arithmetic type T as |e|^2 - 2 <x, e>. The codebook is packed into panels of two vectors of
// codes with -2 folded in; a tile of rows times one panel is accumulated in registers, starting from |e|^2, and
// each lane keeps the smallest score, its code and the second smallest: no score is ever stored. A bound on the
// rounding error of a score then proves the winner, or it does not, and the codes that are within the bound are
// compared in float64. Cosine is the same search over codes of length one, without |e|^2.

#include "vq.h"

namespace fastgen {

// One head's codebook, ready to be scored.
template <class T>
struct PackedCodes {
  const T* codes;        // K x D, as given
  const double* square;  // K, |e|^2
  const T* panels;       // per panel D x width
  const T* start;        // per panel width: the score before any product; infinite for codes that take no part
  const T* mean;         // D, what is subtracted from rows
  std::int64_t count, size, panel_count;
  double reach;  // the largest centred |e| of the codes that take part
  bool cosine;
};

// One block of rows to search, and the memory to do it in.
template <class T>
struct SearchBlock {
  const T* rows;
  std::int64_t count;
  std::int64_t* indices;
  T* distance;         // may be null
  T *centred, *tile;   // kBlockRows x D, kMaxTileRows x D
  double* wide;        // D x panel width
  T* lanes;            // kBlockRows x 3 vectors
  T* norms;            // kBlockRows
  std::int64_t* open;  // kBlockRows
};

template <class S>
struct ReadRows {
  const S* x;
  const Tokens* tokens;
  std::int64_t head, first, count;
  acc_t<S>* out;
};

constexpr int kMaxTileRows = 12;

// Lengths from this to its inverse have products and squares of products in the range of float64; all lengths of
// float32 vectors are among them.
constexpr double kSafeLength = 1e-60;

}  // namespace fastgen

#define FASTGEN_ISA_FILE "vq_nearest_kernel.h"
#include "foreach_isa.h"

namespace fastgen {

Tokens::Tokens(const Tensor& x, bool with_heads) : tensor(x), heads(1), head_stride(0) {
  for (bool copied = false;; copied = true) {
    const std::int64_t last = tensor.dim() - 1;
    std::vector<std::int64_t> counts, strides;
    for (std::int64_t d = with_heads ? 1 : 0; d < last; ++d) {
      if (tensor.size(d) == 1) continue;
      if (!counts.empty() && strides.back() == tensor.stride(d) * tensor.size(d)) {
        counts.back() *= tensor.size(d);
        strides.back() = tensor.stride(d);
      } else {
        counts.push_back(tensor.size(d));
        strides.push_back(tensor.stride(d));
      }
    }
    if (counts.size() > 2 && !copied) {
      tensor = torch::stable::contiguous(x);
      continue;
    }
    counts.resize(2, 1);
    strides.resize(2, 0);
    if (counts[1] == 1) {
      std::swap(counts[0], counts[1]);
      std::swap(strides[0], strides[1]);
    }
    size = tensor.size(last);
    if (with_heads) {
      heads = tensor.size(0);
      head_stride = tensor.stride(0);
    }
    rows = counts[0] * counts[1];
    outer_stride = strides[0];
    inner = std::max<std::int64_t>(1, counts[1]);
    inner_stride = strides[1];
    element_stride = tensor.stride(last);
    return;
  }
}

template <class T>
Codebook<T>::Codebook(const Tensor& codebook)
    : tensor(torch::stable::contiguous(codebook)),
      heads(codebook.dim() == 3 ? codebook.size(0) : 1),
      count(codebook.size(codebook.dim() - 2)),
      size(codebook.size(codebook.dim() - 1)) {
  const ScalarType type = acc_type(codebook.scalar_type());
  if (codebook.scalar_type() == type) return;
  const Tensor given = tensor;
  tensor = new_empty(given, sizes(given), type);
  dispatch_dtype(given.scalar_type(), "vq: codebook", [&](auto* t) {
    using S = std::remove_pointer_t<decltype(t)>;
    std::copy_n(data<S>(given), given.numel(), data<T>(tensor));
  });
}
template struct Codebook<float>;
template struct Codebook<double>;

template <class S>
const acc_t<S>* dense_rows(const Tokens& tokens, std::int64_t head, std::int64_t first, std::int64_t count,
                           acc_t<S>* buffer) {
  const S* x = data<S>(tokens.tensor);
  if constexpr (std::is_same_v<S, acc_t<S>>) {
    if (tokens.dense()) return x + tokens.offset(head, first);
  }
  const ReadRows<S> args{x, &tokens, head, first, count, buffer};
  FASTGEN_DISPATCH_ISA(read_rows, args);
  return buffer;
}
#define FASTGEN_DENSE_ROWS(S)                                                                                     \
  template const acc_t<S>* dense_rows<S>(const Tokens&, std::int64_t, std::int64_t, std::int64_t, acc_t<S>*);
FASTGEN_DENSE_ROWS(float)
FASTGEN_DENSE_ROWS(double)
FASTGEN_DENSE_ROWS(Half)
FASTGEN_DENSE_ROWS(BFloat16)
#undef FASTGEN_DENSE_ROWS

std::int64_t block_rows(std::int64_t rows) {
  const std::int64_t sixteenth = (rows + 15) / 16;
  const std::int64_t whole_tiles = (sixteenth + kMaxTileRows - 1) / kMaxTileRows * kMaxTileRows;
  return std::clamp<std::int64_t>(whole_tiles, kMaxTileRows, kBlockRows);
}

std::int64_t block_count(const Tokens& x) {
  const std::int64_t step = block_rows(x.rows);
  return x.heads * ((x.rows + step - 1) / step);
}

void check_codebook(const Tensor& x, const Tensor& codebook, const char* op) {
  const std::int64_t dims = codebook.dim();
  STD_TORCH_CHECK(x.is_cpu() && codebook.is_cpu() && x.scalar_type() == codebook.scalar_type(), op,
                  ": codebook must have the device and dtype of x");
  STD_TORCH_CHECK(x.dim() >= 1 && (dims == 2 || (dims == 3 && x.dim() == 3 && x.size(0) == codebook.size(0))), op,
                  ": codebook must be (K, D), or (H, K, D) for x (H, N, D)");
  STD_TORCH_CHECK(codebook.size(dims - 1) == x.size(x.dim() - 1), op,
                  ": codebook must have vectors of the size of x's");
  STD_TORCH_CHECK(codebook.size(dims - 2) > 0, op, ": codebook must have at least one code");
}

namespace {

// Codes that can never be the answer: those equal to an earlier one, or not finite. Leaving them out keeps
// collapsed codebooks as fast as others.
template <class T>
std::vector<bool> left_out(const T* codes, const std::vector<std::uint64_t>& hashes, std::int64_t size) {
  const std::int64_t count = static_cast<std::int64_t>(hashes.size());
  std::vector<bool> out(count);
  std::int64_t slots = 16;
  while (slots < 2 * count) slots *= 2;
  std::vector<std::int64_t> table(slots, -1);
  for (std::int64_t k = 0; k < count; ++k) {
    const T* code = codes + k * size;
    out[k] = !std::all_of(code, code + size, [](T e) { return std::isfinite(e); });
    std::int64_t slot = static_cast<std::int64_t>(hashes[k] >> 20) & (slots - 1);
    for (; table[slot] >= 0 && !out[k]; slot = (slot + 1) & (slots - 1)) {
      out[k] = std::equal(code, code + size, codes + table[slot] * size);
    }
    if (!out[k]) table[slot] = k;
  }
  return out;
}

template <class T>
std::uint64_t hash_code(const T* code, std::int64_t size) {
  std::uint64_t hash = 0;
  for (std::int64_t j = 0; j < size; ++j) {
    // Adding zero turns -0 into 0, which it equals.
    const T value = code[j] + T(0);
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    hash = (hash ^ bits) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 32;
  }
  return hash;
}

// Owns what PackedCodes points to.
template <class T>
class Packing {
 public:
  Packing(const T* codes, std::int64_t count, std::int64_t size, bool cosine)
      : width_(FASTGEN_DISPATCH_ISA(panel_width<T>)), square_(count), hashes_(count), mean_(size), packed_{} {
    packed_.codes = codes;
    packed_.count = count;
    packed_.size = size;
    packed_.cosine = cosine;
    packed_.panel_count = (count + width_ - 1) / width_;
    measure();
    const std::vector<bool> out = left_out(codes, hashes_, size);
    const std::vector<double> mean = mean_code(out);
    panels_.resize(packed_.panel_count * width_ * size);
    start_.resize(packed_.panel_count * width_, std::numeric_limits<T>::infinity());
    std::vector<double> reach(packed_.panel_count);
    torch::stable::parallel_for(0, packed_.panel_count, grain(width_), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t p = begin; p < end; ++p) reach[p] = pack(p, out, mean);
    });
    // Cosine: rows stay as they are, since shifting the codes adds the same to all scores of a row.
    if (!cosine) std::copy(mean.begin(), mean.end(), mean_.begin());
    packed_.square = square_.data();
    packed_.panels = panels_.data();
    packed_.start = start_.data();
    packed_.mean = mean_.data();
    packed_.reach = *std::max_element(reach.begin(), reach.end());
  }
  Packing(const Packing&) = delete;

  const PackedCodes<T>& codes() const { return packed_; }

 private:
  std::int64_t grain(std::int64_t codes) const {
    return std::max<std::int64_t>(1, 32768 / std::max<std::int64_t>(1, codes * packed_.size));
  }

  void measure() {
    torch::stable::parallel_for(0, packed_.count, grain(1), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t k = begin; k < end; ++k) {
        double sum = 0;
        for (std::int64_t j = 0; j < packed_.size; ++j) {
          const double e = static_cast<double>(packed_.codes[k * packed_.size + j]);
          sum += e * e;
        }
        square_[k] = sum;
        hashes_[k] = hash_code(packed_.codes + k * packed_.size, packed_.size);
      }
    });
  }

  // Whether float64 keys neither overflow nor underflow; where they may, rows are compared by their keys.
  bool safe(double square) const {
    constexpr double kLeast = kSafeLength * kSafeLength;
    return square < 1 / kLeast && (square > kLeast || square == 0 || !packed_.cosine);
  }

  // The factor that makes a code one of length one, for cosine.
  double unit(std::int64_t k) const { return square_[k] == 0 ? 0 : 1 / std::sqrt(square_[k]); }

  std::vector<double> mean_code(const std::vector<bool>& out) const {
    std::vector<double> mean(packed_.size);
    std::int64_t used = 0;
    for (std::int64_t k = 0; k < packed_.count; ++k) {
      if (out[k]) continue;
      ++used;
      const double scale = packed_.cosine ? unit(k) : 1;
      const T* code = packed_.codes + k * packed_.size;
      for (std::int64_t j = 0; j < packed_.size; ++j) mean[j] += scale * static_cast<double>(code[j]);
    }
    for (double& m : mean)
      m = static_cast<double>(static_cast<T>(m / static_cast<double>(std::max<std::int64_t>(1, used))));
    return mean;
  }

  // Fills panel p and returns its reach.
  double pack(std::int64_t p, const std::vector<bool>& out, const std::vector<double>& mean) {
    double reach = 0;
    T* panel = panels_.data() + p * width_ * packed_.size;
    for (std::int64_t lane = 0; lane < width_; ++lane) {
      const std::int64_t k = p * width_ + lane;
      if (k >= packed_.count || out[k]) continue;
      const T* code = packed_.codes + k * packed_.size;
      const double scale = packed_.cosine ? unit(k) : 1;
      double sum = 0;
      for (std::int64_t j = 0; j < packed_.size; ++j) {
        const T centred = static_cast<T>(scale * static_cast<double>(code[j]) - mean[j]);
        panel[j * width_ + lane] = packed_.cosine ? -centred : T(-2) * centred;
        sum += static_cast<double>(centred) * static_cast<double>(centred);
      }
      start_[k] = packed_.cosine ? T(0) : static_cast<T>(sum);
      reach = safe(square_[k]) ? std::max(reach, std::sqrt(sum)) : std::numeric_limits<double>::infinity();
    }
    return reach;
  }

  std::int64_t width_;
  std::vector<double> square_;
  std::vector<std::uint64_t> hashes_;
  std::vector<T> mean_, panels_, start_;
  PackedCodes<T> packed_;
};

template <class T>
struct SearchMemory {
  std::vector<T> rows, centred, tile, lanes, norms;
  std::vector<double> wide;
  std::vector<std::int64_t> open;

  SearchMemory(std::int64_t size, std::int64_t width)
      : rows(kBlockRows * size),
        centred(kBlockRows * size),
        tile(kMaxTileRows * size),
        lanes(kBlockRows * 3 * width),
        norms(kBlockRows),
        wide(size * width),
        open(kBlockRows) {}
};

template <class T>
void search_head(const Tokens& x, std::int64_t head, const PackedCodes<T>& codes, std::int64_t* indices,
                 T* distance, const std::function<void(const FoundRows<T>&, std::int64_t)>& visit) {
  const std::int64_t step = block_rows(x.rows), blocks = (x.rows + step - 1) / step;
  const std::int64_t width = FASTGEN_DISPATCH_ISA(panel_width<T>);
  torch::stable::parallel_for(0, blocks, 1, [&](std::int64_t begin, std::int64_t end) {
    SearchMemory<T> memory(x.size, width);
    for (std::int64_t b = begin; b < end; ++b) {
      const std::int64_t first = b * step, count = std::min(step, x.rows - first), row = head * x.rows + first;
      const T* rows = memory.rows.data();
      dispatch_dtype(x.tensor.scalar_type(), "vq", [&](auto* t) {
        using S = std::remove_pointer_t<decltype(t)>;
        if constexpr (std::is_same_v<acc_t<S>, T>) rows = dense_rows<S>(x, head, first, count, memory.rows.data());
      });
      const SearchBlock<T> block{rows,
                                 count,
                                 indices + row,
                                 distance == nullptr ? nullptr : distance + row,
                                 memory.centred.data(),
                                 memory.tile.data(),
                                 memory.wide.data(),
                                 memory.lanes.data(),
                                 memory.norms.data(),
                                 memory.open.data()};
      FASTGEN_DISPATCH_ISA(search_block, codes, block);
      if (visit) visit({block.rows, block.indices, codes.codes, row, count, x.size}, head * blocks + b);
    }
  });
}

}  // namespace

template <class T>
void vq_search(const Tokens& x, const Codebook<T>& codebook, bool cosine, std::int64_t* indices, T* distance,
               const std::function<void(const FoundRows<T>&, std::int64_t)>& visit) {
  if (x.rows == 0) return;
  for (std::int64_t h = 0; h < x.heads; ++h) {
    const Packing<T> packing(codebook.head(h), codebook.count, codebook.size, cosine);
    search_head(x, h, packing.codes(), indices, distance, visit);
  }
}
template void vq_search<float>(const Tokens&, const Codebook<float>&, bool, std::int64_t*, float*,
                               const std::function<void(const FoundRows<float>&, std::int64_t)>&);
template void vq_search<double>(const Tokens&, const Codebook<double>&, bool, std::int64_t*, double*,
                                const std::function<void(const FoundRows<double>&, std::int64_t)>&);

namespace {

std::tuple<Tensor, Tensor> vq_nearest_fwd(const Tensor& x, const Tensor& codebook, std::string metric,
                                          bool return_distance) {
  check_codebook(x, codebook, "vq_nearest");
  STD_TORCH_CHECK(metric == "euclidean" || metric == "cosine", "vq_nearest: unknown metric '", metric, "'");
  std::vector<std::int64_t> shape = sizes(x);
  shape.pop_back();
  const ScalarType type = acc_type(x.scalar_type());
  Tensor indices = new_empty(x, shape, ScalarType::Long);
  Tensor distance = new_empty(x, return_distance ? shape : std::vector<std::int64_t>{0}, type);
  const auto search = [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    vq_search<T>(Tokens(x, codebook.dim() == 3), Codebook<T>(codebook), metric == "cosine",
                 data<std::int64_t>(indices), return_distance ? data<T>(distance) : nullptr, {});
  };
  type == ScalarType::Double ? search(static_cast<double*>(nullptr)) : search(static_cast<float*>(nullptr));
  return {indices, distance};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { m.impl("vq_nearest_fwd", TORCH_BOX(&vq_nearest_fwd)); }

}  // namespace fastgen
