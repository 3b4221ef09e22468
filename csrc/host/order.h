// Orders the entries of an arbitrary mask for the CUDA row kernel (csrc/cuda/sddmm_rows.cuh): which lane serves which entry,
// when.
//
// Columns are cut into windows. In each window a row's entries are dealt to as many virtual rows of `slots` entries as it needs,
// virtual rows go to lanes in ascending order (a warp's neighbours read neighbouring rows), and within eight neighbouring
// virtual rows, which the hardware serves at once, the slots are filled so that their columns differ modulo 8 where that is
// possible: in each step the lanes with the least slack choose first, each a free residue of which it has most; a lane without
// one waits while it has slack.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <vector>

namespace sprand::host {

constexpr int kBanks = 8;

struct Ordered {
  std::vector<int32_t> window_begin;  // [tiles]
  std::vector<int32_t> rows;          // [tiles, rows_per_lane, threads], -1: none
  std::vector<int32_t> entries;       // [tiles, rows_per_lane * slots, threads], -1: none
  int64_t phases = 0, wavefronts = 0;
};

struct Lanes {
  int64_t threads, rows_per_lane, slots;
};

// Fills the slots of one eight of virtual rows; stock[lane][residue] holds entries, of which the last is taken first.
// put(lane, slot, entry) is called for each.
template <class Put>
void fill_slots(std::array<std::array<std::vector<int32_t>, kBanks>, kBanks>& stock, int64_t slots, Ordered& ordered, Put put) {
  std::array<int64_t, kBanks> left{};
  for (int lane = 0; lane < kBanks; ++lane)
    for (const auto& entries : stock[lane]) left[lane] += entries.size();
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t steps = slots - slot;
    std::vector<std::array<int64_t, 3>> order;  // slack, residues to choose from, lane
    for (int lane = 0; lane < kBanks; ++lane)
      if (left[lane] > 0)
        order.push_back({steps - left[lane],
                         std::count_if(stock[lane].begin(), stock[lane].end(), [](auto& e) { return !e.empty(); }), lane});
    std::sort(order.begin(), order.end());
    std::array<int64_t, kBanks> used{};
    for (const auto& [slack, choices, lane] : order) {
      int chosen = -1;
      for (int bank = 0; bank < kBanks; ++bank) {
        const auto& here = stock[lane][bank];
        if (!here.empty() && used[bank] == 0 && (chosen < 0 || here.size() > stock[lane][chosen].size())) chosen = bank;
      }
      if (chosen < 0 && slack > 0) continue;
      if (chosen < 0)
        for (int bank = 0; bank < kBanks; ++bank)
          if (!stock[lane][bank].empty() && (chosen < 0 || used[bank] < used[chosen])) chosen = bank;
      put(static_cast<int>(lane), slot, stock[lane][chosen].back());
      stock[lane][chosen].pop_back();
      --left[lane];
      ++used[chosen];
    }
    const int64_t worst = *std::max_element(used.begin(), used.end());
    ordered.wavefronts += worst;
    ordered.phases += worst > 0;
  }
}

template <class Index>
Ordered order_rows(std::span<const Index> indices, int64_t out_features, int64_t in_features, Lanes lanes, int64_t columns) {
  Ordered ordered;
  const int64_t width = std::min(columns, in_features), block = lanes.threads * lanes.rows_per_lane;
  const int64_t nnz = indices.size();
  std::vector<int64_t> next(out_features), last(out_features);  // entries of a row that no window has met yet
  for (int64_t row = 0, p = 0; row < out_features; ++row) {
    next[row] = p;
    while (p < nnz && indices[p] < static_cast<Index>((row + 1) * in_features)) ++p;
    last[row] = p;
  }
  struct Virtual {
    int64_t row;
    std::vector<int32_t> entries;
  };
  for (int64_t begin = 0; begin < in_features; begin += columns) {
    std::vector<Virtual> all;
    for (int64_t row = 0; row < out_features; ++row) {
      std::array<std::vector<int32_t>, kBanks> residues;
      int64_t count = 0;
      for (; next[row] < last[row]; ++next[row], ++count) {
        const int64_t column = indices[next[row]] - row * in_features;
        if (column >= begin + columns) break;
        residues[column % kBanks].push_back(static_cast<int32_t>(next[row]));
      }
      if (count == 0) continue;
      const int64_t parts = (count + lanes.slots - 1) / lanes.slots, first = all.size();
      for (int64_t part = 0; part < parts; ++part) all.push_back({row, {}});
      int64_t dealt = 0;
      for (const auto& entries : residues)
        for (const int32_t entry : entries) all[first + dealt++ % parts].entries.push_back(entry);
    }
    const int64_t tiles = (static_cast<int64_t>(all.size()) + block - 1) / block, base = ordered.window_begin.size();
    ordered.window_begin.resize(base + tiles, static_cast<int32_t>(std::min(begin, in_features - width)));
    ordered.rows.resize((base + tiles) * block, -1);
    ordered.entries.resize((base + tiles) * block * lanes.slots, -1);
    for (size_t eight = 0; eight < all.size(); eight += kBanks) {
      const int64_t tile = base + eight / block, place = eight % block;
      const int64_t member = place / 32 % lanes.rows_per_lane, thread = place / (32 * lanes.rows_per_lane) * 32 + place % 32;
      std::array<std::array<std::vector<int32_t>, kBanks>, kBanks> stock;
      for (int lane = 0; lane < kBanks && eight + lane < all.size(); ++lane) {
        const Virtual& here = all[eight + lane];
        ordered.rows[(tile * lanes.rows_per_lane + member) * lanes.threads + thread + lane] = static_cast<int32_t>(here.row);
        for (const int32_t entry : here.entries) stock[lane][(indices[entry] - here.row * in_features) % kBanks].push_back(entry);
      }
      fill_slots(stock, lanes.slots, ordered, [&](int lane, int64_t slot, int32_t entry) {
        const int64_t line = (tile * lanes.rows_per_lane + member) * lanes.slots + slot;
        ordered.entries[line * lanes.threads + thread + lane] = entry;
      });
    }
  }
  return ordered;
}

}  // namespace sprand::host
