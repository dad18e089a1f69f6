"""A kernel that writes behind its array: memcheck must find it, or its silence says nothing of others."""

import torch
import triton
import triton.language as tl


@triton.jit
def faulty_kernel(array, BEHIND: tl.constexpr):
    tl.store(array + BEHIND, 1.0)


if __name__ == "__main__":
    array = torch.zeros(256, device="cuda")
    faulty_kernel[(1,)](array, BEHIND=1 << 20)
    torch.cuda.synchronize()
