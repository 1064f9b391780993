"""Reuse of keys and values between prompts: common prefixes, precomputed passages, CacheBlend."""
