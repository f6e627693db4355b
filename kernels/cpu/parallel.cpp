// OpenMP, and not a pool of our own: torch's CPU operators run on libgomp, whose threads spin for a while after each
// operator. A second pool would have to fight them for the cores at every layer. Linked by SONAME (libgomp.so.1) the
// library gets the very copy that torch has loaded, and so torch's own threads.
#include "parallel.h"

#ifdef _OPENMP
#  include <omp.h>
#endif
#ifdef __linux__
#  include <linux/futex.h>
#  include <sys/syscall.h>
#  include <unistd.h>
#else
#  include <sched.h>
#endif

namespace llmq {

// What the threads of a region write to, each on its own line of the cache.
struct Team::Shared {
  // The next task of the phase, for an even and an odd phase: while threads leave one, others may be in the next.
  alignas(64) int64_t next[2][8];
  alignas(64) int32_t arrived;     // threads that wait at the barrier
  alignas(64) int32_t generation;  // barriers that all have passed
  alignas(64) int32_t sleepers;    // threads that wait for the next generation asleep
};

namespace {

// Looks at a barrier before sleeping: some 30 microseconds. OpenMP's own barrier looks for milliseconds, which is as long as a
// busy system takes a thread's core away: while one thread keeps a core by looking, the one that it waits for gets none.
constexpr int32_t kLooks = 1000;

void rest() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void sleep_while(int32_t* word, int32_t value) {
#ifdef __linux__
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
  (void)word, (void)value;
  sched_yield();
#endif
}

void wake_all(int32_t* word) {
#ifdef __linux__
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 0x7fffffff, nullptr, nullptr, 0);
#else
  (void)word;
#endif
}

}  // namespace

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
  if (size_ == 1) return;
  int32_t* generation = &shared_->generation;
  const int32_t now = __atomic_load_n(generation, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&shared_->arrived, 1, __ATOMIC_ACQ_REL) == size_) {
    __atomic_store_n(&shared_->arrived, 0, __ATOMIC_RELAXED);
    __atomic_add_fetch(generation, 1, __ATOMIC_SEQ_CST);
    // Whoever is not counted yet has still to look at the generation, and finds it changed.
    if (__atomic_load_n(&shared_->sleepers, __ATOMIC_SEQ_CST)) wake_all(generation);
    return;
  }
  for (int32_t look = 0; look < kLooks; ++look) {
    if (__atomic_load_n(generation, __ATOMIC_ACQUIRE) != now) return;
    rest();
  }
  __atomic_add_fetch(&shared_->sleepers, 1, __ATOMIC_SEQ_CST);
  while (__atomic_load_n(generation, __ATOMIC_ACQUIRE) == now) sleep_while(generation, now);
  __atomic_sub_fetch(&shared_->sleepers, 1, __ATOMIC_SEQ_CST);
}

void parallel_region(int32_t n_threads, void (*body)(const void* context, Team& team), const void* context) {
#ifdef _OPENMP
  if (n_threads > 1 && !omp_in_parallel()) {
    Team::Shared shared = {};
#  pragma omp parallel num_threads(n_threads)
    {
      Team team(&shared, omp_get_thread_num(), omp_get_num_threads());
      body(context, team);
      team.barrier();  // so that nobody waits long at OpenMP's, which ends the region
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
