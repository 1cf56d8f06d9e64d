"""The chaos run: real processes, real clients, faults of every kind, and a checker that knows nothing of the product.

``python -m tests.chaos --seed 1 --minutes 3`` (or ``make chaos SEED=1 MINUTES=3``). pytest does not run it.

    __main__.py   the order of events of a run
    fleet.py      the processes: one Redis with an append-only file, two API servers, four workers
    worker.py     a worker's process: the product's own, with the engine of engine.py, and a mutation if asked for
    nemesis.py    the faults
    load.py       what clients do; wire.py is their HTTP, transcript.py what they remember
    observer.py   reads every job record and log, and hears every terminal event
    token_log.py  what must hold of a log by itself
    checker.py    holds records, logs, events and transcripts against each other
    report.py     violations and counts
"""

MODEL = "chaos"
"""The served name of the model."""
