"""A simulation of the whole system: machines that flush, publish, collect, restore and take over, and what goes wrong.

    python -m tests.simulation --seed 17           # one history, with what happened in it
    python -m tests.simulation --first 0 --count 2000

`engine` makes a run repeatable and lets a machine stop at any await; `cluster` is the backends and their faults;
`machine` runs the daemon's own parts on a directory; `history` draws what happens; `ledger` knows what was
written and promised; `checks` asks at the end what the design promises of any history.
"""
