// A model of the parts of a GPU that the kernels in csrc/cuda use, so that g++ compiles the same kernels and
// a CPU runs them: the threads of a cluster of blocks are fibers, switched at random wherever a real one
// could wait.
//
// What the hardware does behind a kernel's back is made as nasty as it may be. A TMA transfer ruins its
// targets when it is issued and fills each some random time later. Blocks of a cluster begin at different
// times and fall behind. A wgmma runs when it is issued or as late as the wait for it, and until then its
// accumulators hold NaN; its sums are truncated. Descriptors are decoded bit by bit, addresses swizzled as
// the PTX ISA says, phases of barriers counted. So a stage freed too early, a wrong parity, a missing wait or
// a wrong offset gives wrong numbers or a deadlock that is told, not luck.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include <ucontext.h>

#define RK_DEVICE inline

struct ModelIndex {
  unsigned x = 0, y = 0, z = 0;
};
inline ModelIndex threadIdx, blockIdx, blockDim, gridDim;

namespace realm_kernels {
namespace cuda_model {

constexpr size_t kStackBytes = 96 * 1024;
constexpr int kMisalignment = 48;  // of the dynamic shared memory, as nothing promises more than 16
constexpr unsigned kLongestPause = 300;
constexpr int kPatience = 2000;  // rounds without progress that mean a deadlock

struct Barrier {
  uint32_t count = 0, pending = 0, phase = 0;
  int64_t bytes = 0;
  void settle() {
    if (pending == 0 && bytes == 0) {
      ++phase;
      pending = count;
    }
  }
};

// A wgmma under way, for one thread: its own accumulators only, as no other thread reads them.
struct Product {
  std::function<void()> compute;
  std::function<void()> reveal;
};

struct Accumulators {  // what they hold while nobody may look
  std::vector<unsigned char> value;
  int under_way = 0;
};

struct Rendezvous {
  int arrived = 0;
  uint64_t generation = 0;
  uint64_t slots[2][32] = {};
};

struct Block {
  unsigned index = 0;
  unsigned pause = 0;  // rounds in which it stands still
  std::unique_ptr<unsigned char[]> memory;
  std::vector<Rendezvous> warps;
  Rendezvous all;
  std::map<int, Rendezvous> named;
  size_t alive = 0;  // threads
};

struct Fiber {
  ucontext_t context;
  Block* block = nullptr;
  std::unique_ptr<char[]> stack;
  unsigned thread = 0;
  bool done = false;
  std::vector<Product> open;                // issued, not committed
  std::deque<std::vector<Product>> groups;  // committed, not complete
  std::map<void*, Accumulators> accumulators;

  // Everything issued so far, in order: the hardware may be this early.
  void compute() {
    for (auto& group : groups) {
      compute(group);
    }
    compute(open);
  }
  static void compute(std::vector<Product>& products) {
    for (auto& product : products) {
      if (product.compute) {
        product.compute();
        product.compute = nullptr;
      }
    }
  }
};

class Machine {
 public:
  static Machine& get() {
    static Machine machine;
    return machine;
  }

  // A launch: cluster after cluster, a block on `threads` fibers and `shared_bytes` of dynamic shared memory.
  void launch(unsigned blocks, unsigned threads, size_t shared_bytes, uint64_t seed,
              const std::function<void()>& kernel, unsigned cluster = 1) {
    random_.seed(seed);
    slowness_ = chance(2) ? 2 : 20;
    kernel_ = &kernel;
    gridDim.x = blocks;
    blockDim.x = threads;
    require(blocks % cluster == 0, "a launch of part of a cluster");
    if (!error_.empty()) {
      fail();
    }
    for (unsigned first = 0; first < blocks; first += cluster) {
      run_cluster(first, cluster, threads, shared_bytes);
    }
  }

  unsigned char* shared() { return block().memory.get() + kMisalignment; }
  // In the shared memory of the block that runs, or of another one of its cluster.
  uint32_t address(const void* pointer) {
    return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - block().memory.get());
  }
  unsigned char* at(uint32_t address) { return at(block(), address); }
  unsigned char* at(Block& of, uint32_t address) {
    require(address < memory_bytes_, "shared memory is left");
    require(of.alive > 0, "shared memory of a block that has ended is touched");
    return of.memory.get() + address;
  }
  Block& of_cluster(unsigned rank) {
    require(rank < blocks_.size(), "a block that the cluster does not have");
    return blocks_[rank];
  }
  unsigned cluster_size() const { return static_cast<unsigned>(blocks_.size()); }
  Barrier& barrier(void* pointer) { return barriers_[pointer]; }
  Fiber& fiber() { return *current_; }
  bool chance(int one_in) { return random_() % static_cast<unsigned>(one_in) == 0; }
  void progress() { idle_ = 0; }
  void later(std::function<void()> transfer) { transfers_.push_back(std::move(transfer)); }

  void require(bool holds, const char* what) {
    if (!holds && error_.empty()) {
      error_ = what;
    }
    if (!holds && current_ != nullptr) {
      yield_forever();
    }
  }

  void yield() { swapcontext(&current_->context, &scheduler_); }

  void meet(Rendezvous& place, int count) {
    const uint64_t generation = place.generation;
    if (++place.arrived == count) {
      place.arrived = 0;
      ++place.generation;
      progress();
    }
    while (place.generation == generation) {
      yield();
    }
  }
  Block& block() { return *current_->block; }
  Rendezvous& warp() { return block().warps[current_->thread / 32]; }
  Rendezvous& named(int id) { return block().named[id]; }
  Rendezvous& cluster() { return cluster_; }

  uint64_t exchange(uint64_t value, unsigned from_lane) {
    Rendezvous& place = warp();
    const uint64_t parity = place.generation & 1;
    place.slots[parity][current_->thread % 32] = value;
    meet(place, 32);
    return place.slots[parity][from_lane % 32];
  }

 private:
  [[noreturn]] void yield_forever() {
    while (true) {
      yield();
    }
  }

  static void enter() {
    Machine& machine = get();
    (*machine.kernel_)();
    machine.require(machine.current_->open.empty() && machine.current_->groups.empty(),
                    "a thread ends with a wgmma under way");
    machine.current_->done = true;
    --machine.block().alive;
    machine.progress();
    machine.yield_forever();
  }

  void start(Block& block, unsigned thread) {
    fibers_.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *fibers_.back();
    fiber.block = &block;
    fiber.thread = thread;
    fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Machine::enter, 0);
    ++block.alive;
  }

  void run_cluster(unsigned first, unsigned size, unsigned threads, size_t shared_bytes) {
    memory_bytes_ = shared_bytes + kMisalignment;
    barriers_.clear();
    cluster_ = Rendezvous{};
    fibers_.clear();
    blocks_.clear();
    blocks_.resize(size);
    for (unsigned rank = 0; rank < size; ++rank) {
      Block& block = blocks_[rank];
      block.index = first + rank;
      block.pause = size > 1 ? random_() % kLongestPause : 0;
      // Swizzling looks at addresses: the memory starts on a multiple of 1024 of them, namely at 0.
      block.memory.reset(new unsigned char[memory_bytes_]);
      std::memset(block.memory.get(), 0xFF, memory_bytes_);
      block.warps.assign((threads + 31) / 32, Rendezvous{});
      for (unsigned thread = 0; thread < threads; ++thread) {
        start(block, thread);
      }
    }
    const size_t count = fibers_.size();
    size_t alive = count;
    idle_ = 0;
    while (alive > 0) {
      alive = 0;
      for (Block& block : blocks_) {
        block.pause = block.pause > 0           ? block.pause - 1
                      : size > 1 && chance(128) ? random_() % kLongestPause
                                                : 0;
      }
      const size_t start = random_() % count;
      for (size_t i = 0; i < count; ++i) {
        Fiber& fiber = *fibers_[(start + i) % count];
        if (!fiber.done && fiber.block->pause == 0 && !chance(8)) {
          current_ = &fiber;
          threadIdx.x = fiber.thread;
          blockIdx.x = fiber.block->index;
          swapcontext(&scheduler_, &fiber.context);
          current_ = nullptr;
          if (!error_.empty()) {
            fail();
          }
        }
        alive += !fiber.done;
      }
      while (!transfers_.empty() && chance(slowness_)) {
        const size_t chosen = random_() % transfers_.size();
        const auto transfer = transfers_[chosen];
        transfers_.erase(transfers_.begin() + static_cast<std::ptrdiff_t>(chosen));
        transfer();
        progress();
        if (!error_.empty()) {
          fail();
        }
      }
      if (++idle_ > kPatience) {
        error_ = "deadlock: no thread of block " + std::to_string(first) + " or its cluster can go on";
        fail();
      }
    }
    if (!transfers_.empty()) {
      error_ = "a block ends with a transfer under way";
      fail();
    }
  }

  void fail() {
    const std::string error = error_;
    error_.clear();
    transfers_.clear();
    throw std::runtime_error(error);
  }

  std::mt19937_64 random_;
  const std::function<void()>* kernel_ = nullptr;
  size_t memory_bytes_ = 0;  // of a block
  std::map<void*, Barrier> barriers_;
  std::vector<Block> blocks_;  // of the cluster that runs
  Rendezvous cluster_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<std::function<void()>> transfers_;
  ucontext_t scheduler_;
  Fiber* current_ = nullptr;
  std::string error_;
  int idle_ = 0;
  int slowness_ = 2;  // of memory
};

inline Machine& machine() { return Machine::get(); }

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8, "a register or two");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace cuda_model
}  // namespace realm_kernels

// CUDA's own names.
inline void __syncthreads() {
  auto& m = realm_kernels::cuda_model::machine();
  m.meet(m.block().all, static_cast<int>(blockDim.x));
}
inline void __syncwarp() {
  auto& m = realm_kernels::cuda_model::machine();
  m.meet(m.warp(), 32);
}
inline void __threadfence() {}
template <class T>
T __shfl_sync(uint32_t, T value, int lane) {
  using namespace realm_kernels::cuda_model;
  return from_bits<T>(machine().exchange(to_bits(value), static_cast<unsigned>(lane)));
}
template <class T>
T __shfl_xor_sync(uint32_t, T value, int mask) {
  return __shfl_sync(0xFFFFFFFFu, value, static_cast<int>((threadIdx.x % 32) ^ static_cast<unsigned>(mask)));
}
inline uint32_t __ballot_sync(uint32_t, bool holds) {
  uint32_t bits = 0;
  auto& m = realm_kernels::cuda_model::machine();
  auto& place = m.warp();
  const uint64_t parity = place.generation & 1;
  place.slots[parity][threadIdx.x % 32] = holds;
  m.meet(place, 32);
  for (int lane = 0; lane < 32; ++lane) {
    bits |= static_cast<uint32_t>(place.slots[parity][lane] != 0) << lane;
  }
  return bits;
}
inline bool __any_sync(uint32_t mask, bool holds) { return __ballot_sync(mask, holds) != 0; }
inline int __reduce_max_sync(uint32_t, int value) {
  for (int distance = 16; distance > 0; distance /= 2) {
    value = std::max(value, __shfl_xor_sync(0xFFFFFFFFu, value, distance));
  }
  return value;
}
inline int __reduce_add_sync(uint32_t, int value) {
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  }
  return value;
}
inline int __dp4a(int a, int b, int c) {
  for (int byte = 0; byte < 32; byte += 8) {
    c += static_cast<int8_t>(a >> byte) * static_cast<int8_t>(b >> byte);
  }
  return c;
}
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline float __uint_as_float(uint32_t bits) { return realm_kernels::cuda_model::from_bits<float>(bits); }
inline int __float_as_int(float value) { return static_cast<int>(realm_kernels::cuda_model::to_bits(value)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }
inline uint32_t __float_as_uint(float value) {
  return static_cast<uint32_t>(realm_kernels::cuda_model::to_bits(value));
}
template <class T>
T atomicAdd(T* place, T value) {
  const T before = *place;
  *place += value;
  return before;
}
template <class T>
T atomicMax(T* place, T value) {
  const T before = *place;
  *place = before > value ? before : value;
  return before;
}

namespace realm_kernels {
namespace cuda {

inline unsigned char* dynamic_shared_memory() { return cuda_model::machine().shared(); }
inline int64_t load_from_others(const int64_t* place) { return *place; }
inline float round_up_to_float(double x) {
  const float nearest = static_cast<float>(x);
  return static_cast<double>(nearest) < x ? std::nextafter(nearest, INFINITY) : nearest;
}
// Products and sums of floats in float64 may have been rounded down once: the next number above is no
// smaller.
inline float above(double x) { return round_up_to_float(std::isfinite(x) ? std::nextafter(x, INFINITY) : x); }
inline float round_down_to_float(double x) { return -round_up_to_float(-x); }
inline float to_float_up(int x) { return round_up_to_float(x); }
inline float add_up(float a, float b) { return above(static_cast<double>(a) + b); }
inline float subtract_down(float a, float b) {
  const double x = a, y = -static_cast<double>(b), sum = x + y;
  const double of_y = sum - x,
               lost = (x - (sum - of_y)) + (y - of_y);  // by the sum; NaN where that is not finite
  const float down = round_down_to_float(lost < 0 ? std::nextafter(sum, -INFINITY) : sum);
  return sum == 0.0 ? -0.0f : down;  // as rounding downward has it
}
inline float multiply_up(float a, float b) { return round_up_to_float(static_cast<double>(a) * b); }
inline float multiply_down(float a, float b) { return round_down_to_float(static_cast<double>(a) * b); }
inline float multiply_add_up(float a, float b, float c) { return above(static_cast<double>(a) * b + c); }
inline float half_to_float(uint32_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float magnitude = exponent == 31  ? (fraction == 0 ? INFINITY : NAN)
                          : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                          : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

}  // namespace cuda
}  // namespace realm_kernels
