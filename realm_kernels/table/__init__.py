from .distributed import DistributedTable
from .editor import TableEditor
from .encoders import ProcessEncoder, RanksEncoder, serve_encoder
from .refresh import RefreshMetrics, TableRefresher
from .sharded import ShardedTable
from .streamed import StreamedTable
from .verification import verify
from .writer import TableWriter

__all__ = [
    "DistributedTable",
    "ProcessEncoder",
    "RanksEncoder",
    "RefreshMetrics",
    "ShardedTable",
    "StreamedTable",
    "TableEditor",
    "TableRefresher",
    "TableWriter",
    "serve_encoder",
    "verify",
]
