from .refresh import RefreshMetrics, TableRefresher
from .sharded import ShardedTable
from .writer import TableWriter

__all__ = ["RefreshMetrics", "ShardedTable", "TableRefresher", "TableWriter"]
