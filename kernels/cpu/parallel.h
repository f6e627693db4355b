// The one place that starts threads.
#pragma once

#include <stdint.h>

namespace llmq {

// Calls run(context, i) for each i in [0, tasks), on at most `n_threads` threads, each taking the next task when it is
// done with one. Returns when all are done.
void parallel_tasks(int64_t tasks, int32_t n_threads, void (*run)(const void* context, int64_t task),
                    const void* context);

// "openmp" or "serial".
const char* threading();

}  // namespace llmq
