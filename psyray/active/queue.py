"""The expert queue: questions of the label ledger that people answer, several at a time and each at most once.

    queue = ExpertQueue(ledger.database)
    queue.open(reservation.to_ask, overlap=2)  # two experts each
    lease = queue.lease("anna", 600)  # the conversation and the two responses, blind, in anna's own order
    queue.answer("anna", lease.question_id, Choice.LEFT, note="takes up the loss")
    queue.settle([q.question_id for q in reservation.to_ask], undo_s=30)  # what is complete, into the ledger

The promises:
- A question is shown to no more experts at once than still have to answer it. A lease that has run out is free for
  others; who held it may still answer as long as nobody took the place.
- One expert has one ticket for a question, so there is at most one answer of theirs; sent twice it counts once.
- An answer can be taken back until its question is settled: then it is in the ledger and final. A skip can while
  nobody else has taken the place that it left.
- Every call is one transaction that locks one question, so that several processes and machines may call at once and a
  `kill -9` leaves either all of a call or nothing.
"""

from __future__ import annotations

from psyray.active.leases import Leases
from psyray.active.settling import Settling
from psyray.active.standing import Standing


class ExpertQueue(Leases, Settling, Standing):
    """The questions that are open to experts: what experts do, what the round does, and how it stands."""
