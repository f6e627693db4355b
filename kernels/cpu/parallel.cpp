// OpenMP, and not a pool of our own: torch's CPU operators run on libgomp, whose threads spin for a while after each
// operator. A second pool would have to fight them for the cores at every layer. Linked by SONAME (libgomp.so.1) the
// library gets the very copy that torch has loaded, and so torch's own threads.
#include "parallel.h"

#ifdef _OPENMP
#  include <omp.h>
#endif

namespace llmq {

// The next task of the phase, for an even and an odd phase: while threads leave one, others may be in the next.
struct Team::Shared {
  alignas(64) int64_t next[2][8];
};

void Team::share(int64_t tasks, void (*run)(const void* context, int64_t task, int32_t rank), const void* context) {
  if (size_ == 1) {
    for (int64_t task = 0; task < tasks; ++task) run(context, task, 0);
    return;
  }
  int64_t* next = &shared_->next[phase_ & 1][0];
  // Nobody asks the other counter any more: all have left the phase before, or they would not be here.
  if (rank_ == 0) __atomic_store_n(&shared_->next[(phase_ + 1) & 1][0], 0, __ATOMIC_RELAXED);
  ++phase_;
  for (;;) {
    const int64_t task = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
    if (task >= tasks) break;
    run(context, task, rank_);
  }
  barrier();
}

void Team::barrier() {
#ifdef _OPENMP
  if (size_ > 1) {
#  pragma omp barrier
  }
#endif
}

void parallel_region(int32_t n_threads, void (*body)(const void* context, Team& team), const void* context) {
#ifdef _OPENMP
  if (n_threads > 1 && !omp_in_parallel()) {
    Team::Shared shared = {};
#  pragma omp parallel num_threads(n_threads)
    {
      Team team(&shared, omp_get_thread_num(), omp_get_num_threads());
      body(context, team);
    }
    return;
  }
#else
  (void)n_threads;
#endif
  Team team(nullptr, 0, 1);
  body(context, team);
}

const char* threading() {
#ifdef _OPENMP
  return "openmp";
#else
  return "serial";
#endif
}

}  // namespace llmq
