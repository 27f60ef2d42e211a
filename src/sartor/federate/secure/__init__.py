"""Secure aggregation: a server learns the sum of clients' vectors and no single one, even if it lies.

The protocol is that of Bonawitz et al. (CCS 2017, "Practical Secure Aggregation for Privacy-Preserving Machine
Learning", figure 4, the version against active servers). Large cohorts use the sparse graph of Bell et al. (CCS 2020,
"Secure Single-Server Aggregation with (Poly)Logarithmic Overhead"). Five exchanges:

    keys      a fresh X25519 key for shares and one for masks, signed by the pinned identity
    shares    the seed of the own mask and the mask key, each in Shamir shares, each share sealed for its holder
    masked    the vector + own mask + a mask with each neighbour, which cancels in the sum
    consent   a signature on who is in the sum and who is not
    reveal    of each who is in the sum a share of its seed; of each who vanished a share of its mask key; never both

x_u: (S,), vector of client u, modulo 2^32. b_u: its seed. s_uv: the key that u and v share. sign(u, v): 1 if u < v,
else -1.

    y_u = x_u + PRG(b_u) + sum over neighbours v of sign(u, v) PRG(s_uv)
    sum over active u of x_u = sum y_u - sum PRG(b_u) - sum over active u, dropped v of sign(u, v) PRG(s_uv)

Differences from the papers:
- One threshold t, above 2n/3, stands in the signed manifest and is checked by each client. With a sparse graph a
  client's h holders (itself among them) need ceil(t * h / n), so above 2h/3. Two different lists then never both find
  a quorum among the holders of one client, as long as fewer than a third of them collude with the server. Bell et al.
  choose a threshold that tolerates more dropouts, for servers that do not lie.
- The consistency check of Bonawitz is kept on the sparse graph, over the client's holders: k signatures to check
  instead of n. A client that reveals a share signed the list that its holders signed, so the masks between them stand
  (`secagg_server.py` gives the argument).
- The graph is a circulant graph of random offsets under a random order, drawn from a seed in the manifest. Bell et al.
  use a Harary graph under a random order, in which a set of k neighbours on the ring could be cut off.
- Everything that a client draws comes from one secret of the round through HKDF. A client that was killed therefore
  repeats its messages byte for byte. Its seed is committed to, and a rebuilt mask key is compared with the public one.
  A false share is thus found instead of spoiling the sum.

Not protected:
- a server that colludes with t or more of a client's holders;
- the sum itself, and what the sums of two rounds reveal of a client who took part in only one (noise is for that);
- a client that sends a wrong vector: there is no proof of range, so one client can spoil a round, and shift the sum by
  as much as it likes;
- whoever enrols many clients that are its own;
- with the sparse graph, a coordinator that tries seeds until a client's neighbours are those it colludes with.
"""
