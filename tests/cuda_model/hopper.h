// sm_90a in the model of the machine: barriers, TMA, wgmma. Included by machine-independent names of
// csrc/cuda/sm90/ptx.h where there is no nvcc.
#pragma once

#include "machine.h"

namespace realm_kernels {
namespace cuda {
namespace sm90 {

using cuda_model::machine;

struct TensorMap {  // of a row-major matrix, in bytes; the box is one panel wide
  const unsigned char* base;
  int64_t row_stride;
  int64_t rows, row_bytes;
  int box_rows;
  int element_bytes;
};

inline uint32_t shared_address(const void* pointer) { return machine().address(pointer); }

inline void barrier_init(uint64_t* barrier, uint32_t count) {
  auto& b = machine().barrier(barrier);
  b = {};  // also what was told to it too early
  b.count = b.pending = count;
}
inline void barrier_init_fence() {}
inline void barrier_arrive(void* barrier) {
  auto& b = machine().barrier(barrier);
  machine().require(b.pending > 0, "a barrier gets more arrivals than it was made for");
  --b.pending;
  b.settle();
  machine().progress();
}
inline void barrier_arrive_at(uint64_t* barrier, uint32_t rank) {
  barrier_arrive(machine().at(machine().of_cluster(rank), shared_address(barrier)));
}
inline void cluster_sync() {
  machine().meet(machine().cluster(), static_cast<int>(machine().cluster_size() * blockDim.x));
}
inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  machine().barrier(barrier).bytes += bytes;
  barrier_arrive(barrier);
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  machine().require(parity < 2 && machine().barrier(barrier).count > 0, "a wait for a barrier nobody made");
  while ((machine().barrier(barrier).phase & 1) == parity) {
    machine().yield();
  }
}

inline void tma_load_to(cuda_model::Block& block, const TensorMap* map, uint32_t address, uint32_t barrier,
                        int column, int row) {
  machine().require(address % kAtomBytes == 0, "TMA: the target does not start a swizzle atom");
  machine().require((column * map->element_bytes) % kPanelBytes == 0, "TMA: a panel starts between panels");
  std::memset(machine().at(block, address), 0xFF, static_cast<size_t>(map->box_rows) * kPanelBytes);  // NaN
  machine().later([&block, map, address, barrier, column, row] {
    for (int r = 0; r < map->box_rows; ++r) {
      for (int c = 0; c < kPanelBytes; ++c) {
        const int64_t byte = int64_t{column} * map->element_bytes + c;
        const bool inside = row + r < map->rows && byte < map->row_bytes;
        // The hardware swizzles the address it writes to, not the offset in the box.
        *machine().at(block, swizzled(address + static_cast<uint32_t>(r * kPanelBytes + c))) =
            inside ? map->base[(row + r) * map->row_stride + byte] : 0;
      }
    }
    auto& b = machine().barrier(machine().at(block, barrier));
    b.bytes -= map->box_rows * kPanelBytes;
    b.settle();
  });
}
inline void tma_load(const TensorMap* map, void* to, uint64_t* barrier, int column, int row) {
  tma_load_to(machine().block(), map, shared_address(to), shared_address(barrier), column, row);
}
inline void tma_load_multicast(const TensorMap* map, void* to, uint64_t* barrier, int column, int row,
                               uint16_t blocks) {
  machine().require(blocks >> machine().cluster_size() == 0, "TMA: a block that the cluster does not have");
  for (unsigned rank = 0; rank < machine().cluster_size(); ++rank) {
    if ((blocks >> rank & 1) != 0) {
      tma_load_to(machine().of_cluster(rank), map, shared_address(to), shared_address(barrier), column, row);
    }
  }
}
inline void tma_prefetch(const TensorMap*) {}

inline void wgmma_fence() {}
inline void wgmma_commit() {
  auto& fiber = machine().fiber();
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int kPending>
void wgmma_wait() {
  auto& groups = machine().fiber().groups;
  while (groups.size() > kPending) {
    cuda_model::Fiber::compute(groups.front());
    for (auto& product : groups.front()) {
      product.reveal();
    }
    groups.pop_front();
  }
  machine().yield();
}
template <int kPending, class T, int kCount>
void wgmma_wait(T (&)[kCount]) {
  wgmma_wait<kPending>();
}

template <int>
void give_registers() {}
template <int>
void take_registers() {}
inline void warp_group_sync(int group) { machine().meet(machine().named(group), kWarpGroup); }
inline int uniform(int x) { return x; }

inline Vector16 load_shared(uint32_t address) {
  Vector16 v;
  std::memcpy(&v, machine().at(address), sizeof v);
  return v;
}

struct BFloat16;
struct Float16;
struct Int8;

template <class Element>
double element_at(uint32_t address);
template <>
inline double element_at<BFloat16>(uint32_t address) {
  uint16_t bits;
  std::memcpy(&bits, machine().at(address), 2);
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}
template <>
inline double element_at<Float16>(uint32_t address) {
  uint16_t bits;
  std::memcpy(&bits, machine().at(address), 2);
  return half_to_float(bits);
}
template <>
inline double element_at<Int8>(uint32_t address) {
  return static_cast<int8_t>(*machine().at(address));
}

// The address of a byte of an operand's row, from the bits of its descriptor.
inline uint32_t operand_address(uint64_t descriptor, int row, int byte) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3FFF) << 4; };
  machine().require(descriptor >> 62 == 1, "a descriptor of another swizzle");
  machine().require((descriptor >> 49 & 7) == 0, "a descriptor with a base offset");
  return swizzled(field(0) + static_cast<uint32_t>(row / 8) * field(32) +
                  static_cast<uint32_t>(row % 8 * 128 + byte));
}

// What a tensor core may lose: every eight products a sum cut to 23 bits towards zero, subnormals to nothing.
inline float truncated(double sum) {
  if (!std::isfinite(sum) || sum == 0.0) {
    return static_cast<float>(sum);
  }
  int exponent;
  const double mantissa = std::frexp(sum, &exponent);
  const double cut = std::ldexp(std::trunc(std::ldexp(mantissa, 23)), exponent - 23);
  return std::fabs(cut) < 0x1p-126 ? 0.0f : static_cast<float>(cut);
}
inline int truncated(int64_t sum) { return static_cast<int>(sum); }

template <class Element, int kCount>
void wgmma(typename Element::Accumulator (&d)[kCount], uint64_t a, uint64_t b, int add) {
  using T = typename Element::Accumulator;
  auto& fiber = machine().fiber();
  auto& hidden = fiber.accumulators[d];
  if (hidden.under_way == 0) {
    hidden.value.resize(sizeof d);
    std::memcpy(hidden.value.data(), d, sizeof d);
    for (T& x : d) {
      x = std::is_same<T, float>::value ? static_cast<T>(NAN) : static_cast<T>(0x7FFFFFFF);
    }
  }
  ++hidden.under_way;
  const int thread = static_cast<int>(threadIdx.x) % kWarpGroup;
  T* const shown = d;
  auto compute = [&hidden, thread, a, b, add] {
    T* value = reinterpret_cast<T*>(hidden.value.data());
    constexpr int kElements = kStepBytes / Element::kBytes;
    for (int i = 0; i < kCount; ++i) {
      const int row = fragment_row(thread, i), column = fragment_column(thread, i);
      T total = add != 0 ? value[i] : T{};
      for (int k = 0; k < kElements; k += 8) {
        using Wide = std::conditional_t<std::is_same<T, float>::value, double, int64_t>;
        Wide sum = static_cast<Wide>(total);
        for (int e = k; e < k + 8; ++e) {
          const int byte = e * Element::kBytes;
          sum += static_cast<Wide>(element_at<Element>(operand_address(a, row, byte)) *
                                   element_at<Element>(operand_address(b, column, byte)));
        }
        total = truncated(sum);
      }
      value[i] = total;
    }
  };
  auto reveal = [&hidden, shown] {
    if (--hidden.under_way == 0) {
      std::memcpy(shown, hidden.value.data(), sizeof(T) * kCount);
    }
  };
  fiber.open.push_back({compute, reveal});
  if (machine().chance(3)) {
    fiber.compute();
  }
}

}  // namespace sm90
}  // namespace cuda
}  // namespace realm_kernels
