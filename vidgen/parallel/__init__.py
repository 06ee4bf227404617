"""Several GPUs on one clip: who does what (`layout`), what code asks of its gang (`context`), and the gang (`gang`).

A gang of one is the identity and needs none of `gang`, which alone imports torch.distributed. Refuses to know any
model.
"""

from vidgen.parallel.context import ALONE as ALONE
from vidgen.parallel.context import IDENTITY as IDENTITY
from vidgen.parallel.context import ContextParallel as ContextParallel
from vidgen.parallel.context import Ranks as Ranks
