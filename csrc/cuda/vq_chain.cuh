// The nearest-code search from end to end: prepare the codes, then, for as many rows as are taken at once, pack,
// screen and settle them. What launches the kernels (run), on a stream or on the host emulator, is a parameter:
//   run(kernel, grid, threads, shared_bytes, arguments...);  run.zero(memory, bytes);  run.allocate(bytes) ->
//   void*
#pragma once

#include <algorithm>
#include <limits>

#include "carver.h"
#include "vq_screen_sm90.cuh"
#include "vq_settle.cuh"

namespace fastgen::vq {

constexpr int kThreads = 256;
constexpr std::int64_t kMostSize = std::int64_t{1} << 20, kMostCodes = std::int64_t{1} << 26, kMostHeads = 65535;

struct Device {
  int multiprocessors;
  int shared_bytes;              // that one block can have
  std::int64_t row_image_bytes;  // of the images of rows that are searched at once
  bool hopper;                   // whether the screen of vq_screen_sm90.cuh runs on it
};

// Counts that a launch cannot hold are refused before (kMostCodes) or split (rows).
inline unsigned blocks_for(std::int64_t items, std::int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

// What the screen of a launch uses.
struct Plan {
  bool hopper;
  int warpgroups, stages;  // of the Hopper screen
  int row_tile, parts_of_split, splits, shared_bytes;

  int parts() const { return splits * parts_of_split; }
};

// The number of pieces of the codebook that keeps the multiprocessors busy, at `slots` blocks at a time.
inline int best_splits(std::int64_t blocks, std::int64_t tiles, std::int64_t slots) {
  constexpr std::int64_t kMost = 64, kOverhead = 2;
  int best = 1;
  std::int64_t least = std::numeric_limits<std::int64_t>::max();
  for (std::int64_t s = 1; s <= std::min(kMost, tiles); ++s) {
    const std::int64_t waves = (blocks * s + slots - 1) / slots, time = waves * ((tiles + s - 1) / s + kOverhead);
    if (time < least) {
      least = time;
      best = static_cast<int>(s);
    }
  }
  return best;
}

inline Plan plan_screen(const Device& device, const Problem& problem, std::int64_t heads) {
  const ImageShape s = problem.shape;
  Plan plan{false, 0, 0, kMmaRows, kMmaParts, 1, mma_shared_bytes(s)};
  std::int64_t slots = 2;
  for (int warpgroups = 4; warpgroups >= 2 && device.hopper && !plan.hopper; warpgroups -= 2) {
    int stages = kMostStages;
    while (stages > 0 && sm90_shared_bytes(s, warpgroups, stages) > device.shared_bytes) --stages;
    // Fewer would stall the products on every copy.
    if (stages < 3) continue;
    plan = {
        true, warpgroups, stages, warpgroups * kRowTile, kSm90Parts, 1, sm90_shared_bytes(s, warpgroups, stages)};
    slots = 1;
  }
  const std::int64_t blocks = (problem.rows + plan.row_tile - 1) / plan.row_tile * heads;
  plan.splits = best_splits(blocks, problem.code_tiles(), slots * device.multiprocessors);
  return plan;
}

template <int kWidth, bool kFolded, class Run>
void run_screen(Run& run, const Plan& plan, const Screen& screen, dim3 grid) {
  if (plan.hopper && plan.warpgroups == 4) {
    return run(screen_sm90_kernel<kWidth, kFolded, 4>, grid, sm90_threads(4), plan.shared_bytes, screen,
               plan.stages);
  }
  // Narrower rows always leave shared memory for four.
  if constexpr (kWidth == 128) {
    if (plan.hopper) {
      return run(screen_sm90_kernel<kWidth, kFolded, 2>, grid, sm90_threads(2), plan.shared_bytes, screen,
                 plan.stages);
    }
  }
  run(screen_mma_kernel<kWidth, kFolded>, grid, kMmaThreads, plan.shared_bytes, screen);
}

template <class Run>
void run_screen(Run& run, const Plan& plan, const Screen& screen, std::int64_t heads) {
  const ImageShape s = screen.problem.shape;
  const dim3 grid(blocks_for(screen.problem.rows, plan.row_tile), plan.splits, static_cast<unsigned>(heads));
  const auto of_width = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    s.folded ? run_screen<kWidth, true>(run, plan, screen, grid)
             : run_screen<kWidth, false>(run, plan, screen, grid);
  };
  if (s.width == 32) return of_width(std::integral_constant<int, 32>());
  if (s.width == 64) return of_width(std::integral_constant<int, 64>());
  of_width(std::integral_constant<int, 128>());
}

// The device memory of a search.
template <class S>
struct Scratch {
  HeadFacts* facts;
  int *table, *open_count;
  std::int64_t zeroed;  // bytes of these three
  std::int64_t slots, segments;
  std::int64_t* slot_of;
  double* scales;
  ColumnFacts* columns;
  acc_t<S>* centre;
  unsigned char *code_image, *row_image;
  float *start, *open_limit;
  RowFacts* row_facts;
  Minimum* minima;
  int* open_rows;

  void take(Carver& carver, const Problem& p, std::int64_t heads, int parts) {
    for (slots = 16; slots < 2 * p.codes;) slots *= 2;
    segments = std::clamp<std::int64_t>(p.codes / 64, 1, kMostSegments);
    facts = carver.take<HeadFacts>(heads);
    open_count = carver.take<int>(heads);
    table = carver.take<int>(heads * slots);
    zeroed = carver.used();
    slot_of = carver.take<std::int64_t>(heads * p.codes);
    scales = carver.take<double>(heads * p.codes);
    columns = carver.take<ColumnFacts>(heads * segments * p.shape.size);
    centre = carver.take<acc_t<S>>(heads * p.shape.size);
    code_image = carver.take<unsigned char>(heads * p.code_image_bytes());
    start = carver.take<float>(heads * p.padded_codes());
    row_image = carver.take<unsigned char>(heads * p.row_image_bytes());
    row_facts = carver.take<RowFacts>(heads * p.rows);
    minima = carver.take<Minimum>(heads * p.rows * parts);
    open_rows = carver.take<int>(heads * p.rows);
    open_limit = carver.take<float>(heads * p.rows);
  }
};

template <class S, class Run>
void prepare_codes(Run& run, const Problem& p, std::int64_t heads, const S* codes, const Scratch<S>& m) {
  const auto head_count = static_cast<unsigned>(heads), columns = p.shape.size <= 8 ? 8u : 32u,
             column_blocks = std::max(1u, blocks_for(p.shape.size, columns));
  run.zero(m.facts, m.zeroed);
  run(identify_codes_kernel<S>, dim3(blocks_for(p.codes, kThreads / 32), head_count), kThreads, 0,
      IdentifyCodes<S>{codes, p, m.scales, m.table, m.slots, m.slot_of, m.facts});
  const CentreCodes<S> centre{codes, p, m.scales, static_cast<int>(m.segments), m.columns, m.centre, m.facts};
  const dim3 column_grid(static_cast<unsigned>(m.segments), column_blocks, head_count);
  run(column_facts_kernel<S>, column_grid, kColumnThreads, 0, centre);
  run(centre_codes_kernel<S>, dim3(head_count), kColumnThreads, 0, centre);
  const dim3 pack_grid(blocks_for(p.padded_codes(), kThreads / lanes_of_row(p.shape)), head_count);
  run(pack_codes_kernel<S>, pack_grid, kThreads, 0,
      PackCodes<S>{codes, p, m.scales, m.table, m.slots, m.slot_of, m.centre, m.facts, m.code_image, m.start});
}

// Rows [first, first + problem.rows) of every head.
template <class S, class Run>
void search_rows(Run& run, const Device& device, const Plan& plan, std::int64_t heads, const Search<S>& search,
                 const Scratch<S>& m) {
  const Problem& p = search.problem;
  const auto head_count = static_cast<unsigned>(heads);
  const dim3 pack_grid(blocks_for(p.padded_rows(), kThreads / lanes_of_row(p.shape)), head_count);
  run(pack_rows_kernel<S>, pack_grid, kThreads, 0,
      PackRows<S>{search.x + search.first * p.shape.size, search.head_rows * p.shape.size, p, m.centre, m.facts,
                  m.row_image, m.row_facts});
  run_screen(run, plan,
             Screen{p, m.row_image, m.code_image, m.start, m.row_facts, plan.splits, m.minima, plan.parts()},
             heads);
  const dim3 settle_grid(blocks_for(p.rows, kSettleThreads / 32), head_count);
  const bool four = chunk_codes(p.shape.width) == 4;
  const auto euclidean = four ? settle_kernel<4, false, S> : settle_kernel<8, false, S>;
  const auto cosine = four ? settle_kernel<4, true, S> : settle_kernel<8, true, S>;
  run(p.cosine ? cosine : euclidean, settle_grid, kSettleThreads, 0, search);
  const dim3 open_grid(std::min(blocks_for(p.rows, kOpenRows), 4u * device.multiprocessors), head_count);
  run(open_rows_kernel<S>, open_grid, kOpenThreads, 0, search);
}

// Where the answers go, dense over heads and rows. Null where they are not asked for.
template <class S>
struct Answers {
  std::int64_t* indices;
  acc_t<S>* distance;
  S* quantized;
  double* errors;  // squared distance of each row; with `quantized`
};

// x: heads x rows x D; codes: heads x codes x D.
struct Sizes {
  std::int64_t heads, rows, codes, size;
};

// Returns the memory it worked in, which the run owns: open_count tells how many rows were open, of the last ones
// that were searched at once.
template <class S, class Run>
Scratch<S> search(Run& run, const Device& device, const S* x, const S* codes, const Sizes& sizes, bool cosine,
                  const Answers<S>& answers) {
  Scratch<S> m{};
  if (sizes.heads * sizes.rows == 0) return m;
  Problem problem{sizes.rows, sizes.codes, image_shape(static_cast<int>(sizes.size)), cosine};
  const std::int64_t tile = 4 * kRowTile, tile_bytes = sizes.heads * 4 * problem.shape.tile_bytes(kRowTile);
  const std::int64_t step =
      std::max<std::int64_t>(1, device.row_image_bytes / std::max<std::int64_t>(1, tile_bytes)) * tile;
  problem.rows = std::min(sizes.rows, step);
  const Plan plan = plan_screen(device, problem, sizes.heads);
  carve(run, [&](Carver& carver) { m.take(carver, problem, sizes.heads, plan.parts()); });
  prepare_codes(run, problem, sizes.heads, codes, m);
  for (std::int64_t first = 0; first < sizes.rows; first += step) {
    problem.rows = std::min(step, sizes.rows - first);
    if (first > 0) run.zero(m.open_count, sizes.heads * sizeof(int));
    const Search<S> part{problem,
                         x,
                         codes,
                         sizes.rows,
                         first,
                         m.facts,
                         m.row_facts,
                         m.minima,
                         plan.parts(),
                         m.row_image,
                         m.code_image,
                         m.start,
                         m.open_count,
                         m.open_rows,
                         m.open_limit,
                         answers.indices,
                         answers.distance,
                         answers.quantized,
                         answers.errors};
    search_rows(run, device, plan, sizes.heads, part, m);
  }
  return m;
}

}  // namespace fastgen::vq
