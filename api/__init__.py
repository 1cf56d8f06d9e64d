"""The HTTP half: requests become jobs, events become JSON and server-sent events. It never renders a prompt."""

if __name__ != "fastchat_q.api":
    raise ImportError("import fastchat_q.api, not api (pip install -e .)")
