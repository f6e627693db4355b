// The one place that starts threads.
#pragma once

#include <stdint.h>

namespace llmq {

// The threads of one parallel region, seen by one of them. A region does a chain of phases, each cut into tasks that the
// threads take one by one; nobody enters a phase before all have left the one before it.
class Team {
 public:
  // Calls run(context, i, rank) for each i in [0, tasks), each on whichever thread asks next; returns when all threads
  // are done with all of them. Every thread of the team must come here, with the same number.
  void share(int64_t tasks, void (*run)(const void* context, int64_t task, int32_t rank), const void* context);

  // The same with anything that can be called as run(task, rank).
  template <class Run>
  void share(int64_t tasks, const Run& run) {
    share(
        tasks, [](const void* context, int64_t task, int32_t rank) { (*static_cast<const Run*>(context))(task, rank); },
        &run);
  }

  // Waits until all threads of the team are here. Memory written before is seen after.
  void barrier();

  int32_t rank() const { return rank_; }  // 0 <= rank() < size()
  int32_t size() const { return size_; }

 private:
  friend void parallel_region(int32_t n_threads, void (*body)(const void* context, Team& team), const void* context);
  struct Shared;
  Team(Shared* shared, int32_t rank, int32_t size) : shared_(shared), rank_(rank), size_(size) {}
  Shared* shared_;
  int32_t rank_, size_;
  int32_t phase_ = 0;
};

// Calls body(context, team) on `n_threads` threads (fewer where the system grants fewer, or the caller is inside a
// parallel region already), and returns when all have returned.
void parallel_region(int32_t n_threads, void (*body)(const void* context, Team& team), const void* context);

// The same with anything that can be called as body(team).
template <class Body>
void parallel_region(int32_t n_threads, const Body& body) {
  parallel_region(
      n_threads, [](const void* context, Team& team) { (*static_cast<const Body*>(context))(team); }, &body);
}

// "openmp" or "serial".
const char* threading();

}  // namespace llmq
