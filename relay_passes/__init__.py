"""Graph passes. TVM has released no Relay since 0.19, so they rewrite Relax."""
