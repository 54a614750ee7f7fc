"""S3-FIFO whose small queue grows while pages come back soon after they left it.

A window that slides over the data touches every page several times within a while, and never again.
A small queue of a tenth lets such pages go before their second access, and they are read twice. The
ghost queue tells: what comes back soon would have stayed in a small queue that is a little longer;
what comes back late, as under a skewed popularity, would not, and belongs to the main queue.

The size goes up and down by a 64th of the frames with each page that comes back, between a tenth
and a half. All else is S3-FIFO as its paper has it (`tiers.policies.s3fifo`). The paper's own
adaptive variant, S3-FIFO-D, needs a second ghost queue.
"""

from __future__ import annotations

from tiers.policies.s3fifo import S3Fifo


class S3FifoAdaptive(S3Fifo):
    """S3-FIFO with a small queue of a tenth to a half of the frames."""

    adapts = True
