// Sorted index lists on the host: the check that a list is one, and the union of several with each entry's place in it.
#pragma once
#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

namespace sprand::host {

// Position of the first entry that is out of [0, numel) or not above its predecessor; -1 where there is none.
template <class Index>
int64_t first_bad_index(std::span<const Index> indices, int64_t numel) {
  int64_t previous = -1;
  for (size_t i = 0; i < indices.size(); ++i) {
    const int64_t index = indices[i];
    if (index <= previous || index >= numel) return static_cast<int64_t>(i);
    previous = index;
  }
  return -1;
}

// Union of ascending lists, merged in pairs until one is left.
template <class Index>
std::vector<Index> merge(std::vector<std::span<const Index>> lists) {
  std::vector<std::vector<Index>> stored;
  while (lists.size() > 1) {
    std::vector<std::vector<Index>> merged((lists.size() + 1) / 2);
    for (size_t i = 0; i < merged.size(); ++i) {
      const auto left = lists[2 * i];
      const auto right = 2 * i + 1 < lists.size() ? lists[2 * i + 1] : std::span<const Index>{};
      merged[i].resize(left.size() + right.size());
      merged[i].erase(std::set_union(left.begin(), left.end(), right.begin(), right.end(), merged[i].begin()), merged[i].end());
    }
    lists.assign(merged.begin(), merged.end());
    stored = std::move(merged);
  }
  if (lists.empty()) return {};
  if (!stored.empty()) return std::move(stored.front());
  return {lists.front().begin(), lists.front().end()};
}

// Writes where each entry of `list` stands in `all`, which holds every one of them; both ascending.
template <class Index>
void positions(std::span<const Index> list, std::span<const Index> all, int64_t* out) {
  size_t at = 0;
  for (size_t i = 0; i < list.size(); ++i) {
    while (at < all.size() && all[at] < list[i]) ++at;
    out[i] = static_cast<int64_t>(at);
  }
}

}  // namespace sprand::host
