// Callgrind's client requests as functions that Python can call: count from here to there, and no instruction outside.
#include <valgrind/callgrind.h>

int on_valgrind(void) { return (int)RUNNING_ON_VALGRIND; }

void start(void) {
  CALLGRIND_START_INSTRUMENTATION;
  CALLGRIND_ZERO_STATS;
}

void stop(const char* name) {
  CALLGRIND_DUMP_STATS_AT(name);
  CALLGRIND_STOP_INSTRUMENTATION;
}
