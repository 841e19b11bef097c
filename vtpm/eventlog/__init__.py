"""Event logs as a guest or a firmware wrote them: read, replayed, put into words, compared and predicted.

Everything here is a pure function of bytes. What a log says is *unverified*: a replay that matches quoted PCRs proves the
digests and their order; the data beside a digest is proven only where the digest is the hash of that data (`checks`).

Reading order: `values` and `findings` (what a reader returns), `reading` (which format it is), `tcg`, `ima`, `cel`,
`userspace` (the formats), `replay`, `checks`, then what is made of them: `describe`, `secureboot`, `bootpath`, `wbcl`,
`explain`, `predict`.
"""
