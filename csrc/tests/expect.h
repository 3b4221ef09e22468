// What the C++ tests expect: a line for each expectation that fails, and the exit status.
#pragma once
#include <cstdio>
#include <string>

namespace tests {

inline int failures = 0;

inline void expect(bool condition, const std::string& what) {
  if (condition) return;
  std::printf("FAILED: %s\n", what.c_str());
  ++failures;
}

// The exit status of a test program.
inline int finish() {
  if (failures == 0) std::printf("All passed.\n");
  return failures != 0;
}

}  // namespace tests
