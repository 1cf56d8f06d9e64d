"""The GPU half: workers pull jobs, engines turn them into events. It never speaks HTTP."""

if __name__ != "fastchat_q.workers":
    raise ImportError("import fastchat_q.workers, not workers (pip install -e .)")
