// Callgrind's client requests as functions that Python can call.
#include <valgrind/callgrind.h>

int on_valgrind(void) { return (int)RUNNING_ON_VALGRIND; }

void instrument(void) { CALLGRIND_START_INSTRUMENTATION; }

void start(void) { CALLGRIND_ZERO_STATS; }

void stop(const char* name) { CALLGRIND_DUMP_STATS_AT(name); }
