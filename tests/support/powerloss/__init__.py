"""A disk that forgets: a FUSE file system that loses, at a simulated power cut, what no fsync covered.

`cut` decides what of the uncovered writes reaches the medium, `disk` is the model of such a disk over a
backing directory, `fuse` serves it, `handle` starts and steers it from a test.  Run by itself:
`python -m tests.support.powerloss BACKING MOUNTPOINT --control SOCKET --seed N`.
"""

from tests.support.powerloss.cut import CutReport
from tests.support.powerloss.handle import PowerLoss

__all__ = ["CutReport", "PowerLoss"]
