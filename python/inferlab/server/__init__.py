"""An OpenAI-compatible server of a pipeline (`inferlab serve`; `app.create_app` for other servers).

`engine_thread` makes the engine's steps, `calls` are requests seen from the event loop, `protocol`
what clients send, `service` what is made of it, `answers` and `responses` what they get, `failures`
what they get instead, `connection` and `gate` what is refused before it is heard, `app` the paths,
`serving` the process.

Module paths that stay, and are elsewhere: `ping_vllm` (see `inferlab.client`), `local_baseline`.
"""
