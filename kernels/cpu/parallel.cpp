// OpenMP, and not a pool of our own: torch's CPU operators run on libgomp, whose threads spin for a while after each
// operator. A second pool would have to fight them for the cores at every layer. Linked by SONAME (libgomp.so.1) the
// library gets the very copy that torch has loaded, and so torch's own threads.
#include "parallel.h"

namespace llmq {

void parallel_tasks(int64_t tasks, int32_t n_threads, void (*run)(const void* context, int64_t task),
                    const void* context) {
  if (n_threads > tasks) n_threads = static_cast<int32_t>(tasks);
  if (n_threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) run(context, task);
    return;
  }
#ifdef _OPENMP
#  pragma omp parallel for num_threads(n_threads) schedule(dynamic, 1)
#endif
  for (int64_t task = 0; task < tasks; ++task) run(context, task);
}

const char* threading() {
#ifdef _OPENMP
  return "openmp";
#else
  return "serial";
#endif
}

}  // namespace llmq
