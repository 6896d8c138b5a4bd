// Exact nearest-code search on the CPU, in three steps, each for what the one before leaves open.
//
// 1. Screening (vq_screen_kernel.h, vq_screen_bf16.cpp). Codes and rows are centred (which changes no comparison
// and
//    removes a common offset), and every code gets a score s = |e|^2 - 2 <x, e>. The codes are cut into sets of a
//    few consecutive ones (vq_sets.h), and only the least score of each set is kept: one minimum a vector of
//    scores, no index, no score in memory. The products are bfloat16 where the CPU multiplies these (twice as many
//    a cycle), else of the arithmetic type T. A score computed from the rounded x^ and c^ (c = -2 e) is off by at
//    most
//        E = |x - x^| |c| + |x^| |c - c^| + g (|x| |c| + |e|^2) + constant
//    with the residuals as they are, g for the accumulation (vq_bound.h). So a set whose least score, less its E,
//    is above the least of all scores plus E cannot hold the nearest code: usually one set in hundreds stays.
// 2. The codes of the open sets compete by |x - e|^2 in T, in which nothing cancels: its error is relative to the
//    distance itself. All but one are nearly always out.
// 3. Codes that T does not tell apart are compared by their keys in float64, which define the answer.
//
// Rows for which bfloat16 leaves many sets open are screened again in T, and the next blocks at once. Rows that
// are still not settled (exact ties everywhere, values near overflow) are compared by the keys of all codes. A
// handful of rows skips the first step, and with it the packing of the codes.
//
// Cosine is the same search over codes of length one, with s = -<x, e>.

#include "vq.h"
#include "vq_bound.h"

namespace fastgen {

static_assert(kMaxTileRows % kBf16TileRows == 0);

// Codes whose keys are computed at once where all have to be compared.
constexpr int kWideLanes = 16;
constexpr int kMostOpenSets = 32;

// The sets of codes that a row's minima leave open, with lower bounds of their scores; the least of these is
// first.
template <class T>
struct OpenSets {
  int count;
  std::int32_t set[kMostOpenSets];
  T bound[kMostOpenSets];
};

// One block of rows to search, and the memory to do it in.
template <class T>
struct SearchBlock {
  const T* rows;
  std::int64_t count;
  std::int64_t* indices;
  T* distance;         // may be null
  T *centred, *norms;  // in whole tiles, as the next three
  Bf16Pair* pairs;
  float* residuals;
  T* minima;
  Contest<T>* contests;
  OpenSets<T>* open;
  std::int64_t *left, *chosen, *ordered, *undecided;  // lists of rows
  std::int64_t* undecided_count;
  double *keys, *wide;  // one a row; D x kWideLanes
  int* pause;           // blocks to go before bfloat16 is tried again
};

}  // namespace fastgen

#define FASTGEN_ISA_FILE "vq_nearest_kernel.h"
#include "foreach_isa.h"
#include "vq_packing.h"

namespace fastgen {

namespace {

// Up to here packing the codes costs more than it saves.
constexpr std::int64_t kDirectRows = 48;

template <class T>
class SearchMemory {
 public:
  SearchMemory(std::int64_t count, const PackedCodes<T>& codes)
      : rows_(unwritten<T>(count * codes.size)),
        contests_(unwritten<Contest<T>>(count)),
        lists_(unwritten<std::int64_t>(4 * count)),
        wide_(unwritten<double>(count + kWideLanes * codes.size)),
        count_(count) {
    if (codes.start == nullptr) return;
    centred_ = unwritten<T>(count * (codes.size + 1 + codes.sets.sets()));
    open_ = unwritten<OpenSets<T>>(count);
    if (codes.pairs == nullptr) return;
    pairs_ = unwritten<Bf16Pair>(count * bf16_pairs(codes.size));
    residuals_ = unwritten<float>(count);
  }

  T* rows() { return rows_.get(); }

  SearchBlock<T> block(const T* rows, std::int64_t size, std::int64_t count, std::int64_t* indices, T* distance) {
    T* centred = centred_.get();
    std::int64_t* list = lists_.get();
    return {rows,
            count,
            indices,
            distance,
            centred,
            centred + count_ * size,
            pairs_.get(),
            residuals_.get(),
            centred + count_ * (size + 1),
            contests_.get(),
            open_.get(),
            list,
            list + count_,
            list + 2 * count_,
            list + 3 * count_,
            &undecided_count_,
            wide_.get(),
            wide_.get() + count_,
            &pause_};
  }

 private:
  std::unique_ptr<T[]> rows_, centred_;
  std::unique_ptr<Contest<T>[]> contests_;
  std::unique_ptr<std::int64_t[]> lists_;
  std::unique_ptr<double[]> wide_;
  std::unique_ptr<OpenSets<T>[]> open_;
  std::unique_ptr<Bf16Pair[]> pairs_;
  std::unique_ptr<float[]> residuals_;
  std::int64_t count_, undecided_count_ = 0;
  int pause_ = 0;
};

template <class T>
void search_head(const Tokens& x, std::int64_t head, const PackedCodes<T>& codes, std::int64_t* indices,
                 T* distance, const std::function<void(const FoundRows<T>&, std::int64_t)>& visit) {
  const std::int64_t step = block_rows(x.rows), blocks = (x.rows + step - 1) / step;
  torch::stable::parallel_for(0, blocks, 1, [&](std::int64_t begin, std::int64_t end) {
    SearchMemory<T> memory(step, codes);
    for (std::int64_t b = begin; b < end; ++b) {
      const std::int64_t first = b * step, count = std::min(step, x.rows - first), row = head * x.rows + first;
      const T* rows = memory.rows();
      dispatch_dtype(x.tensor.scalar_type(), "vq", [&](auto* t) {
        using S = std::remove_pointer_t<decltype(t)>;
        if constexpr (std::is_same_v<acc_t<S>, T>) rows = dense_rows<S>(x, head, first, count, memory.rows());
      });
      const SearchBlock<T> block =
          memory.block(rows, x.size, count, indices + row, distance == nullptr ? nullptr : distance + row);
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
  const std::int64_t lanes = x.rows <= kDirectRows ? 0 : FASTGEN_DISPATCH_ISA(lane_count<T>);
  for (std::int64_t h = 0; h < x.heads; ++h) {
    const Packing<T> packing(codebook.head(h), codebook.count, codebook.size, lanes, cosine);
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
