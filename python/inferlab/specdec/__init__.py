"""Speculative decoding: drafters, policies, controllers, the step, the engine, the pipeline."""
