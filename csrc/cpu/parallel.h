// The one place that knows a threading runtime: OpenMP, whose shared runtime torch has loaded already.
// REALM_KERNELS_STD_THREADS puts std::thread in its place for ThreadSanitizer, which cannot see what the
// synchronisation inside libgomp orders (tests/sanitize).
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(REALM_KERNELS_STD_THREADS)
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif

namespace realm_kernels {

// Calls body(begin, end, thread) on `num_threads` contiguous parts of [0, count). The split depends on count
// and num_threads only. With one thread no parallel region is entered, so a forked worker of a program that
// used threads before stays safe.
template <class Body>
void parallel_for(int64_t count, int num_threads, const Body& body) {
  const int parts = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(num_threads, count)));
  const auto part = [&](int thread) { body(count * thread / parts, count * (thread + 1) / parts, thread); };
  if (parts == 1) {
    part(0);
    return;
  }
#if defined(REALM_KERNELS_STD_THREADS)
  std::vector<std::thread> threads;
  for (int thread = 1; thread < parts; ++thread) {
    threads.emplace_back(part, thread);
  }
  part(0);
  for (std::thread& thread : threads) {
    thread.join();
  }
#else
#ifdef _OPENMP
#pragma omp parallel for num_threads(parts) schedule(static, 1)
#endif
  for (int thread = 0; thread < parts; ++thread) {
    part(thread);
  }
#endif
}

}  // namespace realm_kernels
