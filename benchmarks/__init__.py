"""One file per op, each peer measured in the same run, every time held against the machine's limit."""
