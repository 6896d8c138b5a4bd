// (B, C, *spatial) tensors as planes, for ops that reduce over the spatial dimensions.
#pragma once

#include "common.h"

namespace fastgen {

// Elements of a job that are handled at once; partial results of pieces are combined in order.
constexpr std::int64_t kPlanePiece = 16384, kRowsPiece = 65536;

// About what a core's own cache, and the one that cores share, keep between two sweeps.
constexpr std::int64_t kOwnElements = std::int64_t{1} << 17, kSharedElements = std::int64_t{1} << 20;

// A pointer to the first element of each job, see Planes. `channels` is 0 where jobs are `stride` apart
// throughout.
template <class S>
struct Jobs {
  S* base;
  std::int64_t stride, channels, batch_stride;

  S* operator()(std::int64_t job) const {
    if (channels == 0) return base + job * stride;
    return base + job / channels * batch_stride + job % channels * stride;
  }
};

// Two layouts are read as they lie: dense planes, whatever the distance between them, and channels_last, where the
// C planes of a sample interleave. What is reduced together is a job: one plane, or the `lanes` = C planes of a
// sample. A job is cut into `pieces` of `piece` elements of each plane.
struct Planes {
  Tensor tensor;
  std::int64_t channels, lanes, jobs, size, piece, pieces;

  explicit Planes(const Tensor& t) : Planes(t, !t.is_contiguous() && is_channels_last(t)) {}

  Planes(const Tensor& t, bool channels_last) : tensor(t) {
    STD_TORCH_CHECK(t.dim() >= 3, "planes: expected (B, C, *spatial)");
    if (channels_last && !is_channels_last(t)) tensor = torch::stable::contiguous(t, memory_format(t, true));
    if (!channels_last && !dense_planes(t)) tensor = torch::stable::contiguous(t);
    channels = t.size(1);
    lanes = channels_last ? channels : 1;
    jobs = channels_last ? t.size(0) : t.size(0) * channels;
    size = 1;
    for (std::int64_t d = 2; d < t.dim(); ++d) size *= t.size(d);
    piece = lanes > 1 ? std::clamp<std::int64_t>(kRowsPiece / lanes, 16, 1024) : kPlanePiece;
    pieces = (size + piece - 1) / piece;
  }

  bool channels_last() const { return lanes > 1; }

  template <class S>
  Jobs<S> pointers() const {
    S* base = static_cast<S*>(tensor.data_ptr());
    const std::int64_t outer = tensor.stride(0), inner = tensor.stride(1);
    if (channels_last()) return {base, outer, 0, 0};
    return {base, inner, outer == channels * inner ? 0 : channels, outer};
  }

  // A fresh tensor of the same shape, in the same layout, without gaps.
  Tensor new_dense() const {
    return on_huge_pages(torch::stable::empty(sizes(tensor), tensor.scalar_type(), std::nullopt, tensor.device(),
                                              std::nullopt, memory_format(tensor, channels_last())));
  }

 private:
  using Format = torch::headeronly::MemoryFormat;

  static Format memory_format(const Tensor& t, bool channels_last) {
    if (!channels_last) return Format::Contiguous;
    return t.dim() == 4 ? Format::ChannelsLast : Format::ChannelsLast3d;
  }

  static bool dense(const Tensor& t, std::int64_t expected) {
    for (std::int64_t d = t.dim() - 1; d >= 2; --d) {
      if (t.size(d) != 1 && t.stride(d) != expected) return false;
      expected *= t.size(d);
    }
    return true;
  }

  static bool dense_planes(const Tensor& t) { return dense(t, 1); }

  // PyTorch's definition: channels_last has four dimensions, channels_last_3d five.
  static bool is_channels_last(const Tensor& t) {
    if (t.dim() != 4 && t.dim() != 5) return false;
    const bool whole = t.size(0) == 1 || t.size(0) * t.stride(0) == t.numel();
    return whole && (t.size(1) == 1 || t.stride(1) == 1) && dense(t, t.size(1));
  }
};

// Over all jobs: reduce(job, first, last) over the pieces of each, then finish(first_job, last_job), then
// apply(job, first, last). In parallel over jobs, where whole(first_job, last_job) does it all; or over pieces,
// where jobs are too few to keep all threads busy or, with interleaved planes, so large that each thread by itself
// would push out of the shared cache what it has reduced before it applies.
template <class Whole, class Reduce, class Finish, class Apply>
void reduce_then_apply(const Planes& planes, Whole&& whole, Reduce&& reduce, Finish&& finish, Apply&& apply) {
  using torch::stable::parallel_for;
  const std::int64_t jobs = planes.jobs, pieces = planes.pieces, job_size = planes.size * planes.lanes;
  const bool many = jobs >= 4 * static_cast<std::int64_t>(torch::stable::get_num_threads());
  if (pieces == 1 || (many && (planes.lanes == 1 || job_size <= kOwnElements))) {
    parallel_for(0, jobs, std::max<std::int64_t>(1, kPlanePiece / job_size), whole);
    return;
  }
  const std::int64_t group = std::max<std::int64_t>(1, kSharedElements / job_size);
  for (std::int64_t first = 0; first < jobs; first += group) {
    const std::int64_t last = std::min(jobs, first + group);
    const auto over_pieces = [&](auto&& f) { parallel_for(first * pieces, last * pieces, 1, f); };
    over_pieces([&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) reduce(i / pieces, i % pieces, i % pieces + 1);
    });
    finish(first, last);
    // Backwards: what was reduced last is still in the thread's own cache.
    over_pieces([&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = end; i-- > begin;) apply(i / pieces, i % pieces, i % pieces + 1);
    });
  }
}

}  // namespace fastgen
