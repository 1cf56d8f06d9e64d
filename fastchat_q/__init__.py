"""fastchat-q: a message-queue-driven server for open LLMs. This package is the protocol that both halves speak.

The map::

    keys · jobs · events · slugs        what crosses a process: names and frozen messages
    lua/*.lua · scripts · queue · tokens   one Lua script per transition, and the two classes that call them
    registry · connection               workers and API servers as keys with TTLs; how a Redis URL becomes a client
    settings · errors · logs            configuration, one exception tree, one line an event
    cli · up · supervisor · embedded    the command line and the one-command stack

``fastchat_q.api`` is the HTTP half and ``fastchat_q.workers`` the GPU half; neither imports the other, and nothing here
imports torch, transformers or fastapi.
"""

__version__ = "0.1.0"
