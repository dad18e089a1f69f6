"""What `make gpu` runs where an NVIDIA GPU is: build, tests, sanitizers, benchmarks. See __main__.py.

No file here imports more than torch, triton and pytest bring, and nothing is downloaded. The parent process
holds no CUDA context: a kernel that faults ends a child, and the parent says which row that was.
"""
