"""Anthropic's Messages API in front of the same queue: a message is a chat job whose answer looks another way.

``request`` and ``content`` make the job, ``answer`` and ``blocks`` render what comes of it, ``errors`` says it in
Anthropic's words. https://platform.claude.com/docs/en/api/messages
"""
