"""Auto-tuning: sessions that search for the fastest configuration of every kernel of a model, and their database."""
