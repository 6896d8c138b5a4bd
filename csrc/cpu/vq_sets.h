// How the search of vq_nearest.cpp orders the codes.
#pragma once

#include "common.h"

namespace fastgen {

// Codes in sets of `length` consecutive ones, sets in groups of `width`, the lanes of a vector. Vector v of a
// group holds code v of each of its sets, so that the minimum of the group's vectors is the minimum of every set.
// Two vectors make a panel.
struct SetLayout {
  static constexpr std::int64_t kMostGroups = 16, kMostSets = kMostGroups * 16;
  std::int64_t width, length, groups;

  SetLayout() : width(0), length(0), groups(0) {}

  SetLayout(std::int64_t count, std::int64_t lanes) : width(lanes) {
    // Short sets are cheap to search, many are costly to choose from.
    constexpr std::int64_t kShort = 8;
    const std::int64_t most = std::clamp<std::int64_t>(divide_up(count, lanes * kShort), 1, kMostGroups);
    std::int64_t least = std::numeric_limits<std::int64_t>::max();
    // Fewer groups where that leaves less of the last one empty.
    for (std::int64_t g = most; 2 * g > most; --g) {
      const std::int64_t pairs = divide_up(count, 2 * lanes * g);
      if (g * pairs >= least) continue;
      least = g * pairs;
      length = 2 * pairs;
      groups = divide_up(count, lanes * length);
    }
  }

  std::int64_t sets() const { return groups * width; }
  std::int64_t group_panels() const { return length / 2; }
  std::int64_t panels() const { return groups * group_panels(); }

  // The code in a lane of a panel, of its 2 * width.
  std::int64_t code(std::int64_t panel, std::int64_t lane) const {
    const std::int64_t set = panel / group_panels() * width + lane % width;
    return set * length + panel % group_panels() * 2 + lane / width;
  }

  // f(tile, group, first, last): every tile of rows against every panel, a part of the panels that stays in L2 at
  // a time, a group's panels [first, last) a time.
  template <class F>
  void each_tile(std::int64_t tiles, std::int64_t panel_bytes, F&& f) const {
    constexpr std::int64_t kPartBytes = 256 * 1024;
    const std::int64_t part = std::max<std::int64_t>(1, kPartBytes / std::max<std::int64_t>(1, panel_bytes));
    for (std::int64_t p = 0; p < panels(); p += part) {
      const std::int64_t end = std::min(p + part, panels());
      for (std::int64_t tile = 0; tile < tiles; ++tile) {
        for (std::int64_t first = p; first < end;) {
          const std::int64_t group = first / group_panels();
          const std::int64_t last = std::min(end, (group + 1) * group_panels());
          f(tile, group, first, last);
          first = last;
        }
      }
    }
  }

 private:
  static std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
};

}  // namespace fastgen
