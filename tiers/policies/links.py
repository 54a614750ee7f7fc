"""Doubly linked lists whose nodes are rows of one array.

::

    links[0 .. n_lists - 1]   heads: (last, first) of each list
    links[n_lists ..]         nodes: (previous, next)

A list is a ring through its head, so no step asks whether there is a neighbour; a node that is in
no list is its own. Which list a node is in is the user's to know.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tiers.policies.jit import compiled

PREVIOUS, NEXT = 0, 1
BYTES_PER_NODE = 8

Links = npt.NDArray[np.int32]


def new_links(n_lists: int, n_nodes: int) -> Links:
    """Return `n_lists` empty lists and as many nodes: int32 array (n_lists + n_nodes, 2)."""
    return np.repeat(np.arange(n_lists + n_nodes, dtype=np.int32), 2).reshape(-1, 2)


def resized_links(links: Links, n_lists: int, n_nodes: int) -> Links:
    """Return the same lists over another number of nodes; nodes that go are in no list."""
    longer = new_links(n_lists, n_nodes)
    n_kept = min(len(links), len(longer))
    assert (links[n_kept:] == np.arange(n_kept, len(links))[:, np.newaxis]).all()
    longer[:n_kept] = links[:n_kept]
    return longer


@compiled
def push_front(links: Links, head: int, node: int) -> None:
    """Put a node that is in no list at the front of one."""
    first = links[head, NEXT]
    links[node, PREVIOUS] = head
    links[node, NEXT] = first
    links[first, PREVIOUS] = node
    links[head, NEXT] = node


@compiled
def unlink(links: Links, node: int) -> None:
    """Take a node out of its list; one that is in none stays so."""
    previous = links[node, PREVIOUS]
    following = links[node, NEXT]
    links[previous, NEXT] = following
    links[following, PREVIOUS] = previous
    links[node, PREVIOUS] = node
    links[node, NEXT] = node
