"""Module paths that stay: `ping_vllm` (see `inferlab.client`), `local_baseline`."""
