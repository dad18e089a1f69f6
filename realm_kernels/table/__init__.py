from .distributed import DistributedTable
from .editor import TableEditor
from .refresh import RefreshMetrics, TableRefresher
from .sharded import ShardedTable
from .verification import verify
from .writer import TableWriter

__all__ = [
    "DistributedTable",
    "RefreshMetrics",
    "ShardedTable",
    "TableEditor",
    "TableRefresher",
    "TableWriter",
    "verify",
]
