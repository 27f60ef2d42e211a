"""Secure aggregation: a server learns the sum of clients' vectors and no vector, even if it lies.

The protocol is that of Bonawitz et al. (CCS 2017, "Practical Secure Aggregation for Privacy-Preserving Machine
Learning", figure 4, the version against active servers), on the sparse graph of Bell et al. (CCS 2020, "Secure
Single-Server Aggregation with (Poly)Logarithmic Overhead") where a cohort is large. Five exchanges:

    keys      a fresh X25519 key for shares and one for masks, signed by the pinned identity
    shares    the seed of the own mask and the mask key, each in Shamir shares, each share sealed for its holder
    masked    the vector + own mask + a mask with each neighbour, which cancels in the sum
    consent   a signature on who is in the sum and who is not
    reveal    of each who is in the sum a share of its seed; of each who vanished a share of its mask key; never both

Where we differ from the papers:
- One threshold t, above 2n/3, stands in the signed manifest and is checked by each client. With a sparse graph a
  client's h holders (itself among them) need ceil(t * h / n), so above 2h/3: two lists that differ never both find a
  quorum among the holders of one client, as long as fewer than a third of them collude with the server. Bell et al.
  take a threshold that tolerates more dropouts, for servers that do not lie.
- The consistency check of Bonawitz is kept on the sparse graph, over the client's holders: k signatures to check
  instead of n. A client that reveals a share signed the list that its holders signed, so the masks between them stand
  (see `server.py`).
- The graph is a circulant graph of random offsets under a random order, drawn from a seed in the manifest; Bell's is a
  Harary graph under a random order, in which a set of k neighbours on the ring could be cut off.
- Everything that a client draws comes from one secret of the round through HKDF, so that a client that was killed says
  again what it said before, to the byte. An own seed is committed to, and a rebuilt mask key is held against the
  public one, so a share that is false is found instead of spoiling the sum.

What is not protected: a server that colludes with t or more of a client's holders; the sum itself, and what the sums
of two rounds say of a client who took part in only one (that is what noise is for); a client that sends a wrong vector
(there is no
proof of range: one client can spoil a round, and shift the sum by as much as it likes); whoever enrols a crowd of
clients that are its own; with the sparse graph, a coordinator that tries seeds until a client's neighbours are those
it colludes with.
"""
