from .distributed import DistributedTable
from .refresh import RefreshMetrics, TableRefresher
from .sharded import ShardedTable
from .writer import TableWriter

__all__ = ["DistributedTable", "RefreshMetrics", "ShardedTable", "TableRefresher", "TableWriter"]
