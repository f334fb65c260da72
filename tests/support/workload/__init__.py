"""Programs that write to a mount until it dies under them, and say afterwards what of theirs is missing.

Each run has a directory on the mount and an ack file outside of it.  What a step `n` writes follows from
the seed and `n` alone.  Before a step its number goes into the ack file as begun, and once the program was
promised durability, as acknowledged.  So `verify` knows what must be there (all that was acknowledged), what
may be (what was begun), and that nothing else can be; it returns one sentence for each thing that is wrong.

`files` uses plain files and names, `lmdb` one environment, `casper` the two environments of a Casper node,
`sqlite` a database.  As a process: `Running`, or `python -m tests.support.workload NAME DIR ACKFILE`.
"""

from tests.support.workload.acks import read
from tests.support.workload.process import Running
from tests.support.workload.registry import WORKLOADS, run, verify

__all__ = ["WORKLOADS", "Running", "read", "run", "verify"]
