"""An OpenAI-compatible server of a pipeline (`inferlab serve`; `app.create_app` for other servers).

`engine_thread` makes the engine's steps, `calls` are requests seen from the event loop, `protocol`
what clients send, `answers` what they get, `failures` what they get instead, `gate` what is refused
unread, `app` the paths, `serving` the process.

Module paths that stay, and are elsewhere: `ping_vllm` (see `inferlab.client`), `local_baseline`.
"""
